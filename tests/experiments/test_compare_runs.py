"""Two runs side by side: differences by hand, what is refused, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmdit_probe import UserError
from mmdit_probe.cli.app import main
from mmdit_probe.experiments import AttentionBudget, BlockOperations, Perturb, Result, ValueNorms
from mmdit_probe.experiments.attention_budget import blocks
from mmdit_probe.experiments.compare_runs import compare_runs
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.plots.layers import run_differences
from tests import tiny

PROMPTS = ["a red ring", "a cat", "a blue house"]


def run(kind: type = AttentionBudget, seed: int = 0, prompts: list[str] = PROMPTS, **options: Any) -> Result:
    ask = kind(prompts=prompts, num_steps=1, guidance=3.0, rows="summary", **options)
    return ask.run(MMDiT(tiny.pipeline("sd3", seed)), progress=False)


def test_differences_are_paired_by_item() -> None:
    first, second = run(seed=0), run(seed=1)
    found = compare_runs(first, second)
    one, two = (blocks(r.experiment.by_item(r)).set_index(["layer", "item"])["I2T"] for r in (first, second))  # type: ignore[attr-defined]
    row = found.table.set_index(["measure", "layer"]).loc[("I2T", 2)]
    assert row["difference"] == pytest.approx((two - one).loc[2].mean(), abs=1e-6)
    assert row["low"] <= row["difference"] <= row["high"] and row["n"] == 3
    assert row["verdict"] == "too few items"
    same = compare_runs(first, first)
    assert np.allclose(same.table["difference"], 0) and same.differs == []
    assert "I2T_word" in str(found.texts()[1]) and found.figure().axes


def test_a_figure_of_a_part_says_so() -> None:
    """Eight of twelve series were drawn, as if there were no others."""
    cells = [{"layer": 0, "measure": f"m{k}", "n": 9, "difference": 0.1, "low": 0.0, "high": 0.2} for k in range(12)]
    assert "the first 8 of 12 are drawn" in run_differences(pd.DataFrame(cells), "runs")._suptitle.get_text()  # type: ignore[attr-defined]
    assert "drawn" not in run_differences(pd.DataFrame(cells[:8]), "runs")._suptitle.get_text()  # type: ignore[attr-defined]


def test_another_scheduler_is_told(pipe: Any) -> None:
    ask = AttentionBudget(prompts=["a cat"], num_steps=2, guidance=1.0, rows="summary")
    first = ask.run(MMDiT(pipe), progress=False)
    pipe.scheduler = type(pipe.scheduler)(shift=1.0)
    second = ask.run(MMDiT(pipe), progress=False)
    assert compare_runs(first, second).differs == ["noise levels: 1, 0.00893 -> 1, 0.001"]


def test_verdicts() -> None:
    """Ten items of which the second run has .1 more, up to noise; a margin is about losses."""
    from mmdit_probe.experiments.compare_runs import _paired

    noise = np.random.default_rng(0).normal(0, 0.01, (2, 10))
    first, second = (
        pd.DataFrame({"item": range(10), "control": "none", "layer": 0, "value": level + noise[k]})
        for k, level in enumerate((0.5, 0.6))
    )
    assert _paired(first, second, None)["verdict"].tolist() == ["higher"]
    assert _paired(second, first, None)["verdict"].tolist() == ["lower"]
    assert _paired(second, first, 0.2)["verdict"].tolist() == ["no worse"]
    assert _paired(second, first, 0.05)["verdict"].tolist() == ["worse"]
    # This loss is excluded at p = .018 alone, not among five layers; outcomes are families of their own.
    one, two = second.assign(outcome="facts"), first.assign(outcome="facts")
    difference = (two["value"] - one["value"]).to_numpy()
    error = difference.std(ddof=1) / np.sqrt(10)
    margin = -difference.mean() + 2.9 * error  # of t with 9 degrees of freedom
    assert _paired(one, two, margin)["verdict"].tolist() == ["no worse"]
    layers, outcomes = (
        [pd.concat([frame.assign(**{name: k}) for k in range(5)]) for frame in (one, two)]
        for name in ("layer", "outcome")
    )
    assert set(_paired(*layers, margin)["verdict"]) == {"worse"}  # that there is one is beyond doubt
    assert set(_paired(*outcomes, margin)["verdict"]) == {"no worse"}


def test_a_loss_is_a_rise_where_less_is_better() -> None:
    """Ten prompts of which the second run draws more swapped colours, .1 up to noise: that is a loss of .1."""
    from mmdit_probe.experiments.compare_runs import _paired

    noise = np.random.default_rng(0).normal(0, 0.01, (2, 10))
    first, second = (
        pd.DataFrame({"item": range(10), "control": "none", "outcome": name, "value": level + noise[k]})
        for k, level in enumerate((0.5, 0.6)) for name in ("swapped_colours",)
    )  # fmt: skip
    sign = BlockOperations().sign
    assert (sign("facts"), sign("swapped_colours"), sign("change"), Perturb().sign("facts")) == (1, -1, -1, -1)
    (row,) = _paired(first, second, 0.05, sign).to_dict("records")
    assert row["verdict"] == "worse" and row["difference"] == pytest.approx(0.1, abs=0.02)
    assert 0 < row["low"] < row["difference"] < row["high"] and row["second"] > row["first"] > 0
    (row,) = _paired(second, first, 0.05, sign).to_dict("records")
    assert row["verdict"] == "no worse" and row["low"] < row["high"] < 0


def test_images_that_did_not_move_in_either_run_differ_by_exactly_nothing() -> None:
    from mmdit_probe.experiments.compare_runs import _paired

    still = pd.DataFrame({"item": range(10), "control": "none", "outcome": "change", "value": 0.0})
    turned = _paired(still, still, 0.05, lambda outcome: -1.0)
    assert not np.signbit(turned[["first", "second", "difference"]].to_numpy(float)).any()  # "-0.000" in a table
    for margin in (None, 0.05):
        ask = BlockOperations()
        (row,) = _paired(still, still, margin, ask.sign, ask.distances).to_dict("records")
        assert row["low"] == row["high"] == 0


def test_other_weights_of_the_same_name_are_told() -> None:
    first, second = run(seed=0), run(seed=1)
    differs = [entry.partition(":")[0] for entry in compare_runs(first, second).differs]
    assert differs == ["weight_hash", "other weights of text_encoder, text_encoder_2, text_encoder_3, vae"]


def test_refused() -> None:
    first = run()
    with pytest.raises(UserError, match="value-norms"):
        compare_runs(first, run(ValueNorms))
    with pytest.raises(UserError, match="other items"):
        compare_runs(first, run(prompts=["a cat", "a red ring", "a blue house"]))
    longer = run(prompts=[*PROMPTS, *PROMPTS])  # the first difference lies behind what a message tells
    for others in ([*PROMPTS, *PROMPTS[:2], "a dog"], [*PROMPTS, *PROMPTS[:2]]):
        with pytest.raises(UserError, match=r"other (number of )?items"):
            compare_runs(longer, run(prompts=others))
    for margin in (-1.0, float("inf"), float("nan"), "0.05"):
        with pytest.raises(UserError, match=f"--margin {margin!r}: expected"):
            compare_runs(first, first, margin)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="in common"):
        compare_runs(run(layers=0), run(layers=1))


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        run(seed=seed).save(name)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "a", "b", "--out", "c", "--json"])
    out, err = capfd.readouterr()
    assert stopped.value.code in (0, None), err
    assert {row["layer"] for row in json.loads(out)["comparison"]} == {0, 1, 2}
    assert {path.name for path in Path("c").iterdir()} == {
        "comparison.csv", "comparison.png", "comparison.pdf", "run.json"
    }  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "a", "nowhere"])
    assert stopped.value.code == 2
