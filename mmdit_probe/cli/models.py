"""`mmdit-probe models`: what can be probed, without loading any of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmdit_probe import assets
from mmdit_probe.cli.narrow import App
from mmdit_probe.cli.options import Debug, Json, Quiet, epilog
from mmdit_probe.cli.output import Output
from mmdit_probe.errors import UserError
from mmdit_probe.experiments.text import TextTable
from mmdit_probe.scenes.captions import WORDS

app = App(
    help="Embedded models and supported families.", invoke_without_command=True,
    epilog=epilog("models", "models inspect scenes-sd3"),
)  # fmt: skip


@app.callback()
def listing(context: typer.Context, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the embedded models and the supported model families."""
    if context.invoked_subcommand is not None:
        if as_json or quiet:
            raise UserError(
                f"--json and --quiet stand after the command: models {context.invoked_subcommand} ... --json"
            )
        return
    from mmdit_probe.models.families.registry import FAMILIES

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    kinds = {name: describe(assets.path(name)) for name in assets.names()}
    embedded = [{"name": name, "what": what} for name, what in kinds.items() if what]
    families = [
        {"name": family.name, "transformer": family.transformer, "order": list(family.order)}
        for family in FAMILIES.values()
    ]
    first = TextTable(["name", "what"], left=("name", "what"), title="Embedded models (--model NAME)")
    for entry in embedded:
        first.add(entry["name"], entry["what"])
    columns = ["family", "diffusers transformer", "token order"]
    second = TextTable(columns, left=columns, title="Families (--model DIRECTORY or hub id)")
    for fact in families:
        second.add(str(fact["name"]), str(fact["transformer"]), ", ".join(fact["order"]))
    known = f"The embedded models know {len(WORDS)} words: {', '.join(WORDS)}."
    document = {"embedded": embedded, "words": list(WORDS), "families": families}
    output.result(document, [first, known, second])


@app.command("inspect", epilog=epilog("models inspect scenes-sd3"))
def inspect_command(
    path: Annotated[
        str, typer.Argument(metavar="MODEL", help="Embedded model or diffusers pipeline directory, of any family.")
    ],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find out, mechanically, which layers of a model are joint attention and in which order its tokens are."""
    from mmdit_probe.observe.inspect import inspect_model

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    found = inspect_model(path)
    title = f"{found['transformer']} (family: {found['family'] or 'none known'})"
    layers = TextTable(["layer", "module", "token order", "kernel"], left=("module", "token order"), title=title)
    for layer in found["layers"]:
        layers.add(str(layer["index"]), layer["path"], _order(layer["order"]), layer["kernel"])
    others = [f"Not joint: {other['path']} ({_order(other['order'])})" for other in found["other attention"]]
    if found["entry agrees"] is False:
        others.append("The family's entry names other layers: please report it.")
    output.result(found, [layers, *others])


def _order(runs: list[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in runs)


def describe(path: Path) -> str:
    """What an embedded asset is, from its configuration files; empty if it is no model that can be probed."""
    if path.suffix == ".json":
        twin = json.loads(path.read_text(encoding="utf-8"))
        return f"{twin['base']} with a random transformer (seed {twin['seed']}): the control" if "base" in twin else ""
    if not (path / "model_index.json").is_file():
        return ""
    pipeline = json.loads((path / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    config = json.loads((path / "transformer" / "config.json").read_text(encoding="utf-8"))
    return f"{pipeline}, {config['num_layers']} layers, {config['num_attention_heads']} heads"
