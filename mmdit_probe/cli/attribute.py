"""`mmdit-probe attribute`: causal attribution of words to regions (captum), and where attention agrees with it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Json, Model, Out, Quiet, Resume, Seed

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

NAME, TABLE = "attribute", "attribution"


class MethodName(StrEnum):
    """How a word's effect is found."""

    ABLATION = "ablation"
    GRADIENTS = "gradients"


def command(
    method: Annotated[
        MethodName, typer.Option(help="Feature ablation, or integrated gradients.")
    ] = MethodName.ABLATION,
    n: Annotated[int, typer.Option("-n", help="Scenes.", min=2)] = 24,
    split: Annotated[str, typer.Option(help="Scenes split: train, val or test.")] = "val",
    sigma: Annotated[float, typer.Option(help="Noise level, above 0 (clean) to 1 (noise).")] = 0.7,
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """By how much does each word lower the denoising loss in each region, and do I2T maps say the same, per layer?

    On scenes, where regions are known exactly. Control: the attention of the scene's next word.
    """
    from mmdit_probe.cli.output import Output
    from mmdit_probe.cli.session import open_model
    from mmdit_probe.edit.attribute import attribute
    from mmdit_probe.results import RunFolder, TableWriter
    from mmdit_probe.scenes import scene

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    items = [scene(split, index) for index in range(n)]
    loaded = open_model(model, debug=debug, device=device, dtype=dtype, t5=True)
    request = {
        "model": loaded.name,
        "weight_hash": loaded.weight_hash,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "method": method.value,
        "n": n,
        "split": split,
        "sigma": sigma,
        "seed": seed,
    }
    folder = RunFolder.open(NAME, request, out=out, resume=resume)
    if not folder.complete:
        facts = {"id": loaded.name, "family": loaded.family.name, "weight_hash": loaded.weight_hash}
        folder.record(model=facts, device=str(loaded.device))
        with TableWriter(folder.path, TABLE) as writer:
            with output.progress("scenes", n, len(writer.done)) as advance:
                for index, item in enumerate(items):
                    if index not in writer.done and len(item.class_names) > 1:
                        frame = attribute(loaded, [item], method=method.value, sigma=sigma, seed=seed + index)
                        with writer.item(index) as rows:
                            rows.write(frame.assign(item=index))
                    advance()
            folder.record()
    _report(folder, output)


def _report(folder: Any, output: Any) -> None:
    from mmdit_probe.edit.attribute import agreement
    from mmdit_probe.plots import attribute as plots
    from mmdit_probe.plots import save
    from mmdit_probe.results import read_table

    request = folder.data["request"]
    table = agreement(read_table(folder.path / f"{TABLE}.parquet"))
    table.to_csv(folder.path / "agreement.csv", index=False, float_format="%.6g")
    title = f"{Path(request['model']).name}: {request['method']}, n = {table['n'].max()}, sigma {request['sigma']}"
    figures = save(plots.agreement(table, title=title), folder.path / NAME)
    if not folder.complete:
        folder.finish()
    document = {
        "run": folder.path,
        "figures": figures,
        "model": folder.data["model"],
        "layers": [{k: None if v != v else v for k, v in row.items()} for row in table.to_dict("records")],
    }
    lines = [
        agreement_rows(table),
        "rank correlation over (word, region) pairs of I2T attention and attribution, 95 % bootstrap interval over"
        " scenes; control: the attention of the scene's next word.",
        f"n = {table['n'].max()} scenes, sigma {request['sigma']}, {request['method']}; tables: {folder.path}",
    ]
    output.result(document, lines, folder.path)


def agreement_rows(table: pd.DataFrame) -> Table:
    """One row per layer for the terminal."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("layer", "rank correlation", "control", "verdict"):
        result.add_column(column, justify="right")
    for row in table.to_dict("records"):
        result.add_row(
            str(row["layer"]), f"{row['rho']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            f"{row['control']:+.3f} [{row['control_low']:+.3f}, {row['control_high']:+.3f}]", str(row["verdict"]),
        )  # fmt: skip
    return result
