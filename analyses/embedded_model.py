"""How good is the embedded model? What its images show, where its words look, and the same for its random-weight twin.

    python analyses/embedded_model.py            # about half an hour on one core
    python analyses/embedded_model.py --limit 20     # a quick look

The guidance is chosen on captions of the "val" split, of all categories; everything else is of "test".

Writes `analyses/results/embedded_model/{guidance,alignment,maps}.csv` and `summary.md`. Run it again after the
checkpoint was replaced: nothing else states these numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from mmdit_probe import load
from mmdit_probe.errors import at_least, run_script
from mmdit_probe.experiments import Score
from mmdit_probe.experiments.score import REAL, map_cells
from mmdit_probe.experiments.text import bounded
from mmdit_probe.results.statistics import interval
from mmdit_probe.scenes.parser import CONTRASTS, SCORES

OUT = Path(__file__).parent / "results" / "embedded_model"
MODELS = {"scenes-sd3": "all", "scenes-sd3-random": "none"}
"""Caption categories to draw images for; the twin draws noise, so that only its maps are of interest."""


def guidance_table(model: object, options: argparse.Namespace) -> pd.DataFrame:
    """Scores on captions of the "val" split, of all categories, per guidance with the same seeds; best first."""
    rows = []
    for guidance in options.guidance:
        experiment = Score(
            limit=options.val_limit, split="val", clip="none", num_steps=options.num_steps, guidance=guidance
        )
        table = experiment.run(model, out="auto", resume=True).table
        rows.append({"guidance": guidance, **means(table[table["category"] != REAL])})
    return pd.DataFrame(rows).sort_values("things_right", ascending=False, kind="stable")


def alignment_table(images: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % interval over captions per model and caption category."""
    return pd.DataFrame(
        {"model": model, "category": category, **means(part)}
        for (model, category), part in images.groupby(["model", "category"], sort=False, observed=True)
    )


def means(part: pd.DataFrame) -> dict[str, object]:
    """Number of images, and each score's mean with its interval over captions: one that comes up again is the same."""
    scores = [name for name in SCORES if name in part]
    by_caption = part[scores].astype(float).groupby(part["prompt"]).mean()
    row: dict[str, object] = {"n": len(part), "captions": len(by_caption)}
    for name in scores:
        row[name], row[f"{name}_low"], row[f"{name}_high"] = interval(by_caption[name], "share")
    return row | {f"{name}_n": int(by_caption[name].notna().sum()) for name in CONTRASTS if name in part}


def as_markdown(
    guidances: pd.DataFrame, alignment: pd.DataFrame, maps: pd.DataFrame, num_steps: int, dtype: str
) -> str:
    """The tables for people."""
    guidance = guidances["guidance"].iloc[0]
    by_guidance = guidances.sort_values("guidance")[["guidance", "things_right"]].itertuples(index=False)
    lines = [
        "# The embedded model, measured",
        "",
        "Written by `python analyses/embedded_model.py`; every number is from the checkpoint in `mmdit_probe/assets`.",
        "",
        f"Images generated from captions of held-out scenes ({num_steps} steps, guidance {guidance:g}, {dtype}), read",
        "back by the scene parser: share of images where it holds, mean over captions, with the 95 % interval over",
        "captions (a kind of few captions has them again and again: texture has eight in all). The scenes are held",
        "out, not every caption: short ones come up among training scenes too, and among val's, on which the guidance",
        "was chosen. `real` is the parser's own limit: true captions of real held-out scenes. Objects and colours",
        "right on captions of the val split, by guidance: "
        + ", ".join(f"{g:g}: {v:.3f}" for g, v in by_guidance) + ".",
        "",
        "| model | category | images | captions | objects, colours right | ground right | all facts | share of facts |",
        "|-|-|-|-|-|-|-|-|",
    ]  # fmt: skip
    for row in alignment.to_dict("records"):
        cells = [told(row, name) for name in ("things_right", "grounds_right", "all_right", "facts")]
        places = [row[name] for name in ("model", "category", "n", "captions")]
        lines.append("| " + " | ".join(map(str, [*places, *cells])) + " |")
    lines += [
        "",
        "What a caption states beside its opposite, of the n captions that state it: both are false in an image that",
        "lacks the objects.",
        "",
        "| model | category | of | n | shown | the opposite shown |",
        "|-|-|-|-|-|-|",
    ]
    lines += [
        f"| {row['model']} | {row['category']} | {name} | {row[f'{name}_n']:.0f} | {told(row, name)} |"
        f" {told(row, opposite)} |"
        for row in alignment.to_dict("records")
        for name, opposite in CONTRASTS.items()
        if row[f"{name}_n"]
    ]
    n, ceiling = int(maps["n"].iloc[0]), float(maps["ceiling"].iloc[0])
    table = map_cells(maps, ["model", "stream", "layer"])
    columns = [f"sigma {sigma}, {'min-max' if stretched else 'raw'}" for sigma, stretched in table.columns]
    lines += [
        "",
        f"I2T maps of the classes present in {n} held-out scenes, mean over heads, argmax, upsampled: mIoU by layer,",
        "with the 95 % interval over scenes.",
        f"The prompt is the bare list of the classes. No map of this token grid can pass {ceiling:.3f}. Raw maps, and",
        "maps stretched to 0..1 over the image first (the min-max of the paper's Table 5). A word has tokens in the",
        "CLIP and in the T5 half of the text: its map sums both (all), or those of one half.",
        "",
        "| model | text tokens | layer | " + " | ".join(columns) + " |",
        "|-|-|-|" + "-|" * len(columns),
    ]
    for (model, stream, layer), row in table.iterrows():
        lines.append(f"| {model} | {stream} | {layer} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def told(row: Mapping[Any, Any], name: str) -> str:
    """A score with its interval."""
    return bounded(row[name], row[f"{name}_low"], row[f"{name}_high"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", "-n", type=at_least(1), default=200, help="captions per category, and scenes")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[3.0, 4.5, 6.0, 7.5, 9.0, 12.0], help="chosen among these"
    )
    parser.add_argument("--val-limit", type=at_least(1), default=32, help="val captions per category, for the guidance")
    parser.add_argument("--num-steps", type=at_least(1), default=28)
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.3, 0.5, 0.75])
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", default="bfloat16", help="of the model; bfloat16 halves the time on CPUs that have it"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    images, maps = [], []
    asked = Score(limit=options.limit, split="test", map_sigma=",".join(map(str, options.sigma)), clip="none",
                  num_steps=options.num_steps)  # fmt: skip
    chooser = load("scenes-sd3", device=options.device, dtype=options.dtype)
    guidances = guidance_table(chooser, options)
    for name, categories in MODELS.items():
        experiment = replace(asked, categories=categories, guidance=float(guidances["guidance"].iloc[0]))
        model = load(name, device=options.device, dtype=options.dtype)
        result = experiment.run(model, out="auto", resume=True)
        if categories != "none":
            images.append(result.table.assign(model=name))
        maps.append(result.store.table("maps").assign(model=name))
    options.out.mkdir(parents=True, exist_ok=True)
    alignment = alignment_table(pd.concat(images))
    every_map = pd.concat(maps)
    guidances.to_csv(options.out / "guidance.csv", index=False, float_format="%.4f")
    alignment.to_csv(options.out / "alignment.csv", index=False, float_format="%.4f")
    every_map.to_csv(options.out / "maps.csv", index=False, float_format="%.4f")
    text = as_markdown(guidances, alignment, every_map, options.num_steps, options.dtype)
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
