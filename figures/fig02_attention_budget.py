"""Fig. 2b and 2c of arXiv:2509.18096, re-measured: the attention budget of every layer.

    python figures/fig02_attention_budget.py                                   # embedded model: runs, draws, writes
    python figures/fig02_attention_budget.py --run runs/attention-budget/...   # from a run folder that is there

Writes `fig02_attention_budget` as PNG, PDF and CSV (the plotted numbers) under `figures/out/<model>/`. The paper's own
model is measured with the paper's text and step, and its values are marked.
"""

from __future__ import annotations

from runs import measured, options_of, paper_step, protocol_of, target, write

from mmdit_probe.errors import run_script
from mmdit_probe.experiments import AttentionBudget


def main() -> None:
    options = options_of(__doc__).parse_args()
    result = measured(options, AttentionBudget, rows="summary", **paper_step(options))
    table = result.summary.assign(measured_as=protocol_of(result))
    write(result.figure(), target(options, result.model_name, "fig02_attention_budget"), table)


if __name__ == "__main__":
    run_script(main)
