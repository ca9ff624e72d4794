"""`mmdit-probe compare RUN RUN`: two runs of one experiment, paired by item."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdit_probe.cli.options import Debug, Json, Out, Quiet
from mmdit_probe.cli.output import Output
from mmdit_probe.options import METHOD
from mmdit_probe.results.folder import check_out

EXAMPLES = ("compare runs/float32 runs/bfloat16", "compare runs/base runs/lora --margin 0.01")


def command(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="Run folder.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Run folder of the same command and items.")],
    margin: Annotated[
        float | None,
        typer.Option(
            help="Largest loss that does not matter: verdicts are 'no worse' and 'worse'.", rich_help_panel=METHOD
        ),
    ] = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Second run minus first, paired by item, with intervals: two models, with and without a LoRA, two dtypes."""
    from mmdit_probe.experiments.compare_runs import compare_runs

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    check_out(out)
    found = compare_runs(first, second, margin)
    path = found.save(out)
    document = {"run": path, "differs": found.differs, "comparison": found.table}
    output.result(document, [*found.texts(), f"table and figure: {path}"], path)
