"""Two runs of one experiment: second minus first, per cell.

save(run_differences(comparison.table), "comparison")
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST = 8
"""Series, or rows without a layer, that one figure shows; the table holds all."""

_NUMBERS = {"n", "n_undefined", "first", "second", "difference", "low", "high", "p_holm", "verdict"}


def run_differences(table: pd.DataFrame, title: str = "", margins: Collection[float] = ()) -> Figure:
    """Paired differences with their intervals: by layer, a series per remaining cell; without layers a row per cell.

    Args:
        table: from `experiments.compare_runs`. margins: of non-inferiority, drawn as lines.
    """
    cell = [name for name in table.columns if name not in _NUMBERS and name != "layer" and table[name].nunique() > 1]
    labels = table[cell].astype(str).agg(" ".join, axis=1) if cell else table["difference"].map(lambda _: "difference")
    by_layer, names = "layer" in table, list(dict.fromkeys(labels))[:MOST]
    width, height = (style.COLUMN, 2.7) if by_layer else (style.PAGE, 1.2 + 0.2 * len(names))
    with style.panels(width, height, title=title) as (figure, axes):
        lines = [(0.0, ":"), *((margin, "--") for margin in margins)]
        for value, dashes in lines:
            (axes.axhline if by_layer else axes.axvline)(value, color="black", lw=0.6, ls=dashes)
        for number, name in enumerate(names):
            part = table[labels == name]
            at = part["layer"] + style.dodge(number, len(names)) if by_layer else [number] * len(part)
            style.errorbars(axes, part, "difference", number, at=at, label=name, joined=False, horizontal=not by_layer)
        if by_layer:
            axes.set_ylabel("second minus first (95 %)")
            style.whole(axes)
            style.legend(figure, axes)
        else:
            axes.set_xlabel("second minus first (95 %)")
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
    return figure
