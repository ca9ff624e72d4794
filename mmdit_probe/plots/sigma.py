"""The map of layers and noise levels: where nouns, colours, counts and relations are read.

save(sigma_map(summary), "sigma_map")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

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
            axes.set_title(kind)
            ticks = [-top, 0, top]  # three: numbers of several digits run into each other
            figure.colorbar(shown, ax=axes, orientation="horizontal", format="%.2g", pad=0.02, ticks=ticks)
        for axes in panels[1:]:
            axes.set_ylabel("")
        marks: list[Any] = [Patch(fill=False, lw=0, hatch=HATCH, label="below 0")]
        if (part["verdict"] == "higher").any():
            marks.append(Line2D([], [], label="above 0, corrected for all cells (Holm)", **dot))
        style.legend(figure, handles=marks)
    return figure
