"""MAGNET in figures, after Fig. 10 of arXiv:2509.18096 and its Tables 3 to 5: the pipeline, and what a LoRA changed.

    save(pipeline(parts), "fig10_pipeline")
    save(differences(generation, "facts"), "table4_alignment")          # a table of `experiments.generation.compare`

Sheets of maps and pictures (Fig. 11 to 13) are those of `plots.maps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MARKS = "os^Dv<>p"
COLOURS = ("#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#999999")


def pipeline(steps: Sequence[tuple[str, Any]], *, title: str = "") -> Figure:
    """A row of stages with arrows between them: pictures, maps, or, without either, a box that holds the name.

    Args:
        steps: (name, picture uint8 [H, W, 3], map [h, w], or None for a box); a name that starts with "+" stands for a
            second input of the next stage and has no arrow before it.
    """
    import numpy as np

    with style.context():
        figure = style.figure(width=1.25 * len(steps), height=1.65)
        places = figure.subplots(1, len(steps), squeeze=False)[0]
        for index, (axes, (name, content)) in enumerate(zip(places, steps, strict=True)):
            axes.set_xticks([])
            axes.set_yticks([])
            text = name.removeprefix("+ ")
            if content is None:
                axes.set_box_aspect(1)
                axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=6, transform=axes.transAxes)
                axes.spines[:].set_visible(True)
            else:
                shown = {"vmin": 0, "cmap": "viridis"} if np.ndim(content) == 2 else {}
                axes.imshow(content, interpolation="nearest", **shown)
                axes.set_title(text, fontsize=6)
                axes.spines[:].set_visible(False)
            if index:
                sign = "+" if name.startswith("+ ") else "→"
                axes.text(-0.14, 0.5, sign, ha="center", va="center", fontsize=11, transform=axes.transAxes)
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def differences(table: pd.DataFrame, metric: str, baseline: str, *, title: str = "") -> Figure:
    """Paired difference to a baseline per category with its 95 % interval, one series per variant.

    Args:
        table: from `experiments.generation.compare`.
        metric: which of its metrics. baseline: what the differences are to; not drawn itself.
    """
    part = table[(table["metric"] == metric) & (table["variant"] != baseline)]
    categories = list(dict.fromkeys(part["category"]))
    variants = list(dict.fromkeys(part["variant"]))
    with style.context():
        figure = style.figure(width=1.2 + 0.85 * len(categories), height=2.6)
        axes = figure.subplots()
        axes.axhline(0, color="black", lw=0.6, ls=":")
        for place, name in enumerate(variants):
            rows = part[part["variant"] == name].set_index("category").loc[categories]
            middle = rows["difference"]
            error = [middle - rows["difference_low"], rows["difference_high"] - middle]
            x = [k + 0.7 * ((place + 0.5) / len(variants) - 0.5) for k in range(len(categories))]
            axes.errorbar(x, middle, yerr=error, fmt=MARKS[place % 8], ms=4, color=COLOURS[place % 8], mec="black",
                          mew=0.4, elinewidth=1, capsize=2, label=name)  # fmt: skip
        axes.set_xticks(range(len(categories)), categories)
        axes.set_ylabel(f"{metric}\ndifference to {baseline}")
        figure.legend(loc="outside lower center", ncols=len(variants))
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure
