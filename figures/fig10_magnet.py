"""Fig. 10 to 13 and Tables 3 to 5 of arXiv:2509.18096: what a LoRA trained by mask alignment changes.

    python figures/fig10_magnet.py                                                    # analyses/magnet_scenes.py, drawn
    python figures/fig10_magnet.py --model ... --lora runs/magnet/lora --clip ... --prompts everyday   # any model

Without `--lora` draws the folder that `analyses/magnet_scenes.py` wrote (`--run`; it is committed) and measures
nothing; for another model than that analysis' own there is nothing to draw, and it says so. With `--lora` the adapted
model is measured beside the base model: label maps, word maps and pictures on the same seeds, and, where a CLIP or the
scenes parser can read the pictures, Tables 3 and 4. Its rows of Tables 1, 2 and 5 are those of `fig08_segmentation.py`.

The paper's values stand in the tables' CSVs as rows of another world (`world` = "paper": other model, other prompts),
to be read beside ours and not ranked with them; so do ours if the weights that ship have changed since.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fig07_masks
import numpy as np
import pandas as pd
from fig09_token_maps import TokenMaps, plain, shown_layers
from runs import file_suffix, given, model_of, options_of, run, target, write, write_table

from mmdit_probe import assets, load
from mmdit_probe.data import Dataset, dataset, paper_table
from mmdit_probe.data.labels import IGNORE
from mmdit_probe.errors import UserError, at_least, run_script
from mmdit_probe.experiments import Score
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.plots import style
from mmdit_probe.plots.magnet import METRICS, differences
from mmdit_probe.plots.segmentation import blend
from mmdit_probe.plots.sheet import draw, sheet

RESULTS = Path(__file__).parents[1] / "analyses" / "results" / "magnet_scenes"
BASE, ADAPTED = "base", "LoRA"
MEASURED = "measured"
"""Column `world` of the tables; of weights that no longer ship it names them, and they are no company for the rest."""
NAMES = {
    "control": "no masks", "class": "class masks", "part": "part masks", "self": "own labels",
    "released": "released focal loss",
}  # fmt: skip
"""What the adapters of `analyses/magnet_scenes.py` are called in figures: the masks that they were aligned with."""
SIGMA = 0.5
"""Noise level of the latent that Fig. 10 shows."""

Variants = Mapping[str, Mapping[str, Any]]


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--dataset", default="scenes:test", help="pictures of the label maps")
    parser.add_argument("--limit", type=at_least(1), default=6, help="number of these pictures")
    parser.add_argument("--layers", help="the two layers of the maps, best first: 9,12")
    parser.add_argument("--marked-prompts", action="append", default=[], help="of Fig. 12 and 13, keywords in brackets")
    parser.add_argument("--prompts", help="prompts of Tables 3 and 4 (scenes categories for embedded models)")
    parser.add_argument("--clip", help="CLIP checkpoint (folder or hub id)")
    options = parser.parse_args()
    options.label, options.world = Path(options.model).name, MEASURED
    if options.lora:
        if options.run:
            raise UserError("--run is a folder of analyses/magnet_scenes.py; with --lora leave it out")
        adapted(options)
    else:
        if options.set:
            raise UserError("--set is read where an adapter is measured: name one with --lora")
        analysed(options)


def analysed(options: argparse.Namespace) -> None:
    """The figures and tables of `analyses/magnet_scenes.py`."""
    folder = Path(options.run or RESULTS)
    if not (folder / "settings.json").is_file():
        print(f"fig10_magnet: nothing in {folder}; run analyses/magnet_scenes.py first")
        return
    how = json.loads((folder / "settings.json").read_text())
    if options.model != how["model"]:
        print(f"fig10_magnet: {folder} is about {how['model']}, not {options.model}; name an adapter with --lora")
        return
    model = load(how["model"])
    if model.weight_hash != how["weight_hash"]:
        options.label += f" (earlier weights {how['weight_hash'][:8]})"
        options.world += f", weights {how['weight_hash'][:8]}"
        print(f"fig10_magnet: {folder} is about earlier weights; run analyses/magnet_scenes.py for those that ship")
    variants: dict[str, dict[str, Any]] = {}
    with np.load(folder / "examples.npz") as kept:
        for name in kept.files:
            variant, _, key = name.partition("/")
            variants.setdefault(NAMES.get(variant, variant), {})[key] = kept[name]
    prompts, words = (json.loads(str(variants[BASE][key])) for key in ("prompts", "words"))
    count = len(variants[BASE]["named"])
    data = dataset("scenes:test", count)
    whole = {name: of | {key: list(of[key]) for key in ("named", "unnamed")} for name, of in variants.items()}
    place = f"n = {count} test scenes, LoRA of {how['steps']} steps"
    draw_pipeline(options, model, data, how["layer"], variants[NAMES["class"]]["named"][0])
    draw_masks(options, data, whole, place)
    draw_maps(options, prompts, words, variants, f"layer {how['layer']}")
    draw_pictures(options, prompts, variants)
    tables(options, pd.read_csv(folder / "generation_over_base.csv"), "scenes captions")
    table5 = readings(folder, f"reading of layer {how['layer']}").assign(world=options.world)
    write_table(table5, target(options, options.model, "table5_magnet"))


def adapted(options: argparse.Namespace) -> None:
    """The same figures of any model and an adapter."""
    asked = given(options, TokenMaps)
    data = dataset(options.dataset, options.limit)
    layers = shown_layers(options)
    variants: dict[str, dict[str, Any]] = {}
    for name, lora in ((BASE, False), (ADAPTED, True)):
        masks = fig07_masks.measured(options, lora=lora, own=True)
        shown = TokenMaps(**{"prompts": options.marked_prompts, "layers": layers} | asked)
        found = run(shown, model_of(options, lora=lora), options)
        stored: list[Any] = [found.store.load_arrays(f"prompt{k}") for k in range(len(found.request["prompts"]))]
        layer = found.request["layers"][0]
        variants[name] = {
            "named": list(fig07_masks.label_maps(masks, "open").values())[-1],
            "unnamed": list(fig07_masks.label_maps(masks, "blind").values())[-1],
            "pictures": [one["image"] for one in stored],
            "maps": [one["i2t"][layer].mean(0).transpose(2, 0, 1) for one in stored],
        }
    prompts, words = [plain(prompt) for prompt in found.request["prompts"]], [list(one["words"]) for one in stored]
    model = load(options.model, device=options.device)
    draw_pipeline(options, model, data, layer, variants[ADAPTED]["named"][0])
    draw_masks(options, data, variants, f"n = {len(data)} pictures of {options.dataset}")
    draw_maps(options, prompts, words, variants, f"layer {layer}, sigma {found.request['sigma']:.3f}")
    draw_pictures(options, prompts, variants)
    known = options.model in assets.names()
    if known or options.clip:
        prompt_set = options.prompts or (None if known else "everyday")
        experiment = Score(
            lora=[f"{ADAPTED}={options.lora}"], prompts=prompt_set, clip=options.clip or "scenes-clip", split="test"
        )
        scored = run(experiment, model_of(options, lora=False), options)
        tables(options, scored.summary, prompt_set or "scenes captions")


def put(options: argparse.Namespace, name: str, figure: Any, table: pd.DataFrame | None = None) -> None:
    write(figure, target(options, options.model, name), table)


def draw_pipeline(options: argparse.Namespace, model: MMDiT, data: Dataset, layer: int, found: np.ndarray) -> None:
    """F10: the parts of a training step on a picture; the mask is that of its first class."""
    sample = data.samples[0]
    picture = np.asarray(sample.open(model.default_size))
    noised = np.asarray(model.decode(model.noise(model.encode_image(picture), SIGMA, seed=0))[0])
    regions = sample.regions()
    names = list(regions.names)[:4]
    labels = blend(sample.image, found.astype(np.int64), [one.name for one in data.classes], 0.8)
    mask = np.repeat(regions.masks[0][..., None], 3, -1).astype(np.uint8) * 255
    steps = [
        ("picture", sample.image), ("noised latent", noised), ("+ " + "\n".join(names), None),
        (f"MM-DiT\n+ LoRA\n\nI2T of layer {layer}", None),
        ("maps of the words\n(largest)", labels),
        ("focal + dice\nto the mask,\nflow matching\nto the velocity", None), (f"mask of {names[0]}", mask),
    ]  # fmt: skip
    title = f"{options.label}: MAGNET aligns the I2T maps of a picture's words with its masks"
    put(options, "fig10_pipeline", pipeline(steps, title=title))


def pipeline(steps: Sequence[tuple[str, Any]], *, title: str = "") -> Any:
    """A row of stages with arrows between them: pictures, maps, or, without either, a box that holds the name.

    Args:
        steps: (name, picture uint8 [H, W, 3], map [h, w], or None for a box); a name that starts with "+" stands for a
            second input of the next stage and has no arrow before it.
    """
    with style.panels(min(style.PAGE, 1.1 * len(steps)), 1.5, len(steps), title=title) as (figure, places):
        for index, (axes, (name, content)) in enumerate(zip(places, steps, strict=True)):
            draw(axes, content)
            text = style.name(name.removeprefix("+ "))
            if content is None:
                axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=6, transform=axes.transAxes)
                axes.spines[:].set_visible(True)
            else:
                axes.set_title(text, fontsize=6, loc="center")
            if index:
                sign = "+" if name.startswith("+ ") else "→"
                axes.text(-0.14, 0.5, sign, ha="center", va="center", fontsize=11, transform=axes.transAxes)
    return figure


def draw_masks(options: argparse.Namespace, data: Dataset, variants: Variants, place: str) -> None:
    """F11: label maps of the same pictures, a column per variant."""
    names = [one.name for one in data.classes]
    kinds = {"named": ("fig11_masks_open", "classes present named"),
             "unnamed": ("fig11_masks_unsupervised", "segments of the empty prompt, matched to classes")}  # fmt: skip
    for key, (file, what) in kinds.items():
        found = {
            name: [np.where(np.less(one, len(names)), one, IGNORE).astype(np.int64) for one in of[key]]
            for name, of in variants.items()
        }
        pictures = [sample.image for sample in data.samples]
        truths: list[Any] = [sample.label() for sample in data.samples]
        title = f"{options.label}: {what}, {place}"
        suffix = "" if options.dataset == "scenes:test" else file_suffix(options.dataset)
        put(options, file + suffix, fig07_masks.mask_sheet(pictures, truths, found, names, title=title))


def draw_maps(
    options: argparse.Namespace, prompts: Sequence[str], words: Sequence[Sequence[str]], variants: Variants, at: str
) -> None:
    """F12: generated pictures and the maps of their words halfway, by variant; the prompts that name most things."""
    chosen = sorted(sorted(range(len(prompts)), key=lambda k: -len(words[k]))[:3])
    most = min(3, max(map(len, words)))
    cells, captions = [], []
    for of in variants.values():
        row: list[Any] = []
        above: list[str] = []
        for place in chosen:
            shown = words[place][:most]
            blank = most - len(shown)
            maps = [np.asarray(of["maps"][place][k], float) for k in range(len(shown))]
            row += [of["pictures"][place], *maps, *[None] * blank]
            above += ["picture", *shown, *[""] * blank]
        cells.append(row)
        captions.append(above)
    title = f"{options.label}: I2T maps of words while generating, {at}, by the masks of the LoRA"
    note = f"{' | '.join(prompts[k] for k in chosen)}; each map from 0 to its maximum"
    put(options, "fig12_maps", sheet(cells, rows=list(variants), captions=captions, title=title, note=note))


def draw_pictures(options: argparse.Namespace, prompts: Sequence[str], variants: Variants) -> None:
    """F13: the same prompts and seeds in every variant."""
    cells = [[of["pictures"][place] for of in variants.values()] for place in range(len(prompts))]
    title = f"{options.label}: generated with the same seeds, by the masks of the LoRA"
    put(options, "fig13_pictures", sheet(cells, columns=list(variants), rows=list(prompts), title=title))


def tables(options: argparse.Namespace, generation: pd.DataFrame, prompt_set: str) -> None:
    """Tables 3 (CLIPScore) and 4 (alignment by category) with their figures."""
    name = options.label

    def drawn(metric: str) -> Any:
        part = generation[(generation["metric"] == metric) & (generation["category"] == "all")]
        label, _, checkpoint = metric.partition("[")
        what = METRICS.get(label, label) + (f" by {checkpoint.rstrip(']')}" if checkpoint else "")
        title = f"{name}: {what}, n = {part['prompts'].max()} {prompt_set}"
        shown = generation.assign(variant=generation["variant"].replace(NAMES))
        return differences(shown, metric, BASE, title=title)

    keep = ["prompts", "images", "mean", "low", "high", "difference", "difference_low", "difference_high"]
    clip = generation[generation["metric"].str.startswith("clipscore")]
    if len(clip):
        ours = clip[clip["category"] == "all"].assign(world=options.world, prompt_set=prompt_set)
        columns = ["world", "variant", "prompt_set", "metric", *keep]
        table = pd.concat([ours, published("clipscore_table", "clipscore", "")]).reindex(columns=columns)
        put(options, "table3_clipscore", drawn(str(clip["metric"].iloc[0])), table)
    facts = generation[generation["metric"].isin(["facts", "all_right"])].assign(world=options.world)
    if len(facts):
        columns = ["world", "variant", "category", "metric", *keep]
        paper = published("t2i_compbench_table", "score", "T2I-CompBench++")
        put(options, "table4_alignment", drawn("facts"), pd.concat([facts, paper]).reindex(columns=columns))


def published(name: str, value: str, metric: str) -> pd.DataFrame:
    """A table of the paper in the columns of ours."""
    table = paper_table(name).rename(columns={value: "mean"})
    variant = table["method"] + ", " + table["training"].fillna("none")
    return table.assign(world="paper", variant=variant, metric=metric)


def readings(folder: Path, at: str) -> pd.DataFrame:
    """Table 5's choices when maps of the trained variants are read (test), and in the loss of short trainings (val)."""
    miou = pd.read_csv(folder / "miou.csv")
    present = miou[miou["protocol"].str.startswith("present") & ~miou["protocol"].str.contains("mean")]
    name = present["protocol"]
    read = present.assign(at=at, softmax=~name.str.contains("before"), min_max=name.str.contains("min-max"),
                          dataset="scenes:test")  # fmt: skip
    pilot = pd.read_csv(folder / "pilot.csv")
    pilot = pilot[pilot["alignment"] != "none"]
    trained = pilot.assign(at="loss, rate " + pilot["rate"].map("{:g}".format), variant="class",
                           softmax=pilot["space"] == "probability", min_max=pilot["normalise"] == "minmax",
                           dataset="scenes:val")  # fmt: skip
    keep = ["world", "at", "variant", "dataset", "softmax", "min_max", "n", "miou", "low", "high"]
    return pd.concat([read, trained]).reindex(columns=keep)


if __name__ == "__main__":
    run_script(main)
