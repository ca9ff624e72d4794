"""Contact sheet of the scenes world: each image with its caption, class mask, instance mask and part mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from mmdit_probe.plots import style
from mmdit_probe.scenes.world import CLASSES, PARTS, Scene

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = ("image", "classes", "instances", "parts")


def contact_sheet(items: Sequence[Scene], captions: Sequence[str], per_row: int = 3) -> Figure:
    """Figure with four panels per scene (image, class mask, instance mask, part mask) and the caption above them.

    Args:
        items: scenes.
        captions: one text per scene.
        per_row: scenes side by side.
    """
    rows = -(-len(items) // per_row)
    with style.context():
        figure = style.figure(width=2.9 * per_row, height=0.98 * rows + 0.6)
        grids = figure.subfigures(rows, per_row, squeeze=False).ravel()
        for grid, item, text in zip(grids, items, captions, strict=False):
            grid.suptitle(_fold(text or "(empty)"), fontsize=6)
            axes = grid.subplots(1, len(PANELS))
            for axis, panel in zip(axes, PANELS, strict=True):
                axis.imshow(_picture(item, panel), interpolation="nearest")
                axis.set_axis_off()
                axis.set_title(panel, fontsize=5)
        colours = [mpl.patches.Patch(color=_shade(i, len(CLASSES)), label=name) for i, name in enumerate(CLASSES)]
        figure.legend(handles=colours, ncols=len(CLASSES), loc="outside lower center", fontsize=5, handlelength=0.8)
    return figure


def _fold(text: str, width: int = 62) -> str:
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 0, width)
    return text[:cut] + "\n" + text[cut + 1 :]


def _shade(index: int, count: int) -> tuple[float, float, float]:
    colour = mpl.colormaps["turbo"]((index + 0.5) / count)
    return colour[0], colour[1], colour[2]


def _picture(item: Scene, panel: str) -> np.ndarray:
    if panel == "image":
        return item.image
    ids = getattr(item, panel)
    count = {"classes": len(CLASSES), "parts": len(PARTS), "instances": len(item.objects) + 1}[panel]
    palette = np.array([_shade(i, count) for i in range(count)])
    if panel == "instances":
        palette[0] = 0.9
    return palette[ids]
