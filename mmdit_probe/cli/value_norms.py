"""`mmdit-probe value-norms`: how long each kind of token's value vectors are, Fig. 4 and 28 of arXiv:2509.18096."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_probe.cli.attention_budget import (
    PAPER_MODEL,
    Guidance,
    Heads,
    Images,
    Layers,
    Length,
    Limit,
    NoT5,
    NumSteps,
    Prompts,
    Sigma,
    Steps,
)
from mmdit_probe.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Json, Lora, Model, Out, Quiet, Resume, Seed

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from mmdit_probe.models.mmdit import MMDiT

NAME, TABLE = "value-norms", "value_norms"


def command(
    layers: Layers = "all",
    prompts: Prompts = None,
    steps: Steps = "all",
    num_steps: NumSteps = 28,
    guidance: Guidance = 7.5,
    no_t5: NoT5 = False,
    heads: Heads = "all",
    max_sequence_length: Length = None,
    images: Images = None,
    sigma: Sigma = 0.515,
    limit: Limit = None,
    model: Model = DEFAULT_MODEL,
    lora: Lora = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Mean L2 norm of the values that enter attention: image, text and each span kind, per layer and head.

    Writes value_norms.parquet, the summaries per layer and per head, two figures and run.json into a run folder.
    """
    from mmdit_probe import assets
    from mmdit_probe.cli.output import Output
    from mmdit_probe.data import images as pictures
    from mmdit_probe.data import prompts as texts

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    default = "scenes:val" if model in assets.names() else "everyday"
    chosen = pictures.resolve(images, limit) if images is not None else None
    asked = texts.resolve(default if prompts is None else prompts, limit) if chosen is None or prompts else []

    from mmdit_probe.cli.session import open_model
    from mmdit_probe.observe.norms import NormMeasurement
    from mmdit_probe.results import RunFolder, TableWriter

    loaded = open_model(model, lora=lora, debug=debug, device=device, dtype=dtype, t5=not no_t5)
    if chosen is None:
        measurement = NormMeasurement.of_prompts(
            loaded, asked, layers=layers, heads=heads, steps=steps, num_steps=num_steps, guidance=guidance, seed=seed,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip
    else:
        measurement = NormMeasurement.of_pictures(
            loaded, chosen, asked, layers=layers, heads=heads, sigma=sigma, seed=seed,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip
    for remark in measurement.remarks:
        output.note(remark)
    folder = RunFolder.open(NAME, measurement.request, out=out, resume=resume)
    if not folder.complete:
        folder.record(**measurement.facts)
        with TableWriter(folder.path, TABLE) as writer:
            label = "prompts" if chosen is None else "pictures"
            with output.progress(label, len(measurement), len(writer.done)) as advance:
                measurement.run(writer, advance)
            folder.record()
    _report(folder, loaded, output)


def _report(folder: Any, model: MMDiT, output: Any) -> None:
    """The per-layer table, the figures and the paths, from the table on disk."""
    from mmdit_probe.cli.attention_budget import _plain, _setting
    from mmdit_probe.data import paper_table
    from mmdit_probe.observe import norm_summary
    from mmdit_probe.plots import save
    from mmdit_probe.plots.norms import value_norm_heads, value_norms
    from mmdit_probe.results import read_row_groups

    path = folder.path / f"{TABLE}.parquet"
    summary = norm_summary.by_layer(read_row_groups(path, norm_summary.COLUMNS))
    heads = norm_summary.by_head(read_row_groups(path, norm_summary.COLUMNS))
    summary.to_csv(folder.path / f"{TABLE}_by_layer.csv", index=False, float_format="%.6g")
    heads.to_csv(folder.path / f"{TABLE}_by_head.csv", index=False, float_format="%.6g")
    paper = paper_table("value_norm_by_layer") if PAPER_MODEL in model.name else None
    title = f"{Path(model.name).name}: {_setting(folder, summary)}"
    figures = save(value_norms(summary, title=title, paper=paper), folder.path / TABLE)
    figures += save(value_norm_heads(heads, title=title), folder.path / f"{TABLE}_by_head")
    if not folder.complete:
        folder.finish()
    document = {
        "run": folder.path,
        "table": path,
        "figures": figures,
        "model": folder.data["model"],
        "layers": [{name: _plain(value) for name, value in row.items()} for row in summary.to_dict("records")],
    }
    lines = [
        "L2 norm over all heads together; prompt: text without padding; gap: prompt minus image, with its 95 % interval"
        " over prompts.",
        f"Mean over tokens and steps (conditional branch): {_setting(folder, summary)}.",
        f"table and figures: {folder.path}",
    ]
    output.result(document, [norm_rows(summary, paper), *lines], folder.path)


def norm_rows(summary: pd.DataFrame, paper: pd.DataFrame | None = None) -> Table:
    """The per-layer table for the terminal. `paper` adds the published curves."""
    from rich import box
    from rich.table import Table

    from mmdit_probe.observe.norm_summary import GROUPS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    groups = [name for name in GROUPS if name in summary]
    published = paper.set_index("layer") if paper is not None else None
    for name in ("layer", *groups, "gap", "95 % interval"):
        table.add_column(name, justify="right")
    if published is not None:
        table.add_column("paper image / text / prompt", justify="right")
    for row in summary.to_dict("records"):
        interval = "" if row["gap_low"] != row["gap_low"] else f"[{row['gap_low']:+.2f}, {row['gap_high']:+.2f}]"
        cells = [str(row["layer"]), *(f"{row[name]:.2f}" for name in groups), f"{row['gap']:+.2f}", interval]
        if published is not None:
            known = published.loc[row["layer"]] if row["layer"] in published.index else None
            cells.append("" if known is None else f"{known.image} / {known.text} / {known.prompt}")
        table.add_row(*cells)
    return table
