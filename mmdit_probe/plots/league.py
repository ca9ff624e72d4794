"""Figures of an evaluation: the league table, and sweeps over layers, heads and noise levels (Figs. 8, 15 and 17).

    save(league_figure(table), "league"); save(layer_figure(table), "by_layer")

Tables come from `evaluate.league.league`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import fill
from typing import TYPE_CHECKING, Any

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = {"token-grid ceiling": "-", "one class everywhere": "--", "one segment": "-."}
"""Rows without a refinement -> line across the panel."""
CONTROLS = {"random": ":", "one true token per class": (0, (1, 3))}
"""Rows with the refinement of the methods: rows of their own in the league, lines of the strongest one in sweeps."""
STRONGEST = "strongest control of the row"
PROTOCOLS = {
    "present": "names of the classes present",
    "full": "names of all classes",
    "predicted": "names from a tagger",
}
STEPS = {"none": "no refinement", "centre": "centred", "pamr": "PAMR"}


def league_figure(table: pd.DataFrame, title: str = "") -> Figure:
    """mIoU with its interval: a panel per protocol, a row per method, a marker per refinement.

    Rows have one order in all panels, that of the table (best first in the first protocol); controls with the methods'
    refinements follow, hollow. Ceiling and trivial predictions are vertical lines, and a grey tick is the strongest
    control of a method with its refinement (which may be its own maps with the words shifted).
    """
    runs = _methods(table)
    panels = list(dict.fromkeys(table["protocol"]))
    methods = list(dict.fromkeys(runs["method"]))
    order = [*methods, *(name for name in CONTROLS if (table["method"] == name).any())]
    refinements = sorted(set(runs["refine"]), key=lambda name: (name != "none", name.count("+"), name))
    step = max(0.2, 0.085 * len(refinements) + 0.05)
    width, height = min(style.PAGE, 1.3 + 1.85 * len(panels)), 1.3 + max(1, len(order)) * step
    with style.panels(width, height, len(panels), sharey=True, title=title) as (figure, row):
        for axes, protocol in zip(row, panels, strict=True):
            part = table[table["protocol"] == protocol]
            for place, refine in enumerate(refinements):
                for names in (methods, CONTROLS):
                    shown = part[(part["refine"] == refine) & part["method"].isin(names)]
                    if shown.empty:
                        continue
                    shift = style.dodge(place, len(refinements), 0.75)
                    at = [order.index(name) + shift for name in shown["method"]]
                    style.errorbars(
                        axes, shown, "miou", place, at=at, joined=False, horizontal=True, hollow=names is CONTROLS,
                        label=refinement(refine) if names is methods else "",
                    )  # fmt: skip
                    axes.plot(shown["miou"] - shown["over"], at, "|", color="#888888", ms=5, mew=1.2, zorder=1,
                              label=STRONGEST if names is methods and not place else "")  # fmt: skip
            for border in range(1, len(order)):
                axes.axhline(border - 0.5, color="#DDDDDD" if border < len(methods) else "black", lw=0.5)
            words = fill(PROTOCOLS.get(protocol, style.name(protocol)), 20)
            axes.set_title(f"{words}\n(n = {int(part['n'].max())})")
            _references(axes, part, axes.axvline, LINES)
            style.within(axes, "x", 0, 1)
            axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
            axes.set_xlabel("mIoU (union rule)")
        row[0].set_yticks(range(len(order)), [style.name(method) for method in order])
        row[0].set_ylim(max(1, len(order)) - 0.5, -0.5)
        style.legend(figure, *row)
        if len(panels) == 1:  # as narrow as that, its legend is a column
            figure.set_figheight(height + 0.15 * (len(figure.legends[0].get_texts()) - 1))
    return figure


def layer_figure(table: pd.DataFrame, title: str = "", paper: pd.DataFrame | None = None) -> Figure:
    """mIoU of each layer alone, a line per method and protocol (after Fig. 8).

    Args:
        paper: the published values by layer, drawn as diamonds; they are of another model and data set.
    """
    return _sweep(table, "layers", "joint-attention layer", title, paper)


def sigma_figure(table: pd.DataFrame, title: str = "") -> Figure:
    """mIoU of each noise level alone, a line per method and protocol (after Fig. 15)."""
    return _sweep(table, "sigma", "noise level sigma (0 clean, 1 noise)", title)


def head_figure(table: pd.DataFrame, title: str = "") -> Figure:
    """mIoU of each head of each layer alone, one panel per method and protocol (after Fig. 17)."""
    groups = list(_groups(table))
    width = style.COLUMN if len(groups) == 1 else min(style.PAGE, 1.0 + 2.3 * len(groups))
    with style.panels(width, 3.2, len(groups), title=title + _shared(table)) as (figure, row):
        high = max(float(part["miou"].max()) for _, part in groups)
        for axes, (words, part) in zip(row, groups, strict=True):
            part = part.assign(layer=part["layers"].astype(int), head=part["heads"].astype(int))
            shown = style.heat(axes, part.pivot(index="layer", columns="head", values="miou"), low=0, high=high)
            axes.set_title(words.replace(", ", ",\n"))
        figure.colorbar(shown, ax=list(row), label="mIoU")
    return figure


def _sweep(table: pd.DataFrame, column: str, label: str, title: str, paper: pd.DataFrame | None = None) -> Figure:
    groups = list(_groups(table))
    with style.panels(style.COLUMN, 2.6 + 0.12 * len(groups), title=title + _shared(table)) as (figure, axes):
        for number, (words, part) in enumerate(groups):
            part = part.assign(at=part[column].astype(float)).sort_values("at")
            style.errorbars(axes, part, "miou", number, at="at", label=words)
        if paper is not None:
            axes.plot(
                paper["layer"],
                paper["miou"] / 100,
                "D",
                ms=3,
                mfc="white",
                mec="black",
                label="paper (SD3, data set not stated)",
            )
        _references(axes, table, axes.axhline, LINES | CONTROLS)
        if column == "layers":
            style.whole(axes, label)
        elif table[column].nunique() < 3:
            axes.set_xlim(0, 1)
        axes.set(xlabel=label, ylabel="mIoU (union rule)")
        style.within(axes, "y", 0, 1)
        style.legend(figure, axes)
    return figure


def _groups(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Runs by method, protocol and refinement, named by what differs between them."""
    runs = _methods(table)
    one = {name: runs[name].nunique() < 2 for name in ("method", "protocol")}
    for (protocol, method, refine), part in runs.groupby(["protocol", "method", "refine"], sort=False):
        words = [
            *([] if one["method"] else [str(method)]),
            *([] if one["protocol"] else [PROTOCOLS.get(str(protocol), str(protocol))]),
            *([] if refine == "none" and not all(one.values()) else [refinement(refine)]),
        ]
        yield style.name(", ".join(words)), part


def _shared(table: pd.DataFrame) -> str:
    """Method and protocol where all runs have the same, as a line of the title."""
    runs = _methods(table)
    words = [str(runs["method"].iloc[0])] if runs["method"].nunique() == 1 else []
    if runs["protocol"].nunique() == 1:
        words.append(PROTOCOLS.get(str(runs["protocol"].iloc[0]), str(runs["protocol"].iloc[0])))
    return f"\n{', '.join(words)}" if words else ""


def refinement(refine: Any) -> str:
    """The steps of a refinement in words: "centred + PAMR (80 rounds)"."""
    steps = (step.partition(":") for step in str(refine).split("+"))
    return " + ".join(STEPS.get(name, name) + (f" ({rounds} rounds)" if colon else "") for name, colon, rounds in steps)


def _methods(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of what is measured, without bounds and controls."""
    return table[table["role"] == "method"]


def _references(axes: Axes, table: pd.DataFrame, line: Any, marks: Mapping[str, Any]) -> None:
    """Bounds and trivial predictions as lines across the axes; of several refinements the strongest."""
    for mark, dash in marks.items():
        values = table.loc[table["method"] == mark, "miou"]
        if len(values):
            line(float(values.max()), color="black", ls=dash, lw=0.9, label=mark)
