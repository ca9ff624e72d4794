"""What does MAGNET gain and lose? Four trainings of one LoRA on scenes-sd3, measured on the same held-out scenes.

    python analyses/magnet_scenes.py                                     # about an hour on two idle cores
    python analyses/magnet_scenes.py --steps 4 --train 16 --maps 6 --prompts 2 --num-steps 3 --work /tmp/quick

Variants: `class` (token-level, class masks), `part` (head-level, part masks), `self` (token-level, the model's own
refined maps, no annotation), and `control`: the same LoRA, data, steps and seeds with flow matching alone, so that what
more training does is not taken for what mask alignment does. The layer is chosen on the "val" scenes; everything
reported is of "test". Trainings continue where they were stopped.

Writes `miou.csv`, `generation.csv`, `training.csv` and `summary.md` into `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from mmdit_probe import load
from mmdit_probe.evaluate.clipscore import ClipScorer
from mmdit_probe.evaluate.generation import compare, scene_prompts, score
from mmdit_probe.evaluate.matching import assign, histogram
from mmdit_probe.evaluate.scores import ImageCounts
from mmdit_probe.magnet import MagnetConfig, ScenesData, SelfLabelled, train
from mmdit_probe.magnet.data import Data
from mmdit_probe.magnet.trainer import Watch
from mmdit_probe.magnet.validation import validate
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.scenes import CLASSES, load_parser, scene
from mmdit_probe.segment import discover

OUT = Path(__file__).parent / "results" / "magnet_scenes"
BASE, CONTROL = "base", "control"
ALIGNMENT = {CONTROL: "none", "class": "token", "part": "head", "self": "token"}


def data_of(variant: str, model: MMDiT, layer: int, count: int) -> Data:
    """The training data of a variant: the same pictures, and the same prompts but for the parts' own captions."""
    named = ScenesData("train", count, "class", "mixed")
    if variant == "part":
        return ScenesData("train", count, "part", "mixed")
    return SelfLabelled.make(model, named, layers=(layer,)) if variant == "self" else named


def named_counts(model: MMDiT, layer: int, count: int, normalised: bool) -> ImageCounts:
    """Open vocabulary, present classes: counts of the I2T maps of one layer on test scenes."""
    samples = [ScenesData("test", count)[index] for index in range(count)]
    found = validate(model, samples, [layer], normalised=normalised).counts.astype(float)
    return ImageCounts(np.diagonal(found, axis1=1, axis2=2).copy(), found.sum(2), found.sum(1))


def unnamed_counts(model: MMDiT, layer: int, count: int) -> ImageCounts:
    """Unsupervised segments of the empty prompt on test scenes, matched within each image."""
    hit, truth, found = (np.zeros((count, len(CLASSES))) for _ in range(3))
    for index in range(count):
        item = scene("test", index)
        segments = discover(model, item.image, layers=[layer], seeds=(index,)).labels
        counts = histogram(item.classes, segments, len(CLASSES))
        truth[index] = counts.sum(1)
        for segment, of in enumerate(assign(counts)):
            if of < len(CLASSES):
                hit[index, of] += counts[of, segment]
                found[index, of] += counts[:, segment].sum()
    return ImageCounts(hit, truth, found)


def miou_table(counts: dict[tuple[str, str], ImageCounts]) -> pd.DataFrame:
    """mIoU per variant and protocol with intervals, and paired gains over the base model and over the control."""
    rows = []
    for (variant, protocol), own in counts.items():
        low, high = own.interval("miou")
        row: dict[str, object] = {"variant": variant, "protocol": protocol, "n": len(own), "miou": own.miou()}
        row |= {"low": low, "high": high}
        for other in (BASE, CONTROL):
            gain = own.gain(counts[other, protocol])
            row |= dict(zip((f"gain_{other}", f"gain_{other}_low", f"gain_{other}_high"), gain, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def as_markdown(miou: pd.DataFrame, generation: pd.DataFrame, facts: str) -> str:
    """Both tables for people."""
    lines = ["# MAGNET on scenes-sd3", "", facts, "", "## mIoU on test scenes (95 % intervals over images, paired)", ""]
    lines += ["| variant | protocol | n | mIoU | gain over base | gain over control |", "|---|---|---|---|---|---|"]
    for row in miou.to_dict("records"):
        gains = [
            f"{row[f'gain_{o}']:+.3f} [{row[f'gain_{o}_low']:+.3f}, {row[f'gain_{o}_high']:+.3f}]"
            for o in (BASE, CONTROL)
        ]
        cells = [row["variant"], row["protocol"], str(row["n"]),
                 f"{row['miou']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", *gains]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Generated pictures: mean, and paired difference to the control (95 % intervals over prompts)", ""]
    for metric, part in generation.groupby("metric", sort=False):
        categories = list(dict.fromkeys(part["category"]))
        images = int(part["images"].iloc[0])
        lines += [f"### {metric} (n = {images} pictures)", "", f"| variant | {' | '.join(categories)} |"]
        lines.append("|---" * (len(categories) + 1) + "|")
        for variant, of in part.groupby("variant", sort=False):
            by = of.set_index("category")
            cells = []
            for category in categories:
                row = by.loc[category]
                worse = " (worse)" if row["worse"] else ""
                interval = f"[{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
                cells.append(f"{row['mean']:.3f}, {row['difference']:+.3f} {interval}{worse}")
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--train", type=int, default=800, help="training scenes")
    parser.add_argument("--space", default="logit", help="maps before (logit) or after (probability) the softmax")
    parser.add_argument("--normalise", default="none")
    parser.add_argument("--maps", type=int, default=200, help="test scenes of the mIoU")
    parser.add_argument("--prompts", type=int, default=30, help="prompts per category")
    parser.add_argument("--num-steps", type=int, default=28)
    parser.add_argument("--layer", type=int, help="layer to align [default: the best of the base model on val]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("runs") / "magnet-scenes", help="training run folders")
    parser.add_argument("--out", type=Path, help="tables [default: analyses/results/magnet_scenes]")
    ask = parser.parse_args()
    model = load("scenes-sd3", device=ask.device)
    chosen = [ScenesData("val", 64)[index] for index in range(min(64, ask.maps))]
    scores = [validate(model, chosen, [layer]).miou for layer in range(len(model.layers))]
    layer = int(np.argmax(scores)) if ask.layer is None else ask.layer
    counts: dict[tuple[str, str], ImageCounts] = {}
    pictures, logs = [], []
    prompts, reader, clip = scene_prompts(ask.prompts, split="test"), load_parser(), ClipScorer.load("scenes-clip")
    for variant in (BASE, *ALIGNMENT):
        if variant != BASE:
            config = MagnetConfig(
                layers=(layer,), alignment=ALIGNMENT[variant], space=ask.space, normalise=ask.normalise,
                streams="joint", steps=ask.steps, batch=ask.batch, rate=ask.rate, warmup=ask.steps // 20, clip=1.0,
                drop_prompt=0.1,
            )  # type: ignore[arg-type]  # fmt: skip
            base = load("scenes-sd3", device=ask.device)
            watch = Watch(every=max(1, ask.steps // 4), samples=chosen, save_every=50)
            data = data_of(variant, base, layer, ask.train)
            result = train(base, data, config, watch=watch, out=ask.work / variant, resume=True)
            logs.append(result.log.assign(variant=variant))
            model = load("scenes-sd3", device=ask.device, lora=result.lora)
        counts[variant, "present"] = named_counts(model, layer, ask.maps, normalised=False)
        counts[variant, "present, maps / mean"] = named_counts(model, layer, ask.maps, normalised=True)
        counts[variant, "unsupervised"] = unnamed_counts(model, layer, ask.maps)
        pictures.append(
            score(model, prompts, variant=variant, steps=ask.num_steps, parser=reader, clip=clip, seed=10_000)
        )
        print(f"{variant}: mIoU {counts[variant, 'present'].miou():.3f}", flush=True)
    out = ask.out or OUT
    out.mkdir(parents=True, exist_ok=True)
    miou, generation = miou_table(counts), compare(pd.concat(pictures), CONTROL)
    miou.to_csv(out / "miou.csv", index=False, float_format="%.5g")
    generation.to_csv(out / "generation.csv", index=False, float_format="%.5g")
    pd.concat(logs).to_csv(out / "training.csv", index=False, float_format="%.5g")
    facts = f"Layer {layer}, {ask.steps} steps of {ask.batch}, {ask.train} training scenes, rate {ask.rate}."
    (out / "summary.md").write_text(as_markdown(miou, generation, facts), encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
