"""Fig. 10 to 13 and Tables 3 to 5 of arXiv:2509.18096 on the embedded world, drawn from analyses/magnet_scenes.py.

    python figures/fig10_magnet.py
    python figures/fig10_magnet.py --run runs/somewhere

Draws the folder that the analysis wrote (`--run`; it is committed) and measures nothing. The paper's values stand in
the tables' CSVs as rows of another world (`world` = "paper": other model, other prompts), to be read beside ours and
not ranked with them. For another model than the analysis' own there is nothing to draw, and it says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from runs import parse

from mmdit_probe import load
from mmdit_probe.data import paper_table
from mmdit_probe.plots import save
from mmdit_probe.plots.magnet import differences, pipeline
from mmdit_probe.plots.segmentation import blend, palette
from mmdit_probe.plots.sheet import sheet
from mmdit_probe.scenes import CLASSES, scene

RESULTS = Path(__file__).parents[1] / "analyses" / "results" / "magnet_scenes"
COMMAND = "analyses/magnet_scenes.py"
BASE, CONTROL = "base", "control"
UNMATCHED = np.uint8(255)


def main() -> None:
    options = parse(__doc__, COMMAND)
    folder = Path(options.run or RESULTS)
    if not (folder / "settings.json").is_file():
        print(f"fig10_magnet: nothing in {folder}; run {COMMAND} first")
        return
    settings = json.loads((folder / "settings.json").read_text())
    if options.model != settings["model"]:
        print(f"fig10_magnet: {COMMAND} is about {settings['model']}, not {options.model}; nothing to draw")
        return
    out = options.out / settings["model"]
    out.mkdir(parents=True, exist_ok=True)
    with np.load(folder / "examples.npz") as kept:
        examples: dict[str, dict[str, Any]] = {}
        for name in kept.files:
            variant, _, key = name.partition("/")
            examples.setdefault(variant, {})[key] = kept[name]
    draw_pipeline(examples, settings, out)
    draw_masks(examples, out)
    draw_maps(examples, settings, out)
    draw_pictures(examples, out)
    tables(folder, out)


def draw_pipeline(examples: dict[str, dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    """F10: the parts of a training step on a test scene; the mask is that of the scene's first class."""
    item = scene("test", 0)
    model = load(settings["model"])
    latents = model.encode_image(item.image)
    noised = np.asarray(model.decode(model.noise(latents, 0.5, seed=0))[0])
    name = item.class_names[0]
    mask = np.repeat((item.classes == CLASSES.index(name))[..., None], 3, -1).astype(np.uint8) * 255
    steps = [
        ("picture", item.image), ("noised latent", noised), ("+ " + "\n".join(item.class_names), None),
        (f"MM-DiT\n+ LoRA\n\nI2T of layer {settings['layer']}", None),
        ("maps of the words\n(largest)", blend(item.image, examples["class"]["named"][0], 0.8)),
        ("focal + dice\nto the mask,\nflow matching\nto the velocity", None), (f"mask of {name}", mask),
    ]  # fmt: skip
    put(pipeline(steps, title="MAGNET: the I2T maps of a picture's words are aligned with its masks"),
         out / "fig10_pipeline")  # fmt: skip


def draw_masks(examples: dict[str, dict[str, Any]], out: Path) -> None:
    """F11: label maps of the same test scenes, every variant."""
    titles = ["picture", "truth", *examples]
    kinds = {"named": ("fig11_masks_open", "classes present"),
             "unnamed": ("fig11_masks_unsupervised", "segments of the empty prompt, matched")}  # fmt: skip
    for key, (file, what) in kinds.items():
        cells, seen = [], set()
        for index in range(len(examples[BASE][key])):
            item = scene("test", index)
            found = [np.where(of[key][index] < len(CLASSES), of[key][index], UNMATCHED) for of in examples.values()]
            labels = [item.classes.astype(np.uint8), *found]
            cells.append([item.image, *(blend(item.image, one, 0.8) for one in labels)])
            seen |= {int(one) for of in labels for one in np.unique(of) if one < len(CLASSES)}
        legend = {CLASSES[one]: palette(len(CLASSES))[one] / 255 for one in sorted(seen)}
        put(sheet(cells, columns=titles, title=f"Test scenes: {what}", legend=legend), out / file)


def draw_maps(examples: dict[str, dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    """F12: generated pictures and the maps of their words halfway, by variant; the prompts that name most things."""
    prompts, words = (json.loads(str(examples[BASE][key])) for key in ("prompts", "words"))
    chosen = sorted(sorted(range(len(prompts)), key=lambda k: -len(words[k]))[:3])
    most = min(3, max(map(len, words)))
    cells, captions, rows = [], [], []
    for variant in examples:
        of = examples[variant]
        rows.append(variant)
        row: list[Any] = []
        above: list[str] = []
        for place in chosen:
            shown = words[place][:most]
            maps = [of["maps"][place, k].astype(float) for k in range(len(shown))]
            row += [of["pictures"][place], *maps, *[None] * (most - len(shown))]
            above += ["picture", *shown, *[""] * (most - len(shown))]
        cells.append(row)
        captions.append(above)
    put(
        sheet(cells, rows=rows, captions=captions, title=f"I2T maps of words while generating, layer"
                  f" {settings['layer']}", note=" | ".join(prompts[k] for k in chosen)),
        out / "fig12_maps",
    )  # fmt: skip


def draw_pictures(examples: dict[str, dict[str, Any]], out: Path) -> None:
    """F13: the first test prompt of every category, the same seed in every variant."""
    prompts = json.loads(str(examples[BASE]["prompts"]))
    cells = [[of["pictures"][place] for of in examples.values()] for place in range(len(prompts))]
    put(sheet(cells, columns=list(examples), rows=prompts, title="Generated with the same seeds"),
         out / "fig13_pictures")  # fmt: skip


def tables(folder: Path, out: Path) -> None:
    """Tables 3 (CLIPScore), 4 (alignment by category) and 5 (softmax x min-max), and their figures."""
    generation = pd.read_csv(folder / "generation_over_base.csv")
    clip = generation[generation["metric"].str.startswith("clipscore")]
    metric = str(clip["metric"].iloc[0])
    put(differences(generation, "facts", BASE), out / "table4_alignment")
    put(differences(generation, metric, BASE), out / "table3_clipscore")
    ours = clip[clip["category"] == "all"].assign(world="measured", prompt_set="scenes captions")
    paper = paper_table("clipscore_table").rename(columns={"clipscore": "mean"})
    paper = paper.assign(world="paper", variant=paper["method"] + ", " + paper["training"].fillna("none"), metric="")
    keep = ["world", "variant", "prompt_set", "metric", "prompts", "images", "mean", "low", "high", "difference",
            "difference_low", "difference_high"]  # fmt: skip
    write(pd.concat([ours, paper]).reindex(columns=keep), out / "table3_clipscore.csv")
    facts = generation[generation["metric"].isin(["facts", "all_right"])].assign(world="measured")
    paper = paper_table("t2i_compbench_table").rename(columns={"score": "mean"})
    paper = paper.assign(world="paper", variant=paper["method"] + ", " + paper["training"].fillna("none"),
                         metric="T2I-CompBench++")  # fmt: skip
    keep = ["world", "variant", "category", *keep[3:]]
    write(pd.concat([facts, paper]).reindex(columns=keep), out / "table4_alignment.csv")
    write(readings(folder), out / "table5_normalisation.csv")


def readings(folder: Path) -> pd.DataFrame:
    """Table 5: the same choice when maps are read (test), when they are trained on (val, short), and in the paper."""
    miou = pd.read_csv(folder / "miou.csv")
    present = miou[miou["protocol"].str.startswith("present") & ~miou["protocol"].str.contains("mean")]
    name = present["protocol"]
    read = present.assign(world="measured", at="reading", softmax=~name.str.contains("before"),
                          min_max=name.str.contains("min-max"), dataset="scenes:test")  # fmt: skip
    pilot = pd.read_csv(folder / "pilot.csv")
    pilot = pilot[pilot["alignment"] != "none"]
    trained = pilot.assign(world="measured", at="loss, rate " + pilot["rate"].map("{:g}".format), variant="class",
                           softmax=pilot["space"] == "probability", min_max=pilot["normalise"] == "minmax",
                           dataset="scenes:val")  # fmt: skip
    paper = paper_table("normalisation_ablation")
    paper = paper.assign(world="paper", at="reading", variant="SD3", softmax=paper["softmax"] == "yes",
                         min_max=paper["min_max"] == "yes", miou=paper["miou"] / 100)  # fmt: skip
    keep = ["world", "at", "variant", "dataset", "softmax", "min_max", "n", "miou", "low", "high"]
    return pd.concat([read, trained, paper]).reindex(columns=keep)


def put(figure: Any, path: Path) -> None:
    print(*save(figure, path), sep="\n")


def write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.5g")
    print(path)


if __name__ == "__main__":
    main()
