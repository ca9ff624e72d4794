"""Does the layer that segments follow the layer that was taught? Not a figure of the paper.

    python figures/fig_alignment_ablation.py

Draws the tables that `analyses/alignment_ablation.py` writes: one row per transformer, trained by the same curriculum,
batches and noise, whose image tokens were taught something on the framed layers. Writes
`figures/out/scenes-sd3/alignment_ablation.{png,pdf,csv}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from runs import options_of

from mmdit_probe.errors import run_script
from mmdit_probe.plots import save, style
from training.align import Alignment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TABLES = Path(__file__).parents[1] / "analyses" / "results" / "alignment_ablation"
RANDOM = "random weights"
NAMES = {"none": "nothing", "all:features": "features, all layers", "all:labels": "labels, all layers"}
BEST: dict[str, Any] = {"marker": "o", "ls": "none", "ms": 3, "color": "white", "mec": "black", "mew": 0.6}
TAUGHT: dict[str, Any] = {"fill": False, "ec": "#D55E00", "lw": 1.6}


def taught(recipe: str, layers: list[int]) -> list[int]:
    """The layers whose output had a head."""
    named = () if recipe == RANDOM else Alignment.parse(recipe).layers
    return [layer for layer in layers if layer in named]


def name_of(recipe: str) -> str:
    """A recipe in words."""
    return NAMES.get(recipe, f"labels, layer {recipe.partition(':')[2]}" if recipe.startswith("layer:") else recipe)


def by_layer(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Recipes by layers, the mean over seeds, in the order of the table."""
    order = list(dict.fromkeys(table["recipe"]))
    return table.pivot_table(index="recipe", columns="layer", values=value).reindex(order)


def panel(axes: Axes, grid: pd.DataFrame, title: str, low: float, high: float) -> None:
    """One heat map: a dot for the best layer of each transformer (of ranks, the least), a frame around the taught."""
    from matplotlib.patches import Rectangle

    ranks, layers = low > 0, list(grid.columns)
    texts = [[f"{value:.1f}" if ranks else f"{value:.2f}".lstrip("0") for value in row] for row in grid.to_numpy()]
    shown = grid.rename(index=name_of).rename_axis(index="taught beside flow matching")
    style.heat(axes, shown, low=low, high=high, colours="cividis_r" if ranks else "cividis", texts=texts)
    for row, recipe in enumerate(grid.index):
        values = grid.loc[recipe]
        best = values.idxmin() if ranks else values.idxmax()
        axes.plot(layers.index(best) + 0.5, row + 0.12, **BEST)
        for layer in taught(recipe, layers):
            axes.add_patch(Rectangle((layers.index(layer), row), 1, 1, clip_on=False, **TAUGHT))
    axes.set_title(title)


def ablation_figure(maps: pd.DataFrame, evidence: pd.DataFrame, *, title: str = "") -> Figure:
    """I2T map quality, raw and stretched, and the mean rank over all evidence, recipe by layer.

    Args:
        maps, evidence: as `analyses/alignment_ablation.py` writes them.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    raw, stretched = (by_layer(maps[maps["min_max"] == kind], "miou") for kind in (False, True))
    ranks = by_layer(evidence, "rank")
    top = float(maps["miou"].max())
    with style.panels(style.PAGE, 2.4, 3, title=title) as (figure, panels):
        panel(panels[0], raw, "mIoU, raw I2T maps", 0, top)
        panel(panels[1], stretched, "mIoU, maps stretched to 0..1", 0, top)
        panel(panels[2], ranks, "mean rank over all evidence", 1, float(ranks.columns.size))
        for axes in panels[1:]:
            axes.set(ylabel="", yticklabels=[])
        handles = [Patch(label="taught layer", **TAUGHT), Line2D([], [], label="best layer", **BEST)]
        style.legend(figure, handles=handles)
    return figure


def headline(maps: pd.DataFrame, evidence: pd.DataFrame) -> str:
    """What is shown, of how many scenes and seeds."""
    few, most = evidence["n"].min(), evidence["n"].max()
    seeds = maps[maps["recipe"] != RANDOM].groupby("recipe")["seed"].nunique()
    more = [f"{name_of(str(recipe))}: {count}" for recipe, count in seeds.items() if count > seeds.min()]
    told = f"{seeds.min()} seed" + "s" * bool(seeds.min() > 1) + f" ({'; '.join(more)})" * bool(more)
    return (
        f"scenes-sd3, trained alike but for what its image tokens were taught; n = {maps['n'].max()} scenes (ranks:"
        f" {few} to {most}), {told}"
    )


def main() -> None:
    options = options_of(__doc__, run=False, more=False).parse_args()
    maps, evidence = (pd.read_csv(TABLES / f"{name}.csv") for name in ("maps", "evidence"))
    path = options.out / "scenes-sd3" / "alignment_ablation"
    for written in save(ablation_figure(maps, evidence, title=headline(maps, evidence)), path):
        print(written)
    table = maps.merge(evidence.groupby(["recipe", "seed", "layer"], as_index=False)["rank"].mean())
    table.to_csv(path.with_suffix(".csv"), index=False)
    print(path.with_suffix(".csv"))


if __name__ == "__main__":
    run_script(main)
