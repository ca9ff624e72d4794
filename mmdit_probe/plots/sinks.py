"""Sinks: share of attention on single keys per layer and head, and word maps with sinks removed.

save(sinks(top), "diagnose")
save(sink_maps(picture, maps, ["BOS", "ring"], removed), "diagnose_maps")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmdit_probe.plots import style
from mmdit_probe.plots.sheet import sheet

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def sinks(top: pd.DataFrame, *, title: str = "") -> Figure:
    """Layer x head heat map of the mass on sinks; the kind of the largest key is written into the cell.

    Args:
        top: from `observe.sinks.top_keys`.
    """
    grid = top.pivot(index="layer", columns="head", values="sink_mass")
    kinds = top.pivot(index="layer", columns="head", values="kind")
    written = len(grid.columns) <= 12
    width = 1.2 + (0.55 if written else 0.2) * len(grid.columns)
    with style.panels(max(style.COLUMN, width), 1.0 + 0.2 * len(grid.index), title=title) as (figure, axes):
        style.heat(axes, grid, low=0, high=1, label="share of attention on sinks", texts=kinds if written else None)
    return figure


def sink_maps(picture: Any, maps: Any, names: Sequence[str], removed: Any, *, title: str = "") -> Figure:
    """Two rows of token maps: as they are, and with sinks removed and the rest renormalised.

    Args:
        picture: the image. maps: [h, w, K] probabilities. names: of the K tokens.
        removed: [h, w, K] after the removal; maps without any mass (of removed tokens) are left empty.
    """
    cells = [
        [first, *(values[..., k] if values[..., k].max() > 0 else None for k in range(len(names)))]
        for first, values in ((picture, maps), (None, removed))
    ]
    return sheet(cells, ["picture", *names], ["as it is", "no sinks"], title=title)
