"""The budget per layer, against the closed form of the synthetic table."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mmdit_probe.data import paper_table
from mmdit_probe.errors import UserError
from mmdit_probe.experiments import AttentionBudget, Result, ValueNorms
from mmdit_probe.experiments.attention_budget import (
    budget_table as shown,
    mass_interval,
    robust_z,
    summarise as summarise_items,
)
from mmdit_probe.experiments.store import MemoryStore
from mmdit_probe.experiments.text import records, share
from mmdit_probe.results.statistics import interval
from tests.tables import SPANS, budget_table, by_item, of_video


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    items = by_item(AttentionBudget(), table)
    return summarise_items(items[items["branch"] == "cond"])


def test_masses_of_each_query_modality_sum_to_one():
    summary = summarise(budget_table())
    np.testing.assert_allclose(summary[["I2I", "I2T", "I2O"]].sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(summary[["T2I", "T2T", "T2O"]].sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(summary[["I2I_uniform", "I2T_uniform"]].sum(axis=1), 1, atol=1e-12)


def test_mean_over_steps_heads_then_prompts():
    summary = summarise(budget_table(layers=6, prompts=3))
    np.testing.assert_allclose(summary.I2T, (np.arange(6) + 1) / 10 + 0.01)  # prompts add 0, 0.01, 0.02
    assert list(summary.prompts) == [3] * 6


def test_spans_add_up_over_encoders_and_to_the_block():
    summary = summarise(budget_table())
    kinds = [f"I2T_{kind}" for kind in ("word", "bos", "eos", "template", "pad", "null", "unknown")]
    np.testing.assert_allclose(summary[kinds].sum(axis=1), summary.I2T)
    words = SPANS["clip", "word"] + SPANS["t5", "word"]
    np.testing.assert_allclose(summary.I2T_word / summary.I2T, words / sum(SPANS.values()))
    np.testing.assert_allclose(summary.I2T_word_uniform, words / 64)
    assert (summary.I2T_null == 0).all()


def test_shares_lose_the_zero_before_the_point_and_no_other():
    assert [*map(share, (0.785, -0.05, 1, 10.5, np.nan))] == [".785", "-.050", "1.000", "10.500", ""]


def test_of_a_video_the_image_mass_is_split_and_nothing_else_changes():
    plain, video = summarise(budget_table()), summarise(of_video(budget_table()))
    parts = ["I2I_same_frame", "I2I_other_frames"]
    np.testing.assert_allclose(video[parts].to_numpy(), np.outer(plain.I2I, [1 / 3, 2 / 3]))
    np.testing.assert_allclose(video[[f"{name}_uniform" for name in parts]], [[12 / 64, 36 / 64]] * 6)
    new = [name for name in video if name.startswith(tuple(parts))]
    assert sorted(new) == sorted(f"{name}{of}" for name in parts for of in ("", "_uniform", "_low", "_high"))
    pd.testing.assert_frame_equal(video.drop(columns=new), plain)
    table = shown(video)
    assert table.columns[1:5] == ["I2I", "same frame", "other frames", "I2T"]
    assert table.rows[0][1:4] == [".890 (.750)", ".297 (.188)", ".593 (.562)"]
    assert "same frame" not in shown(plain).columns


def test_interval_is_over_prompts():
    row = summarise(budget_table(layers=1, prompts=4)).iloc[0]
    mean, low, high = interval(0.1 + 0.01 * np.arange(4))
    assert (row.I2T, row.I2T_low, row.I2T_high) == (pytest.approx(mean), pytest.approx(low), pytest.approx(high))
    assert low < mean < high


def test_one_prompt_has_no_interval():
    assert summarise(budget_table(prompts=1))[["I2T_low", "I2T_high"]].isna().all().all()


def test_in_json_there_is_no_nan_whatever_holds_it():
    held = {"frame": pd.DataFrame({"a": [1.0, np.nan]}), "single": np.float32("inf"), "array": np.array([0.5, np.nan])}
    assert records(held) == {"frame": [{"a": 1.0}, {"a": None}], "single": None, "array": [0.5, None]}


def test_streams_add_up_and_heads_and_steps_are_averaged():
    ask, table = AttentionBudget(), budget_table()
    cell = ["branch", "layer", "query", "key", "span"]
    table["mass"] *= 1 + 0.1 * table["step"] + 0.01 * table["head"]
    for item, rows in table.groupby("item"):
        each = rows.groupby([*cell, "step", "head"])[["mass", "uniform"]].sum()
        one = ask.reduce(rows).set_index(cell).sort_index()
        pd.testing.assert_frame_equal(one, each.groupby(cell).mean(), obj=f"item {item}")


def test_categories_change_nothing():
    table = budget_table()
    coded = table.astype(dict.fromkeys(("branch", "query", "key", "span", "stream"), "category"))
    pd.testing.assert_frame_equal(summarise(table), summarise(coded))


def test_only_the_layer_that_stands_out_is_marked():
    table = budget_table(layers=8)
    odd = (table.layer == 5) & (table["query"] == "text")
    table.loc[odd & (table.key == "image"), "mass"] = 0.9
    table.loc[odd & (table.key == "text"), "mass"] *= 0.2
    table.loc[table["query"] == "text", "mass"] += 1e-3 * table.layer  # some spread, or no scale exists
    assert list(summarise(table).outlier) == ["", "", "", "", "", "T2I+", "", ""]


def test_robust_z_of_equal_values_is_zero():
    np.testing.assert_array_equal(robust_z(np.ones(5)), np.zeros(5))


@pytest.mark.parametrize(("ask", "branch"), [(AttentionBudget(), "condd"), (ValueNorms(), "uncond")])
def test_missing_branch_is_said(ask, branch):
    store = MemoryStore(ask.name, {}, {})
    with store.task(0, lambda _: None) as record:
        record.write(ask.tables[-1], pd.DataFrame({"item": [0], "control": "none", "branch": "cond"}))
    with pytest.raises(UserError, match=f"no rows of branch '{branch}'; expected cond or uncond"):
        ask.by_item(Result(ask, store), branch)


def test_the_table_in_text_puts_the_paper_beside_ours():
    table = shown(summarise(budget_table()), paper_table("budget_by_layer"))
    cells = {name: [row[place] for row in table.rows] for place, name in enumerate(table.columns)}
    assert cells["layer"] == ["0", "1", "2", "3", "4", "5"]
    assert cells["I2T"][0] == ".110 (.250)"
    assert cells["paper I2T"][:2] == [".562", ".856"]
    assert cells["paper T2I"][:2] == [".345", ".869"]
    assert "to words" in cells
    assert "to null slots" not in cells


@pytest.mark.parametrize("mass", [0.0, 0.16, 1.0])
def test_a_mass_that_is_the_same_in_every_item_is_exact(mass: float):
    """Of keys that are none, under uniform attention, of all keys: no item can have another."""
    assert mass_interval(pd.Series([mass] * 20)) == pytest.approx((mass, mass, mass))
