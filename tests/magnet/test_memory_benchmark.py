"""The memory benchmark of differentiable maps: ways agree that compute the same; the report is complete."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.scripts import script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("benchmarks/magnet_memory.py")


def test_dense_and_head_maps_are_the_same_step(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "HEADS", 2)
    monkeypatch.setattr(bench, "TEXT", 12)
    transformer, inputs = bench.build(4, "float32", "cpu")
    losses, gradients = {}, {}
    for way in bench.WAYS:
        transformer.zero_grad()
        losses[way] = bench.step(way, transformer, inputs, 4)
        gradients[way] = torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])
    assert losses["dense"] == pytest.approx(losses["head-probability"], rel=1e-5)
    torch.testing.assert_close(gradients["dense"], gradients["head-probability"], atol=1e-7, rtol=1e-3)
    assert len({round(loss, 7) for loss in losses.values()}) == len(bench.WAYS) - 1


def test_report(bench: ModuleType) -> None:
    assert bench.held("head-logit", 64) == 4 * 24 * 4096 * 333
    assert bench.held("dense", 64) == 4 * 24 * 4429**2
    rows = [{"way": "flow", "before": 0, "peak": 2**20, "seconds": 1.0},
            {"way": "dense", "before": 0, "peak": 5 * 2**20, "seconds": 2.0}]  # fmt: skip
    report = {"machine": "m", "torch": "t", "threads": 1, "dtype": "float32", "side": 2, "rows": rows}
    lines = bench.markdown(report).splitlines()
    assert lines[-2:] == ["| flow | 1.0 | 1 | 0 | 0 |", "| dense | 2.0 | 5 | 4 | 10 |"]
