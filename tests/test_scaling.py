"""The scaling benchmark runs: every way computes the forward it says, and rows are complete."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.scripts import script


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return script("benchmarks/scaling.py")


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


def test_a_cell_is_measured_and_what_does_not_fit_is_left_out(
    scaling: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "fits", lambda way, *_: way in ("stock", "masses", "maps"))
    rows = scaling.measure("sd3-medium", 16, "float32", "cpu", 2, "cpu", heads=1)
    assert [row["way"] for row in rows] == ["stock", "masses", "maps"]
    assert rows[0]["ratios"]["cpu"][0] == 1.0 and all(row["seconds"] > 0 for row in rows)
    assert rows[1]["within"] > 1.0 and rows[1]["added_seconds"] < rows[1]["seconds"]
    assert all(row["peak_bytes"] is None or row["peak_bytes"] > 2**20 for row in rows)
    monkeypatch.undo()
    assert not scaling.fits("explicit", "flux", 10**8, "cpu") and scaling.fits("masses", "flux", 10**8, "cpu")


def of_clocks(seconds: dict[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    return {"wall": seconds, "cpu": seconds}


def test_rows_are_ratios_to_stock_judged_and_tabulated(scaling: ModuleType) -> None:
    stock = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 2.0]
    seconds = {"stock": stock, "masses": [1.02 * value for value in stock], "blur": [2 * value for value in stock]}
    rows = []
    for tokens, factor in ((1024, 1), (4096, 4)):
        timed = of_clocks({way: [factor * value for value in values] for way, values in seconds.items()})
        found = scaling.judged(timed, {"stock": (1, 2), "masses": (1, 2), "blur": (1, 3)}, {}, "cpu")
        rows += [{"blocks": "flux", "image_tokens": tokens, "dtype": "bfloat16", "rounds": 7} | row for row in found]
    assert [row["peak_ratio"] for row in rows[:3]] == [1.0, 1.0, 1.5]
    assert [row["verdict"] for row in rows[:3]] == ["", "met", "missed"]
    assert scaling.growth(rows, "flux", "bfloat16", "blur", "added_seconds") == pytest.approx(1.0)
    text = scaling.markdown({"machine": "m", "torch": "t", "threads": 1, "clock": "cpu", "rows": rows})
    assert (
        "2 of 4 cells met in time and memory, 2 missed, 0 undecided" in text
        and "flux bfloat16 4096 blur (2.000x time, 1.500x memory)" in text
    )
    ratio = "1.020 [1.020, 1.020]"
    row = f"| flux | bfloat16 | 4096 | masses | 7 | 8.160 | 0.1600 | {ratio} | {ratio} | - | 0 | 1.000 |"
    assert f"{row} 1.05 | met |" in text
    assert "explicit softmax left out at flux, bfloat16, 4096 image tokens" in text


def test_the_measured_ratio_decides_and_the_time_within_a_forward_stands_beside_it(scaling: ModuleType) -> None:
    # The machine slowed down between the two forwards; the observers' own time does not excuse the ratio.
    seconds = of_clocks({"stock": [1.0] * 6, "masses": [2.08] * 6, "blur": [2.0] * 6})
    rows = scaling.judged(seconds, dict.fromkeys(seconds["cpu"], (1, 2)), {"masses": [0.08] * 6}, "cpu")
    assert [row["within"] for row in rows] == [None, pytest.approx(1.04), None]
    assert [row["verdict"] for row in rows] == ["", "missed", "missed"]
    assert rows[1]["added_seconds"] == 0.08


def test_the_observers_time_is_that_of_their_methods(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdit_probe import AttentionMass

    observe = AttentionMass.observe

    def slow(observer: AttentionMass, seen: object) -> None:
        time.sleep(0.02)
        observe(observer, seen)  # type: ignore[arg-type]

    monkeypatch.setattr(AttentionMass, "observe", slow)
    transformer, forward = scaling.build("sd3-medium", 16, "float32", "cpu", heads=1)
    spent = scaling.Spent("wall")
    with scaling.attached("masses", transformer, spent):
        begin = time.perf_counter()
        forward()
        whole = time.perf_counter() - begin
    assert 0.04 <= spent.seconds < whole  # two layers


def test_a_stopped_run_goes_on(
    scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[int] = []

    def measure(blocks: str, tokens: int, dtype: str, *_: object) -> list[dict[str, object]]:
        if tokens == 4096 and not measured[1:]:
            measured.append(tokens)
            raise KeyboardInterrupt
        measured.append(tokens)
        cell = {"blocks": blocks, "image_tokens": tokens, "dtype": dtype, "rounds": 1}
        return [cell | row for row in scaling.judged(of_clocks({"stock": [1.0]}), {"stock": (1, 2)}, {}, "wall")]

    monkeypatch.setattr(scaling.overhead, "results", lambda name, device: tmp_path / f"{name}-kind")
    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr("sys.argv", ["scaling.py", "--blocks", "flux", "--tokens", "1024", "--tokens", "4096"])
    with pytest.raises(KeyboardInterrupt):
        scaling.main()
    scaling.main()
    assert measured == [1024, 4096, 4096]
    assert "in scaling-kind.json already" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling-kind.json", "scaling-kind.md"]
