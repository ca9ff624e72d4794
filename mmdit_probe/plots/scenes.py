"""Contact sheet of the scenes world: each image with its caption, class mask, instance mask and part mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmdit_probe.plots.segmentation import class_colours, palette, write_names
from mmdit_probe.plots.sheet import sheet
from mmdit_probe.scenes.world import CLASSES, PARTS, Scene

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = tuple(dict.fromkeys((*CLASSES, *PARTS)))
"""Of classes and parts, which share names where they share masks."""
SIDE = 0.9
"""Of a cell in inches."""
PANELS = ("image", "classes", "instances", "parts")


def contact_sheet(items: Sequence[Scene], captions: Sequence[str]) -> Figure:
    """Figure with a row per scene: image, class mask, instance mask and part mask, the caption beside them.

    Args:
        items: scenes.
        captions: one text per scene.
    """
    cells = [[_picture(item, panel) for panel in PANELS] for item in items]
    legend = dict(zip(NAMES, class_colours(NAMES) / 255, strict=True))
    drawn = sheet(cells, PANELS, captions, legend=legend, side=SIDE)
    for number, item in enumerate(items):
        for panel, names in (("classes", CLASSES), ("parts", PARTS)):
            axes = drawn.axes[number * len(PANELS) + PANELS.index(panel)]
            write_names(axes, getattr(item, panel), names, SIDE)
    return drawn


def _picture(item: Scene, panel: str) -> np.ndarray:
    if panel == "image":
        return item.image
    if panel == "instances":
        colours = palette(len(item.objects) + 1)
        colours[0] = 230
        return colours[item.instances]
    names = CLASSES if panel == "classes" else PARTS
    return class_colours(NAMES)[[NAMES.index(name) for name in names]][getattr(item, panel)]
