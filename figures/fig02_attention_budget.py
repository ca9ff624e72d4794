"""Fig. 2b and 2c of arXiv:2509.18096, re-measured: the attention budget of every layer.

    python figures/fig02_attention_budget.py                                   # embedded model: runs, draws, writes
    python figures/fig02_attention_budget.py --run runs/attention-budget/...   # from a run folder that is there

Writes `fig02_attention_budget` as PNG, PDF and CSV (the plotted numbers) under `figures/out/<model>/`. The paper's own
model is measured with the paper's text and step, and its values are marked.
"""

from __future__ import annotations

from mmdit_probe.experiments.budget_summary import COLUMNS, summarise
from runs import PAPER_TEXT, is_paper_model, model_of, parse, published, run_folder, target, write

from mmdit_probe.plots import attention_budget
from mmdit_probe.results import read_items

COMMAND, TABLE = "attention-budget", "attention_budget"


def main() -> None:
    options = parse(__doc__, COMMAND)
    folder = run_folder(options, COMMAND, PAPER_TEXT if is_paper_model(options.model) else ())
    model = model_of(folder)
    summary = summarise(read_items(folder / f"{TABLE}.parquet", COLUMNS))
    title = f"{model}: {int(summary.prompts.min())} prompts"
    figure = attention_budget(summary, title=title, paper=published("budget_by_layer", model))
    write(figure, target(options, model, "fig02_attention_budget"), summary)


if __name__ == "__main__":
    main()
