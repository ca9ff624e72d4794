"""Fig. 5, 18 and 31 of arXiv:2509.18096, re-measured: images with I2T blurred at one layer, and what is lost.

    python figures/fig05_blur.py
    python figures/fig05_blur.py --model ... --clip openai/clip-vit-large-patch14 --dino facebook/dinov2-base

Writes `fig05_blur` and `fig05_blur_control` (contact sheets) and `fig18_blur_scores` with its CSV under
`figures/out/<model>/`. The control is a change of equal size; the no-op must be exactly 0. Images of the embedded world
are read by its parser and its own CLIP; of other models only the change is known unless `--clip` is given. Fig. 31 is
more rows of Fig. 5: `--set shown=12`. `--set limit=16` is a quick look.
"""

from __future__ import annotations

from runs import measured, options_of, target, write

from mmdit_probe.errors import run_script
from mmdit_probe.experiments import Perturb

PROMPTS = 266
"""As many as a run of 218 said would show a drop of .05 of the facts beyond the control at every layer (power .8)."""


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--clip", help="CLIP checkpoint (folder or hub id)")
    parser.add_argument("--dino", help="DINO checkpoint (folder or hub id)")
    options = parser.parse_args()
    result = measured(options, Perturb, limit=PROMPTS, clip=options.clip, dino=options.dino)
    write(result.figure(), target(options, result.model_name, "fig18_blur_scores"), result.summary)
    for name, file in (("perturb_sheet", "fig05_blur"), ("perturb_sheet_control", "fig05_blur_control")):
        if name in result.figures:
            write(result.figure(name), target(options, result.model_name, file))


if __name__ == "__main__":
    run_script(main)
