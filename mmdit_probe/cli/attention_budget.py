"""`mmdit-probe attention-budget`: where each layer's attention goes, Fig. 2 of arXiv:2509.18096."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.options import (
    DEFAULT_MODEL,
    Debug,
    Device,
    Dtype,
    Json,
    Lora,
    Model,
    Out,
    Quiet,
    Resume,
    Seed,
)

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from mmdit_probe.models.mmdit import MMDiT

NAME, TABLE = "attention-budget", "attention_budget"
PAPER_MODEL = "stable-diffusion-3-medium"
"""Part of the names of the one model whose published numbers are shipped."""

Layers = Annotated[str, typer.Option(help="Joint-attention layers, 0-based: all, 9, 7-11 or 0,9.")]
Prompts = Annotated[
    str | None,
    typer.Option(help="File with one prompt per line, a text, or a set: everyday, scenes:train|val|test. "
                      "[default: scenes:val for embedded models, else everyday]"),
]  # fmt: skip
Steps = Annotated[str, typer.Option(help="Sampling steps: all, 0,20, 0-4; last-8 is the 8th from the clean end.")]
NumSteps = Annotated[int, typer.Option(help="Number of sampling steps.", min=1)]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 or less runs without it.")]
NoT5 = Annotated[bool, typer.Option("--no-t5", help="Leave the T5 encoder out: its slots are zeros, as in the paper.")]
Heads = Annotated[str, typer.Option(help="Attention heads to keep in the table: all, 3, 0-3 or 0,5.")]
Length = Annotated[int | None, typer.Option("--max-sequence-length", help="T5 tokens (the paper: 77).", min=1)]
Images = Annotated[
    str | None, typer.Option(help="Probe real pictures instead of sampling: a folder, or scenes:train|val|test.")
]
Sigma = Annotated[float, typer.Option(help="Noise level of --images, 0 clean to 1 noise (the paper's t=8: 0.515).")]
Limit = Annotated[
    int | None, typer.Option(help="Use the first LIMIT prompts or pictures [default: 50 of a scenes set].")
]


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
    """Share of attention that image and text queries give to image and text keys, per layer, exact.

    Writes attention_budget.parquet (one row per prompt, step, branch, layer, head and kind of key), the per-layer
    summary, the figure and run.json into a run folder.
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
    from mmdit_probe.observe.budget import Budget
    from mmdit_probe.results import RunFolder, TableWriter

    loaded = open_model(model, lora=lora, debug=debug, device=device, dtype=dtype, t5=not no_t5)
    if chosen is None:
        budget = Budget.of_prompts(
            loaded, asked, layers=layers, heads=heads, steps=steps, num_steps=num_steps, guidance=guidance, seed=seed,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip
    else:
        budget = Budget.of_pictures(
            loaded, chosen, asked, layers=layers, heads=heads, sigma=sigma, seed=seed,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip
    for remark in budget.remarks:
        output.note(remark)
    folder = RunFolder.open(NAME, budget.request, out=out, resume=resume)
    if not folder.complete:
        folder.record(**budget.facts)
        with TableWriter(folder.path, TABLE) as writer:
            with output.progress("prompts" if chosen is None else "pictures", len(budget), len(writer.done)) as advance:
                budget.run(writer, advance)
            folder.record()
    _report(folder, loaded, output)


def _report(folder: Any, model: MMDiT, output: Any) -> None:
    """The per-layer table, the figure and the paths, from the table on disk."""
    from mmdit_probe.data import paper_table
    from mmdit_probe.observe import summary as budget
    from mmdit_probe.plots import attention_budget, save
    from mmdit_probe.results import read_row_groups

    path = folder.path / f"{TABLE}.parquet"
    summary = budget.summarise(read_row_groups(path, budget.COLUMNS))
    summary.to_csv(folder.path / f"{TABLE}_by_layer.csv", index=False, float_format="%.6g")
    paper = paper_table("budget_by_layer") if PAPER_MODEL in model.name else None
    figures = save(
        attention_budget(summary, title=f"{Path(model.name).name}: {_setting(folder, summary)}", paper=paper),
        folder.path / TABLE,
    )
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
        "I2T = image queries, text keys; shares of the query's attention, in brackets what uniform attention gives; "
        "'to ...' splits I2T.",
        f"Mean over heads and steps (conditional branch): {_setting(folder, summary)}.",
        f"table and figure: {folder.path}",
    ]
    output.result(document, [budget_rows(summary, paper), *lines], folder.path)


def budget_rows(summary: pd.DataFrame, paper: pd.DataFrame | None = None) -> Table:
    """The per-layer table for the terminal. `paper` adds the published shares."""
    from rich import box
    from rich.table import Table

    from mmdit_probe.plots.style import LABELS

    spans = [kind for kind in LABELS if summary[f"I2T_{kind}_uniform"].max() > 0]
    masses = ["I2I", "I2T", "T2I", "T2T", "I2O"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for name in masses:
        table.add_column("other" if name == "I2O" else name, justify="right")
    for kind in spans:
        table.add_column(f"to {LABELS[kind]}", justify="right")
    published = paper.set_index("layer") if paper is not None else None
    if published is not None:
        table.add_column("paper I2T", justify="right")
        table.add_column("paper T2I", justify="right")
    table.add_column("outlier")
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


def _setting(folder: Any, summary: pd.DataFrame) -> str:
    """What was averaged over and how it was run, for the figure's title and the line below the table."""
    request, count = folder.data["request"], int(summary.prompts.min())
    if request["mode"] == "pictures":
        return f"n = {count} pictures, sigma {request['sigma']}"
    steps, total = len(request["steps"]), request["num_steps"]
    return f"n = {count} prompts, {steps} of {total} steps, guidance {request['guidance']}"


def _plain(value: Any) -> Any:
    """A JSON value: NaN (no interval with one prompt) becomes null."""
    if isinstance(value, float):
        return None if value != value else float(value)
    return value
