"""Sheets of token maps, after Fig. 9, 16, 25 to 27 and 30 of arXiv:2509.18096.

    cells = [[picture, of_ring, of_house]]                       # [H, W, 3] pictures and [h, w] maps
    save(map_sheet(cells, columns=["picture", "ring", "house"], rows=["layer 4"]), "maps")

A map runs from 0 (dark) to its own maximum, which is printed above it, or to the maximum of its row: attention to a
word is small in most places, and one scale for all would show the sinks and nothing else. Not here: any measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmdit_probe.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["each", "row"]


def map_sheet(
    cells: Sequence[Sequence[Any]], *, columns: Sequence[str] = (), rows: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (), scale: Scale = "each", title: str = "", note: str = "",
    side: float | None = None,
) -> Figure:  # fmt: skip
    """A grid of pictures and maps.

    Args:
        cells: per row, pictures uint8 [H, W, 3], maps [h, w] >= 0, or None for an empty cell; all rows of one length.
        columns: titles of the columns. rows: labels of the rows.
        captions: a text above each cell, in place of column titles.
        scale: the white end is each map's own maximum (printed above it where there is room) or that of its row.
        title, note: lines above and below. side: of a cell in inches; by default what fits a page.
    """
    across = max(len(row) for row in cells)
    side = min(0.9, 6.6 / across) if side is None else side
    small = side < 0.6
    above = 0.2 if captions else 0.13 if scale == "each" and not small else 0.04
    left = 0.9 if any(rows) else 0.1
    with style.context():
        figure = style.figure(
            width=left + (side + 0.05) * across, height=(side + above) * len(cells) + (0.35 if title else 0.1) + 0.35
        )
        grid = figure.subplots(len(cells), across, squeeze=False)
        for y, row in enumerate(cells):
            tops = [float(cell.max()) for cell in row if cell is not None and np.ndim(cell) == 2]
            for x, axes in enumerate(grid[y]):
                cell = row[x] if x < len(row) else None
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if cell is None:
                    axes.set_box_aspect(1)
                    continue
                lines = [captions[y][x]] if captions else [columns[x]] if columns and y == 0 else []
                if np.ndim(cell) == 3:
                    axes.imshow(cell, interpolation="nearest")
                else:
                    top = max(tops) if scale == "row" else float(cell.max())
                    axes.imshow(cell, cmap="viridis", vmin=0, vmax=top or 1.0, interpolation="nearest")
                    if scale == "each" and not small:
                        lines.append(f"max {short(top)}")
                axes.set_title("\n".join(lines), fontsize=5 if captions or y else 6, pad=2)
        for label, axes in zip(rows, grid[:, 0], strict=False):
            axes.set_ylabel(
                "\n".join(fill(line, 16) for line in label.split("\n")), fontsize=6, rotation=0, ha="right", va="center"
            )
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
        if note:
            figure.supxlabel(note, fontsize=5.5, x=0.01, ha="left")
    return figure


def wrapped(cells: Sequence[Any], captions: Sequence[str], across: int = 8) -> tuple[list[list[Any]], list[list[str]]]:
    """Cells and captions in rows of `across`, the last row filled up with empty cells: arguments of `map_sheet`."""
    count = -(-len(cells) // across) * across
    filled = [*cells, *[None] * (count - len(cells))]
    texts = [*captions, *[""] * (count - len(captions))]
    starts = range(0, count, across)
    return [filled[at : at + across] for at in starts], [texts[at : at + across] for at in starts]


def short(value: float) -> str:
    """Three decimals without the leading 0; powers of ten where that would be nothing."""
    return f"{value:.3f}".removeprefix("0") if value >= 0.001 or value == 0 else f"{value:.0e}"
