"""Sheets: grids of pictures and maps, after Fig. 7, 9, 11 to 13, 16, 25 to 27, 30 and 34 to 39 of arXiv:2509.18096.

    cells = [[picture, of_ring, of_house]]                       # [H, W, 3] pictures and [h, w] maps
    save(sheet(cells, ["picture", "ring", "house"], ["layer 4"]), "maps")

A map runs from 0 (dark) to its own maximum, which is printed above it, or to the maximum of its row: attention to a
word is small in most places, and one scale for all would show the sinks and nothing else. Not here: any measuring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmdit_probe.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scale = Literal["each", "row", "own"]
FONT = 6.0
"""Size of all text in a sheet, in points."""


def sheet(
    cells: Sequence[Sequence[Any]], columns: Sequence[str] = (), rows: Sequence[str | None] = (), *,
    captions: Sequence[Sequence[str]] = (), below: Sequence[Sequence[str]] = (), scale: Scale = "each",
    legend: Mapping[str, Any] | None = None, title: str = "", note: str = "", side: float | None = None,
) -> Figure:  # fmt: skip
    """A grid of pictures and maps.

    Args:
        cells: per row, pictures (PIL, or uint8 [H, W, 3]), maps [h, w] >= 0, or None for an empty cell.
        columns: titles of the columns. rows: labels of the rows, such as prompts; None: it goes on with the one above.
        captions, below: a text above and under each cell.
        scale: the light end is each map's own maximum ("each": printed above it where there is room; "own": not), or
            that of its row.
        legend: name -> colour, such as those of classes.
        title, note: lines above and below. side: of a cell in inches; by default what fits a page.
    """
    from matplotlib.patches import Patch

    grid = [[None if cell is None else np.asarray(cell) for cell in row] for row in cells]
    across = max(len(row) for row in grid)
    left = 0.9 if any(rows) else 0.1
    side = min(0.95, (style.PAGE - left) / across - 0.04) if side is None else side
    width = max(left + (side + 0.04) * across, style.COLUMN if title or note or legend else 0)
    tops = scale == "each" and side >= 0.6
    texts = [[_above(grid, columns, captions, y, x, tops, side) for x in range(across)] for y in range(len(grid))]
    unders = [[_fold(below[y][x], side) if below and x < len(below[y]) else "" for x in range(across)]
              for y in range(len(grid))]  # fmt: skip
    lines = sum(_most(row) for row in texts) + sum(_most(row) for row in unders)
    ratio = [max((one.shape[0] / one.shape[1] for one in row if one is not None), default=1.0) for row in grid]
    height = sum(side * one + 0.06 for one in ratio) + 0.1 * lines + 0.3 * bool(title) + 0.2 * bool(note) + 0.1
    with style.context():
        figure = style.figure(width, height + (0.2 + 0.12 * len(legend) * 0.9 / width if legend else 0))
        places = figure.subplots(len(grid), across, squeeze=False, height_ratios=ratio)
        for y, row in enumerate(grid):
            high = max((float(one.max()) for one in row if one is not None and one.ndim == 2), default=0.0)
            for x, axes in enumerate(places[y]):
                draw(axes, row[x] if x < len(row) else None, high if scale == "row" else None)
                axes.set_title(texts[y][x], fontsize=FONT, pad=2, loc="center")
                axes.set_xlabel(unders[y][x], fontsize=FONT, labelpad=2)
        for text, axes in zip(rows, places[:, 0], strict=False):
            if text is None:
                continue
            folded = "\n".join(fill(line or "(empty)", 18) for line in style.name(text).split("\n"))
            axes.set_ylabel(folded, fontsize=FONT, rotation=0, ha="right", va="center")
        if legend:
            style.legend(figure, handles=[Patch(color=colour, label=style.name(n)) for n, colour in legend.items()])
        style.headline(figure, title)
        if note:
            figure.supxlabel(fill(style.name(note), int(width * 21)), fontsize=FONT, x=0.01, ha="left")
    return figure


def draw(axes: Axes, cell: Any, high: float | None = None) -> None:
    """A picture, a map (up to `high`, by default its maximum), or nothing, without ticks and frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if cell is None:
        axes.set_box_aspect(1)
    elif cell.ndim == 3:
        axes.imshow(cell, interpolation="nearest")
    else:
        top = float(cell.max()) if high is None else high
        axes.imshow(cell, cmap="viridis", vmin=0, vmax=top or 1.0, interpolation="nearest")


def wrapped(cells: Sequence[Any], captions: Sequence[str], across: int = 8) -> tuple[list[list[Any]], list[list[str]]]:
    """Cells and captions in rows of `across`, the last row filled up with empty cells: arguments of `sheet`."""
    count = -(-len(cells) // across) * across
    filled = [*cells, *[None] * (count - len(cells))]
    texts = [*captions, *[""] * (count - len(captions))]
    starts = range(0, count, across)
    return [filled[at : at + across] for at in starts], [texts[at : at + across] for at in starts]


def short(value: float) -> str:
    """Three decimals without the leading 0; powers of ten where that would be nothing."""
    return f"{value:.3f}".removeprefix("0") if value >= 0.001 or value == 0 else f"{value:.0e}"


def _above(
    grid: list[list[Any]], columns: Sequence[str], captions: Sequence[Sequence[str]], y: int, x: int, tops: bool,
    side: float,
) -> str:  # fmt: skip
    """Column title or caption, and the maximum of a map."""
    cell = grid[y][x] if x < len(grid[y]) else None
    text = captions[y][x] if captions and x < len(captions[y]) else columns[x] if y == 0 and x < len(columns) else ""
    top = f"max {short(float(cell.max()))}" if tops and cell is not None and cell.ndim == 2 else ""
    return "\n".join(part for part in (_fold(text, side), top) if part)


def _fold(text: str, side: float) -> str:
    return "\n".join(fill(line, max(8, int(side * 22))) for line in style.name(text).split("\n"))


def _most(texts: list[str]) -> int:
    return max((text.count("\n") + 1 for text in texts if text), default=0)
