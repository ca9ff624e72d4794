"""What the overhead benchmark compares: the explicit softmax computes the same attention, and reports are complete."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests import tiny
from tests.scripts import script


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    return script("benchmarks/overhead.py")


@torch.no_grad()
def test_all_ways_compute_the_same_forward(overhead):
    transformer = tiny.transformer()
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 40),
        "pooled_projections": torch.randn(1, 24),
        "timestep": torch.tensor([500.0]),
    }
    results = {}
    for way in overhead.WAYS:
        with overhead.attached(way, transformer):
            results[way] = transformer(**inputs, return_dict=False)[0]
    assert torch.equal(results["probe"], results["stock"]) and torch.equal(results["watched"], results["stock"])
    torch.testing.assert_close(results["explicit"], results["stock"], atol=1e-4, rtol=1e-4)
    assert torch.equal(transformer(**inputs, return_dict=False)[0], results["stock"])


@pytest.mark.parametrize(
    ("units", "kind"), [(["avx2"], "avx2"), (["avx2", "avx512_f"], "avx512"), (["avx512_f", "amx_bf16"], "amx-bf16")]
)
def test_results_are_named_after_what_the_processor_computes_in(overhead, monkeypatch, units, kind):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "P", **dict.fromkeys(units, True)})
    words, found = overhead.machine("cpu")
    assert found == kind and words.startswith(f"P with {kind}, ")
    assert overhead.results("overhead", "cpu").name == f"overhead-{kind}"


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([1.01] * 7, "met"), ([1.04] * 6 + [1.2], "undecided"), ([1.2] * 7, "missed"), ([1.0] * 5, "too few rounds")],
)
def test_a_target_is_judged_by_the_interval_of_the_measured_ratio(overhead, ratios, expected):
    _, interval = overhead.ratio(ratios, [1.0] * len(ratios))
    assert overhead.verdict(interval, 1.05) == expected


def test_report_has_a_row_for_each_way(overhead, monkeypatch):
    stock = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0]
    seconds = {"stock": stock, "probe": [1.1, *stock[1:]], "explicit": [3 * value for value in stock]}
    seconds["watched"] = seconds["stock"]
    monkeypatch.setattr(overhead, "timings", lambda *_: {"wall": seconds, "cpu": seconds})
    monkeypatch.setattr(overhead, "memory", lambda *a: {"before": 0, "peak": 2**20 * (5 if a[-1] == "explicit" else 1)})
    row = overhead.measure("scenes-sd3", "float32", "cpu", 3, "wall")
    assert row["probe"]["time_ratio_median"] == 1.0 and row["probe"]["verdict"] == "undecided"
    assert row["probe"]["time_ratio_interval"] == [1.0, pytest.approx(1.1)] and row["stock"]["verdict"] == ""
    assert row["explicit"]["time_ratio_median"] == 3.0
    assert row["explicit"]["peak_ratio"] == 5.0
    text = overhead.markdown(
        {
            "machine": "m",
            "date": "d",
            "torch": "t",
            "threads": 1,
            "clock": "wall",
            "rows": [row],
            "shares": {"float32": overhead.shares("float32", "cpu", (64, 9))},
        }
    )
    assert (
        f"| scenes-sd3 | float32 | cpu | explicit | 6.0000{2 * ' | 3.000 [3.000, 3.000]'} |  | 5 | 5 | 5.000 |" in text
    )
    assert "What the masses add in float32" in text and "bmm" in text.splitlines()[-1]
