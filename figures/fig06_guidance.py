"""Fig. 6 and 32 of arXiv:2509.18096, re-measured: guidance by the prediction with I2T blurred at one layer.

    python figures/fig06_guidance.py
    python figures/fig06_guidance.py --model ... --clip openai/clip-vit-large-patch14

Writes `fig06_guidance` (contact sheet at the largest scale, a column per layer) and `fig06_guidance_scores` with its
CSV under `figures/out/<model>/`. Without classifier-free guidance, where there is something to gain; the paper
states no scale s.
"""

from __future__ import annotations

from typing import Any

from runs import measured, options_of, target, write

from mmdit_probe.errors import run_script
from mmdit_probe.experiments import Generate, Result
from mmdit_probe.experiments.sweep import STOCK, sheet_cells
from mmdit_probe.plots.perturb import guidance_by_layer
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


if __name__ == "__main__":
    run_script(main)
