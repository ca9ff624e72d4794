"""The package as a whole: cheap to import, its examples run, its errors help."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest

import mmdit_probe
from mmdit_probe.errors import RunError, UserError, unknown

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


def test_importing_the_package_imports_neither_torch_nor_diffusers() -> None:
    code = "import sys, mmdit_probe, mmdit_probe.errors; print({'torch', 'diffusers', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_every_exported_name_is_there() -> None:
    for name in mmdit_probe.__all__:
        assert getattr(mmdit_probe, name) is not None
        assert name in dir(mmdit_probe)
    with pytest.raises(AttributeError, match="nothing"):
        _ = mmdit_probe.nothing


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_errors_carry_exit_codes_and_the_closest_name() -> None:
    assert (UserError.exit_code, RunError.exit_code) == (2, 1)
    assert "did you mean 'ring'?" in str(unknown("class", "rin", ["house", "ring"]))
    assert str(unknown("class", "x", range(30))).endswith("(30 in all)")
    assert str(unknown("class", "x", [])).endswith("Known: none")
