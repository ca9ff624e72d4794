"""`mmdit-probe models`: what can be probed, without loading any of it."""

from __future__ import annotations

from mmdit_probe.cli.options import Debug, Json, Quiet


def command(as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the embedded models and the supported model families."""
    from rich.table import Table

    from mmdit_probe import assets
    from mmdit_probe.cli.output import Output
    from mmdit_probe.models.families import FAMILIES

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    embedded = [{"name": name, "path": str(assets.path(name))} for name in assets.names()]
    families = [
        {"name": family.name, "transformer": family.transformer, "order": list(family.order)}
        for family in FAMILIES.values()
    ]
    first = Table(title="embedded models (--model NAME)", title_justify="left")
    first.add_column("name")
    first.add_column("where")
    for entry in embedded:
        first.add_row(entry["name"], entry["path"])
    second = Table(title="families (--model DIRECTORY or hub id)", title_justify="left")
    for column in ("family", "diffusers transformer", "token order"):
        second.add_column(column)
    for fact in families:
        second.add_row(str(fact["name"]), str(fact["transformer"]), ", ".join(fact["order"]))
    output.result({"embedded": embedded, "families": families}, [first, second])
