"""Fig. 8, 15 and 17 and Tables 1 and 2 of arXiv:2509.18096, re-measured: segmentation by layer, sigma and head; league.

    python figures/fig08_segmentation.py --limit 200
    python figures/fig08_segmentation.py --model ... --dataset voc20:VOCdevkit/VOC2012 --only layer

Writes `fig08_miou_by_layer`, `fig15_miou_by_sigma`, `fig17_miou_by_head` and `table12_league` as PNG, PDF and CSV under
`figures/out/<model>/`. The league's CSV holds the paper's Tables 1 and 2 below the measured rows, as rows of another
world (`world` = "paper": other models, other data sets), to be read beside them and not ranked with them.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from runs import CHOICE, chosen, options_of, paper_layers, published, run_folder, target, write

from mmdit_probe.data import paper_table
from mmdit_probe.plots.league import head_figure, layer_figure, league_figure, sigma_figure

COMMAND = "evaluate"
OPEN = "seg4diff,diffsegmenter,iseg,tokenrank,conceptattention,proxyclip,corrclip"
BLIND = "seg4diff-unsup,diffseg,diffcut"
TAGGER = "scenes-clip"
LIMIT = 200

RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "layer": ("fig08_miou_by_layer",
              ("--method", "seg4diff", "--sweep", "layer", "--layers", "all", "--refine", "none,centre")),
    "sigma": ("fig15_miou_by_sigma",
              ("--method", "seg4diff", "--sweep", "sigma", "--sigma", "0.05,0.2,0.35,0.5,0.65,0.8,0.95",
               "--refine", "none,centre")),
    "head": ("fig17_miou_by_head",
             ("--method", "seg4diff", "--sweep", "head", "--layers", "all", "--refine", "centre")),
    "league": ("table12_league",
               ("--method", f"{OPEN},{BLIND}", "--protocol", "present,full",
                "--refine", "none,centre,pamr,centre+pamr")),
}  # fmt: skip


def settings(model: str, arguments: tuple[str, ...]) -> list[str]:
    """A run's arguments with what `analyses/segmentation_choice.py` chose for this model. Other models are read as
    the paper reads them, at the layers that it names, if any.

    Sweeps take the noise level and seg4diff's options; the league takes the layers, the options of every method and the
    chosen refinement too, with and without scaling of the maps, and a tagger for the protocol "predicted".
    """
    found, line = chosen(model), list(arguments)
    if not found:
        experts = ",".join(map(str, paper_layers(model)))
        return [*line, "--layers", experts] if experts and "--sweep" not in line else line
    for method in line[line.index("--method") + 1].split(","):
        for name, value in found["options"].get(method, {}).items():
            line += ["--set", f"{method}.{name}={value}"]
    if "--sigma" not in line:
        line += ["--sigma", ",".join(f"{level:g}" for level in found["sigma"])]
    if "--sweep" not in line:
        line += ["--noise-seeds", str(found["noise_seeds"]), "--selection", str(CHOICE / found["selection"])]
        steps = found["refine"].split("+")
        pixels = "+".join(step for step in steps if step.startswith("pamr")) or "none"
        place = line.index("--refine") + 1
        line[place] = ",".join(dict.fromkeys([*line[place].split(","), found["refine"], pixels]))
        line[line.index("--protocol") + 1] += ",predicted"
        line += ["--tagger", TAGGER]
    return line


def main() -> None:
    parser = options_of(__doc__, f"{COMMAND}; needs --only")
    parser.add_argument("--limit", type=int, default=LIMIT, help="number of images")
    parser.add_argument("--dataset", default="scenes:val")
    parser.add_argument("--only", choices=list(RUNS), help="one of the figures")
    options = parser.parse_args()
    for name in [options.only] if options.only else RUNS:
        file, arguments = RUNS[name]
        line = ["--dataset", options.dataset, "--limit", str(options.limit), *settings(options.model, arguments)]
        folder = run_folder(options, COMMAND, line)
        measured = pd.read_csv(folder / "league.csv", keep_default_na=False, na_values=[""])
        title = f"{Path(options.model).name} on {options.dataset}, n = {int(measured.n.max())}"
        if name == "layer":
            figure = layer_figure(measured, title, published("miou_by_layer", options.model))
        else:
            figure = {"league": league_figure, "head": head_figure, "sigma": sigma_figure}[name](measured, title)
        table = measured.assign(world="measured", dataset=options.dataset)
        if name == "league":
            table = pd.concat([table, of_the_paper()], ignore_index=True)
        write(figure, target(options, options.model, file), table)


def of_the_paper() -> pd.DataFrame:
    """Tables 1 and 2 of the paper in the columns of the league, mIoU as a share."""
    named = paper_table("ovss_table")
    blind = paper_table("unsupervised_table").assign(protocol="unsupervised")
    both = pd.concat([named, blind], ignore_index=True)
    method = both["method"] + " (" + both["backbone"] + ", " + both["training"] + ")"
    return pd.DataFrame(
        {"world": "paper", "protocol": both["protocol"], "method": method, "dataset": both["dataset"],
         "miou": both["miou"] / 100}
    )  # fmt: skip


if __name__ == "__main__":
    main()
