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
    assert losses["again"] == losses["flow"]
    assert len({round(loss, 7) for loss in losses.values()}) == len(bench.WAYS) - 2


def test_report(bench: ModuleType) -> None:
    assert bench.held("head-logit", 64) == 4 * 24 * 4096 * 333
    assert bench.held("dense", 64) == 4 * 24 * 4429**2
    cell = {"side": 2, "dtype": "float32", "rounds": 1}
    ratios = {clock: [2.0, [float("nan")] * 2] for clock in ("wall", "cpu")}
    rows = [
        cell
        | {"way": way, "seconds": 1.0, "ratios": ratios, "peak_bytes": (2 + mib) * 2**20, "added_bytes": mib * 2**20}
        for way, mib in (("flow", 1), ("dense", 5))
    ]
    report = {"machine": "m", "torch": "t", "threads": 1, "clock": "cpu", "rows": rows}
    told = "1.00 | 2.000 [nan, nan] | 2.000 [nan, nan]"
    assert bench.markdown(report).splitlines()[-2:] == [
        f"| float32 | 4 | flow | 1 | {told} | 1 | 0 | 0 |", f"| float32 | 4 | dense | 1 | {told} | 5 | 4 | 10 |"
    ]  # fmt: skip


def test_a_cell_is_measured(bench: ModuleType) -> None:
    rows = bench.measure(4, "float32", "cpu", 1, "cpu", heads=1)
    assert [row["way"] for row in rows] == list(bench.WAYS)
    assert all(row["seconds"] > 0 and row["ratios"]["wall"][0] > 0 for row in rows)
