"""What README and docs show runs as it stands."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import mmdit_probe
from mmdit_probe import experiments
from mmdit_probe.cli.app import COMMANDS, app, every_command, main
from mmdit_probe.models.families.registry import FAMILIES
from tests import editing_pipelines
from tests.scripts import script

ROOT = Path(__file__).parents[1]
HUB = "stabilityai/"


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


TEXTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder, depth in {"": "*.md", "docs": "**/*.md", "figures": "*.md", "benchmarks": "*.md"}.items()
    for path in (ROOT / folder).glob(depth)
)
PAGES = [page for page in TEXTS if blocks(page, "python")]
"""Every page with Python; pages that are made when the site is built are tested below."""


def own_tensors(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page on segmentation takes for granted: attention of 4 x 6 tokens to 6 text tokens, and labels."""
    shares = torch.rand(2, 24, 30, generator=torch.Generator().manual_seed(0)).softmax(-1)
    return {
        "h": 4,
        "w": 6,
        "i2t": shares[..., 24:],
        "i2i": shares[..., :24],
        "truth": torch.arange(24).reshape(4, 6) % 2,
    }


def editing(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page on editing takes for granted: a pipeline and a picture, here of 24 x 32 tokens."""
    from diffusers.pipelines.flux import pipeline_flux_kontext

    patch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(128, 96)])
    pipe = editing_pipelines.build("kontext")
    pipe.default_sample_size = 128 // pipe.vae_scale_factor
    return {"pipe": pipe, "picture": editing_pipelines.picture(96, 128)}


GIVEN = {"docs/guide/segmentation.md": own_tensors, "docs/guide/editing.md": editing}


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_their_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = GIVEN[page](monkeypatch) if page in GIVEN else {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


def test_no_python_is_spelled_so_that_no_test_runs_it() -> None:
    assert set(GIVEN) <= set(PAGES)
    for page in TEXTS:
        kinds = re.findall(r"^ *```(\S*)", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)
        assert set(kinds) <= {"", "python", "sh"}, page
        assert kinds.count("python") == len(blocks(page, "python")), page


@pytest.mark.parametrize("name", [one.name for one in COMMANDS])
def test_python_of_a_commands_page_is_a_call_that_can_be_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are checked and the result has what is shown; whole analyses run in the tests of their commands."""
    pages = script("docs/commands.py")
    kind = pages.OF_COMMAND[name]
    module = sys.modules[kind.__module__]
    result = getattr(module, str(inspect.signature(kind.run).return_annotation), experiments.Result)
    known = {*dir(result), *result.__init__.__code__.co_names}
    stub = SimpleNamespace(**dict.fromkeys(known - set(dir(object)), lambda: None))
    asked: list[Any] = []
    monkeypatch.setattr(kind, "run", lambda self, target: asked.append((self, target)) or stub)
    page = pages.command_page(name, every_command()[name])
    code = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(code) == 1
    exec(compile(code[0], name, "exec"), {})
    assert [(type(one), target) for one, target in asked] == [(kind, "scenes-sd3")]


def test_a_commands_page_shows_lines_that_run_and_every_option() -> None:
    for name, command in every_command().items():
        page = script("docs/commands.py").command_page(name, command)
        lines = re.search(r"```sh\n(.*?)```", page, flags=re.S)
        assert lines and all(line.startswith(f"mmdit-probe {name}") for line in lines[1].splitlines())
        flags = [flag for one in command.params for flag in one.opts if flag.startswith("-") and one.name != "help"]
        assert [flag for flag in flags if f"`{flag}`" not in page] == []
    pictures = [*(ROOT / "docs" / "pictures").glob("*.png"), *(ROOT / "figures" / "out" / "scenes-sd3").glob("*.png")]
    assert set(script("docs/commands.py").SHOWN.values()) <= {path.stem for path in pictures}


def test_tutorials_show_what_the_notebooks_do(tmp_path: Path) -> None:
    path = tmp_path / "one.ipynb"
    cells = [
        {"cell_type": "markdown", "source": ["# One"], "metadata": {}},
        {
            "cell_type": "code", "source": "1 + 1", "metadata": {}, "execution_count": 1,
            "outputs": [
                {"output_type": "execute_result", "data": {"text/plain": "2"}, "metadata": {}, "execution_count": 1},
                {"output_type": "display_data", "data": {"text/html": ["<b>", "x</b>"], "text/plain": "x"}},
                {"output_type": "stream", "name": "stdout", "text": ["said\n"]},
            ],
        },
    ]  # fmt: skip
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    text = script("docs/notebooks.py").tutorial(path)
    parts = ("# One", "```python\n1 + 1\n```", "```\n2\n```", "<b>x</b>", "```\nsaid\n```", "notebooks/one.ipynb")
    at = [text.index(part) for part in parts]
    assert at == sorted(at)
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"tutorials/{path.stem}.md" in nav for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_python_of_a_familys_page_runs(pipe: Any) -> None:
    families = script("docs/families.py")
    bare = [family for family in FAMILIES.values() if not family.pipelines]
    code = {
        block
        for family in bare
        for block in re.findall(r"```python\n(.*?)```", "\n".join(families.recipe(family)), re.S)
    }
    assert len(code) == 1
    exec(compile(code.pop(), "families", "exec"), {"pipe": pipe})


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


class Loaded(Exception):
    """Stands for the weights that would be loaded next."""


DOCS = [
    line.replace("--model ...", "")
    for page in sorted((ROOT / "docs" / "guide").glob("*.md"))
    for line in commands(str(page.relative_to(ROOT)))
    if not line.startswith("mmdit-probe datasets")
]


@pytest.mark.parametrize("command", DOCS)
def test_commands_of_the_docs_are_ones_that_start(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they ask for is there, up to the weights: options, layers of the model, files that the text speaks of."""

    def load(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("cat.jpg", "hat.png", "cat.png", "ring.png", "photos/cat.jpg"):
        Image.new("RGB", (64, 64)).save(name)
    Path("prompts.txt").write_text("a red ring\n", encoding="utf-8")
    if "--out runs/magnet" not in command:
        Path("runs/magnet/lora").mkdir(parents=True)
        Path("runs/magnet/lora/pytorch_lora_weights.safetensors").touch()
    Path("sd3.5_large.safetensors").touch()
    monkeypatch.setattr("mmdit_probe.models.names.devices", lambda kind: None)  # as if every device might be there
    installed = dict.fromkeys(("int8", "fp8", "nf4", "gguf"), "json")  # and every quantiser
    monkeypatch.setattr("mmdit_probe.models.names.QUANTIZERS", installed)
    monkeypatch.setattr("mmdit_probe.experiments.target.as_model", load)
    monkeypatch.setattr("mmdit_probe.models.load.load", load)
    with pytest.raises(Loaded):
        app(shlex.split(command, comments=True)[1:], standalone_mode=False)


def test_the_errors_that_the_page_explains_are_raised() -> None:
    """The words of each message are those of a text in the code, in this order; `...` stands for what is filled in."""
    said = []
    for path in (ROOT / "mmdit_probe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                said.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    page = (ROOT / "docs" / "guide" / "errors.md").read_text(encoding="utf-8")
    rows = [row.split(" | ")[0] for row in page.splitlines() if row.startswith("| `")]
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 60
    unsaid = []
    for message in messages:
        words = ".*".join(re.escape(part.strip()) for part in message.split("..."))
        kind = words.removeprefix(r"unknown\ ")  # `errors.unknown` is given the rest
        if not any(re.search(words, text, flags=re.S) or (kind != words and re.match(kind, text)) for text in said):
            unsaid.append(message)
    assert unsaid == []


def test_the_reference_has_every_module_that_users_import_from() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    told = set(re.findall(r"^::: (\S+)$", pages, flags=re.M))
    public = {getattr(mmdit_probe, name).__module__ for name in mmdit_probe.__all__ if not name.startswith("__")}
    assert public | {f"mmdit_probe.experiments.{name}" for name in experiments.MODULES.values()} <= told


def test_readme_names_targets_that_exist_and_is_short() -> None:
    text, makefile = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make (\w+)", text)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    assert len(text.split()) <= 700


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert link.startswith("https://") or (ROOT / link).exists(), link
