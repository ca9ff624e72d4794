"""`mmdit-probe value-norms`: how long each kind of token's value vectors are, Fig. 4 and 28 of arXiv:2509.18096."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_probe.cli.options import MEASURED, SESSION, Measured, Session, with_session

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from mmdit_probe.models.mmdit import MMDiT

NAME, TABLE = "value-norms", "value_norms"


@with_session
def command(measured: Measured = MEASURED, session: Session = SESSION) -> None:
    """Mean L2 norm of the values that enter attention: image, text and each span kind, per layer and head.

    Writes value_norms.parquet, the summaries per layer and per head, two figures and run.json into a run folder.
    """
    from mmdit_probe.cli.session import measure
    from mmdit_probe.experiments.budget_items import NormMeasurement

    folder, loaded, output = measure(NormMeasurement, NAME, TABLE, measured, session)
    _report(folder, loaded, output)


def _report(folder: Any, model: MMDiT, output: Any) -> None:
    """The per-layer table, the figures and the paths, from the table on disk."""
    from mmdit_probe.cli.session import PAPER_MODEL, setting
    from mmdit_probe.cli.tables import plain, report_controls
    from mmdit_probe.data import paper_table
    from mmdit_probe.experiments import norm_summary
    from mmdit_probe.plots import save
    from mmdit_probe.plots.norms import value_norm_heads, value_norms
    from mmdit_probe.results import read_items
    from mmdit_probe.results.statistics import compare

    path = folder.path / f"{TABLE}.parquet"
    summary = norm_summary.by_layer(read_items(path, norm_summary.COLUMNS))
    heads = norm_summary.by_head(read_items(path, norm_summary.COLUMNS))
    summary.to_csv(folder.path / f"{TABLE}_by_layer.csv", index=False, float_format="%.6g")
    heads.to_csv(folder.path / f"{TABLE}_by_head.csv", index=False, float_format="%.6g")
    paper = paper_table("value_norm_by_layer") if PAPER_MODEL in model.name else None
    title = f"{Path(model.name).name}: {setting(folder, summary)}"
    figures = save(value_norms(summary, title=title, paper=paper), folder.path / TABLE)
    figures += save(value_norm_heads(heads, title=title), folder.path / f"{TABLE}_by_head")
    wide = norm_summary.by_control(read_items(path, norm_summary.COLUMNS))
    long = wide.assign(relative_gap=wide["gap"] / wide["image"]).melt(
        ["item", "control", "layer"], ["gap", "relative_gap"], "measure"
    )
    comparison = compare(long, ["layer", "measure"])
    against = report_controls(
        folder, TABLE, comparison,
        "prompt tokens have longer values than image tokens (gap over the image's norm) beyond the control",
        lambda table: table[table["measure"] == "relative_gap"].drop(columns="measure"),
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
        "L2 norm over all heads together; prompt: text without padding; gap: prompt minus image, with its 95 % interval"
        " over prompts.",
        f"Mean over tokens and steps (conditional branch): {setting(folder, summary)}.",
        *against,
        f"table and figures: {folder.path}",
    ]
    output.result(document, [norm_rows(summary, paper), *lines], folder.path)


def norm_rows(summary: pd.DataFrame, paper: pd.DataFrame | None = None) -> Table:
    """The per-layer table for the terminal. `paper` adds the published curves."""
    from mmdit_probe.cli.tables import bare_table
    from mmdit_probe.experiments.norm_summary import GROUPS

    groups = [name for name in GROUPS if name in summary]
    published = paper.set_index("layer") if paper is not None else None
    last = ["paper image / text / prompt"] if published is not None else []
    table = bare_table(["layer", *groups, "gap", "95 % interval", *last])
    for row in summary.to_dict("records"):
        interval = "" if row["gap_low"] != row["gap_low"] else f"[{row['gap_low']:+.2f}, {row['gap_high']:+.2f}]"
        cells = [str(row["layer"]), *(f"{row[name]:.2f}" for name in groups), f"{row['gap']:+.2f}", interval]
        if published is not None:
            known = published.loc[row["layer"]] if row["layer"] in published.index else None
            cells.append("" if known is None else f"{known.image} / {known.text} / {known.prompt}")
        table.add_row(*cells)
    return table
