"""Sinks: share of attention on single keys per layer and head, and word maps with sinks removed.

save(sinks(top), "diagnose")
save(sink_maps(picture, maps, ["BOS", "ring"], removed), "diagnose_maps")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmdit_probe.plots import style

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
    with style.context():
        figure = style.figure(width=1.4 + 0.62 * len(grid.columns), height=1.0 + 0.27 * len(grid.index))
        axes = figure.subplots()
        shown = axes.imshow(grid.to_numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
        if len(grid.columns) <= 12:
            for y, row in enumerate(kinds.to_numpy()):
                for x, kind in enumerate(row):
                    ink = "white" if grid.to_numpy()[y, x] < 0.6 else "black"
                    axes.text(x, y, kind, ha="center", va="center", fontsize=5, color=ink)
        axes.set_xticks(range(len(grid.columns)), [str(head) for head in grid.columns])
        axes.set_yticks(range(len(grid.index)), [str(layer) for layer in grid.index])
        axes.set(xlabel="head", ylabel="layer")
        figure.colorbar(shown, ax=axes, label="share of attention on sinks")
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def sink_maps(picture: Any, maps: Any, names: Sequence[str], removed: Any, *, title: str = "") -> Figure:
    """Two rows of token maps: as they are, and with sinks removed and the rest renormalised.

    Args:
        picture: the image. maps: [h, w, K] probabilities. names: of the K tokens.
        removed: [h, w, K] after the removal; maps without any mass (of removed tokens) are left empty.
    """
    with style.context():
        count = len(names) + 1
        figure = style.figure(width=min(9.5, 0.95 * count), height=2.5)
        grid = figure.subplots(2, count, squeeze=False)
        for axes in grid.ravel():
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        grid[0, 0].imshow(picture)
        for row, values in enumerate((maps, removed)):
            for k, name in enumerate(names):
                if values[..., k].max() > 0:
                    grid[row, k + 1].imshow(values[..., k], cmap="cividis", vmin=0, interpolation="nearest")
                    grid[row, k + 1].set_xlabel(f"max {values[..., k].max():.2g}", fontsize=5)
                if row == 0:
                    grid[row, k + 1].set_title(name, fontsize=6)
        grid[0, 1].set_ylabel("as it is", fontsize=6)
        grid[1, 1].set_ylabel("no sinks", fontsize=6)
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure
