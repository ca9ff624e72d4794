"""Evidence per layer side by side, and how much the evidences agree.

save(evidence(table, correlations, chosen=[4]), "select_layers")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

NAMES = {
    "word_mass": "word mass",
    "value_gap": "value gap",
    "pca_class": "PCA class",
    "perturbation": "perturbation",
    "segmentation": "segmentation",
}


def evidence(table: pd.DataFrame, correlations: pd.DataFrame, chosen: Sequence[int], *, title: str = "") -> Figure:
    """Left: each evidence by layer, scaled to its own range, chosen layers shaded. Right: rank correlations.

    Args:
        table: of one split, from `experiments.evidence.by_layer`. correlations: of the same split, from `agreement`.
        chosen: selected layers.
    """
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(table["evidence"]))
    with style.context():
        figure = style.figure(width=6.6, height=2.9)
        lines, matrix = figure.subplots(1, 2, width_ratios=[1.6, 1])
        for layer in chosen:
            lines.axvspan(layer - 0.4, layer + 0.4, color="#DDDDDD", lw=0)
        colours = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73")
        for name, colour, marker, dash in zip(names, colours, "os^Dv", ("-", "--", "-.", ":", "-"), strict=False):
            part = table[table["evidence"] == name].sort_values("layer")
            low, high = part["value"].min(), part["value"].max()
            scale = (high - low) or 1.0
            value = (part["value"] - low) / scale
            error = [(part["value"] - part["low"]) / scale, (part["high"] - part["value"]) / scale]
            lines.errorbar(part["layer"], value, yerr=error, color=colour, marker=marker, ms=3, ls=dash, lw=1,
                           elinewidth=0.7, capsize=1.5, label=NAMES.get(name, name))  # fmt: skip
        lines.set(xlabel="layer", ylabel="evidence (0: least, 1: most)", title="evidence by layer")
        lines.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid = np.eye(len(names))
        for row in correlations.to_dict("records"):
            if row["first"] in names and row["second"] in names:
                i, j = names.index(row["first"]), names.index(row["second"])
                grid[i, j] = grid[j, i] = float(row["rho"])
        matrix.imshow(grid, cmap="PuOr", vmin=-1, vmax=1)
        for i, j in np.ndindex(grid.shape):
            if i != j:
                ink = "white" if abs(grid[i, j]) > 0.7 else "black"
                matrix.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=6, color=ink)
        labels = [NAMES.get(name, name) for name in names]
        matrix.set_xticks(range(len(names)), labels, rotation=40, ha="right", fontsize=6)
        matrix.set_yticks(range(len(names)), labels, fontsize=6)
        matrix.set_title("rank correlation over layers", fontsize=8)
        figure.legend(loc="outside lower center", ncols=len(names), fontsize=6)
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure
