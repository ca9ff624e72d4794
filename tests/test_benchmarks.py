"""What the overhead benchmark compares: the explicit softmax computes the same attention, and reports are complete."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
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
    assert all(torch.equal(results[way], results["stock"]) for way in ("again", "watched", "probe"))
    torch.testing.assert_close(results["explicit"], results["stock"], atol=1e-4, rtol=1e-4)
    assert torch.equal(transformer(**inputs, return_dict=False)[0], results["stock"])


def test_memory_is_counted_from_configurations(monkeypatch):
    memory = script("benchmarks/model_memory.py")
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4), torch.nn.BatchNorm1d(4))
    weights = memory.weights_of(model)  # 32 + 4, 8, 8 parameters; 4 + 4 + 1 in buffers
    assert (weights.parameters, weights.linear, weights.buffers) == (52, 32, 9)
    assert weights.gib(4.5) * 2**30 == 32 * 4.5 / 8 + 29 * 2
    monkeypatch.setattr(
        memory, "built", lambda module, *_: memory.Weights(2**30 * (5 if module == "diffusers" else 3), 0, 0)
    )
    assert memory.row("Flux.1") == f"| Flux.1 (5.37 B) | 10.0 | 12.0 | 32.0 |{3 * ' 10.0 |'}"
    committed = (Path(memory.__file__).parent / "results" / "model_memory.md").read_text()
    assert [line.split(" (")[0][2:] for line in committed.splitlines()[2:]] == list(memory.MODELS)


def test_changes_by_quantisation_are_told_with_their_reasons():
    quantisation = script("benchmarks/quantisation.py")
    of = {"layer": 1, "first": 0.25, "difference": -0.125, "low": -0.5, "high": 0.0, "layers": 2, "differ": 1}
    row = {"model": "embedded", "way": "nf4", "mib": 4.4, "remark": "a GPU", "I2T": of, "I2T_word": of, "largest": 0.5}
    report = {"rows": [row], "packages": "torch t", "setting": "8 prompts", "left out": {"embedded, fp8": "NaN"}}
    text, change = quantisation.markdown(report), "-0.12500 [-0.50000, +0.00000]"
    assert f"| embedded | nf4 | 4 | 0.2500 | {change} | {change} | 1 of 2, 1 of 2 | 0.5000 |" in text
    assert (
        "nf4 cannot run there (a GPU): bitsandbytes stored it" in text and "Not measured: embedded, fp8 (NaN)" in text
    )
    committed = json.loads(quantisation.STEM.with_suffix(".json").read_text(encoding="utf-8"))
    assert quantisation.markdown(committed) == quantisation.STEM.with_suffix(".md").read_text(encoding="utf-8")
    measured = {(row["model"], row["way"]) for row in committed["rows"]}
    missing = {(model, way) for model in quantisation.MODELS for way in quantisation.WAYS} - measured
    assert {f"{model}, {way}" for model, way in missing} == set(committed["left out"])


def test_what_quantisation_changes_is_told_of_the_weights_that_ship(scenes_model):
    quantisation = script("benchmarks/quantisation.py")
    committed = json.loads(quantisation.STEM.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert quantisation.known(committed, "embedded", scenes_model.weight_hash) == committed
    others = [row for row in committed if row["model"] != "embedded"]
    assert quantisation.known(committed, "embedded", "of another training") == others  # the rest is measured again


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


def test_ways_take_turns_and_a_way_may_run_what_it_gives(overhead):
    order = []

    @contextlib.contextmanager
    def attach(way):
        yield None if way == "a" else lambda: order.append("given")

    seconds = overhead.in_turns(("a", "b"), attach, lambda: order.append("forward"), "cpu", 3)
    assert order == ["forward", "given", "given", "forward", "forward", "given"]
    assert {clock: {way: len(times) for way, times in of.items()} for clock, of in seconds.items()} == {
        clock: {"a": 3, "b": 3} for clock in ("wall", "cpu")
    }


def test_the_peak_is_of_the_forward_alone(overhead):
    large = overhead.peak(lambda: torch.ones(64 * 2**20).sum(), "cpu")
    if large is None:
        pytest.skip("the system cannot reset the peak")
    before, most = large
    assert 200 * 2**20 < most - before < 512 * 2**20
    before, most = overhead.peak(lambda: None, "cpu")
    assert most - before < 2**20


def test_ratios_are_to_the_base_and_memory_is_over_what_was_held_before(overhead):
    stock = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0]
    seconds = {"stock": stock, "probe": [1.1, *stock[1:]], "explicit": [3 * value for value in stock]}
    mib = 2**20
    # The library that the second way loaded stays in the process: no later way pays for it.
    peaks = {"stock": (4 * mib, 8 * mib), "probe": (14 * mib, 18 * mib), "explicit": (14 * mib, 34 * mib)}
    rows = {row["way"]: row for row in overhead.compared({"wall": seconds, "cpu": seconds}, peaks, "wall", "stock")}
    assert rows["probe"]["ratios"]["cpu"] == (1.0, [1.0, pytest.approx(1.1)]) and rows["probe"]["peak_ratio"] == 1.0
    assert rows["explicit"]["seconds"] == 6.0 and rows["explicit"]["added_bytes"] == 20 * mib
    assert rows["explicit"]["peak_ratio"] == 3.0  # 4 + 20 against 4 + 4
    no_peaks = overhead.compared({"wall": seconds, "cpu": seconds}, dict.fromkeys(seconds), "wall", "stock")
    assert no_peaks[1]["peak_ratio"] is None and no_peaks[1]["added_bytes"] is None
    whole = [row | {"dtype": "float32", "rounds": 7, "verdict": ""} for row in rows.values()]
    text = overhead.markdown({"machine": "m", "torch": "t", "threads": 1, "clock": "wall", "rows": whole})
    assert f"| float32 | explicit | 7 | 6.0000{2 * ' | 3.000 [3.000, 3.000]'} |  | 20 | 34 | 3.000 |" in text


def test_a_stopped_run_goes_on_where_it_was_measured_in_the_same_way(overhead, tmp_path):
    of = {"machine": "m", "clock": "wall"}
    overhead.write(tmp_path / "some-kind", of | {"rows": [1]}, "page")
    assert overhead.kept(tmp_path / "some-kind", of)["rows"] == [1]
    assert overhead.kept(tmp_path / "some-kind", of | {"clock": "cpu"})["rows"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some-kind.json", "some-kind.md"]
