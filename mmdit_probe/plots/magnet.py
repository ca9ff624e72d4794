"""Adapters in figures, after Tables 3 to 5 of arXiv:2509.18096: how a training went, what generated pictures show, and
what a LoRA changed.

    save(scores(comparison, "facts"), "scores")                         # a table of `experiments.score`
    save(differences(comparison, "facts", "base"), "table4_alignment")

Sheets of maps and pictures (Fig. 11 to 13) are those of `plots.sheet`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

METRICS = {"facts": "share of the prompt's facts shown", "all_right": "images with all facts right",
           "clipscore": "CLIPScore", "things_right": "objects right", "grounds_right": "grounds right"}  # fmt: skip


def training(log: pd.DataFrame, validation: pd.DataFrame, *, title: str = "") -> Figure:
    """The terms of the loss by step, and the held-out mIoU where there is one.

    Args:
        log: columns step, flow, focal, dice. validation: columns step and miou, or none.
    """
    held_out = validation.dropna(subset=["miou"]) if "miou" in validation else validation.iloc[:0]
    width, count = (style.COLUMN, 1) if held_out.empty else (style.PAGE, 2)
    with style.panels(width, 2.4, count, title=title) as (figure, (axes, *right)):
        for place, name in enumerate(("flow", "focal", "dice")):
            axes.plot(log["step"], log[name], color=style.COLOURS[place], ls=style.LINES[place], label=name)
        style.whole(axes, "step")
        axes.set(ylabel="loss", ylim=(0, None))
        style.legend(figure, axes)
        for panel in right:
            panel.plot(held_out["step"], held_out["miou"], color=style.COLOURS[3], marker="o", ms=3)
            style.whole(panel, "step")
            panel.set_ylabel(f"held-out mIoU (n = {held_out['n'].iloc[-1]:.0f})")
            style.within(panel, "y", 0, 1)
    return figure


def differences(table: pd.DataFrame, metric: str, baseline: str, *, title: str = "") -> Figure:
    """Paired difference to a baseline per category with its 95 % interval, one series per variant.

    Args:
        table: from `experiments.score.compare_variants`.
        metric: which of its metrics. baseline: what the differences are to; not drawn itself.
    """
    part = table[(table["metric"] == metric) & (table["variant"] != baseline)]
    label, _, checkpoint = metric.partition("[")
    label = METRICS.get(label, label) + (f" ({checkpoint.rstrip(']')})" if checkpoint else "")
    count = part.loc[part["category"] == "all", "prompts"].max()
    figure = by_category(
        part, "difference", f"difference to {style.name(baseline)}\n(paired)",
        title or f"{label}, n = {count} prompts",
    )  # fmt: skip
    figure.axes[0].axhline(0, color="black", lw=0.6, ls=":")
    return figure


def scores(table: pd.DataFrame, metric: str, *, title: str = "") -> Figure:
    """Mean of a metric per category with its 95 % interval, one series per variant.

    Args:
        table: columns variant, category, metric, mean, low, high; prompts, where the ticks shall tell how many.
        metric: which of its metrics.
    """
    part = table[table["metric"] == metric]
    return by_category(part, "mean", style.name(metric.replace("_", " ")), title)


def by_category(part: pd.DataFrame, value: str, label: str, title: str) -> Figure:
    """One series per variant over the categories: a column and its interval, as `style.errorbars` takes them."""
    categories, variants = (list(dict.fromkeys(part[name])) for name in ("category", "variant"))
    with style.panels(max(style.COLUMN, 1.0 + 0.8 * len(categories)), 2.7, title=title) as (figure, axes):
        for place, name in enumerate(variants):
            rows = part[part["variant"] == name].set_index("category").loc[categories]
            at = np.arange(len(categories)) + style.dodge(place, len(variants), 0.7)
            style.errorbars(axes, rows, value, place, at=at, label=name, joined=False)
        counts = dict(part.groupby("category")["prompts"].max()) if "prompts" in part else {}
        told = [style.name(one) + (f"\nn = {counts[one]}" if one in counts else "") for one in categories]
        axes.set_xticks(range(len(categories)), told)
        axes.set_ylabel(label)
        style.legend(figure, axes)
    return figure
