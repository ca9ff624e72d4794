"""Pages that are made from the code when the site is built: one per command, one per family, tables, pictures.

Run by mkdocs (`mkdocs-gen-files`); writes nothing into the repository.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import mkdocs_gen_files

from mmdit_probe import experiments
from mmdit_probe.cli.options import Session
from mmdit_probe.models.families.registry import FAMILIES
from mmdit_probe.options import described

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(Path(__file__).parent))
from families import family_page, index_page, tried  # noqa: E402, beside this script

PICTURES = ROOT / "figures" / "out" / "scenes-sd3"
SHOWN = {
    "attention-budget": "fig02_attention_budget",
    "value-norms": "fig04_value_norms",
    "pca": "fig03_pca_scores",
    "perturb": "fig18_blur_scores",
    "generate": "fig06_guidance",
    "evaluate": "table12_league",
}
"""Command -> the committed figure that shows its result."""


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
    lines += ["The same from Python:", "", "```python"]
    lines += [f"from mmdit_probe.experiments import {kind.__name__}", ""]
    lines += [
        f'result = {kind.__name__}().run("scenes-sd3")',
        "result.summary, result.claims, result.figure()",
        "```",
        "",
    ]
    if name in SHOWN:
        lines += [f"![result of {name} on the embedded model](../pictures/{SHOWN[name]}.png)", ""]
    lines += ["## Options", "", *options_table(kind), ""]
    own = {field.name for field in described(kind)} | set(getattr(kind, "without", ()))
    *flags, last = (f"`{flag}`" for name, flag in session_flags().items() if name not in own)
    lines += [f"Every command on a model also takes {', '.join(flags)} and {last}."]
    return "\n".join(lines) + "\n"


def followed(page: str, tables: list[Path]) -> None:
    """A page of the guide, and below it what scripts measured."""
    with mkdocs_gen_files.open(page, "w") as file:
        file.write("\n".join(part.read_text(encoding="utf-8") for part in (ROOT / "docs" / page, *tables)))


def main() -> None:
    index = ["# Commands", "", "| command | what it measures |", "|-|-|"]
    for name, kind_name in experiments.OF_COMMAND.items():
        kind = getattr(experiments, kind_name)
        first = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
        index.append(f"| [{name}]({name}.md) | {first} |")
        with mkdocs_gen_files.open(f"commands/{name}.md", "w") as page:
            page.write(command_page(name, kind))
    with mkdocs_gen_files.open("commands/index.md", "w") as page:
        page.write("\n".join(index) + "\n")
    table = RESULTS / "situations.md"
    followed("guide/works-with-what.md", [table])
    followed("guide/growth.md", sorted(RESULTS.glob("growth-*.md")))
    with mkdocs_gen_files.open("guide/models.md", "w") as page:
        text = (ROOT / "docs" / "guide" / "models.md").read_text(encoding="utf-8")
        for name in ("model_memory", "quantisation"):
            text = text.replace(f"<!-- {name} -->", (RESULTS / f"{name}.md").read_text(encoding="utf-8"))
        page.write(text)
    with mkdocs_gen_files.open("families/index.md", "w") as page:
        page.write(index_page())
    for name, family in FAMILIES.items():
        with mkdocs_gen_files.open(f"families/{name}.md", "w") as page:
            page.write(family_page(family, tried(name, family.pipelines, table.read_text(encoding="utf-8"))))
    with mkdocs_gen_files.open("contributing.md", "w") as page:
        page.write((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for picture in sorted(PICTURES.glob("*.png")):
        with mkdocs_gen_files.open(f"pictures/{picture.name}", "wb") as file:
            file.write(picture.read_bytes())


main()
