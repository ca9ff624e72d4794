"""Fig. 8, 15 and 17 and Tables 1 and 2 of arXiv:2509.18096, re-measured: segmentation by layer, sigma and head; league.

    python figures/fig08_segmentation.py --limit 200
    python figures/fig08_segmentation.py --limit 20 --only league

Writes `fig08_miou_by_layer`, `fig15_miou_by_sigma`, `fig17_miou_by_head` and `table12_league` as PNG, PDF and CSV under
`figures/out/<model>/`. The league's CSV holds the paper's Tables 1 and 2 below the measured rows, as rows of another
world (`world` = "paper": other models, other data sets), to be read beside them and not ranked with them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from runs import OUT, run_folder, take, target

from mmdit_probe.data import paper_table

COMMAND = "evaluate"
OPEN = "seg4diff,diffsegmenter,iseg,tokenrank,conceptattention,proxyclip,corrclip"
BLIND = "seg4diff-unsup,diffseg,diffcut"
SCENES = ("--set", "seg4diff.stream=t5", "--sigma", "0.3")
"""For the embedded world: the stream that was best on scenes:train, and a noise level on the flat part of Fig. 15."""

RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "layer": ("fig08_miou_by_layer", "by_layer",
              ("--method", "seg4diff", "--sweep", "layer", "--layers", "all", "--refine", "none,centre")),
    "sigma": ("fig15_miou_by_sigma", "by_sigma",
              ("--method", "seg4diff", "--sweep", "sigma", "--sigma", "0.05,0.2,0.35,0.5,0.65,0.8,0.95",
               "--refine", "none,centre")),
    "head": ("fig17_miou_by_head", "by_head",
             ("--method", "seg4diff", "--sweep", "head", "--layers", "all", "--refine", "centre")),
    "league": ("table12_league", "league",
               ("--method", f"{OPEN},{BLIND}", "--protocol", "present,full",
                "--refine", "none,centre,pamr,centre+pamr,centre+regions+pamr")),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-sd3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run", type=Path, help="run folder of evaluate; needs --only")
    parser.add_argument("--fresh", action="store_true", help="measure even if a finished run is there")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    parser.add_argument("--limit", type=int, default=200, help="number of images")
    parser.add_argument("--dataset", default="scenes:val")
    parser.add_argument("--only", choices=list(RUNS), help="one of the figures")
    options = parser.parse_args()
    for name in [options.only] if options.only else RUNS:
        file, figure, arguments = RUNS[name]
        fixed = SCENES if options.dataset.startswith("scenes") else ()
        fixed = fixed[:2] if "--sigma" in arguments else fixed
        folder = run_folder(
            options, COMMAND, ["--dataset", options.dataset, "--limit", str(options.limit), *arguments, *fixed]
        )
        path = target(options, folder, file)
        take(folder, figure, path)
        table = pd.read_csv(folder / "league.csv").assign(world="measured")
        if name == "league":
            table = pd.concat([table, published()], ignore_index=True)
        table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")


def published() -> pd.DataFrame:
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
