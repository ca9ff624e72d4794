"""Figures of an evaluation: the league table, and sweeps over layers, heads and noise levels (Figs. 8, 15 and 17).

    save(league_figure(table), "league"); save(layer_figure(table), "by_layer")

Tables come from `mmdit_probe.evaluate.league.league`; nothing is computed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CEILING = "token-grid ceiling"
TRIVIAL = ("random", "one class everywhere", "one segment")
LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#666666", "#000000")


MARKERS = "os^Dv<>pPX"


def league_figure(table: pd.DataFrame, title: str = "") -> Figure:
    """mIoU with its interval, a panel per protocol, a row per method (best first), a marker per refinement.

    Ceiling and trivial predictions are vertical lines.
    """
    known = [CEILING, *TRIVIAL]
    panels = {name: table[table["protocol"] == name] for name in dict.fromkeys(table["protocol"])}
    rows = {name: list(dict.fromkeys(part.loc[~part["method"].isin(known), "method"])) for name, part in panels.items()}
    refinements = sorted(
        set(table.loc[~table["method"].isin(known), "refine"]), key=lambda name: (name != "none", name.count("+"), name)
    )
    step = 0.09 * len(refinements) + 0.1
    with style.context():
        figure = style.figure(width=6.6, height=1.2 + sum(max(1, len(names)) * step + 0.4 for names in rows.values()))
        axes = figure.subplots(
            len(panels),
            1,
            squeeze=False,
            sharex=True,
            height_ratios=[max(1, len(names)) + 0.5 for names in rows.values()],
        )
        for one, (name, part) in zip(axes[:, 0], panels.items(), strict=True):
            for place, refine in enumerate(refinements):
                runs = part[(part["refine"] == refine) & ~part["method"].isin(known)]
                at = np.array([rows[name].index(method) for method in runs["method"]], float)
                at += 0.75 * ((place + 0.5) / len(refinements) - 0.5)
                ends = np.stack([runs["miou"] - runs["miou_low"], runs["miou_high"] - runs["miou"]])
                one.errorbar(
                    runs["miou"], at, xerr=np.nan_to_num(np.abs(ends), nan=0.0), ms=3.5,
                    fmt=MARKERS[place % len(MARKERS)], color=LINES[place % len(LINES)], elinewidth=0.8, capsize=1.5,
                    label="no refinement" if refine == "none" else refine,
                )  # fmt: skip
            one.set_yticks(range(len(rows[name])), rows[name])
            one.set_ylim(len(rows[name]) - 0.5, -0.5)
            for border in range(1, len(rows[name])):
                one.axhline(border - 0.5, color="#DDDDDD", lw=0.5)
            one.set_title(f"{name} (n = {int(part['n'].max())})", loc="left")
            for mark, dash in zip(known, ("-", ":", "--", "-."), strict=True):
                for value in part.loc[part["method"] == mark, "miou"]:
                    one.axvline(value, color="black", ls=dash, lw=0.9, label=mark)
            one.set_xlim(0, 1)
        axes[-1, 0].set_xlabel("mIoU (union rule), 95 % interval over images")
        seen: dict[str, Artist] = {}
        for one in axes[:, 0]:
            for handle, text in zip(*one.get_legend_handles_labels(), strict=True):
                seen.setdefault(text, handle)
        figure.legend(list(seen.values()), list(seen), loc="outside lower left", ncols=4)
        if title:
            figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def layer_figure(table: pd.DataFrame, title: str = "", paper: pd.DataFrame | None = None) -> Figure:
    """mIoU of each layer alone, a line per method and protocol (after Fig. 8).

    Args:
        paper: the published values by layer, drawn as diamonds; they are of another model and data set.
    """
    from matplotlib.ticker import MaxNLocator

    runs = table[~table["method"].isin([CEILING, *TRIVIAL])]
    with style.context():
        figure = style.figure(width=5.2, height=3.0)
        axes = figure.subplots()
        for index, (key, part) in enumerate(runs.groupby(["protocol", "method", "refine"], sort=False)):
            part = part.assign(layer=part["layers"].astype(int)).sort_values("layer")
            _line(axes, part, "layer", _words(key), LINES[index % len(LINES)])
        _marks(axes, table)
        if paper is not None:
            axes.plot(
                paper["layer"], paper["miou"] / 100, "D", ms=3, mfc="white", mec="black", label="paper (SD3, Fig. 8)"
            )
        axes.set_xlabel("joint-attention layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(figure, axes, title)
    return figure


def sigma_figure(table: pd.DataFrame, title: str = "") -> Figure:
    """mIoU of each noise level alone, a line per method and protocol (after Fig. 15)."""
    runs = table[~table["method"].isin([CEILING, *TRIVIAL])]
    with style.context():
        figure = style.figure(width=5.2, height=3.0)
        axes = figure.subplots()
        for index, (key, part) in enumerate(runs.groupby(["protocol", "method", "refine"], sort=False)):
            part = part.assign(level=part["sigma"].astype(float)).sort_values("level")
            _line(axes, part, "level", _words(key), LINES[index % len(LINES)])
        _marks(axes, table)
        axes.set_xlabel("noise level sigma (0 clean, 1 noise)")
        _finish(figure, axes, title)
    return figure


def head_figure(table: pd.DataFrame, title: str = "") -> Figure:
    """mIoU of each head of each layer alone, one panel per method and protocol (after Fig. 17)."""
    runs = table[~table["method"].isin([CEILING, *TRIVIAL])]
    groups = list(runs.groupby(["protocol", "method", "refine"], sort=False))
    with style.context():
        figure = style.figure(width=1.2 + 2.6 * len(groups), height=3.4)
        axes = figure.subplots(1, len(groups), squeeze=False)[0]
        high = float(runs["miou"].max())
        for one, (key, part) in zip(axes, groups, strict=True):
            part = part.assign(layer=part["layers"].astype(int), head=part["heads"].astype(int))
            grid = part.pivot(index="layer", columns="head", values="miou")
            drawn = one.imshow(grid.to_numpy(), cmap="viridis", vmin=0, vmax=high, aspect="auto")
            one.set_xticks(range(grid.shape[1]), [str(head) for head in grid.columns])
            one.set_yticks(range(grid.shape[0]), [str(layer) for layer in grid.index])
            one.set_xlabel("head")
            one.set_ylabel("layer")
            one.set_title(_words(key), loc="left")
        figure.colorbar(drawn, ax=list(axes), label="mIoU")
        if title:
            figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def _line(axes: Axes, part: pd.DataFrame, column: str, name: str, colour: str) -> None:
    axes.plot(part[column], part["miou"], "o-", ms=3, lw=1.2, color=colour, label=name)
    axes.fill_between(part[column], part["miou_low"], part["miou_high"], color=colour, alpha=0.2, lw=0)


def _marks(axes: Axes, table: pd.DataFrame) -> None:
    for mark, dash in ((CEILING, "-"), ("random", ":"), (TRIVIAL[1], "--"), (TRIVIAL[2], "-.")):
        values = table.loc[table["method"] == mark, "miou"]
        if len(values):
            axes.axhline(float(values.iloc[0]), color="black", ls=dash, lw=0.9, label=mark)


def _finish(figure: Figure, axes: Axes, title: str) -> None:
    axes.set_ylabel("mIoU (union rule)")
    axes.set_ylim(0, 1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    if title:
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")


def _words(key: Any) -> str:
    """What a line stands for: protocol, method, refinement where there is one."""
    return " ".join(str(word) for word in key if word != "none")
