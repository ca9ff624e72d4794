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
    from matplotlib.ticker import MaxNLocator

    with style.context():
        figure = style.figure(width=3.8, height=2.6)
        axes = figure.subplots()
        axes.axhline(0, color="black", lw=0.6, ls=":")
        for middle, low, high, colour, marker, shift, label in (
            ("rho", "low", "high", style.TEXT, "o", -0.1, "same word"),
            ("control", "control_low", "control_high", style.OTHER, "s", 0.1, "next word (control)"),
        ):
            error = [table[middle] - table[low], table[high] - table[middle]]
            axes.errorbar(table["layer"] + shift, table[middle], yerr=error, fmt=marker, ms=4, color=colour, capsize=2,
                          elinewidth=1, mec="black", mew=0.4, label=label)  # fmt: skip
        axes.set(xlabel="layer", ylabel="rank correlation", title="I2T attention and attribution to regions")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=2, fontsize=6)
        if title:
            figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure
