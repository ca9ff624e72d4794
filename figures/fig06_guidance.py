"""Fig. 6 and 32 of arXiv:2509.18096, re-measured: guidance by the prediction with I2T blurred at one layer.

    python figures/fig06_guidance.py
    python figures/fig06_guidance.py --model ... --clip openai/clip-vit-large-patch14

Writes `fig06_guidance` (contact sheet at the largest scale, a column per layer) and `fig06_guidance_scores` with its
CSV under `figures/out/<model>/`. Without classifier-free guidance, where there is something to gain; the paper
states no scale s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from runs import model_of, options_of, run_folder, target, write

from mmdit_probe.experiments.sweep import Setting, summarise
from mmdit_probe.plots.perturb import guidance_by_layer
from mmdit_probe.plots.sheet import sheet
from mmdit_probe.results import read_table
from mmdit_probe.results.folder import read_record

COMMAND = "generate"
ARGUMENTS = ("--perturb-layers", "all", "--each", "--perturb-scale", "2,4", "--guidance", "1", "--limit", "10",
             "--batch", "10")  # fmt: skip
ROWS = 6


def main() -> None:
    parser = options_of(__doc__, COMMAND)
    parser.add_argument("--clip", help="CLIP checkpoint (folder or hub id)")
    options = parser.parse_args()
    folder = run_folder(options, COMMAND, [*ARGUMENTS, *(["--clip", options.clip] if options.clip else [])])
    model = model_of(folder)
    summary = summarise(read_table(folder / "images.parquet"))
    title = f"{model}: perturbed guidance, n = {summary.n.max()} prompts"
    sheet = images_of(folder, f"{Path(model).name}: guided by I2T blurred at one layer")
    if sheet is not None:
        write(sheet, target(options, model, "fig06_guidance"))
    write(guidance_by_layer(summary, title=title), target(options, model, "fig06_guidance_scores"), summary)


def images_of(folder: Path, title: str) -> Any:
    """The contact sheet: stock, then each layer at the largest scale; None if the folder holds no images."""
    if not (folder / "images").is_dir():
        return None
    request = (read_record(folder) or {})["request"]
    plan = [Setting(tuple(layers), scale, control) for layers, scale, control in request["settings"]]
    top = max(setting.scale for setting in plan)
    shown = [setting for setting in plan if setting.scale in (0, top) and not setting.control]
    prompts = [prompt for prompt, _ in request["items"]][:ROWS]
    cells = [
        [Image.open(folder / "images" / f"{row:03d}-{setting.name}.png") for setting in shown]
        for row in range(len(prompts))
    ]
    columns = ["stock" if setting.scale == 0 else f"layer {setting.layers[0]}" for setting in shown]
    return sheet(cells, columns, prompts, title=f"{title}; g = {request['guidance']:g}, s = {top:g}")


if __name__ == "__main__":
    main()
