"""`mmdit-probe scenes`: look at the embedded world."""

from __future__ import annotations

from typing import Annotated

import typer

from mmdit_probe.cli.options import Debug, Json, Out, Quiet

app = typer.Typer(help="The embedded world: look at scenes.", rich_markup_mode=None)


@app.command()
def show(
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    n: Annotated[int, typer.Option("--limit", "-n", help="How many scenes.", min=1, max=60)] = 12,
    start: Annotated[int, typer.Option(help="Index of the first scene.", min=0)] = 0,
    kind: Annotated[str | None, typer.Option(help="Caption kind; a mixture by default.")] = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a contact sheet: scenes with captions, class, instance and part masks (PNG and PDF)."""
    from mmdit_probe.cli.output import Output
    from mmdit_probe.plots import save
    from mmdit_probe.plots.scenes import contact_sheet
    from mmdit_probe.results import RunFolder
    from mmdit_probe.scenes import describe, scene

    items = [scene(split, index) for index in range(start, start + n)]
    texts = [describe(item, kind) for item in items]
    folder = RunFolder.open("scenes-show", {"split": split, "n": n, "start": start, "kind": kind}, out=out)
    paths = save(contact_sheet(items, texts), folder.path / "scenes")
    folder.finish()
    document = {"run": folder.path, "figures": paths, "captions": texts}
    lines = [f"{split} {item.index}: {text or '(empty)'}" for item, text in zip(items, texts, strict=True)]
    Output(quiet=quiet, as_json=as_json, debug=debug).result(document, [*lines, f"written: {paths[0]}"], folder.path)
