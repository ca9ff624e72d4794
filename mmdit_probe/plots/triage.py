"""Head triage: how well heads localise words, and what reading maps with that knowledge gains.

save(triage(summary, heads), "head_triage")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


LABELS = {
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
                right, rows, "miou", number, of=len(names), label=LABELS.get(way, way), joined=False,
                hollow=way == "random heads",
            )  # fmt: skip
        right.set_ylabel("mIoU, mean over scenes (95 %)")
        style.whole(right)
        style.legend(figure, right)
    return figure
