"""MAGNET in figures, after Tables 3 to 5 of arXiv:2509.18096: how a training went, and what a LoRA changed.

    save(differences(generation, "facts"), "table4_alignment")          # a table of `experiments.generation.compare`

Sheets of maps and pictures (Fig. 11 to 13) are those of `plots.sheet`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.plots import style
from mmdit_probe.plots.scores import by_category

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
        table: from `experiments.generation.compare`.
        metric: which of its metrics. baseline: what the differences are to; not drawn itself.
    """
    part = table[(table["metric"] == metric) & (table["variant"] != baseline)]
    label, _, checkpoint = metric.partition("[")
    label = METRICS.get(label, label) + (f" ({checkpoint.rstrip(']')})" if checkpoint else "")
    count = part.loc[part["category"] == "all", "prompts"].max()
    figure = by_category(
        part, "difference", f"difference to {style.name(baseline)}\n(paired, 95 % interval)",
        title or f"{label}, n = {count} prompts",
    )  # fmt: skip
    figure.axes[0].axhline(0, color="black", lw=0.6, ls=":")
    return figure
