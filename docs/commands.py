"""The page of every command: what it does, examples, the same from Python, its options.

Written from the commands themselves when the site is built (`generate`): a page says what `--help` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmdit_probe.cli.app import COMMANDS

SHOWN = {
    "maps": "word_maps",
    "attention-budget": "fig02_attention_budget",
    "contribution-budget": "contribution_budget",
    "value-norms": "fig04_value_norms",
    "pca": "fig03_pca_scores",
    "perturb": "fig18_blur_scores",
    "generate": "fig06_guidance",
    "swap-test": "swap_test",
    "block-operations": "block_operations",
    "sigma-map": "sigma_map",
    "head-triage": "head_triage",
    "segment": "fig07_masks_open",
    "discover": "fig37_masks_unsupervised",
    "evaluate": "table12_league",
    "scenes show": "scenes",
}
"""Command -> the committed figure that shows its result."""
LABELS = "result.labels, result.summary"
PROMPT = 'prompt="a red ring on grass"'
CALLS = {
    "maps": (PROMPT, "result.summary"),
    "explore": (PROMPT, "result.summary"),
    "report": ("", "result.summary"),
    "segment": ('image="scenes:val:3", classes="tree, ring, grass, sky"', LABELS),
    "discover": ('image="scenes:val:3"', LABELS),
    "train-magnet": ('layers="2-3", train_steps=100', "result.summary, result.lora"),
}
"""Command -> the options that it cannot do without, and what its result has, where that is not summary and claims."""
OF_COMMAND = {one.name: one for one in COMMANDS}
"""Command -> the experiment that it runs."""


def cell(text: object) -> str:
    return str(text).replace("|", r"\|").replace("<", "&lt;")


def default(option: Any) -> str:
    """What `--help` shows as the default of an option or an argument."""
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    shown = option.show_default and option.default not in (None, False)
    return str(option.default) if shown else ""


def options_tables(command: Any) -> Iterator[str]:
    """A table of options per heading of `--help`."""
    panels: dict[str, list[Any]] = {}
    for one in command.params:
        if one.name != "help":
            panels.setdefault(one.rich_help_panel or "Arguments", []).append(one)
    for panel, options in panels.items():
        yield from (f"## {panel}", "", "| option | default | what it does |", "|-|-|-|")
        for one in options:
            names = one.opts if one.param_type_name == "option" else [one.metavar]
            flags = ", ".join(f"`{name}`" for name in names)
            values = f" One of {', '.join(one.metavar.split('|'))}." if "|" in (one.metavar or "") else ""
            yield f"| {flags} | {cell(default(one))} | {cell(one.help + values)} |"
        yield ""


def summary(command: Any) -> str:
    """The first sentence or two of the help text."""
    return str(command.help).split("\n\n")[0].replace("\n", " ")


def command_page(name: str, command: Any) -> str:
    """The page of one command.

    Args:
        name: what is typed after the program's name. command: as `cli.app.every_command` has it.
    """
    examples = [line.replace(r"\[", "[") for line in command.epilog.split("\n\n")[1:]]
    lines = [f"# {name}", "", str(command.help), "", "```sh", *examples, "```", ""]
    if name in OF_COMMAND:
        lines += ["The same from Python:", "", "```python", python(name, OF_COMMAND[name]), "```", ""]
    if name in SHOWN:
        lines += [f"![result of {name} on the embedded model](../pictures/{SHOWN[name]}.png)", ""]
    return "\n".join([*lines, *options_tables(command)])


def python(name: str, kind: Any) -> str:
    """The command as a library call, and what its result has."""
    options, shown = CALLS.get(name, ("", "result.summary, result.claims"))
    return (
        f"from mmdit_probe.experiments import {kind.__name__}\n\n"
        f'result = {kind.__name__}({options}).run("scenes-sd3")\n{shown}, result.figure()'
    )
