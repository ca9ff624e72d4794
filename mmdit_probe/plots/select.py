"""Evidence per layer side by side, and how much the evidences agree.

save(evidence(table, correlations, chosen=[4]), "select_layers")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def evidence(table: pd.DataFrame, correlations: pd.DataFrame, chosen: Sequence[int], *, title: str = "") -> Figure:
    """Left: each evidence by layer, scaled to its own range, chosen layers shaded. Right: rank correlations.

    Args:
        table: of one split, from `experiments.evidence.by_layer`. correlations: of the same split, from `agreement`.
        chosen: selected layers.
    """
    names = list(dict.fromkeys(table["evidence"]))
    with style.panels(style.PAGE, 2.9, 2, width_ratios=[1.6, 1], title=title) as (figure, (lines, matrix)):
        for number, layer in enumerate(chosen):
            lines.axvspan(layer - 0.4, layer + 0.4, color="#DDDDDD", lw=0, label="" if number else "chosen")
        for number, name in enumerate(names):
            part = table[table["evidence"] == name].sort_values("layer")
            low, high = part["value"].min(), part["value"].max()
            scaled = (part[["value", "low", "high"]] - low) / ((high - low) or 1.0)
            scaled["layer"] = part["layer"]
            style.errorbars(lines, scaled, "value", number, of=len(names), label=_label(name))
        lines.set(ylabel="evidence (0: least, 1: most)", title="evidence by layer, 95 % over items")
        style.whole(lines)
        grid = np.eye(len(names))
        for row in correlations.to_dict("records"):
            if row["first"] in names and row["second"] in names:
                i, j = names.index(row["first"]), names.index(row["second"])
                grid[i, j] = grid[j, i] = float(row["rho"])
        labels = [style.name(_label(name)) for name in names]
        style.heat(matrix, pd.DataFrame(grid, labels, labels), low=-1, high=1, colours="PuOr", decimals=2)
        matrix.set_xticks(matrix.get_xticks(), labels, rotation=40, ha="right")
        matrix.set_title("rank correlation over layers")
        style.legend(figure, lines)
    return figure


def _label(evidence: str) -> str:
    return evidence.replace("_", " ").replace("pca", "PCA")
