"""Value norms by layer and by head, after Fig. 4 and 28 of arXiv:2509.18096.

    from mmdit_probe.experiments.norm_summary import by_head, by_layer
    save(value_norms(by_layer(table)), "value_norms")
    save(value_norm_heads(by_head(table)), "value_norm_heads")

Not here: any averaging; the numbers come from `mmdit_probe.experiments.norm_summary`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

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
        curves.set(title="by modality, 95 % over prompts", ylabel="mean value norm")
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
