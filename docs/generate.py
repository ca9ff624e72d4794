"""Pages that are made from the code when the site is built: one per command, one per family, tables, pictures.

Run by mkdocs (`mkdocs-gen-files`); writes nothing into the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mkdocs_gen_files

from mmdit_probe.cli.app import every_command
from mmdit_probe.models.families.registry import FAMILIES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(Path(__file__).parent))
from commands import cell, command_page, summary  # noqa: E402, beside this script
from families import family_page, index_page, tried  # noqa: E402, beside this script

from notebooks import tutorial  # noqa: E402, beside this script

PICTURES = ROOT / "figures" / "out" / "scenes-sd3"


def followed(page: str, tables: list[Path]) -> None:
    """A page of the guide, and below it what scripts measured."""
    with mkdocs_gen_files.open(page, "w") as file:
        file.write("\n".join(part.read_text(encoding="utf-8") for part in (ROOT / "docs" / page, *tables)))


def situations(table: str) -> str:
    """The page of what works with what: where a row is of every family, it says so in two words."""
    every = next(line.split(" | ")[1] for line in table.splitlines() if line.startswith("| autocast bfloat16 |"))
    text = (ROOT / "docs" / "guide" / "works-with-what.md").read_text(encoding="utf-8")
    return f"{text}\n*Every family* in the table: {every}.\n\n{table.replace(every, '*every family*')}"


def main() -> None:
    index = ["# Commands", "", "| command | what it does |", "|-|-|"]
    for name, command in every_command().items():
        file = f"{name.replace(' ', '-')}.md"
        index.append(f"| [{name}]({file}) | {cell(summary(command))} |")
        with mkdocs_gen_files.open(f"commands/{file}", "w") as page:
            page.write(command_page(name, command))
    with mkdocs_gen_files.open("commands/index.md", "w") as page:
        page.write("\n".join(index) + "\n")
    table = RESULTS / "situations.md"
    with mkdocs_gen_files.open("guide/works-with-what.md", "w") as page:
        page.write(situations(table.read_text(encoding="utf-8")))
    followed("guide/growth.md", sorted(RESULTS.glob("growth-*.md")))
    with mkdocs_gen_files.open("guide/figures.md", "w") as page:
        text = [(ROOT / name).read_text(encoding="utf-8") for name in ("docs/guide/figures.md", "figures/README.md")]
        names = [picture.stem for picture in sorted(PICTURES.glob("*.png"))]
        shown = [f"### {name}\n\n![{name}](../pictures/{name}.png)\n" for name in names]
        page.write("\n".join([text[0], text[1].replace("# Figures and tables", "## Every figure and its script", 1),
                              "## The figures of the embedded model\n", *shown]))  # fmt: skip
    followed("guide/paper-and-embedded.md", [PICTURES / "paper_findings.md"])
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
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        with mkdocs_gen_files.open(f"tutorials/{notebook.stem}.md", "w") as page:
            page.write(tutorial(notebook))
    with mkdocs_gen_files.open("contributing.md", "w") as page:
        page.write((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for picture in sorted(PICTURES.glob("*.png")):
        with mkdocs_gen_files.open(f"pictures/{picture.name}", "wb") as file:
            file.write(picture.read_bytes())


main()
