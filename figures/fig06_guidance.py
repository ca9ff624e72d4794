"""Fig. 6 of arXiv:2509.18096, re-measured: guidance by the prediction with I2T blurred at one layer.

    python figures/fig06_guidance.py
    python figures/fig06_guidance.py --run runs/generate/...

Writes `fig06_guidance` (contact sheet, a column per layer) and `fig06_guidance_scores` with its CSV under
`figures/out/<model>/`. Classifier-free guidance is kept low, where there is something to gain; the paper states no
scale.
"""

from __future__ import annotations

from runs import model_of, parse, run_folder, take, target

from mmdit_probe.edit.sweep import summarise
from mmdit_probe.plots import save
from mmdit_probe.plots.perturb import guidance_sweep
from mmdit_probe.results import read_table

COMMAND = "generate"
ARGUMENTS = ("--perturb-layers", "all", "--each", "--perturb-scale", "2,4", "--guidance", "2")


def main() -> None:
    options = parse(__doc__, COMMAND)
    folder = run_folder(options, COMMAND, ARGUMENTS)
    take(folder, "generate", target(options, folder, "fig06_guidance"))
    summary = summarise(read_table(folder / "images.parquet"))
    path = target(options, folder, "fig06_guidance_scores")
    title = f"{model_of(folder)}: n = {summary.n.max()} prompts"
    print(*save(guidance_sweep(summary, title=title), path), sep="\n")
    summary.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
