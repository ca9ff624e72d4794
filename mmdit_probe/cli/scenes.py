"""`mmdit-probe scenes`: look at the embedded world."""

from __future__ import annotations

from typing import Annotated

import typer

from mmdit_probe.cli.narrow import App
from mmdit_probe.cli.options import Debug, Json, Out, Quiet, completing, epilog
from mmdit_probe.cli.output import Output
from mmdit_probe.experiments.options import INPUT
from mmdit_probe.results import RunFolder
from mmdit_probe.scenes import KINDS, SPLITS, describe, scene

app = App(help="The embedded world: look at scenes.", epilog=epilog("scenes show"), rich_markup_mode="rich")


@app.command(epilog=epilog("scenes show --split test --limit 6", "scenes show --kind 2d-spatial"))
def show(
    split: Annotated[
        str, typer.Option(help="train, val or test.", rich_help_panel=INPUT, autocompletion=completing(SPLITS))
    ] = "val",
    n: Annotated[
        int, typer.Option("--limit", "-n", help="How many scenes.", min=1, max=60, rich_help_panel=INPUT)
    ] = 12,
    start: Annotated[int, typer.Option("--first", help="Index of the first scene.", min=0, rich_help_panel=INPUT)] = 0,
    kind: Annotated[
        str | None,
        typer.Option(
            help=f"Caption kind: {', '.join(KINDS)}.",
            show_default="a mixture",
            rich_help_panel=INPUT,
            autocompletion=completing(KINDS),
        ),
    ] = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a contact sheet: scenes with captions, class, instance and part masks (PNG and PDF)."""
    from mmdit_probe.plots import save
    from mmdit_probe.plots.segmentation import contact_sheet

    items = [scene(split, index) for index in range(start, start + n)]
    texts = [describe(item, kind) for item in items]
    folder = RunFolder.open("scenes-show", {"split": split, "n": n, "start": start, "kind": kind}, out=out)
    paths = save(contact_sheet(items, texts), folder.path / "scenes")
    folder.finish()
    document = {"run": folder.path, "figures": paths, "captions": texts}
    lines = [f"{split} {item.index}: {text or '(empty)'}" for item, text in zip(items, texts, strict=True)]
    Output(quiet=quiet, as_json=as_json, debug=debug).result(document, [*lines, f"written: {paths[0]}"], folder.path)
