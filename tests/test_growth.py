"""The growth benchmark: slopes are of what was varied, and a command's start is beside them, not in them."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.scripts import script


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    return script("benchmarks/growth.py")


def test_an_axis_of_a_forward_is_measured(growth: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "BASE", {"image tokens": 16, "text tokens": 8, "layers": 2, "heads": 1})
    monkeypatch.setattr(growth, "FORWARD", {"text tokens": (4, 8)})
    rows = growth.of_forward("text tokens", "cpu", 2, "cpu")
    assert [row["value"] for row in rows] == [4, 8]
    assert all(row["added"] > 0 and row["stock"] > 0 and row["ratio"][0] > 0 for row in rows)


def test_slopes_leave_out_what_starting_costs(growth: ModuleType) -> None:
    def row(axis: str, value: int, processes: int, wall: float) -> dict[str, object]:
        return {"axis": axis, "value": value, "processes": processes, "repeats": 1, "wall": wall, "cpu": wall,
                "rows": 100 * value, "bytes": 800 * value}  # fmt: skip

    prompts = [row("prompts", 1, 1, 12.0), row("prompts", 5, 1, 20.0)]
    images = [row("images", 8, 1, 14.0), row("images", 48, 1, 34.0), row("images", 8, 2, 12.0)]
    images.append(row("images", 48, 2, 22.0))
    assert growth.slope(prompts, "wall") == 2.0
    forward = [{"axis": "heads", "value": n, "rounds": 7, "stock": n**2, "added": n, "ratio": [1.0, [1.0, 1.1]],
                "stock_bytes": 2**20, "masses_bytes": None} for n in (6, 24)]  # fmt: skip
    assert growth.exponent(forward, "stock") == pytest.approx(2.0)
    report = {"machine": "m", "torch": "t", "threads": 1, "clock": "wall", "rows": [*prompts, *images, *forward]}
    text = growth.markdown(report)
    assert "| heads | **p** | | 2.00 | 1.00 | | | |" in text
    assert "2.00 times the images a second; 1.55 for the whole command of 48 images" in text
    # 2 s and 100 rows of 8 bytes a prompt
    assert "| embedded model, measured slope | 1.00e+08 | 8.00e+08 | 556 h | 5.6 h |" in text
    assert "at 8.00 bytes a row as measured | 5.81e+11 | 4.64e+12 | | |" in text


def test_what_many_prompts_leave_is_counted(growth: ModuleType) -> None:
    (row,) = growth.of_items((2,))
    assert row["value"] == 2 and row["files"] > 4 and row["bytes"] > 1000
    assert all(row[name] > 0 for name in ("measured", "summed_up", "opened", "resumed", "resident", "after"))
    report = {"machine": "m", "torch": "t", "threads": 1, "clock": "wall", "rows": [row]}
    found = {"value": 1000, "measured": 50.0, "resident": 2**20, "bytes": 9000, "files": 9, "summed_up": 1.0,
             "opened": 2.0, "resumed": 3.0, "after": 2**21}  # fmt: skip
    report["rows"].append(row | found)
    assert "| 1000 | 50.0 | 0.0500 | 1 | 9 | 9 | 1.00 | 2.00 | 3.00 | 2 |" in growth.markdown(report)
