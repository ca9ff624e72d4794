"""Fig. 4 and 28 of arXiv:2509.18096, re-measured: value norms by layer, and by layer and head.

    python figures/fig04_value_norms.py
    python figures/fig04_value_norms.py --run runs/value-norms/...

Writes `fig04_value_norms` and `fig28_value_norm_heads` as PNG, PDF and CSV under `figures/out/<model>/`; with a model
of which the paper prints values, these are drawn and tabulated beside.
"""

from __future__ import annotations

from runs import model_of, parse, run_folder, target

from mmdit_probe.data import paper_table
from mmdit_probe.observe.norm_summary import COLUMNS, by_head, by_layer
from mmdit_probe.plots import save
from mmdit_probe.plots.norms import value_norm_heads, value_norms
from mmdit_probe.results import read_row_groups

COMMAND, PAPER_MODEL = "value-norms", "stable-diffusion-3-medium"


def main() -> None:
    options = parse(__doc__, COMMAND)
    folder = run_folder(options, COMMAND)
    path = folder / "value_norms.parquet"
    summary, heads = (reduce(read_row_groups(path, COLUMNS)) for reduce in (by_layer, by_head))
    paper = paper_table("value_norm_by_layer") if PAPER_MODEL in model_of(folder) else None
    title = f"{model_of(folder)}: n = {int(summary.prompts.min())}"
    by_layers, by_heads = (target(options, folder, name) for name in ("fig04_value_norms", "fig28_value_norm_heads"))
    written = save(value_norms(summary, title=title, paper=paper), by_layers)
    written += save(value_norm_heads(heads, title=title), by_heads)
    if paper is not None:
        summary = summary.merge(paper.rename(columns=lambda name: f"paper_{name}" if name != "layer" else name))
    summary.to_csv(by_layers.with_suffix(".csv"), index=False, float_format="%.6g")
    heads.to_csv(by_heads.with_suffix(".csv"), index=False, float_format="%.6g")
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
