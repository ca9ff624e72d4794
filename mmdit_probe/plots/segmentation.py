"""Label maps as pictures: palette PNGs, overlays, and the sheets that show picture, labels and maps side by side.

    write_labels(labels, "labels.png")              # indexed PNG with a palette
    save(overlay_sheet(image, labels, names, shares), "overlay")

Colours repeat in no map of fewer than 24 names and stay the same for the same index.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmdit_probe.plots.sheet import sheet, wrapped
from mmdit_probe.results.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNLABELLED = 255
"""Index of unlabelled pixels in a palette PNG (as in VOC)."""

_FIRST = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#666666",
          "#000088", "#333300", "#0022FF", "#88CC88", "#FFFFBB", "#443388")  # fmt: skip


def palette(count: int) -> NDArray[np.uint8]:
    """Colours [count, 3] by index: Okabe and Ito's; six that lie farthest from them and each other in CAM02-UCS, also
    as deuteranopes and protanopes see them (no pair nearer than 12.7); then hues by the golden angle in three
    lightnesses."""
    colours = [tuple(int(h[i : i + 2], 16) for i in (1, 3, 5)) for h in _FIRST]
    for index in range(len(colours), count):
        r, g, b = colorsys.hls_to_rgb((index * 0.61803) % 1.0, (0.35, 0.55, 0.72)[index % 3], 0.75)
        colours.append((int(255 * r), int(255 * g), int(255 * b)))
    return np.array(colours[:count], np.uint8).reshape(-1, 3)


def write_labels(labels: NDArray[Any], path: Path | str) -> Path:
    """An indexed 8-bit PNG of labels [H, W] (16-bit grey above 255 classes); unlabelled pixels are index 255, black.

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
        image.putpalette(table.ravel().tolist())
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
    return Path(path)


def blend(image: NDArray[np.uint8], labels: NDArray[Any], opacity: float = 0.55) -> NDArray[np.uint8]:
    """The picture [H, W, 3] tinted by its labels, with the borders between labels drawn white."""
    known = labels < 255
    colours = palette(max(1, int(labels[known].max(initial=0)) + 1))
    tint = colours[np.where(known, labels, 0)]
    out = image * (1 - opacity) + tint * opacity
    out = np.where(known[..., None], out, image)
    if min(labels.shape) >= 128:
        out[_borders(labels)] = 255
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def _borders(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """The first pixels [H, W] of other labels than to the left or above."""
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    return border


def overlay_sheet(
    image: NDArray[np.uint8], labels: NDArray[Any], names: list[str], shares: NDArray[np.floating], *,
    title: str = "", limit: int = 11,
) -> Figure:  # fmt: skip
    """Picture, label map and up to `limit` probability maps [C, H, W] in one figure."""
    shown = min(limit, len(shares))
    captions = [f"{name} (max {float(one.max()):.2f})" for name, one in zip(names[:shown], shares, strict=False)]
    cells, texts = wrapped(
        [image, blend(image, labels, 0.65), *shares[:shown]], ["picture", "labels", *captions], min(4, shown + 2)
    )
    colours = palette(max(1, len(names))) / 255.0
    owned = [index for index in range(len(names)) if (labels == index).any()]
    legend = {f"{names[index]} {(labels == index).mean():.0%}": colours[index] for index in owned[:16]}
    return sheet(cells, captions=texts, scale="own", side=1.5, legend=legend, title=title)


def mask_sheet(
    pictures: Sequence[NDArray[np.uint8]], truths: Sequence[NDArray[Any]], found: Mapping[str, Sequence[NDArray[Any]]],
    names: Sequence[str], *, title: str = "",
) -> Figure:  # fmt: skip
    """Label maps beside the truth, after Fig. 7, 11 and 34 to 39: a row per picture, a column per method.

    Args:
        pictures: uint8 [H, W, 3]. truths: class ids [H, W] per picture, 255 where there is none.
        found: method -> class ids [H, W] per picture; 255, drawn grey, is no class. Under each map stands the share of
            the labelled pixels that are right.
        names: of the classes, for the legend.
    """
    seen = [index for index in range(len(names)) if any((truth == index).any() for truth in truths)]
    colours = np.full((len(names) + 1, 3), 221, np.uint8)
    colours[seen] = palette(len(seen))  # few classes are told apart better than a data set's hundreds

    def paint(labels: NDArray[Any]) -> NDArray[np.uint8]:
        fine = np.kron(labels, np.ones((-(-192 // len(labels)),) * 2, labels.dtype))  # so that borders are thin
        painted = colours[np.where(fine < len(names), fine, len(names))]
        painted[_borders(fine)] = 0  # in grey print, classes of like lightness meet
        return painted

    def right(labels: NDArray[Any], truth: NDArray[Any]) -> str:
        return f"{float((labels == truth)[truth < UNLABELLED].mean()):.0%} right"

    cells, below = [], []
    for picture, truth, *maps in zip(pictures, truths, *found.values(), strict=True):
        cells.append([picture, paint(truth), *map(paint, maps)])
        below.append(["", "", *(right(labels, truth) for labels in maps)])
    legend = {names[index]: tuple(colours[index] / 255) for index in seen} | {"none": tuple(colours[-1] / 255)}
    columns = ["picture", "truth", *(name.replace(" + ", "\n+ ", 1) for name in found)]
    return sheet(cells, columns, below=below, legend=legend, title=title)
