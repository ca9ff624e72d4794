"""How the embedded model learned, from the training curves that ship with it. Not a figure of the paper.

    python figures/fig_embedded_training.py

Writes `figures/out/scenes-sd3/embedded_training.{png,pdf}`. Takes and ignores the options of its sister scripts, since
only the embedded model has these curves.
"""

from __future__ import annotations

import pandas as pd
from runs import options_of

from mmdit_probe import assets
from mmdit_probe.errors import run_script
from mmdit_probe.plots import save
from mmdit_probe.plots.training import training_curves


def main() -> None:
    options = options_of(__doc__, run=False, more=False).parse_args()
    curves = pd.read_csv(assets.path("scenes-sd3") / "training" / "transformer.csv")
    for path in save(
        training_curves(curves, title="scenes-sd3: how the transformer was trained"),
        options.out / "scenes-sd3" / "embedded_training",
    ):
        print(path)


if __name__ == "__main__":
    run_script(main)
