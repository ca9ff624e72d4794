"""Agreement of attention and causal attribution by layer.

save(agreement(table), "attribute")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
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
