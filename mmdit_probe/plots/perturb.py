"""The perturbation experiment's figures, after Fig. 5 and 18 of arXiv:2509.18096.

    save(contact_sheet(images, columns=["none", "layer 3"], rows=prompts), "perturb_sheet")
    save(effects_by_layer(summarise(table), outcomes=["facts", "change"]), "perturb")

Not here: any averaging; the numbers come from `mmdit_probe.edit.perturb.summarise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LABELS = {
    "facts": "share of the prompt's facts shown",
    "things_right": "objects right",
    "grounds_right": "grounds right",
    "change": "change of pixels (RMS)",
    "relabelled": "pixels read as another class",
    "clip_t": "CLIP-T (image and prompt)",
    "clip_i": "CLIP-I (with the unedited image)",
    "dino": "DINO (with the unedited image)",
}
COMPARED = ("change", "relabelled")


def contact_sheet(
    images: Sequence[Sequence[Any]], columns: Sequence[str], rows: Sequence[str], *, title: str = ""
) -> Figure:
    """A grid of images, one row per prompt and seed.

    Args:
        images: per row, one PIL image or array per column (None leaves the cell empty).
        columns: titles. rows: the prompts.
    """
    with style.context():
        side = min(0.85, 9.0 / max(1, len(columns)))
        figure = style.figure(width=1.0 + side * len(columns), height=0.45 + (side + 0.06) * len(rows))
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for axes, name in zip(grid[0], columns, strict=True):
            axes.set_title(name, fontsize=6)
        for axes_row, prompt, cells in zip(grid, rows, images, strict=True):
            for axes, cell in zip(axes_row, cells, strict=True):
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if cell is not None:
                    axes.imshow(cell, interpolation="nearest")
            axes_row[0].set_ylabel(fill(prompt or "(empty)", 20), fontsize=5, rotation=0, ha="right", va="center")
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def effects_by_layer(summary: pd.DataFrame, outcomes: Sequence[str], *, title: str = "") -> Figure:
    """One panel per outcome: effect of editing each layer, with its interval, beside the random control of equal size.

    Args:
        summary: from `summarise`, of whole layers.
        outcomes: which, in order; those that were not measured are left out.
    """
    from matplotlib.ticker import MaxNLocator

    whole = summary[(summary["head"] == -1) & (summary["span"] == "all")]
    shown = [name for name in outcomes if name in set(whole["outcome"])]
    across = min(3, len(shown)) if len(shown) != 4 else 2
    down = -(-len(shown) // across)
    with style.context():
        figure = style.figure(width=0.4 + 2.4 * across, height=0.5 + 2.0 * down)
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes, name in zip(grid, shown, strict=False):
            part = whole[whole["outcome"] == name].sort_values("layer")
            axes.axhline(0, color="black", lw=0.6, ls=":")
            series = [("effect", "low", "high", style.TEXT, "o", -0.12, "edit")]
            if "control" in part and part["control"].notna().any():
                series.append(
                    ("control", "control_low", "control_high", style.OTHER, "s", 0.12, "random, equal budget")
                )
            for middle, low, high, colour, marker, shift, label in series:
                edited = part[part["layer"] >= 0]
                error = [edited[middle] - edited[low], edited[high] - edited[middle]]
                axes.errorbar(edited["layer"] + shift, edited[middle], yerr=error, fmt=marker, ms=4, color=colour,
                              ecolor=colour, elinewidth=1, capsize=2, mec="black", mew=0.4, label=label)  # fmt: skip
            idle = part[part["layer"] < 0]
            if len(idle):
                axes.plot(idle["layer"], idle["effect"], "x", ms=5, color="black", label="no-op (at -1)")
            axes.set_xlabel("edited layer")
            axes.set_title(LABELS.get(name, name), fontsize=7)
            axes.set_ylabel("difference from unedited")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def effects_grid(summary: pd.DataFrame, outcome: str, *, title: str = "") -> Figure:
    """Layer x head (or layer x span kind) heat map of one outcome; a dot marks places beyond their control."""
    part = summary[(summary["outcome"] == outcome) & (summary["layer"] >= 0)]
    column = "head" if part["head"].nunique() > 1 else "span"
    grid = part.pivot(index="layer", columns=column, values="effect")
    marks = part.pivot(index="layer", columns=column, values="verdict")
    top = float(grid.abs().max().max()) or 1.0
    with style.context():
        figure = style.figure(width=1.6 + 0.45 * len(grid.columns), height=1.0 + 0.24 * len(grid.index))
        axes = figure.subplots()
        shown = axes.imshow(grid.to_numpy(), cmap="PuOr", vmin=-top, vmax=top, aspect="auto")
        axes.set_xticks(range(len(grid.columns)), [str(name) for name in grid.columns])
        axes.set_yticks(range(len(grid.index)), [str(name) for name in grid.index])
        axes.set(xlabel=column, ylabel="layer")
        for y, row in enumerate(marks.to_numpy()):
            for x, verdict in enumerate(row):
                if verdict == "beyond control":
                    axes.plot(x, y, "o", ms=3, color="black")
        figure.colorbar(shown, ax=axes, label=LABELS.get(outcome, outcome))
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def guidance_sweep(summary: pd.DataFrame, *, title: str = "") -> Figure:
    """Alignment (or, without a measure of it, change) against the guidance scale, one line per set of layers.

    Args:
        summary: from `experiments.sweep.summarise`. Scale 0 is stock; hollow markers are the random control.
    """
    name = next((n for n in ("facts", "clip_t") if n in set(summary["outcome"])), "change")
    part = summary[summary["outcome"] == name]
    stock = part[part["scale"] == 0].iloc[0]
    with style.context():
        figure = style.figure(width=3.6, height=2.7)
        axes = figure.subplots()
        axes.axhspan(stock["low"], stock["high"], color="#EEEEEE", lw=0)
        axes.axhline(stock["mean"], color="black", lw=0.7, ls=":", label="stock")
        guided = part[part["scale"] != 0]
        colours = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#999999")
        for place, (key, rows) in enumerate(guided.groupby(["layers", "control"], observed=True)):
            layers, control = str(key[0]), bool(key[1])
            colour, marker = colours[place % len(colours)], "os^Dv<>p"[place % 8]
            rows = rows.sort_values("scale")
            error = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
            axes.errorbar(rows["scale"], rows["mean"], yerr=error, marker=marker, ms=4, color=colour, lw=1, capsize=2,
                          elinewidth=0.7, ls="--" if control else "-", mfc="white" if control else colour,
                          label=f"layer {layers}{' (random)' if control else ''}")  # fmt: skip
        axes.set(xlabel="guidance scale s", ylabel=LABELS.get(name, name))
        axes.legend(fontsize=6)
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def guidance_by_layer(summary: pd.DataFrame, *, title: str = "") -> Figure:
    """Alignment and change of the images against the one layer that guides, a series per scale.

    Args:
        summary: from `experiments.sweep.summarise`, of single layers. The band is stock; hollow markers the random
        control.
    """
    from matplotlib.ticker import MaxNLocator

    names = [name for name in ("facts", "clip_t", "change") if name in set(summary["outcome"])]
    with style.context():
        figure = style.figure(width=0.4 + 3.1 * len(names), height=2.8)
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            part = summary[summary["outcome"] == name]
            stock = part[part["scale"] == 0].iloc[0]
            axes.axhspan(stock["low"], stock["high"], color="#E5E5E5", lw=0)
            axes.axhline(stock["mean"], color="black", lw=0.7, ls=":", label="stock")
            scales = sorted(set(part["scale"]) - {0})
            series = list(part[part["scale"] != 0].groupby(["scale", "control"], observed=True))
            for place, (key, rows) in enumerate(series):
                scale, control = float(str(key[0])), bool(key[1])
                colour = (style.IMAGE, style.TEXT, "#000000", "#CC79A7")[scales.index(scale) % 4]
                layers = rows["layers"].astype(int) + 0.5 * ((place + 0.5) / len(series) - 0.5)
                error = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
                axes.errorbar(layers, rows["mean"], yerr=error, fmt="s" if control else "o", ms=4, color=colour,
                              ecolor=colour, elinewidth=0.8, capsize=1.5, mfc="white" if control else colour,
                              label=f"s = {scale:g}{', random' if control else ''}")  # fmt: skip
            axes.set(xlabel="guiding layer", ylabel=LABELS.get(name, name))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure
