"""Label maps as pictures: palette PNGs, overlays, and the sheets that show picture, labels and maps side by side.

    write_labels(labels, "labels.png")              # indexed PNG with a palette
    save(overlay_sheet(image, labels, names, shares), "overlay")

Colours repeat in no map of fewer than 24 names; a class of scenes has the same colour everywhere.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmdit_probe.plots import style
from mmdit_probe.plots.sheet import FONT, sheet, wrapped
from mmdit_probe.results.atomic import replacing
from mmdit_probe.scenes.world import CLASSES, PARTS, Scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNLABELLED = 255
"""Index of unlabelled pixels in a palette PNG (as in VOC)."""

_FIRST = ("#0076FF", "#EB8900", "#D814B1", "#623B4E", "#EB1400", "#B19DFF", "#FF9DC4", "#00764E", "#3CF53C", "#3B3B00",
          "#8DB36A", "#E8D5A6", "#1D3F73", "#8A8A8A", "#CFE6F7")  # fmt: skip
"""The classes of scenes, in their order: grounds near their own colours, things far from these and from each other in
CAM02-UCS (no pair nearer than 22, nor than 12 for deuteranopes, protanopes and tritanopes). Fifteen colours cannot
differ in grey print as well: hence borders, and names in the regions."""


def palette(count: int) -> NDArray[np.uint8]:
    """Colours [count, 3] by index: fifteen that are told apart, then hues by the golden angle in three lightnesses."""
    colours = [tuple(int(h[i : i + 2], 16) for i in (1, 3, 5)) for h in _FIRST]
    for index in range(len(colours), count):
        r, g, b = colorsys.hls_to_rgb((index * 0.61803) % 1.0, (0.35, 0.55, 0.72)[index % 3], 0.75)
        colours.append((int(255 * r), int(255 * g), int(255 * b)))
    return np.array(colours[:count], np.uint8).reshape(-1, 3)


def class_colours(names: Sequence[str]) -> NDArray[np.uint8]:
    """Colours [n, 3] by name: a class of scenes has the same in every picture; the rest take those that are left."""
    own = {name: CLASSES.index(name) for name in names if name in CLASSES}
    free = iter(index for index in range(len(names) + len(own)) if index not in own.values())
    return palette(len(names) + len(CLASSES))[[own[name] if name in own else next(free) for name in names]]


def write_labels(labels: NDArray[Any], path: Path | str, names: Sequence[str] = ()) -> Path:
    """An indexed 8-bit PNG of labels [H, W] (16-bit grey above 255 classes); unlabelled pixels are index 255, black.

    `names` give the indices the colours of their classes.

    Errors as in `results.atomic.replacing`. Returns the path.
    """
    seen = labels[labels != np.iinfo(labels.dtype).max]
    if seen.size and int(seen.max()) >= UNLABELLED:
        image = Image.fromarray(labels.astype(np.uint16))
    else:
        indexed = np.where(labels == np.iinfo(labels.dtype).max, UNLABELLED, labels).astype(np.uint8)
        image = Image.fromarray(indexed, mode="P")
        table = np.zeros((256, 3), np.uint8)
        table[:UNLABELLED] = palette(UNLABELLED)
        table[: len(names[:UNLABELLED])] = class_colours(names[:UNLABELLED])
        image.putpalette(table.ravel().tolist())
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
    return Path(path)


def blend(
    image: NDArray[np.uint8], labels: NDArray[Any], names: Sequence[str], opacity: float = 0.55
) -> NDArray[np.uint8]:
    """The picture [H, W, 3] tinted by its labels, indices into `names`, with the borders between labels drawn white."""
    known = labels < len(names)
    tint = class_colours(names)[np.where(known, labels, 0)]
    out = image * (1 - opacity) + tint * opacity
    out = np.where(known[..., None], out, image)
    if min(labels.shape) >= 128:
        out[borders(labels)] = 255
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def write_names(axes: Axes, labels: NDArray[Any], names: Sequence[str], side: float) -> None:
    """Each class's name where it fits into what is labelled so, of a map that is `side` inches wide."""
    from matplotlib.patheffects import withStroke
    from scipy.ndimage import distance_transform_edt, uniform_filter

    pixels = labels.shape[1] / (72 * side)  # per point
    for index in (index for index in np.unique(labels) if index < len(names)):
        box = (int(1.2 * FONT * pixels) + 1, int(0.62 * FONT * len(names[index]) * pixels) + 1)
        own = labels == index
        inside = uniform_filter(own.astype(np.float32), box, mode="constant")
        depth = distance_transform_edt(np.pad(own, 1))[1:-1, 1:-1]
        y, x = np.unravel_index((np.minimum(inside, 0.95) + 1e-3 * depth).argmax(), inside.shape)
        if inside[y, x] > 0.8:
            axes.text(x, y, style.name(names[index]), fontsize=FONT, ha="center", va="center", color="black",
                      parse_math=False, path_effects=[withStroke(linewidth=1.2, foreground="white")])  # fmt: skip


def borders(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """The first pixels [H, W] of other labels than to the left or above."""
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    return border


def overlay_sheet(
    image: NDArray[np.uint8], labels: NDArray[Any], names: list[str], shares: NDArray[np.floating], *, title: str = ""
) -> Figure:
    """Picture, label map and up to 11 probability maps [C, H, W] in one figure."""
    shown = min(11, len(shares))
    captions = [f"{name} (max {float(one.max()):.2f})" for name, one in zip(names[:shown], shares, strict=False)]
    cells, texts = wrapped(
        [image, blend(image, labels, names, 0.65), *shares[:shown]], ["picture", "labels", *captions], min(4, shown + 2)
    )
    colours = class_colours(names) / 255.0
    owned = [index for index in range(len(names)) if (labels == index).any()]
    legend = {f"{names[index]} {(labels == index).mean():.0%}": colours[index] for index in owned[:16]}
    drawn = sheet(cells, captions=texts, scale="own", side=1.5, legend=legend, title=title)
    write_names(drawn.axes[1], labels, names, 1.5)
    return drawn


NAMES = tuple(dict.fromkeys((*CLASSES, *PARTS)))
"""Of classes and parts, which share names where they share masks."""
SIDE = 0.9
"""Of a cell of the contact sheet in inches."""
PANELS = ("image", "classes", "instances", "parts")


def contact_sheet(items: Sequence[Scene], captions: Sequence[str]) -> Figure:
    """Figure with a row per scene: image, class mask, instance mask and part mask, the caption beside them.

    Args:
        items: scenes.
        captions: one text per scene.
    """
    cells = [[_picture(item, panel) for panel in PANELS] for item in items]
    legend = dict(zip(NAMES, class_colours(NAMES) / 255, strict=True))
    title = "classes and parts in the colours below; instances: a colour per object"
    drawn = sheet(cells, PANELS, captions, legend=legend, side=SIDE, title=title)
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
