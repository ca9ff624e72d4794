"""The swap test: how often the image exchanges what was exchanged in one layer.

save(swaps(summary), "swap")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_LABELS = {"swap": "the two words", "function": "two function words (control)"}


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
            for number, (condition, label) in enumerate(_LABELS.items()):
                rows = part[part["condition"] == condition].sort_values("layer")
                style.errorbars(axes, rows, "share", number, of=2, label=label, joined=False, hollow=number > 0)
            axes.set(title=f"attributes {outcome}", ylabel="share of images (95 %)")
            style.whole(axes, "layer (all at once: left of 0)" if (part["layer"] < 0).sum() > 1 else "layer")
            style.within(axes, "y", low=0)
        style.legend(figure, panels[0])
    return figure
