"""The budget per layer, against the closed form of the synthetic table."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from mmdit_probe.experiments.budget_summary import robust_z, summarise

from mmdit_probe.errors import UserError
from tests.tables import SPANS, budget_table


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


def test_interval_is_students_over_prompts():
    from scipy import stats

    row = summarise(budget_table(layers=1, prompts=4)).iloc[0]
    per_prompt = 0.1 + 0.01 * np.arange(4)
    low, high = stats.t.interval(0.95, 3, per_prompt.mean(), stats.sem(per_prompt))
    assert row.I2T_low == pytest.approx(low)
    assert row.I2T_high == pytest.approx(high)


def test_one_prompt_has_no_interval():
    assert summarise(budget_table(prompts=1))[["I2T_low", "I2T_high"]].isna().all().all()


def test_parts_give_the_same_as_the_whole():
    table = budget_table()
    whole, parts = summarise(table), summarise([part for _, part in table.groupby("item")])
    pd.testing.assert_frame_equal(whole, parts)
    pd.testing.assert_frame_equal(whole, summarise(budget_table(item=False)))


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


def test_missing_branch_is_said():
    table = budget_table()
    with pytest.raises(UserError, match="no rows of branch 'condd'; expected cond or uncond"):
        summarise(table, branch="condd")
