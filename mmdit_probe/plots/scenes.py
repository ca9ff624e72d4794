"""Contact sheet of the scenes world: each image with its caption, class mask, instance mask and part mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmdit_probe.plots.segmentation import palette
from mmdit_probe.plots.sheet import sheet
from mmdit_probe.scenes.world import CLASSES, PARTS, Scene

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = ("image", "classes", "instances", "parts")


def contact_sheet(items: Sequence[Scene], captions: Sequence[str]) -> Figure:
    """Figure with a row per scene: image, class mask, instance mask and part mask, the caption beside them.

    Args:
        items: scenes.
        captions: one text per scene.
    """
    cells = [[_picture(item, panel) for panel in PANELS] for item in items]
    legend = dict(zip(CLASSES, palette(len(CLASSES)) / 255, strict=True))
    return sheet(cells, PANELS, captions, legend=legend, side=0.6)


def _picture(item: Scene, panel: str) -> np.ndarray:
    if panel == "image":
        return item.image
    ids = getattr(item, panel)
    count = {"classes": len(CLASSES), "parts": len(PARTS), "instances": len(item.objects) + 1}[panel]
    colours = palette(count)
    if panel == "instances":
        colours[0] = 230
    return colours[ids]
