"""Fig. 6 and 32 of arXiv:2509.18096, re-measured: guidance by the prediction with I2T blurred at one layer.

    python figures/fig06_guidance.py
    python figures/fig06_guidance.py --model ... --clip openai/clip-vit-large-patch14

Writes `fig06_guidance` (contact sheet at the largest scale, a column per layer) and `fig06_guidance_scores` with its
CSV under `figures/out/<model>/`. Without classifier-free guidance, where there is something to gain; the paper
states no scale s.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from runs import measured, options_of, target, write

from mmdit_probe.errors import run_script
from mmdit_probe.experiments import Generate, Result
from mmdit_probe.experiments.sweep import STOCK, sheet_cells
from mmdit_probe.plots import style
from mmdit_probe.plots.perturb import equal_size, over_stock
from mmdit_probe.plots.sheet import sheet
from mmdit_probe.results.statistics import NONE

ROWS = 6


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--clip", help="CLIP checkpoint (folder or hub id)")
    options = parser.parse_args()
    result = measured(
        options, Generate, perturb_layers="all", sweep="layer", perturb_scale="2,4", guidance=1.0, limit=10, batch=10,
        clip=options.clip,
    )  # fmt: skip
    name, summary = result.model_name, result.summary
    write(images_of(result), target(options, name, "fig06_guidance"))
    title = f"{name}: perturbed guidance, n = {summary['n'].max()} prompts"
    write(guidance_by_layer(summary, title=title), target(options, name, "fig06_guidance_scores"), summary)


def images_of(result: Result) -> Any:
    """The contact sheet: stock, then each layer at the largest scale."""
    request = result.request
    top = max(scale for _, _, scale, _ in request["conditions"])
    shown = [
        (file, labels["layers"])
        for file, labels, scale, _ in request["conditions"]
        if scale in (0, top) and labels["control"] == NONE
    ]
    prompts = [prompt for prompt, _ in request["items"]][:ROWS]
    cells = sheet_cells(result, [file for file, _ in shown], range(len(prompts)))
    columns = [f"layer {layers}" if layers else STOCK for _, layers in shown]
    title = f"{result.model_name}: guided away from blurred I2T, scale {top:g}; guidance {request['guidance']:g}"
    return sheet(cells, columns, prompts, title=title)


def guidance_by_layer(summary: pd.DataFrame, *, title: str = "") -> Any:
    """Gain over stock, paired, in alignment and change of the images against the one layer that guides.

    Args:
        summary: from `experiments.generate.summarise`, of single layers. Hollow markers are controls of equal size.
    """
    names = [name for name in ("facts", "clip_t", "change") if name in set(summary["outcome"])]
    width = style.COLUMN if len(names) == 1 else style.PAGE
    with style.panels(width, 2.6, len(names), title=title) as (figure, panels):
        for axes, name in zip(panels, names, strict=True):
            guided = over_stock(axes, summary, name)
            series = list(guided.groupby(["scale", "control"], observed=True))
            scales = sorted(set(guided["scale"]))
            for place, (key, rows) in enumerate(series):
                scale, control = float(str(key[0])), str(key[1])
                at = rows["layers"].astype(int) + style.dodge(place, len(series))
                style.errorbars(
                    axes, rows, "difference", scales.index(scale), at=at, joined=False, hollow=control != NONE,
                    label=f"scale {scale:g}{equal_size(control)}",
                )  # fmt: skip
            style.whole(axes, "guiding layer")
        style.legend(figure, *panels)
    return figure


if __name__ == "__main__":
    run_script(main)
