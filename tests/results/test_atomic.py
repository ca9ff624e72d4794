"""Files are complete or absent; a refused write is one line with the path and the reason."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdit_probe.errors import RunError, UserError
from mmdit_probe.results import atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_contents_and_no_leftovers(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "new" / "a.txt", "eins\nzwei ü\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "eins\nzwei ü\n".encode()
    atomic.write_json(tmp_path / "new" / "b.json", {"path": Path("x"), "n": 1, "of": [-math.inf, (math.nan, 0.5)]})
    written = json.loads((tmp_path / "new" / "b.json").read_text(), parse_constant=pytest.fail)
    assert written == {"path": "x", "n": 1, "of": ["-inf", [None, 0.5]]}
    assert atomic.write_bytes(tmp_path / "new" / "a.txt", b"2").read_bytes() == b"2"
    assert names(tmp_path / "new") == ["a.txt", "b.json"]


def test_a_name_as_long_as_the_system_takes(tmp_path: Path) -> None:
    """What was beside it for a while had a longer name: characters of more than a byte were counted as one."""
    assert atomic.write_bytes(tmp_path / f"{'猫' * 83}.png", b"1").read_bytes() == b"1"


@pytest.mark.parametrize("broken", [KeyboardInterrupt, ValueError])
def test_old_file_stays_when_the_block_fails(tmp_path: Path, broken: type[BaseException]) -> None:
    path = atomic.write_text(tmp_path / "a", "old")
    with pytest.raises(broken), atomic.replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old" and temporary.parent == tmp_path
        raise broken
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    atomic.write_text(tmp_path / "a", "x")
    assert order == ["fsync", "replace"]


def test_something_in_the_way_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path in (tmp_path / "file" / "a.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match=r"cannot write '.*': .*; choose another folder"):
            atomic.write_text(path, "x")
    with pytest.raises(UserError, match="cannot write"):
        atomic.make_folder(tmp_path / "file" / "below")
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        atomic.write_text(tmp_path / "a", "x")
    tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("kind", ["python", "safetensors", "torch"])
def test_a_full_disk_is_told_whatever_library_writes(tmp_path: Path, kind: str) -> None:
    told = pytest.raises(RunError, match=r"writing '.*a' failed: .*; finished items are kept; .* with --resume")
    with told, atomic.resumable(), atomic.disk(tmp_path / "a"):
        if kind == "python":
            Path("/dev/full").write_text("x", encoding="utf-8")
        elif kind == "torch":
            torch.save({"x": torch.zeros(100_000)}, "/dev/full")
        else:
            from safetensors import SafetensorError

            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RunError, match="No space left on device; free some space"), atomic.disk("a"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_safetensors_tells_the_system_s_number(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises((UserError, RunError), match="cannot write"), atomic.disk("a"):
        save_file({"x": torch.zeros(1)}, tmp_path / "folder")


def test_bugs_keep_their_traceback_and_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic.replacing(tmp_path / "a"):
        1 / 0  # noqa: B018
    with pytest.raises(RunError, match="nothing was written"), atomic.replacing(tmp_path / "a"):
        pass
    with pytest.raises(UserError, match="mine"), atomic.replacing(tmp_path / "a"):
        raise UserError("mine")


def test_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    (tmp_path / f"a.parquet.0123{atomic.SUFFIX}").write_text("half")
    atomic.write_text(tmp_path / "b", "x")
    atomic.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["b"]
