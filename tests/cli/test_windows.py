"""What Windows lacks or refuses, as far as another system can show it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

from mmdit_probe.errors import UserError
from mmdit_probe.experiments.score import export
from mmdit_probe.results.atomic import letters

AS_ON_WINDOWS = """
import builtins, multiprocessing, os, sys

imported, missing = builtins.__import__, {"fcntl", "grp", "posix", "pwd", "resource", "termios"}

def without(name, names=None, *rest, **more):
    if name in missing and (names or {}).get("__name__", "").startswith("mmdit_probe"):
        raise ModuleNotFoundError(name)
    return imported(name, names, *rest, **more)

builtins.__import__ = without
for name in ("fork", "mkfifo", "sched_getaffinity"):
    delattr(os, name)
multiprocessing.set_start_method("spawn")
from mmdit_probe.cli.app import main
main()
"""


def test_a_command_without_what_windows_lacks(tmp_path: Path) -> None:
    """No Unix modules and functions, a pipe in a code page, words that no file may be called."""
    (tmp_path / "prompts.txt").write_text('a red ring on grass: "CON", 猫?\n', encoding="utf-8")
    command = ["maps", "prompts.txt", "--num-steps", "1", "--out", "out"]
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, *command], cwd=tmp_path, env=env, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert "\\u732b" in done.stdout.decode("cp1252")
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
    assert any(path.name.endswith("-CON.png") for path in written)
    for path in written:
        assert not re.search(r'[\\<>:"|?*]|[. ]$', path.name), path
        assert not PureWindowsPath(path).is_reserved(), path
    assert len({str(path).lower() for path in written}) == len(written)


def test_file_names_from_words() -> None:
    assert letters('a <b>: "c" \\ d/e|f?*.') == "a-b-c-d-e-f"
    assert len(letters("word " * 100).encode()) <= 40 and letters("?") == ""


def test_a_prompt_that_windows_refuses_as_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdit_probe.experiments.score.sys.platform", "win32")
    with pytest.raises(UserError, match=re.escape('it has " ?')):
        export(None, tmp_path, 'is it "red"?', 0)
