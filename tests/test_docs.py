"""What README and docs show runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mmdit_probe.cli.app import main
from mmdit_probe.models.families.registry import FAMILIES
from tests.scripts import script

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/index.md", "docs/guide/own-analysis.md"]
HUB = "stabilityai/"


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_their_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)


def test_every_family_has_a_page_of_what_was_tried() -> None:
    families = script("docs/families.py")
    table = (ROOT / "benchmarks" / "results" / "situations.md").read_text(encoding="utf-8")
    for name, family in FAMILIES.items():
        rows = families.tried(name, family.pipelines, table)
        page = families.family_page(family, rows)
        assert ("autocast bfloat16", "exact") in [(way, outcome.partition(" (")[0]) for way, outcome in rows]
        assert family.transformer in page and all(f"**{stream.name}**" in page for stream in family.streams)
        assert f"[{name}]({name}.md)" in families.index_page()
    flux = dict(families.tried("flux", FAMILIES["flux"].pipelines, table))
    assert flux["an IP-Adapter"] == "refused" and "5 steps at strength 0.6" in flux
    glm = families.family_page(FAMILIES["glm_image"], [])
    assert "reads what stands in quotation marks" in glm and "maps 'a sign that says \"OPEN\"' --model" in glm
    assert "`transformer_blocks.N.attn1`" in glm and "order: text, image." in glm


def commands(page: str) -> list[str]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("mmdit-probe ")]


@pytest.mark.parametrize("command", [line for line in commands("README.md") if HUB not in line])
def test_readme_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command)[1:])
    assert ended.value.code == 0


def test_readme_names_targets_that_exist_and_is_short() -> None:
    text, makefile = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make (\w+)", text)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    assert len(text.split()) <= 700


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert link.startswith("https://") or (ROOT / link).exists(), link
