"""Fig. 4 and 28 of arXiv:2509.18096, re-measured: value norms by layer, and by layer and head.

    python figures/fig04_value_norms.py
    python figures/fig04_value_norms.py --run runs/value-norms/...

Writes `fig04_value_norms` and `fig28_value_norm_heads` as PNG, PDF and CSV under `figures/out/<model>/`. The paper's
own model is measured with the paper's text and step, and its values are drawn and tabulated beside.
"""

from __future__ import annotations

from mmdit_probe.experiments.norm_summary import COLUMNS, by_head, by_layer
from runs import PAPER_TEXT, is_paper_model, model_of, parse, published, run_folder, target, write

from mmdit_probe.plots.norms import value_norm_heads, value_norms
from mmdit_probe.results import read_items

COMMAND = "value-norms"


def main() -> None:
    options = parse(__doc__, COMMAND)
    folder = run_folder(options, COMMAND, PAPER_TEXT if is_paper_model(options.model) else ())
    path, model = folder / "value_norms.parquet", model_of(folder)
    summary, heads = (reduce(read_items(path, COLUMNS)) for reduce in (by_layer, by_head))
    paper = published("value_norm_by_layer", model)
    title = f"{model}: n = {int(summary.prompts.min())} prompts"
    curves, grids = value_norms(summary, title=title, paper=paper), value_norm_heads(heads, title=title)
    if paper is not None:
        summary = summary.merge(paper.rename(columns=lambda name: f"paper_{name}" if name != "layer" else name))
    write(curves, target(options, model, "fig04_value_norms"), summary)
    write(grids, target(options, model, "fig28_value_norm_heads"), heads)


if __name__ == "__main__":
    main()
