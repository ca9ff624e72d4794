"""Fig. 5, 18 and 31 of arXiv:2509.18096, re-measured: images with I2T blurred at one layer, and what is lost.

    python figures/fig05_blur.py
    python figures/fig05_blur.py --model ... --clip openai/clip-vit-large-patch14 --dino facebook/dinov2-base

Writes `fig05_blur` and `fig05_blur_control` (contact sheets) and `fig18_blur_scores` with its CSV under
`figures/out/<model>/`. The control is a random change of equal size; the no-op must be exactly 0. Images of the
embedded world are read by its parser and its own CLIP; of other models only the change is known unless `--clip` is
given. Fig. 31 is more rows of Fig. 5: `-- --sheet 12`.
"""

from __future__ import annotations

from runs import model_of, options_of, run_folder, take, target, write

from mmdit_probe.experiments.perturb import summarise
from mmdit_probe.plots.perturb import effects_by_layer
from mmdit_probe.results import read_table

COMMAND = "perturb"
OUTCOMES = ("facts", "clip_t", "clip_i", "dino", "change")
ARGUMENTS = ("--limit", "16", "--batch", "8", "--control", "budget")


def main() -> None:
    parser = options_of(__doc__, COMMAND)
    parser.add_argument("--clip", help="CLIP checkpoint (folder or hub id)")
    parser.add_argument("--dino", help="DINO checkpoint (folder or hub id)")
    options = parser.parse_args()
    given = [
        part for name in ("clip", "dino") if getattr(options, name) for part in (f"--{name}", getattr(options, name))
    ]
    folder = run_folder(options, COMMAND, [*ARGUMENTS, *given])
    model = model_of(folder)
    take(folder, "perturb_sheet", target(options, model, "fig05_blur"))
    take(folder, "perturb_sheet_control", target(options, model, "fig05_blur_control"))
    summary = summarise(read_table(folder / "perturb.parquet"))
    title = f"{model}: I2T blurred at one layer, n = {summary.n.max()} prompts"
    figure = effects_by_layer(summary, OUTCOMES, title=title)
    write(figure, target(options, model, "fig18_blur_scores"), summary)


if __name__ == "__main__":
    main()
