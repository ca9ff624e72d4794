"""Fig. 5 and 18 of arXiv:2509.18096, re-measured: images with I2T blurred at one layer, and what is lost.

    python figures/fig05_blur.py
    python figures/fig05_blur.py --run runs/perturb/...

Writes `fig05_blur` and `fig05_blur_control` (contact sheets) and `fig18_blur_scores` with its CSV under
`figures/out/<model>/`. The control is a random change of equal size.
"""

from __future__ import annotations

from runs import model_of, parse, run_folder, take, target

from mmdit_probe.edit.perturb import summarise
from mmdit_probe.plots import save
from mmdit_probe.plots.perturb import effects_by_layer
from mmdit_probe.results import read_table

COMMAND = "perturb"
OUTCOMES = ("facts", "clip_t", "change", "clip_i", "dino")


def main() -> None:
    options = parse(__doc__, COMMAND)
    folder = run_folder(options, COMMAND)
    take(folder, "perturb_sheet", target(options, folder, "fig05_blur"))
    take(folder, "perturb_sheet_control", target(options, folder, "fig05_blur_control"))
    summary = summarise(read_table(folder / "perturb.parquet"))
    path = target(options, folder, "fig18_blur_scores")
    title = f"{model_of(folder)}: n = {summary.n.max()} prompts"
    print(*save(effects_by_layer(summary, OUTCOMES, title=title), path), sep="\n")
    summary.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
