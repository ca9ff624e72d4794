"""MAGNET in figures, after Fig. 10 of arXiv:2509.18096 and its Tables 3 to 5: the pipeline, and what a LoRA changed.

    save(pipeline(parts), "fig10_pipeline")
    save(differences(generation, "facts"), "table4_alignment")          # a table of `experiments.generation.compare`

Sheets of maps and pictures (Fig. 11 to 13) are those of `plots.sheet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe.plots import style
from mmdit_probe.plots.sheet import draw

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

METRICS = {"facts": "share of the prompt's facts shown", "all_right": "images with all facts right",
           "clipscore": "CLIPScore", "things_right": "objects right", "grounds_right": "grounds right"}  # fmt: skip


def pipeline(steps: Sequence[tuple[str, Any]], *, title: str = "") -> Figure:
    """A row of stages with arrows between them: pictures, maps, or, without either, a box that holds the name.

    Args:
        steps: (name, picture uint8 [H, W, 3], map [h, w], or None for a box); a name that starts with "+" stands for a
            second input of the next stage and has no arrow before it.
    """
    with style.context():
        figure = style.figure(1.1 * len(steps), 1.65)
        places = figure.subplots(1, len(steps), squeeze=False)[0]
        for index, (axes, (name, content)) in enumerate(zip(places, steps, strict=True)):
            draw(axes, content)
            text = style.name(name.removeprefix("+ "))
            if content is None:
                axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=6, transform=axes.transAxes)
                axes.spines[:].set_visible(True)
            else:
                axes.set_title(text, fontsize=6, loc="center")
            if index:
                sign = "+" if name.startswith("+ ") else "→"
                axes.text(-0.14, 0.5, sign, ha="center", va="center", fontsize=11, transform=axes.transAxes)
        style.title(figure, title)
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
    label, _, checkpoint = metric.partition("[")
    label = METRICS.get(label, label) + (f" ({checkpoint.rstrip(']')})" if checkpoint else "")
    count = part.loc[part["category"] == "all", "prompts"].max()
    with style.context():
        figure = style.figure(max(style.COLUMN, 1.0 + 0.8 * len(categories)), 2.7)
        axes = figure.subplots()
        axes.axhline(0, color="black", lw=0.6, ls=":")
        for place, name in enumerate(variants):
            rows = part[part["variant"] == name].set_index("category").loc[categories]
            at = np.arange(len(categories)) + style.dodge(place, len(variants), 0.7)
            style.errorbars(axes, at, rows["difference"], rows["difference_low"], rows["difference_high"], place,
                            label=name, joined=False)  # fmt: skip
        axes.set_xticks(range(len(categories)), [style.name(one) for one in categories])
        axes.set_ylabel(f"difference to {style.name(baseline)}\n(paired, 95 % interval)")
        style.legend(figure, axes)
        style.title(figure, title or f"{label}, n = {count} prompts")
    return figure
