"""Fig. 8, 15 and 17 and Tables 1, 2 and 5 of arXiv:2509.18096, re-measured: segmentation by layer, sigma, head; league.

    python figures/fig08_segmentation.py --limit 200
    python figures/fig08_segmentation.py --model ... --dataset voc20:VOCdevkit/VOC2012 --only layer
    python figures/fig08_segmentation.py --model ... --lora runs/magnet/lora --dataset ... --only league

Writes `fig08_miou_by_layer`, `fig15_miou_by_sigma`, `fig17_miou_by_head` and `table12_league` as PNG, PDF and CSV, and
`table5_normalisation.csv`, under `figures/out/<model>/`; other data sets than scenes:val have their name in the file's
name. With `--lora` league and Table 5 have the rows of the adapted model beside those of the base ("seg4diff, LoRA").
The paper's own model is measured by the presets of its two methods.

The league's CSV holds the paper's Tables 1 and 2 below the measured rows, as rows of another world (`world` = "paper":
other models, other data sets), to be read beside them and not ranked with them. Models that no settings were chosen for
are read as the paper reads them, at the layers that it names, if any.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from runs import (
    CHOICE,
    adapter_of,
    as_measured,
    below,
    chosen,
    file_suffix,
    given,
    is_paper_model,
    model_of,
    options_of,
    paper_layers,
    published,
    run,
    target,
    text_of,
    write,
    write_table,
)

from mmdit_probe.data import paper_table
from mmdit_probe.errors import at_least, run_script
from mmdit_probe.experiments import Evaluate
from mmdit_probe.plots.league import head_figure, layer_figure, league_figure, sigma_figure

OPEN = "seg4diff,diffsegmenter,iseg,tokenrank,conceptattention,proxyclip,corrclip"
BLIND = "seg4diff-unsup,diffseg,diffcut"
OWN = "seg4diff,seg4diff-unsup"
"""The paper's methods, which are measured on an adapted model too."""
TAGGER = "scenes-clip"
LIMIT = 200

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "layer": ("fig08_miou_by_layer",
              {"method": "seg4diff", "sweep": "layer", "layers": "all", "refine": "none,centre"}),
    "sigma": ("fig15_miou_by_sigma",
              {"method": "seg4diff", "sweep": "sigma", "sigma": "0.05,0.2,0.35,0.515,0.65,0.8,0.95",
               "refine": "none,centre"}),
    "head": ("fig17_miou_by_head",
             {"method": "seg4diff", "sweep": "head", "layers": "all", "refine": "centre"}),
    "league": ("table12_league",
               {"method": f"{OPEN},{BLIND}", "protocol": "present,full", "refine": "none,centre,pamr,centre+pamr"}),
    "normalisation": ("table5_normalisation", {"method": "seg4diff", "refine": "none,minmax"}),
}  # fmt: skip
ADAPTED = ", LoRA"
"""What follows a method's name in the rows of an adapted model."""
SOFTMAX = {True: "joint", False: "logit"}
"""Table 5's first choice: maps after or before the softmax -> value of the method's option."""


def settings(model: str, how: dict[str, Any]) -> dict[str, Any]:
    """A run's options with what `analyses/segmentation_choice.py` chose for this model.

    Sweeps take the noise level and seg4diff's options; the others take the layers too; the league the options of every
    method and the chosen refinement, with and without scaling of the maps, and a tagger for the protocol "predicted".
    """
    found = chosen(model)
    if not found:
        experts = ",".join(map(str, paper_layers(model)))
        return {"layers": experts, **how} if experts else dict(how)
    methods = how["method"].split(",")
    how = {"sigma": ",".join(f"{level:g}" for level in found["sigma"]), **how}
    how["options"] = [
        f"{method}.{name}={value}" for method in methods for name, value in found["options"].get(method, {}).items()
    ]
    if "layers" not in how:
        how |= {"noise_seeds": found["noise_seeds"], "selection": str(below(CHOICE / found["selection"]))}
    if "protocol" in how:
        steps = found["refine"].split("+")
        pixels = "+".join(step for step in steps if step.startswith("pamr")) or "none"
        how["refine"] = ",".join(dict.fromkeys([*how["refine"].split(","), found["refine"], pixels]))
        how |= {"protocol": how["protocol"] + ",predicted", "tagger": TAGGER}
    return how


def main() -> None:
    parser = options_of(__doc__, run=False)
    parser.add_argument("--limit", type=at_least(1), default=LIMIT, help="number of images")
    parser.add_argument("--dataset", default="scenes:val")
    parser.add_argument("--only", choices=list(RUNS), help="one of the figures")
    options = parser.parse_args()
    for name in [options.only] if options.only else RUNS:
        file, how = RUNS[name]
        path = target(options, options.model, file + file_suffix(options.dataset))
        how = settings(options.model, how)
        if name == "normalisation":
            write_table(normalisation(options, how), path)
            continue
        table = league(options, how)
        if name == "league" and options.lora:
            table = pd.concat([table, adapted(options, how)], ignore_index=True)
        title = f"{Path(options.model).name} on {options.dataset}, n = {int(table['n'].max())}"
        if name == "layer":
            figure = layer_figure(table, title, published("miou_by_layer", options.model))
        else:
            figure = {"league": league_figure, "head": head_figure, "sigma": sigma_figure}[name](table, title)
        if name == "league":
            table = pd.concat([table, of_the_paper()], ignore_index=True)
        write(figure, path, table)


def as_published(model: str, how: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations that a run is: of the paper's model one by each of its two presets, else the one."""
    if not is_paper_model(model):
        return [how]
    methods, blind = how["method"].split(","), BLIND.split(",")
    named = [name for name in methods if name not in blind]
    unnamed = [name for name in methods if name in blind]
    # The released code matches per pixel row, the paper's appendix A.4 per image.
    kinds = ((named, {"preset": "seg4diff"}), (unnamed, {"preset": "seg4diff-unsup", "match": "image"}))
    options = how.get("options", [])
    return [
        preset | how | {"method": ",".join(names), "options": [o for o in options if o.partition(".")[0] in names]}
        for names, preset in kinds
        if names
    ]


def league(options: argparse.Namespace, how: dict[str, Any], lora: bool = False) -> pd.DataFrame:
    """The league table of one run, with how each row was measured."""
    parts = []
    for one in as_published(options.model, how | given(options, Evaluate)):
        experiment = Evaluate(dataset=options.dataset, limit=options.limit, **one)
        result = run(experiment, model_of(options, lora=lora), options)
        adapter = adapter_of(options.lora if lora else None)
        rows = result.summary.to_dict("records")
        said = [row_settings(experiment, result.request, row, adapter) for row in rows]
        parts.append(result.summary.assign(world="measured", dataset=experiment.source, measured_as=said))
    return pd.concat(parts, ignore_index=True)


def row_settings(experiment: Evaluate, request: dict[str, Any], row: dict[str, Any], adapter: str) -> str:
    """How a row of the league was measured."""
    options, size = request["options"].get(row["method"], {}), request["size"] or ["own"]
    blind = row["protocol"] == "unsupervised"
    return as_measured(
        text=text_of(request), sigma=row["sigma"], layers=row["layers"], heads=row["heads"],
        draws=len(request["seeds"]), fit=request["fit"], size="x".join(map(str, size)),
        reference=request.get("reference", "none"),
        options=", ".join(f"{name}={value}" for name, value in sorted(options.items())) or "none",
        refine=row["refine"], background=request["background"], matching=experiment.matching if blind else "none",
        compared=request["score_size"] or "own size", pictures=row["n"], adapter=adapter,
    )  # fmt: skip


def adapted(options: argparse.Namespace, how: dict[str, Any]) -> pd.DataFrame:
    """The paper's methods on the model with its LoRA, beside the base model's rows."""
    kept = [text for text in how.get("options", []) if text.split(".")[0] in OWN.split(",")]
    table = league(options, how | {"method": OWN, "options": kept}, lora=True)
    runs = table[table["method"].isin(OWN.split(","))]
    return runs.assign(method=runs["method"] + ADAPTED)


def normalisation(options: argparse.Namespace, how: dict[str, Any]) -> pd.DataFrame:
    """Table 5 on any data set: maps before and after the softmax, as they are and stretched to 0..1; with an adapter
    the base model's rows and its own."""
    parts = []
    for (softmax, value), lora in product(SOFTMAX.items(), (False, True) if options.lora else (False,)):
        kept = [text for text in how.get("options", []) if not text.startswith("seg4diff.softmax=")]
        table = league(options, how | {"options": [*kept, f"seg4diff.softmax={value}"]}, lora)
        table = table[table["method"] == "seg4diff"].assign(variant="LoRA" if lora else "base")
        parts.append(table.assign(softmax=softmax, min_max=table["refine"] == "minmax"))
    found = pd.concat(parts, ignore_index=True).rename(columns={"miou_low": "low", "miou_high": "high"})
    found = found.assign(at="reading")
    paper = paper_table("normalisation_ablation")
    paper = paper.assign(world="paper", at="reading", variant="SD3", softmax=paper["softmax"] == "yes",
                         min_max=paper["min_max"] == "yes", miou_gt=paper["miou"] / 100)  # fmt: skip
    keep = ["world", "at", "variant", "dataset", "softmax", "min_max", "layers", "sigma", "n", "miou_gt", "miou",
            "low", "high", "measured_as"]  # fmt: skip
    return pd.concat([found, paper.drop(columns="miou")]).reindex(columns=keep)


def of_the_paper() -> pd.DataFrame:
    """Tables 1 and 2 of the paper in the columns of the league, mIoU as a share under the rule of its evaluators."""
    named = paper_table("ovss_table")
    blind = paper_table("unsupervised_table").assign(protocol="unsupervised")
    both = pd.concat([named, blind], ignore_index=True)
    method = both["method"] + " (" + both["backbone"] + ", " + both["training"] + ")"
    return pd.DataFrame(
        {"world": "paper", "protocol": both["protocol"], "method": method, "dataset": both["dataset"],
         "miou": both["miou"] / 100}
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
