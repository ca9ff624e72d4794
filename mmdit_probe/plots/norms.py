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

CURVES = {
    "image": (style.IMAGE, "-", "o", "image tokens"),
    "text": (style.TEXT, "--", "s", "all text tokens"),
    "prompt": ("#000000", "-.", "^", "prompt tokens (no padding)"),
}
"""Group -> colour, line, marker, label: told apart without colour too."""


def value_norms(summary: pd.DataFrame, *, title: str = "", paper: pd.DataFrame | None = None) -> Figure:
    """Fig. 4: mean value norm by layer, with 95 % bands over prompts; below, the same for each kind of text token.

    Args:
        summary: from `by_layer`. title: a line above.
        paper: the published curves (`paper_table("value_norm_by_layer")`), as hollow diamonds.
    """
    from matplotlib.ticker import MaxNLocator

    with style.context():
        figure = style.figure(width=6.3, height=2.7)
        curves, spans = figure.subplots(1, 2, sharey=True)
        for name, (colour, line, marker, label) in CURVES.items():
            if name not in summary:
                continue
            curves.plot(summary["layer"], summary[name], line, marker=marker, ms=3, color=colour, lw=1.1, label=label)
            if summary[f"{name}_low"].notna().any():
                band = (summary[f"{name}_low"], summary[f"{name}_high"])
                curves.fill_between(summary["layer"], *band, color=colour, alpha=0.2, lw=0)
            if paper is not None:
                curves.plot(paper["layer"], paper[name], "D", ms=3, mfc="none", mec=colour, mew=0.7, ls="",
                            label=f"paper, {name}")  # fmt: skip
        spans.plot(summary["layer"], summary["image"], "-", color=style.IMAGE, lw=1.1, label="image tokens")
        markers = iter("osv^<>D")
        for kind in (kind for kind in style.SPANS if kind in summary):
            colour = "#555555" if kind == "null" else style.SPANS[kind]
            spans.plot(summary["layer"], summary[kind], ":", marker=next(markers), ms=3, color=colour, lw=0.9,
                       label=style.LABELS.get(kind, kind))  # fmt: skip
        curves.set(title="by modality", ylabel="mean value norm", xlabel="layer", ylim=(0, None))
        spans.set(title="by kind of text token", xlabel="layer")
        for axes in (curves, spans):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(fontsize=6)
        if title:
            figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def value_norm_heads(heads: pd.DataFrame, *, title: str = "") -> Figure:
    """Fig. 28: layer x head heat maps of the image, text and prompt norms, on one scale.

    Args:
        heads: from `by_head`. title: a line above.
    """
    from matplotlib.ticker import MaxNLocator

    panels = [name for name in CURVES if name in heads]
    with style.context():
        layers, count = heads["layer"].nunique(), heads["head"].nunique()
        figure = style.figure(width=6.3, height=1.2 + 0.13 * max(layers, 8))
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        top = float(heads[panels].max().max())
        for axes, name in zip(row, panels, strict=True):
            grid = heads.pivot(index="layer", columns="head", values=name)
            shown = axes.imshow(grid.to_numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=top)
            axes.set_title(CURVES[name][3], fontsize=8)
            axes.set_xlabel("head")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=min(count, 12), integer=True))
            axes.set_yticks(range(len(grid.index)), [str(layer) for layer in grid.index], fontsize=6)
        row[0].set_ylabel("layer")
        figure.colorbar(shown, ax=list(row), label="mean value norm", shrink=0.9)
        if title:
            figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure
