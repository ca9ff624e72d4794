"""Fig. 4 and 28 of arXiv:2509.18096, re-measured: value norms by layer, and by layer and head.

    python figures/fig04_value_norms.py
    python figures/fig04_value_norms.py --run runs/value-norms/...

Writes `fig04_value_norms` and `fig28_value_norm_heads` as PNG, PDF and CSV under `figures/out/<model>/`. The paper's
own model is measured with the paper's text and step, and its values are drawn and tabulated beside.
"""

from __future__ import annotations

from runs import measured, options_of, paper_step, protocol_of, published, target, write

from mmdit_probe.errors import run_script
from mmdit_probe.experiments import ValueNorms


def main() -> None:
    options = options_of(__doc__).parse_args()
    result = measured(options, ValueNorms, **paper_step(options))
    curves, heads = result.frames.values()
    paper = published("value_norm_by_layer", result.model_name)
    if paper is not None:
        curves = curves.merge(paper.rename(columns=lambda name: f"paper_{name}" if name != "layer" else name))
    curves = curves.assign(measured_as=protocol_of(result))
    write(result.figure(), target(options, result.model_name, "fig04_value_norms"), curves)
    write(result.figure("value_norms_by_head"), target(options, result.model_name, "fig28_value_norm_heads"), heads)


if __name__ == "__main__":
    run_script(main)
