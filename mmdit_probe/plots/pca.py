"""PCA maps and their scores, after Fig. 3 and 29 of arXiv:2509.18096.

    save(pca_maps(maps, images, kinds=["query", "key", "value"]), "pca_maps")
    save(pca_scores(summary), "pca_scores")

Not here: fitting and scoring (`observe.pca`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe.plots import style
from mmdit_probe.plots.sheet import sheet

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KINDS = ("query", "key", "value", "output")
"""In the order of the looks of `style`."""


def to_rgb(maps: Any) -> Any:
    """The first three components [n, h, w, k] as colours [n, h, w, 3] in 0..1, 2nd to 98th percentile over images; a
    single one in grey."""
    first = np.zeros((*maps.shape[:3], 3))
    first[..., : maps.shape[-1] if maps.shape[-1] > 1 else 3] = maps[..., :3]
    low, high = np.percentile(first, [2, 98], axis=(0, 1, 2))
    return np.clip((first - low) / np.maximum(high - low, 1e-12), 0, 1)


def pca_maps(
    maps: Mapping[tuple[int, str], Any], images: Sequence[Any], kinds: Sequence[str], *, each: bool = False,
    title: str = "",
) -> Figure:  # fmt: skip
    """One block of rows per image: a row per kind, a column per layer, three components as RGB, a single one in grey.

    Args:
        maps: (layer, kind) -> [n, h, w, k]. images: the n pictures.
        each: bases are per image: colours are scaled per image too.
    """
    layers = sorted({layer for layer, _ in maps})
    colours = {
        key: np.concatenate([to_rgb(value[i : i + 1]) for i in range(len(value))]) if each else to_rgb(value)
        for key, value in maps.items()
    }
    cells = [
        [image if kind == kinds[0] else None, *(colours[layer, kind][i] for layer in layers)]
        for i, image in enumerate(images)
        for kind in kinds
    ]
    columns = ["picture", *(f"layer {layer}" for layer in layers)]
    single = all(value.shape[-1] == 1 for value in maps.values())
    note = "grey: component 1" if single else "red, green, blue: components 1, 2, 3"
    note += f", on one scale {'per picture' if each else 'over pictures'}"
    return sheet(cells, columns, [*kinds] * len(images), title=title, note=note)


def pca_scores(summary: pd.DataFrame, *, title: str = "") -> Figure:
    """Class scores (with their control) and position score by layer, one line per kind of feature, 95 % intervals."""
    place = "position" if "position" in summary else "coordinates"  # a basis per picture has no mean map
    panels = {
        "class": ("linear probe of the class", "recall"),
        "silhouette": ("silhouette of the classes", "silhouette"),
        place: ("variance that position explains", "share") if place == "position" else ("row and column", "R²"),
    }
    panels = {name: words for name, words in panels.items() if name in summary}
    with style.panels(style.COLUMN if len(panels) == 1 else style.PAGE, 2.6, len(panels), title=title) as (figure, row):
        for axes, (name, (words, label)) in zip(row, panels.items(), strict=True):
            for number, kind in enumerate(KINDS):
                part = summary[summary["kind"] == kind]
                if part.empty:
                    continue
                at = part["layer"] + style.dodge(number, len(KINDS), 0.3)
                style.errorbars(axes, part, name, number, at=at, label=kind)
                if f"{name}_shuffled" in part:
                    axes.plot(at, part[f"{name}_shuffled"], style.MARKERS[number], ms=2.5, mfc="white",
                              mec=style.COLOURS[number], mew=0.6, clip_on=False)  # fmt: skip
            axes.set(title=words, ylabel=label)
            style.whole(axes)
            style.within(axes, "y", low=0)
        control = []
        if "class" in summary:
            (empty,) = row[0].plot([], [], "o", ms=2.5, mfc="white", mec="black", mew=0.6,
                                   label="another scene's classes (control)")  # fmt: skip
            control = [empty]
        style.legend(figure, row[0], handles=control)
    return figure
