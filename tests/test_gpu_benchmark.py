"""The GPU's quarter of an hour in small: every part finds what it should, and one that fails ends alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import script

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
SIZES = ("sd3-medium", "sd35-large", "flux", "qwen-image")


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return script("benchmarks/gpu.py")


@pytest.fixture
def task(gpu: ModuleType) -> object:
    return gpu.Task("cpu", time.time() + 600)


@pytest.mark.parametrize(
    ("blocks", "way"),
    [*((size, "pipeline") for size in SIZES), ("flux", "eager"), ("flux", "autocast"), ("sd3-medium", "compiled"),
     ("sd3-medium", "lora"), *(("sd3-medium", f"offload {kind}") for kind in ("model", "sequential", "group"))],
)  # fmt: skip
def test_the_output_is_compared_with_and_without_the_probe(
    gpu: ModuleType, task: object, blocks: str, way: str
) -> None:
    row = gpu.compared(blocks, "bfloat16", way, task)
    assert row["ok"] and row["same"] and row["same_after"] and row["repeatable"], row
    assert (row["mass_error"] is not None) == (way in ("eager", "autocast")) and way in gpu.WAYS


def test_a_wrong_mass_is_noticed(gpu: ModuleType, task: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdit_probe.attention import exact

    right = exact.attend
    monkeypatch.setattr(exact, "attend", lambda call: (right(call)[0], right(call)[1] + 1e-2))
    row = gpu.compared("flux", "bfloat16", "eager", task)
    assert row["same"] and not row["ok"] and row["mass_error"] > 1e-4


def test_parts_run_apart_and_one_that_fails_ends_alone(gpu: ModuleType, tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPT), "--device", "cpu", "--minutes", "5", "--part", "host", "--out", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "report.md", "rows.jsonl"]
    rows = [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"host"} and [row["rows"] for row in rows] == [
        "stock",
        "dropped",
        "in memory",
        "on disk",
    ]
    assert all(row["processor_ms"] > 0 for row in rows)
    assert (
        "| host | " in (tmp_path / "report.md").read_text()
        and "| on disk | 2 | 2 |" in done.stdout + (tmp_path / "report.md").read_text()
    )
    broken = gpu.apart("no_such_part", gpu.Task("cpu", time.time() + 60), tmp_path)
    assert broken["failed"] == "exit code 1: KeyError: 'no_such_part'" and not broken["rows"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ends_of_tests_are_read_off_what_pytest_prints(gpu: ModuleType, tmp_path: Path, workers: str) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_one(x):\n    assert x == 'c'\n\n"
        "def test_two():\n    pytest.skip('FAILED to find a GPU')\n"
    )
    line = [sys.executable, "-m", "pytest", "-vv", "-n", workers, "-p", "no:cacheprovider", "test_some.py"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = sorted(filter(None, map(gpu.ended_test, done.stdout.splitlines())))
    assert [(test.partition("::")[2], how) for test, how in found] == [
        ("test_one[a b]", "FAILED"), ("test_one[c]", "PASSED"), ("test_two", "SKIPPED"),
    ]  # fmt: skip


def test_a_part_whose_time_is_up_is_stopped(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    stopped = gpu.apart("unchanged", gpu.Task("cpu", time.time()), tmp_path)
    assert stopped["failed"] == "stopped: its time was up" and stopped["seconds"] < 10


@pytest.mark.parametrize(("part", "cells"), [("unchanged", 11), ("cost", 2)])
def test_what_the_time_did_not_allow_is_told_and_no_failure(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, cells: int
) -> None:
    gpu.work(part, gpu.Task("cpu", time.time() - 1), tmp_path)
    assert capsys.readouterr().out == f"{gpu.LEFT}its time was up after 0 of {cells} cells\n"
    assert (tmp_path / "rows.jsonl").read_text() == ""


def test_the_report_names_what_is_wrong_and_what_was_missed(gpu: ModuleType) -> None:
    of_clock = [1.2, [1.1, 1.3]]
    ratio = {"blocks": "flux", "image_tokens": 4096, "way": "maps", "seconds": 0.1, "peak_ratio": 1.01}
    ratio |= {"ratios": {"wall": of_clock, "cpu": of_clock}, "verdict": "missed", "memory_met": True, "ok": True}
    failed = {"test": "tests/x.py::y", "status": "failed", "ok": False}
    done = [
        {"part": "tests", "seconds": 9.0, "rows": [failed], "wrong": [failed], "failed": "", "left": ""},
        {"part": "cost", "seconds": 9.0, "rows": [ratio], "wrong": [], "failed": "", "left": "after 1 of 6 cells"},
        {"part": "host", "seconds": 9.0, "rows": [], "wrong": [], "failed": "stopped", "left": ""},
    ]
    text = gpu.report(done, "cuda", "a card")
    assert "| tests | 9 | 1 | 1 | well |" in text and "| tests/x.py::y | failed |" in text
    assert "| cost | 9 | 1 | 0 | after 1 of 6 cells |" in text and "Nothing was found." in text
    told = "1.200 [1.100, 1.300]"
    assert f"| flux | 4096 | maps | 0.1 | {told} | {told} | missed | 1.01 | yes |" in text and "a card" in text
    assert "In small" not in text and "In small: those of a processor." in gpu.report(
        [{"part": "kernels", "seconds": 1.0, "rows": [], "wrong": [], "failed": "", "left": ""}], "cpu", "a processor"
    )
