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
    assert done.returncode == 0, done.stdout + (tmp_path / "host.log").read_text()
    rows = [json.loads(text) for text in (tmp_path / "host.jsonl").read_text().splitlines()]
    assert [row["rows"] for row in rows] == ["stock", "dropped", "in memory", "on disk"]
    assert all(row["processor_ms"] > 0 for row in rows)
    assert (
        "| host | " in (tmp_path / "report.md").read_text()
        and "| on disk | 2 | 2 |" in done.stdout + (tmp_path / "report.md").read_text()
    )
    broken = gpu.apart("no_such_part", gpu.Task("cpu", time.time() + 60), tmp_path)
    assert broken["ended"] == "exit code 1: KeyError: 'no_such_part'" and not broken["rows"]


def test_a_part_whose_time_is_up_is_stopped(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    stopped = gpu.apart("unchanged", gpu.Task("cpu", time.time()), tmp_path)
    assert stopped["ended"] == "stopped: its time was up" and stopped["seconds"] < 10


def test_the_report_names_what_is_wrong_and_what_was_missed(gpu: ModuleType) -> None:
    ratio = {"blocks": "flux", "image_tokens": 4096, "way": "maps", "seconds": 0.1, "time_ratio": 1.2}
    ratio |= {"time_ratio_interval": [1.1, 1.3], "verdict": "missed", "peak_ratio": 1.01, "memory_met": True}
    failed = {"test": "tests/x.py::y", "status": "failed", "ok": False}
    done = [
        {"part": "tests", "seconds": 9.0, "rows": [failed], "wrong": [failed], "ended": ""},
        {"part": "cost", "seconds": 9.0, "rows": [ratio | {"ok": True}], "wrong": [], "ended": "stopped"},
    ]
    text = gpu.report(done, "cpu")
    assert "| tests | 9 | 1 | 1 | well |" in text and "| tests/x.py::y | failed |" in text
    assert "| flux | 4096 | maps | 0.1 | 1.2 | [1.1, 1.3] | missed | 1.01 | yes |" in text
