"""The page of every command: what it does, the same from Python, its options.

Written from the options of the experiments when the site is built (`generate`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, get_type_hints

from mmdit_probe.cli.options import Session
from mmdit_probe.options import described

SHOWN = {
    "attention-budget": "fig02_attention_budget",
    "value-norms": "fig04_value_norms",
    "pca": "fig03_pca_scores",
    "perturb": "fig18_blur_scores",
    "generate": "fig06_guidance",
    "evaluate": "table12_league",
}
"""Command -> the committed figure that shows its result."""
LABELS = "result.labels, result.names, result.areas"
CALLS = {
    "segment": ('image="scenes:val:3", classes="tree, ring, grass, sky"', LABELS),
    "discover": ('image="scenes:val:3"', LABELS),
    "train-magnet": ('layers="2-3", steps=100', "result.log, result.lora"),
}
"""Command -> the options that it cannot do without, and what its result has, where that is no summary and claims."""


def options_table(options: Any) -> Iterator[str]:
    """Rows of the table of options of a dataclass, as `--help` prints them."""
    yield "| option | default | what it does |"
    yield "|-|-|-|"
    for field in described(options):
        default = options.__dataclass_fields__[field.name].default
        shown = field.option.shown_default
        text = shown if shown is not None else "" if default in (None, ()) else default
        if isinstance(text, dataclasses._MISSING_TYPE):
            text = "required"
        said = str(field.option.help).replace("|", "\\|")
        yield f"| `{field.flag}` | {str(text).replace('|', chr(92) + '|')} | {said} |"


def session_flags() -> dict[str, str]:
    """Option of every command on a model -> its flag."""
    hints = get_type_hints(Session, include_extras=True)
    flags = {}
    for field in dataclasses.fields(Session):
        (said,) = hints[field.name].__metadata__
        # Typer takes the first flag of an annotation for its default, until the command is made.
        stated = [flag for flag in (said.default, *(said.param_decls or ())) if str(flag).startswith("--")]
        flags[field.name] = stated[0] if stated else f"--{field.name.replace('_', '-')}"
    return flags


def command_page(name: str, kind: Any) -> str:
    """The page of one command."""
    lines = [f"# {name}", "", inspect.getdoc(kind) or "", ""]
    lines += ["```sh", *(getattr(kind, "examples", ()) or (f"mmdit-probe {name}",)), "```", ""]
    lines += ["The same from Python:", "", "```python", python(name, kind), "```", ""]
    if name in SHOWN:
        lines += [f"![result of {name} on the embedded model](../pictures/{SHOWN[name]}.png)", ""]
    lines += ["## Options", "", *options_table(kind), ""]
    own = {field.name for field in described(kind)} | set(getattr(kind, "without", ()))
    *flags, last = (f"`{flag}`" for name, flag in session_flags().items() if name not in own)
    lines += [f"Every command on a model also takes {', '.join(flags)} and {last}."]
    return "\n".join(lines) + "\n"


def python(name: str, kind: Any) -> str:
    """The command as a library call, and what its result has."""
    options, shown = CALLS.get(name, ("", "result.summary, result.claims"))
    return (
        f"from mmdit_probe.experiments import {kind.__name__}\n\n"
        f'result = {kind.__name__}({options}).run("scenes-sd3")\n{shown}, result.figure()'
    )
