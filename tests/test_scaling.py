"""The scaling benchmark runs: every way computes the forward it says, and rows and plot are complete."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("blocks", ["sd3-medium", "flux"])
def test_every_way_runs_and_only_the_blur_changes_the_output(scaling: ModuleType, blocks: str) -> None:
    transformer, forward = scaling.build(blocks, 16, "float32", "cpu", heads=1)
    stock = forward()
    outputs = {}
    for way in scaling.WAYS:
        with scaling.attached(way, transformer):
            outputs[way] = forward()
    for way in ("stock", "masses", "norms", "maps", "words"):
        assert torch.equal(outputs[way], stock)
    torch.testing.assert_close(outputs["explicit"], stock, atol=1e-4, rtol=1e-4)
    assert not torch.equal(outputs["blur"], stock)
    assert torch.equal(forward(), stock)


def test_rows_are_ratios_to_stock_and_are_plotted(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"stock": [1.0, 2.0, 4.0], "masses": [1.1, 2.2, 4.4], "blur": [2.0, 4.0, 8.0]}
    monkeypatch.setattr(scaling, "timings", lambda *_: seconds)
    monkeypatch.setattr(scaling, "memory", lambda *arguments: 3 if arguments[-1] == "blur" else 2)
    rows = scaling.measure("flux", 1024, "float32", "cpu", 3)
    assert [row["time_ratio"] for row in rows] == pytest.approx([1.0, 1.1, 2.0])
    assert [row["peak_ratio"] for row in rows] == [1.0, 1.0, 1.5]
    figure = scaling.plot(rows + scaling.measure("flux", 4096, "float32", "cpu", 3))
    assert len(figure.axes) == 2 and all(len(axis.lines) == 3 for axis in figure.axes)
    assert not scaling.fits("explicit", "flux", 10**8, "cpu") and scaling.fits("masses", "flux", 10**8, "cpu")
