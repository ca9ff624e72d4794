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
    return by_category(part, ("mean", "low", "high"), f"{style.name(metric.replace('_', ' '))}\n(95 % interval)", title)


def by_category(part: pd.DataFrame, columns: tuple[str, str, str], label: str, title: str) -> Figure:
    """One series per variant over the categories; `columns` hold its values and both ends of their intervals."""
    categories, variants = (list(dict.fromkeys(part[name])) for name in ("category", "variant"))
    with style.panels(max(style.COLUMN, 1.0 + 0.8 * len(categories)), 2.7, title=title) as (figure, axes):
        for place, name in enumerate(variants):
            rows = part[part["variant"] == name].set_index("category").loc[categories]
            at = np.arange(len(categories)) + style.dodge(place, len(variants), 0.7)
            middle, low, high = (rows[column] for column in columns)
            style.errorbars(axes, at, middle, low, high, place, label=name, joined=False)
        axes.set_xticks(range(len(categories)), [style.name(one) for one in categories])
        axes.set_ylabel(label)
        if len(variants) > 1:
            style.legend(figure, axes)
    return figure


def map_scores(table: pd.DataFrame, *, title: str = "") -> Figure:
    """mIoU of word maps by layer: a panel per noise level, a line per stream of text tokens, raw and stretched.

    Args:
        table: columns stream, layer, sigma, min_max, miou, ceiling.
    """
    levels = list(table.groupby("sigma", observed=True))
    width = max(style.COLUMN, 2.2 * len(levels))
    with style.panels(width, 2.7, len(levels), title=title, sharey=True) as (figure, row):
        for axes, (sigma, part) in zip(row, levels, strict=True):
            for place, (key, line) in enumerate(part.groupby(["stream", "min_max"], observed=True, sort=False)):
                rows, words = line.sort_values("layer"), f"{key[0]} tokens{', min-max' if key[1] else ''}"
                nothing = np.full(len(rows), np.nan)
                style.errorbars(axes, rows["layer"], rows["miou"], nothing, nothing, place, label=words)
            axes.axhline(float(part["ceiling"].iloc[0]), color="black", lw=0.9, label="token-grid ceiling")
            axes.set_title(f"sigma {sigma:g}")
            style.whole(axes)
            style.within(axes, "y", 0, 1)
        row[0].set_ylabel("mIoU of the classes present")
        style.legend(figure, *row)
    return figure
