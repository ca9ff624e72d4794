"""What generated pictures show, per category and variant, with intervals.

    save(scores(table, "facts"), "generate")

Differences to a baseline are those of `plots.magnet`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def scores(table: pd.DataFrame, metric: str, *, title: str = "") -> Figure:
    """Mean of a metric per category with its 95 % interval, one series per variant.

    Args:
        table: columns variant, category, metric, mean, low, high.
        metric: which of its metrics.
    """
    part = table[table["metric"] == metric]
    return by_category(part, "mean", f"{style.name(metric.replace('_', ' '))}\n(95 % interval)", title)


def by_category(part: pd.DataFrame, value: str, label: str, title: str) -> Figure:
    """One series per variant over the categories: a column and its interval, as `style.errorbars` takes them."""
    categories, variants = (list(dict.fromkeys(part[name])) for name in ("category", "variant"))
    with style.panels(max(style.COLUMN, 1.0 + 0.8 * len(categories)), 2.7, title=title) as (figure, axes):
        for place, name in enumerate(variants):
            rows = part[part["variant"] == name].set_index("category").loc[categories]
            at = np.arange(len(categories)) + style.dodge(place, len(variants), 0.7)
            style.errorbars(axes, rows, value, place, at=at, label=name, joined=False)
        axes.set_xticks(range(len(categories)), [style.name(one) for one in categories])
        axes.set_ylabel(label)
        if len(variants) > 1:
            style.legend(figure, axes)
    return figure
