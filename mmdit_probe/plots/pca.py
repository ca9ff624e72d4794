"""PCA maps and their scores, after Fig. 3 and 29 of arXiv:2509.18096.

    save(pca_maps(maps, images, kinds=["query", "key", "value"]), "pca_maps")
    save(pca_scores(summary), "pca_scores")

Not here: fitting and scoring (`mmdit_probe.observe.pca`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KIND_STYLE = {
    "query": (style.IMAGE, "o", "-"),
    "key": (style.TEXT, "s", "--"),
    "value": ("#000000", "^", "-."),
    "output": ("#CC79A7", "D", ":"),
}


def to_rgb(maps: Any) -> Any:
    """The first three components [n, h, w, k] as colours [n, h, w, 3] in 0..1, 2nd to 98th percentile over images."""
    first = np.zeros((*maps.shape[:3], 3))
    first[..., : min(3, maps.shape[-1])] = maps[..., :3]
    low, high = np.percentile(first, [2, 98], axis=(0, 1, 2))
    return np.clip((first - low) / np.maximum(high - low, 1e-12), 0, 1)


def pca_maps(
    maps: Mapping[tuple[int, str], Any], images: Sequence[Any], kinds: Sequence[str], *, each: bool = False,
    title: str = "",
) -> Figure:  # fmt: skip
    """One block of rows per image: a row per kind, a column per layer, three components as RGB.

    Args:
        maps: (layer, kind) -> [n, h, w, k]. images: the n pictures.
        each: bases are per image: colours are scaled per image too.
    """
    layers = sorted({layer for layer, _ in maps})
    colours = {
        key: np.concatenate([to_rgb(value[i : i + 1]) for i in range(len(value))]) if each else to_rgb(value)
        for key, value in maps.items()
    }
    rows = len(images) * len(kinds)
    with style.context():
        side = min(0.7, 9.5 / (len(layers) + 1))
        figure = style.figure(width=0.6 + side * (len(layers) + 1), height=0.45 + (side + 0.03) * rows)
        grid = figure.subplots(rows, len(layers) + 1, squeeze=False)
        for axes in grid.ravel():
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        for k, layer in enumerate(layers):
            grid[0, k + 1].set_title(f"layer {layer}", fontsize=6)
        for i, image in enumerate(images):
            grid[i * len(kinds), 0].imshow(image, interpolation="nearest")
            for j, kind in enumerate(kinds):
                row = grid[i * len(kinds) + j]
                row[1].set_ylabel(kind, fontsize=6)
                for k, layer in enumerate(layers):
                    row[k + 1].imshow(colours[layer, kind][i], interpolation="nearest")
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def pca_scores(summary: pd.DataFrame, *, title: str = "") -> Figure:
    """Class scores (with their control) and position score by layer, one line per kind of feature, 95 % intervals."""
    from matplotlib.ticker import MaxNLocator

    place = "position" if "position" in summary else "coordinates"  # a basis per picture has no mean map
    panels = [
        ("class", "linear probe of the class: recall"),
        ("silhouette", "silhouette of the classes"),
        (place, "variance that position explains" if place == "position" else "R² of row and column"),
    ]
    panels = [(name, label) for name, label in panels if name in summary]
    with style.context():
        figure = style.figure(width=0.4 + 3.0 * len(panels), height=2.7)
        for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for kind, (colour, marker, line) in KIND_STYLE.items():
                part = summary[summary["kind"] == kind]
                if part.empty:
                    continue
                axes.plot(part["layer"], part[name], line, marker=marker, ms=3, color=colour, lw=1, label=kind)
                axes.fill_between(
                    part["layer"], part[f"{name}_low"], part[f"{name}_high"], color=colour, alpha=0.15, lw=0
                )
                if f"{name}_shuffled" in part:
                    axes.plot(part["layer"], part[f"{name}_shuffled"], marker, ms=2.5, mfc="white", mec=colour, mew=0.6)
            axes.set(title=label, xlabel="layer", ylim=(min(0, axes.get_ylim()[0]), None))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = axes.get_legend_handles_labels()
        if "class" in summary:
            (empty,) = axes.plot([], [], "o", ms=2.5, mfc="white", mec="black", mew=0.6)
            handles, labels = [*handles, empty], [*labels, "another scene's classes (control)"]
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure
