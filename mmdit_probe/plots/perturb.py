"""The figures of perturbation and of perturbed guidance, after Fig. 5, 6, 18 and 32 of arXiv:2509.18096.

    save(effects_by_layer(summarise(table), outcomes=["facts", "change"]), "perturb")

Not here: any averaging; the numbers come from `experiments.perturb.summarise` and `experiments.generate.summarise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from mmdit_probe.plots import style
from mmdit_probe.results.statistics import BEYOND, NONE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "facts": "share of the prompt's facts shown",
    "things_right": "objects right",
    "grounds_right": "grounds right",
    "relation": "relation as stated",
    "opposite_relation": "opposite relation",
    "count": "count as stated",
    "wrong_count": "wrong count",
    "colours": "colours as stated",
    "swapped_colours": "colours swapped",
    "change": "change of pixels (RMS)",
    "relabelled": "pixels read as another class",
    "clip_t": "CLIP-T (image and prompt)",
    "clip_i": "CLIP-I (with the unedited image)",
    "dino": "DINO (with the unedited image)",
}

EQUAL = {"budget": "coherent change of equal size", "noise": "noise of equal size"}
"""Names of the controls of equal size in legends."""


def effects_by_layer(summary: pd.DataFrame, outcomes: Sequence[str], *, title: str = "") -> Figure:
    """One panel per outcome: effect of editing each layer, with its interval, beside the control of equal size.

    Args:
        summary: from `summarise`, of whole layers.
        outcomes: which, in order; those that were not measured, or of no prompt, are left out.
    """
    whole = summary[(summary["head"] == -1) & (summary["span"] == "all") & (summary["n"] > 0)]
    shown = [name for name in outcomes if name in set(whole["outcome"])]
    across = min(3, len(shown)) if len(shown) != 4 else 2
    down = -(-len(shown) // across)
    with style.context():
        figure = style.figure(max(style.COLUMN, style.PAGE * across / 3), 0.6 + 1.9 * down)
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes, name in zip(grid, shown, strict=False):
            part = whole[whole["outcome"] == name].sort_values("layer")
            edited, idle = part[part["layer"] >= 0], part[part["layer"] < 0]
            axes.axhline(0, color="black", lw=0.6, ls=":")
            series = {"effect": "edit"}
            if "control" in part and part["control"].notna().any():
                series["control"] = "control: a change of equal size"
            for place, (value, label) in enumerate(series.items()):
                style.errorbars(axes, edited, value, place, of=len(series), label=label, joined=False, hollow=place > 0)
            if len(idle):
                axes.plot(idle["layer"], idle["effect"], "x", ms=5, color="black", label="no-op (left of layer 0)")
            axes.set(title=fill(LABELS.get(name, name), 28), ylabel="difference from unedited")
            style.whole(axes, "edited layer")
        style.legend(figure, grid[0])
        style.headline(figure, title)
    return figure


def effects_grid(summary: pd.DataFrame, outcome: str, *, title: str = "") -> Figure:
    """Layer x head (or layer x span kind) heat map of one outcome; a dot marks places beyond their control."""
    part = summary[(summary["outcome"] == outcome) & (summary["layer"] >= 0)]
    column = "head" if part["head"].nunique() > 1 else "span"
    grid = part.pivot(index="layer", columns=column, values="effect")
    marks = part.pivot(index="layer", columns=column, values="verdict")
    top = float(grid.abs().max().max()) or 1.0
    width, height = max(style.COLUMN, 1.4 + 0.4 * len(grid.columns)), 1.3 + 0.22 * len(grid.index)
    with style.panels(width, height, title=title) as (figure, axes):
        shown = style.heat(axes, grid, low=-top, high=top, colours="PuOr", decimals=2)
        for y, row in enumerate(marks.to_numpy()):
            for x, verdict in enumerate(row):
                if verdict == BEYOND:
                    axes.plot(x + 0.88, y + 0.2, "o", ms=2.5, color="black", mec="white", mew=0.4,
                              label="" if axes.lines else "beyond its control")  # fmt: skip
        axes.set_title(LABELS.get(outcome, outcome))
        figure.colorbar(shown, ax=axes)
        style.legend(figure, axes)
    return figure


def guidance_sweep(summary: pd.DataFrame, *, title: str = "") -> Figure:
    """Gain in alignment (or, without a measure of it, change) over stock, paired, against the guidance scale.

    Args:
        summary: from `experiments.generate.summarise`. Hollow markers are controls of equal size.
    """
    name = next((n for n in ("facts", "clip_t") if n in set(summary["outcome"])), "change")
    with style.panels(style.COLUMN, 2.7, title=title) as (figure, axes):
        guided = over_stock(axes, summary, name)
        for place, (key, rows) in enumerate(guided.groupby(["layers", "control"], observed=True)):
            rows, control = rows.sort_values("scale"), str(key[1])
            label = f"layer {key[0]}{equal_size(control)}"
            style.errorbars(axes, rows, "difference", place, at="scale", label=label, hollow=control != NONE)
        axes.set_xlabel("scale of the perturbed guidance")
        axes.set_xticks(sorted(set(guided["scale"])))
        style.legend(figure, axes)
    return figure


def equal_size(control: str) -> str:
    """What a legend adds for a control of equal size."""
    return "" if control == NONE else f", {EQUAL.get(control, control)}"


def over_stock(axes: Axes, summary: pd.DataFrame, name: str) -> pd.DataFrame:
    """Label the axes as differences from stock, whose own mean the title tells; the rows of guided images."""
    part = summary[summary["outcome"] == name]
    stock = part.loc[part["layers"] == "", "mean"]
    axes.axhline(0, color="black", lw=0.7, ls=":", label="stock")
    told = "" if name == "change" or stock.empty else f"\nstock: {float(stock.iloc[0]):.3f}"
    axes.set(title=f"{LABELS.get(name, name)}{told}", ylabel="difference from stock")
    return part[part["layers"] != ""]


def block_effects(summary: pd.DataFrame, outcomes: Sequence[str], *, title: str = "") -> Figure:
    """One panel per outcome: difference from stock by layer, a series per operation on the block.

    Args:
        summary: from `experiments.block_operations.summarise`.
    """
    names = list(dict.fromkeys(summary["condition"]))
    width = style.PAGE if len(outcomes) > 1 else style.COLUMN
    with style.panels(width, 2.6, len(outcomes), title=title) as (figure, panels):
        for axes, outcome in zip(panels, outcomes, strict=True):
            axes.axhline(0, color="black", lw=0.6, ls=":")
            for number, name in enumerate(names):
                part = summary[(summary["outcome"] == outcome) & (summary["condition"] == name)].sort_values("layer")
                style.errorbars(axes, part, "difference", number, of=len(names), label=name, joined=False)
            axes.set(title=LABELS.get(outcome, outcome), ylabel="difference from stock")
            style.whole(axes, "block")
        style.legend(figure, panels[0])
    return figure
