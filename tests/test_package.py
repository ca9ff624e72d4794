"""The package as a whole: cheap to import, its examples run, its errors help."""

from __future__ import annotations

import ast
import doctest
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmdit_probe
from mmdit_probe.errors import RunError, UserError, counted, unknown

EXAMPLES = [
    "mmdit_probe.errors",
    "mmdit_probe.attention.call",
    "mmdit_probe.attention.exact",
    "mmdit_probe.attention.reference",
    "mmdit_probe.evaluate.scores",
    "mmdit_probe.models.families.registry",
    "mmdit_probe.models.layout",
    "mmdit_probe.segment.record",
]


NO_WEIGHTS = ("Config", "Tokenizer", "Processor")
"""Ends of the names of what holds no weights."""


def test_the_repository_holds_no_links() -> None:
    """A link leads to where its author kept something, which no one else has."""
    root = Path(mmdit_probe.__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not in a git checkout")
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) > 100
    assert [line for line in listed.splitlines() if line.startswith("120000")] == []


def test_weights_are_read_as_safetensors_only() -> None:
    """Every place that loads by name says so; one that does not would unpickle what a folder offers."""
    found = 0
    for file in Path(mmdit_probe.__file__).parent.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            kind = ast.unparse(call.args[0]) if name == "_local" else name.removesuffix(".from_pretrained")
            if kind == name or kind.endswith(NO_WEIGHTS) or kind == "kind":  # "kind": inside `_local`
                continue
            found += 1
            said = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert said.get("use_safetensors") == "True", f"{file.name}: {ast.unparse(call)}"
    assert found >= 7


def test_whatever_loads_with_the_libraries_is_quiet() -> None:
    """Transformers warns of packages that are not there as soon as a processor is imported: also that stands inside."""
    found = 0
    for file in Path(mmdit_probe.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        blocks = [node for node in ast.walk(tree) if isinstance(node, ast.With) and "quiet(" in ast.unparse(node.items)]
        inside = {node for block in blocks for node in ast.walk(block)}
        for node in ast.walk(tree):
            loads = isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "load_config")
            if loads or (isinstance(node, ast.ImportFrom) and node.module == "transformers"):
                found += 1
                assert node in inside, f"{file.name}:{node.lineno}: {ast.unparse(node)}"
    assert found >= 16


def test_importing_the_package_imports_neither_torch_nor_diffusers() -> None:
    code = "import sys, mmdit_probe, mmdit_probe.errors; print({'torch', 'diffusers', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("room", ["", ".data", ".experiments", ".magnet", ".scenes", ".segment"])
def test_every_exported_name_is_there(room: str) -> None:
    """Notebooks complete the names that `dir` lists."""
    package = importlib.import_module(f"mmdit_probe{room}")
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing


def test_type_checkers_are_told_what_packages_export() -> None:
    """A typed package exports what its `__all__` lists word for word, or what it imports `as` itself (PEP 484): else
    `mypy --strict` refuses the import in a user's script, and editors know no type."""
    found = 0
    for file in Path(mmdit_probe.__file__).parent.rglob("__init__.py"):
        module = importlib.import_module(".".join(file.relative_to(Path(mmdit_probe.__file__).parents[1]).parent.parts))
        tree = ast.parse(file.read_text(encoding="utf-8"))
        told = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                told |= {name.name for name in node.names if name.name == name.asname}
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                told.add(node.targets[0].id)
                if node.targets[0].id == "__all__" and isinstance(node.value, ast.List):
                    told |= {one.value for one in node.value.elts if isinstance(one, ast.Constant)}
        assert set(getattr(module, "__all__", ())) <= told, file
        found += len(told)
    assert found > 80


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_errors_carry_exit_codes_and_the_closest_name() -> None:
    assert (UserError.exit_code, RunError.exit_code) == (2, 1)
    assert "did you mean 'ring'?" in str(unknown("class", "rin", ["house", "ring"]))
    assert str(unknown("class", "x", range(30))).endswith("(30 in all)")
    assert str(unknown("class", "x", [])).endswith("Known: none")


def test_one_is_not_told_as_several() -> None:
    told = [counted(count, "picture") for count in (0, 1, 2)] + [counted(1, "class", "classes")]
    assert (
        told == ["0 pictures", "1 picture", "2 pictures", "1 class"] and counted(3, "class", "classes") == "3 classes"
    )
