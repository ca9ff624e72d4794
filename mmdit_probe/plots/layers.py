"""Analyses by layer: one figure each, from the tables that the experiments sum up; nothing is computed here.

save(swaps(summary), "swap")
save(evidence(table, correlations, chosen=[4]), "select_layers")
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.plots import style
from mmdit_probe.plots.sheet import sheet
from mmdit_probe.results.statistics import TOO_FEW

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def agreement(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Rank correlation by layer with its interval, beside the control.

    Args:
        table: from `experiments.attribute.agreement`.
    """
    with style.panels(style.COLUMN, 2.5, title=title) as (figure, axes):
        axes.axhline(0, color="black", lw=0.6, ls=":")
        for place, (name, label) in enumerate({"rho": "same word", "control": "next word (control)"}.items()):
            style.errorbars(axes, table, name, place, of=2, label=label, joined=False, hollow=place > 0)
        axes.set(ylabel="rank correlation", title="I2T attention and attribution to regions")
        style.whole(axes)
        style.legend(figure, axes)
    return figure


def contribution_budget(summary: pd.DataFrame, heads: pd.DataFrame, *, title: str = "") -> Figure:
    """Norm of the contribution of each span kind, and of reference pictures, over the whole update's (left), its mass
    (middle), and the words' relative norm within each head (right, where heads were kept).

    Args:
        summary, heads: from `experiments.contribution_budget.summarise`, by layer, and by layer and head.
    """
    kinds = [kind for kind in (*style.SPANS, "reference") if kind in set(summary["group"])]
    of_words = heads[heads["group"] == "word"]
    with style.panels(style.PAGE, 2.7, 3 if len(of_words) else 2, title=title) as (figure, panels):
        for axes, value, words, label in (
            (panels[0], "relative", "written into image tokens", "norm / norm of the update"),
            (panels[1], "mass", "mass: what image tokens look at", "share of attention"),
        ):
            for number, kind in enumerate(kinds):
                part = summary[summary["group"] == kind].sort_values("layer")
                at = part["layer"] + style.dodge(number, len(kinds), 0.3)
                style.errorbars(axes, part, value, kind, at=at, label=style.LABELS.get(kind, kind))
            axes.set(title=words, ylabel=label)
            style.whole(axes)
            style.within(axes, "y", low=0)
        if len(of_words):
            grid = of_words.pivot(index="layer", columns="head", values="relative")
            top = float(grid.max().max())
            style.heat(panels[2], grid, low=0, high=top, label="norm / norm of the head's update")
            panels[2].set_title("written by words, per head")
        style.legend(figure, panels[0])
    return figure


def evidence(table: pd.DataFrame, correlations: pd.DataFrame, chosen: Sequence[int], *, title: str = "") -> Figure:
    """Left: each evidence by layer, scaled to its own range, chosen layers shaded. Right: rank correlations.

    Args:
        table: of one split, from `experiments.evidence.by_layer`. correlations: of the same split, from `agreement`.
        chosen: selected layers.
    """
    names = list(dict.fromkeys(table["evidence"]))
    with style.panels(style.PAGE, 2.9, 2, width_ratios=[1.6, 1], title=title) as (figure, (lines, matrix)):
        for number, layer in enumerate(chosen):
            lines.axvspan(layer - 0.4, layer + 0.4, color="#DDDDDD", lw=0, label="" if number else "chosen")
        for number, name in enumerate(names):
            part = table[table["evidence"] == name].sort_values("layer")
            low, high = part["value"].min(), part["value"].max()
            scaled = (part[["value", "low", "high"]] - low) / ((high - low) or 1.0)
            scaled["layer"] = part["layer"]
            label = f"{_label(name)} (n = {int(part['n'].max())})"
            style.errorbars(lines, scaled, "value", number, of=len(names), label=label)
        lines.set(ylabel="evidence (0: least, 1: most)", title="evidence by layer")
        style.whole(lines)
        grid = np.eye(len(names))
        for row in correlations.to_dict("records"):
            if row["first"] in names and row["second"] in names:
                i, j = names.index(row["first"]), names.index(row["second"])
                grid[i, j] = grid[j, i] = float(row["rho"])
        labels = [style.name(_label(name)) for name in names]
        style.heat(matrix, pd.DataFrame(grid, labels, labels), low=-1, high=1, colours="PuOr", decimals=2)
        matrix.set_xticks(matrix.get_xticks(), labels, rotation=40, ha="right")
        matrix.set_title("rank correlation over layers")
        style.legend(figure, lines)
    return figure


def _label(evidence: str) -> str:
    return evidence.replace("_", " ").replace("pca", "PCA")


def sinks(top: pd.DataFrame, *, title: str = "") -> Figure:
    """Layer x head heat map of the mass on sinks; the kind of the largest key is written into the cell.

    Args:
        top: from `observe.sinks.top_keys`.
    """
    grid = top.pivot(index="layer", columns="head", values="sink_mass")
    kinds = top.pivot(index="layer", columns="head", values="kind")
    written = len(grid.columns) <= 12
    width = 1.2 + (0.55 if written else 0.2) * len(grid.columns)
    with style.panels(max(style.COLUMN, width), 1.0 + 0.2 * len(grid.index), title=title) as (figure, axes):
        style.heat(axes, grid, low=0, high=1, label="share of attention on sinks", texts=kinds if written else None)
    return figure


def sink_maps(picture: Any, maps: Any, names: Sequence[str], removed: Any, *, title: str = "") -> Figure:
    """Two rows of token maps: as they are, and with sinks removed and the rest renormalised.

    Args:
        picture: the image. maps: [h, w, K] probabilities. names: of the K tokens.
        removed: [h, w, K] after the removal; maps without any mass (of removed tokens) are left empty.
    """
    cells = [
        [first, *(values[..., k] if values[..., k].max() > 0 else None for k in range(len(names)))]
        for first, values in ((picture, maps), (None, removed))
    ]
    return sheet(cells, ["picture", *names], ["as it is", "no sinks"], title=title)


HATCH = "////////"


def sigma_map(summary: pd.DataFrame, *, title: str = "") -> Figure:
    """A heat map of layer by noise level for every word kind, each in its own scale; dots mark rises above 0.

    Hatches mark what lies below 0 by a tenth of the scale or more.

    Args:
        summary: from `experiments.sigma_map`; layer -1, where every layer reads the opposite, is left out.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    part = summary[summary["layer"] >= 0]
    kinds = list(dict.fromkeys(part["kind"]))
    height = 1.6 + 0.16 * part["layer"].nunique()
    dot: dict[str, Any] = {"marker": "o", "ls": "none", "ms": 2.2, "color": "black", "mec": "white", "mew": 0.4}
    with style.panels(style.PAGE, height, len(kinds), title=title) as (figure, panels):
        for axes, kind in zip(panels, kinds, strict=True):
            rows = part[part["kind"] == kind]
            grid, verdicts = (rows.pivot(index="layer", columns="sigma", values=v) for v in ("difference", "verdict"))
            top = float(grid.abs().max().max()) or 1.0
            shown = style.heat(axes, grid, low=-top, high=top, colours="PuOr")
            for y, x in np.argwhere(grid.to_numpy() < -0.1 * top):  # in grey print both signs are dark
                light = grid.iloc[y, x] < -0.5 * top
                axes.add_patch(Rectangle((x, y), 1, 1, lw=0, fill=False, hatch=HATCH, ec="white" if light else "black"))
            for y, of_layer in enumerate(verdicts.to_numpy()):
                for x in (x for x, verdict in enumerate(of_layer) if verdict == "higher"):
                    axes.plot(x + 0.5, y + 0.5, **dot)
            few = ", too few" if (rows["verdict"] == TOO_FEW).all() else ""
            axes.set_title(f"{kind} (n = {int(rows['n'].max())}{few})")
            ticks = [-top, 0, top]  # three: numbers of several digits run into each other
            bar = figure.colorbar(shown, ax=axes, orientation="horizontal", format="%.2g", pad=0.02, ticks=ticks)
            bar.set_label("flow loss")
        for axes in panels[1:]:
            axes.set_ylabel("")
        hatched = any(axes.patches for axes in panels)
        marks: list[Any] = [Patch(fill=False, lw=0, hatch=HATCH, label="below 0")] if hatched else []
        if (part["verdict"] == "higher").any():
            marks.append(Line2D([], [], label="above 0, corrected for all cells (Holm)", **dot))
        style.legend(figure, handles=marks)
    return figure


_SWAPPED = {"swap": "the two words", "function": "two function words (control)"}


def swaps(summary: pd.DataFrame, *, title: str = "") -> Figure:
    """Share of images with exchanged attributes (left) and with their own (right) by layer; a line for stock.

    Args:
        summary: from `experiments.swap_test.summarise`; layer -1 is all layers at once, drawn left of layer 0.
    """
    with style.panels(style.PAGE, 2.6, 2, title=title) as (figure, panels):
        for axes, outcome in zip(panels, ("exchanged", "kept"), strict=True):
            part = summary[summary["outcome"] == outcome]
            axes.axhline(part.loc[part["condition"] == "stock", "share"].mean(), color="black", lw=0.7, ls=":",
                         label="stock")  # fmt: skip
            for number, (condition, label) in enumerate(_SWAPPED.items()):
                rows = part[part["condition"] == condition].sort_values("layer")
                style.errorbars(axes, rows, "share", number, of=2, label=label, joined=False, hollow=number > 0)
            axes.set(title=f"attributes {outcome}", ylabel="share of images")
            style.whole(axes, "layer (all at once: left of 0)" if (part["layer"] < 0).sum() > 1 else "layer")
            style.within(axes, "y", low=0)
        style.legend(figure, panels[0])
    return figure


_WAYS = {
    "triaged": "without heads that look away",
    "triaged, scaled": "without them, scaled",
    "random heads": "without random heads",
}
"""Names of the ways to read maps, where the table's are short."""


def triage(summary: pd.DataFrame, heads: pd.DataFrame, *, title: str = "") -> Figure:
    """AUC by layer and head on training scenes (left), and mIoU by layer on others for every way to read maps (right).

    Args:
        summary, heads: from `experiments.head_triage`: `summarise` (all streams are drawn) and `verdicts`.
    """
    part = summary[summary["stream"] == "all"]
    names = list(dict.fromkeys(part["way"]))
    with style.panels(style.PAGE, 2.9, 2, title=title) as (figure, (left, right)):
        grid = heads.pivot(index="layer", columns="head", values="auc")
        style.heat(left, grid, low=0, high=1, colours="PuOr", decimals=2, label="AUC of word maps (training scenes)")
        for number, way in enumerate(names):
            rows = part[part["way"] == way].sort_values("layer")
            style.errorbars(
                right, rows, "miou", number, of=len(names), label=_WAYS.get(way, way), joined=False,
                hollow=way == "random heads",
            )  # fmt: skip
        right.set_ylabel("mIoU, mean over scenes")
        style.whole(right)
        style.legend(figure, right)
    return figure


MOST = 8
"""Series, or rows without a layer, that one figure shows; the table holds all."""

_NUMBERS = {"n", "n_undefined", "first", "second", "difference", "low", "high", "p_holm", "verdict"}


def run_differences(table: pd.DataFrame, title: str = "", margins: Collection[float] = ()) -> Figure:
    """Paired differences with their intervals: by layer, a series per remaining cell; without layers a row per cell.

    Args:
        table: from `experiments.compare_runs`. margins: of non-inferiority, drawn as lines.
    """
    cell = [name for name in table.columns if name not in _NUMBERS and name != "layer" and table[name].nunique() > 1]
    labels = table[cell].astype(str).agg(" ".join, axis=1) if cell else table["difference"].map(lambda _: "difference")
    by_layer, names = "layer" in table, list(dict.fromkeys(labels))
    if len(names) > MOST:
        title, names = f"{title}; the first {MOST} of {len(names)} are drawn", names[:MOST]
    width, height = (style.COLUMN, 2.7) if by_layer else (style.PAGE, 1.2 + 0.2 * len(names))
    with style.panels(width, height, title=title) as (figure, axes):
        lines = [(0.0, ":"), *((margin, "--") for margin in margins)]
        for value, dashes in lines:
            (axes.axhline if by_layer else axes.axvline)(value, color="black", lw=0.6, ls=dashes)
        for number, name in enumerate(names):
            part = table[labels == name]
            at = part["layer"] + style.dodge(number, len(names)) if by_layer else [number] * len(part)
            style.errorbars(axes, part, "difference", number, at=at, label=name, joined=False, horizontal=not by_layer)
        if by_layer:
            axes.set_ylabel("second minus first")
            style.whole(axes)
            style.legend(figure, axes)
        else:
            axes.set_xlabel("second minus first (95 %)")
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
    return figure


CURVES = {"image": "image tokens", "text": "all text tokens", "prompt": "prompt tokens (no padding)",
          "reference": "reference tokens"}  # fmt: skip
"""Group -> label, in the order of the looks of `style`."""


def value_norms(summary: pd.DataFrame, *, title: str = "", paper: pd.DataFrame | None = None) -> Figure:
    """Fig. 4: mean value norm by layer, with 95 % intervals over prompts; beside it, each kind of text token.

    Args:
        summary: from `by_layer`. title: a line above.
        paper: the published curves (`paper_table("value_norm_by_layer")`), as hollow diamonds.
    """
    with style.panels(style.PAGE, 2.7, 2, sharey=True, title=title) as (figure, (curves, spans)):
        for number, (name, label) in enumerate(CURVES.items()):
            if name not in summary:
                continue
            style.errorbars(curves, summary, name, number, label=label)
            if paper is not None:
                curves.plot(paper["layer"], paper[name], "D", ms=3, mfc="none", mec=style.COLOURS[number], mew=0.7,
                            ls="", label=f"paper, {name}")  # fmt: skip
        spans.plot(summary["layer"], summary["image"], "-", color=style.IMAGE, label="image tokens")
        for kind in (kind for kind in style.SPANS if kind in summary):
            colour, marker, _ = style.look(kind)
            spans.plot(summary["layer"], summary[kind], ":", marker=marker, ms=3, color=colour,
                       label=style.LABELS.get(kind, kind))  # fmt: skip
        curves.set(title="by modality", ylabel="mean value norm")
        spans.set(title="by kind of text token")
        for axes in (curves, spans):
            style.whole(axes)
            style.within(axes, "y", low=0)
        style.legend(figure, curves, spans)
    return figure


def value_norm_heads(heads: pd.DataFrame, *, title: str = "") -> Figure:
    """Fig. 28: layer x head heat maps of the image, text and prompt norms, on one scale.

    Args:
        heads: from `by_head`. title: a line above.
    """
    panels = [name for name in CURVES if name in heads]
    height = 1.2 + 0.13 * max(heads["layer"].nunique(), 8)
    with style.panels(style.PAGE, height, len(panels), sharey=True, title=title) as (figure, row):
        top = float(heads[panels].max().max())
        for axes, name in zip(row, panels, strict=True):
            grid = heads.pivot(index="layer", columns="head", values=name)
            shown = style.heat(axes, grid, low=0, high=top)
            axes.set(title=CURVES[name], ylabel="layer" if axes is row[0] else "")
        figure.colorbar(shown, ax=list(row), label="mean value norm", shrink=0.9)
    return figure
