"""What generated pictures show, per category and variant, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.plots import style
from mmdit_probe.plots.magnet import COLOURS, MARKS

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
    categories, variants = (list(dict.fromkeys(part[name])) for name in ("category", "variant"))
    with style.context():
        figure = style.figure(width=1.2 + 0.85 * len(categories), height=2.6)
        axes = figure.subplots()
        for place, name in enumerate(variants):
            rows = part[part["variant"] == name].set_index("category").loc[categories]
            error = [(rows["mean"] - rows["low"]).clip(lower=0), (rows["high"] - rows["mean"]).clip(lower=0)]
            x = [k + 0.7 * ((place + 0.5) / len(variants) - 0.5) for k in range(len(categories))]
            axes.errorbar(
                x, rows["mean"], yerr=error, fmt=MARKS[place % len(MARKS)], ms=4, color=COLOURS[place % len(COLOURS)],
                mec="black", mew=0.4, elinewidth=1, capsize=2, label=name,
            )  # fmt: skip
        axes.set_xticks(range(len(categories)), categories)
        axes.set_ylabel(metric.replace("_", " "))
        if len(variants) > 1:
            figure.legend(loc="outside lower center", ncols=len(variants))
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure
