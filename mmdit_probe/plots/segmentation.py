"""Label maps as pictures: palette PNGs, overlays, and the sheet that shows picture, labels and maps side by side.

    write_labels(labels, "labels.png")              # indexed PNG with a palette
    save(overlay_sheet(image, labels, names, shares), "overlay")

Colours repeat in no map of fewer than 24 names and stay the same for the same index.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNLABELLED = 255
"""Index of unlabelled pixels in a palette PNG (as in VOC)."""

_FIRST = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#666666",
          "#332288", "#882255", "#999933")  # fmt: skip


def palette(count: int) -> NDArray[np.uint8]:
    """Colours [count, 3] by index: Okabe and Ito's, three of Tol's, then hues by the golden angle in three
    lightnesses."""
    colours = [tuple(int(h[i : i + 2], 16) for i in (1, 3, 5)) for h in _FIRST]
    for index in range(len(colours), count):
        r, g, b = colorsys.hls_to_rgb((index * 0.61803) % 1.0, (0.35, 0.55, 0.72)[index % 3], 0.75)
        colours.append((int(255 * r), int(255 * g), int(255 * b)))
    return np.array(colours[:count], np.uint8).reshape(-1, 3)


def write_labels(labels: NDArray[Any], path: Path | str) -> Path:
    """An indexed 8-bit PNG of labels [H, W] (16-bit grey above 255 classes); unlabelled pixels are index 255, black.

    Written atomically. Returns the path.
    """
    from PIL import Image

    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    seen = labels[labels != np.iinfo(labels.dtype).max]
    if seen.size and int(seen.max()) >= UNLABELLED:
        image = Image.fromarray(labels.astype(np.uint16))
    else:
        indexed = np.where(labels == np.iinfo(labels.dtype).max, UNLABELLED, labels).astype(np.uint8)
        image = Image.fromarray(indexed, mode="P")
        table = np.zeros((256, 3), np.uint8)
        table[:UNLABELLED] = palette(UNLABELLED)
        image.putpalette(table.ravel().tolist())
    temporary = final.with_suffix(".tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, final)
    return final


def blend(image: NDArray[np.uint8], labels: NDArray[Any], opacity: float = 0.55) -> NDArray[np.uint8]:
    """The picture [H, W, 3] tinted by its labels, with the borders between labels drawn white."""
    known = labels < 255
    colours = palette(max(1, int(labels[known].max(initial=0)) + 1))
    tint = colours[np.where(known, labels, 0)]
    out = image * (1 - opacity) + tint * opacity
    out = np.where(known[..., None], out, image)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    if min(labels.shape) >= 128:
        out[border] = 255
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def overlay_sheet(
    image: NDArray[np.uint8],
    labels: NDArray[Any],
    names: list[str],
    shares: NDArray[np.floating],
    *,
    title: str = "",
    limit: int = 11,
) -> Figure:
    """Picture, label map and up to `limit` probability maps [C, H, W] in one figure."""
    from matplotlib.patches import Patch

    shown = min(limit, len(shares))
    columns = min(4, shown + 2)
    rows = -(-(shown + 2) // columns)
    ratio = image.shape[0] / image.shape[1]
    with style.context():
        width = 1.65 * columns
        figure = style.figure(width=width, height=rows * (1.65 * min(2.0, max(0.4, ratio)) + 0.2) + 0.7)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for one in axes:
            one.set_axis_off()
        axes[0].imshow(image)
        axes[0].set_title("picture")
        axes[1].imshow(blend(image, labels, 0.65), interpolation="nearest")
        axes[1].set_title("labels")
        for index in range(shown):
            drawn = axes[2 + index].imshow(shares[index], cmap="viridis", vmin=0)
            axes[2 + index].set_title(f"{names[index]} (max {float(shares[index].max()):.2f})", fontsize=7)
            drawn.set_rasterized(True)
        colours = palette(max(1, len(names))) / 255.0
        owned = [i for i in range(len(names)) if (labels == i).any()]
        handles = [Patch(color=tuple(colours[i]), label=f"{names[i]} {(labels == i).mean():.0%}") for i in owned[:16]]
        if handles:
            figure.legend(handles=handles, loc="outside lower left", ncols=min(4, len(handles)))
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


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
    from matplotlib.patches import Patch

    seen = [index for index in range(len(names)) if any((truth == index).any() for truth in truths)]
    colours = np.full((len(names) + 1, 3), 221, np.uint8)
    colours[seen] = palette(len(seen))  # few classes are told apart better than a data set's hundreds

    def paint(labels: NDArray[Any]) -> NDArray[np.uint8]:
        return colours[np.where(labels < len(names), labels, len(names))]

    columns = 2 + len(found)
    with style.context():
        side = min(1.0, 7.2 / columns)
        figure = style.figure(width=side * columns + 0.2, height=(side + 0.14) * len(pictures) + 0.9)
        grid = figure.subplots(len(pictures), columns, squeeze=False)
        for axes in grid.ravel():
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        for axes, name in zip(grid[0], ("picture", "truth", *found), strict=True):
            axes.set_title(name.replace(" + ", "\n+ "), fontsize=6)
        for row, picture, truth, *maps in zip(grid, pictures, truths, *found.values(), strict=True):
            row[0].imshow(picture, interpolation="nearest")
            row[1].imshow(paint(truth), interpolation="nearest")
            for axes, labels in zip(row[2:], maps, strict=True):
                axes.imshow(paint(labels), interpolation="nearest")
                known = truth < UNLABELLED
                axes.set_xlabel(f"{float((labels == truth)[known].mean()):.0%} right", fontsize=5, labelpad=1)
        handles = [Patch(color=tuple(colours[index] / 255), label=names[index]) for index in seen]
        handles.append(Patch(color=tuple(colours[-1] / 255), label="none"))
        figure.legend(handles=handles, loc="outside lower left", ncols=min(8, len(handles)), handlelength=1)
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure
