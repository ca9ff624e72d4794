"""How the embedded model learned, from the training curves that ship with it. Not a figure of the paper.

    python figures/fig_embedded_training.py

Writes `figures/out/scenes-sd3/embedded_training.{png,pdf}`. Takes and ignores the options of its sister scripts, since
only the embedded model has these curves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from mmdit_probe import assets
from mmdit_probe.errors import run_script
from mmdit_probe.plots import save
from mmdit_probe.plots.training import training_curves

OUT = Path(__file__).parent / "out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    options, _ = parser.parse_known_args()
    curves = pd.read_csv(assets.path("scenes-sd3") / "training" / "transformer.csv")
    for path in save(
        training_curves(curves, title="scenes-sd3: how the transformer was trained"),
        options.out / "scenes-sd3" / "embedded_training",
    ):
        print(path)


if __name__ == "__main__":
    run_script(main)
