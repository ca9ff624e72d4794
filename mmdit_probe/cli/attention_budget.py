"""`mmdit-probe attention-budget`: where each layer's attention goes, Fig. 2 of arXiv:2509.18096."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_probe.cli.options import MEASURED, SESSION, Measured, Session, with_session

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from mmdit_probe.models.mmdit import MMDiT

NAME, TABLE = "attention-budget", "attention_budget"


@with_session
def command(measured: Measured = MEASURED, session: Session = SESSION) -> None:
    """Share of attention that image and text queries give to image and text keys, per layer, exact.

    Writes attention_budget.parquet (one row per prompt, step, branch, layer, head and kind of key), the per-layer
    summary, the figure and run.json into a run folder.
    """
    from mmdit_probe.cli.session import measure
    from mmdit_probe.experiments.budget_items import Budget

    folder, loaded, output = measure(Budget, NAME, TABLE, measured, session)
    _report(folder, loaded, output)


def _report(folder: Any, model: MMDiT, output: Any) -> None:
    """The per-layer table, the figure and the paths, from the table on disk."""
    from mmdit_probe.cli.session import PAPER_MODEL, setting
    from mmdit_probe.cli.tables import plain, report_controls
    from mmdit_probe.data import paper_table
    from mmdit_probe.experiments import budget_summary as budget
    from mmdit_probe.plots import attention_budget, save
    from mmdit_probe.results import read_items
    from mmdit_probe.results.statistics import compare

    path = folder.path / f"{TABLE}.parquet"
    summary = budget.summarise(read_items(path, budget.COLUMNS))
    summary.to_csv(folder.path / f"{TABLE}_by_layer.csv", index=False, float_format="%.6g")
    paper = paper_table("budget_by_layer") if PAPER_MODEL in model.name else None
    figures = save(
        attention_budget(summary, title=f"{Path(model.name).name}: {setting(folder, summary)}", paper=paper),
        folder.path / TABLE,
    )
    long = budget.by_item(read_items(path, budget.COLUMNS)).melt(
        ["item", "control", "layer"], ["I2T", "I2T_word"], "measure"
    )
    comparison = compare(long, ["layer", "measure"])
    against = report_controls(
        folder, TABLE, comparison, "image queries give words more attention than they do in the control",
        lambda table: table[table["measure"] == "I2T_word"].drop(columns="measure"),
    )  # fmt: skip
    if not folder.complete:
        folder.finish()
    document = {
        "run": folder.path,
        "table": path,
        "figures": figures,
        "model": folder.data["model"],
        "layers": plain(summary),
        "controls": plain(comparison),
    }
    lines = [
        "I2T = image queries, text keys; shares of the query's attention, in brackets what uniform attention gives; "
        "'to ...' splits I2T.",
        f"Mean over heads and steps (conditional branch): {setting(folder, summary)}.",
        *against,
        f"table and figure: {folder.path}",
    ]
    output.result(document, [budget_rows(summary, paper), *lines], folder.path)


def budget_rows(summary: pd.DataFrame, paper: pd.DataFrame | None = None) -> Table:
    """The per-layer table for the terminal. `paper` adds the published shares."""
    from mmdit_probe.cli.tables import bare_table
    from mmdit_probe.plots.style import LABELS

    spans = [kind for kind in LABELS if summary[f"I2T_{kind}_uniform"].max() > 0]
    masses = ["I2I", "I2T", "T2I", "T2T", "I2O"]
    columns = ["layer", *("other" if name == "I2O" else name for name in masses)]
    columns += [f"to {LABELS[kind]}" for kind in spans]
    published = paper.set_index("layer") if paper is not None else None
    columns += ["paper I2T", "paper T2I"] if published is not None else []
    table = bare_table([*columns, "outlier"], left=("outlier",))
    for row in summary.to_dict("records"):
        cells = [str(row["layer"])]
        cells += [f"{_share(row[name])} ({_share(row[f'{name}_uniform'])})" for name in masses]
        cells += [_share(row[f"I2T_{kind}"]) for kind in spans]
        if published is not None:
            known = published.loc[row["layer"]] if row["layer"] in published.index else None
            cells += ["", ""] if known is None else [_share(known.i2t_share), _share(known.t2i_share)]
        table.add_row(*cells, str(row["outlier"]))
    return table


def _share(value: float) -> str:
    """Three digits, as the paper's tables print shares: .785."""
    return f"{value:.3f}".removeprefix("0")
