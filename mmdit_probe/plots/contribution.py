"""What text writes into image tokens, per layer: contribution beside mass, and heads.

save(contribution_budget(summary, heads), "contribution_budget")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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
