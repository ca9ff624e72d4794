"""Intervals cover, shares stay in [0, 1], few items decide nothing, many comparisons are corrected."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mmdit_probe.results import statistics
from mmdit_probe.results.statistics import (
    ABOVE,
    FEWEST,
    NO_WORSE,
    NOT_ABOVE,
    TOO_FEW,
    UNDECIDED,
    WORSE,
    Interval,
    compare,
    holm,
    interval,
    n_for_effect,
    no_worse,
    rank_agreement,
    resampled,
    spearman,
)  # fmt: skip


@pytest.mark.parametrize("n", [FEWEST, 20])
@pytest.mark.parametrize("kind", ["normal", "exponential", "share"])
def test_intervals_cover_what_they_say(kind: str, n: int) -> None:
    """Binomial bounds of 400 simulated samples: 91 to 98 %; an interval of 80 %, or of percentiles, is outside."""
    rng = np.random.default_rng(n)
    truth = {"normal": 2.0, "exponential": 1.0, "share": 0.4}[kind]
    hits = 0
    for _ in range(400):
        if kind == "share":
            _, low, high = interval(rng.random(n) < truth, "share")
        else:
            _, low, high = interval(rng.normal(truth, 1, n) if kind == "normal" else rng.exponential(truth, n))
        hits += low <= truth <= high
    assert 0.91 <= hits / 400 <= 0.99


def test_normal_data_have_the_t_interval() -> None:
    data = stats.norm.ppf((np.arange(100) + 0.5) / 100)
    _, low, high = interval(data)
    expected = stats.t.interval(0.95, 99, data.mean(), stats.sem(data))
    np.testing.assert_allclose([low, high], expected, rtol=0.06)
    many = np.tile(data, 3)
    np.testing.assert_allclose(interval(many)[1:], stats.t.interval(0.95, 299, 0, stats.sem(many)), rtol=1e-9)


def test_moves_and_scales_with_the_data() -> None:
    data = np.random.default_rng(0).gamma(2, size=15)
    one, two = interval(data), interval(3 - 2 * data)
    np.testing.assert_allclose(two.mean, 3 - 2 * one.mean)
    np.testing.assert_allclose([two.low, two.high], [3 - 2 * one.high, 3 - 2 * one.low], rtol=0.1)
    assert one.high - one.mean > one.mean - one.low  # the long tail is where the mean may be


def test_wilson_for_shares() -> None:
    """Values of Newcombe 1998, table I, method 3 (Wilson without continuity correction)."""
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = interval([1] * successes + [0] * (n - successes), "share")
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    part = interval([0.9, 1.0, 0.95, 1.0, 0.2, 1.0, 1.0, 1.0], "share")  # shares per item
    assert 0 <= part.low < part.mean < part.high == 1
    with pytest.raises(ValueError, match=r"found -0\.1 to 1"):
        interval([1, -0.1], "share")


def test_one_item_has_no_interval_and_undefined_items_are_left_out() -> None:
    for one in ([3.0], [np.nan, 3.0, np.inf]):
        mean, low, high = interval(one)
        assert mean == 3 and np.isnan(low) and np.isnan(high)
    assert np.isnan(interval([])).all() and np.isnan(interval([np.nan])).all()
    assert interval([0, 1, 2, 3, np.nan]) == interval([0, 1, 2, 3])
    assert interval([2.0] * 9) == Interval(2, 2, 2)


def table(differences: dict[int, list[float]]) -> pd.DataFrame:
    rows = [
        {"layer": layer, "item": item, "control": control, "value": item + (control == "none") * value}
        for layer, values in differences.items()
        for item, value in enumerate(values)
        for control in ("none", "random")
    ]
    return pd.DataFrame(rows)


def spread(mean: float, n: int = 12) -> list[float]:
    return list(mean + stats.norm.ppf((np.arange(n) + 0.5) / n))


def test_many_comparisons_are_corrected() -> None:
    """A difference that stands alone does not stand among twenty."""
    alone = compare(table({0: spread(0.8)}), ["layer"])
    assert alone["verdict"].tolist() == [ABOVE]
    among = compare(table({0: spread(0.8)} | {layer: spread(0.0) for layer in range(1, 21)}), ["layer"])
    assert among["low"][0] == alone["low"][0] > 0 and among["p_holm"][0] > 0.05
    assert set(among["verdict"]) == {NOT_ABOVE}
    strong = compare(table({0: spread(3)} | {layer: spread(0.0) for layer in range(1, 21)}), ["layer"])
    assert strong["verdict"][0] == ABOVE


def test_outcomes_are_families_of_their_own() -> None:
    rows = pd.concat([table({0: spread(0.8)}).assign(outcome=name) for name in "abcdef"])
    together, apart = (compare(rows, ["layer", "outcome"], family=family) for family in (None, "outcome"))
    assert together["p_holm"][0] == pytest.approx(6 * apart["p_holm"][0])
    assert set(together["verdict"]) == {NOT_ABOVE} and set(apart["verdict"]) == {ABOVE}


def test_too_few_items_and_undefined_ones() -> None:
    values = [*spread(5, FEWEST), np.nan]
    (row,) = compare(table({0: values}), ["layer"]).to_dict("records")
    assert (row["n"], row["n_undefined"], row["verdict"]) == (FEWEST, 1, ABOVE)
    few = compare(table({0: spread(5, FEWEST - 1), 1: spread(5)}), ["layer"])
    assert few["verdict"].tolist() == [TOO_FEW, ABOVE] and np.isnan(few["p_holm"][0])
    assert few["p_holm"][1] == pytest.approx(stats.ttest_1samp(spread(5), 0).pvalue)  # a family of one
    assert compare(table({0: [np.nan]}), ["layer"]).empty


def test_holm() -> None:
    """The worked example: .01, .04, .03, .005 -> .03, .06, .06, .02."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.01, np.nan, 0.6, 0.7]), [0.03, np.nan, 1, 1])
    assert holm([]).shape == (0,)


def test_no_worse_needs_a_margin() -> None:
    assert no_worse(spread(0, 60), margin=0.5).verdict == NO_WORSE
    assert no_worse(spread(-0.3, 200), margin=0.5).verdict == NO_WORSE  # a small loss, as was stated
    assert no_worse(spread(0, 10), margin=0.1).verdict == UNDECIDED  # not "no worse": the interval is wide
    assert no_worse(spread(-2, 60), margin=0.5).verdict == WORSE
    few = no_worse(spread(0, FEWEST - 1), margin=9)
    assert (few.verdict, few.margin) == (TOO_FEW, 9)
    with pytest.raises(ValueError, match="margin"):
        no_worse([0.0], margin=0)


def test_power_is_that_of_the_t_test() -> None:
    """Cohen's tables: d = .5 takes 34 pairs at 80 % power; simulated, 34 pairs find it in 80 % of samples."""
    pilot = np.array([-1, 1, -1, 1, -1, 1, -1, 1, -1, 1.0])
    pilot /= pilot.std(ddof=1)
    n = n_for_effect(pilot, 0.5)
    assert n == 34
    found = stats.ttest_1samp(np.random.default_rng(0).normal(0.5, 1, (4000, n)), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.03)
    assert n_for_effect(pilot, -0.5) == n < n_for_effect(pilot, 0.5, comparisons=10) < n_for_effect(pilot, 0.25)
    assert n_for_effect(pilot, 100.0) == n_for_effect([1, 1, 1], 0.1) == FEWEST
    assert n_for_effect([1.0], 0.1) is None and n_for_effect(pilot, 1e-9) is None
    with pytest.raises(ValueError, match="effect"):
        n_for_effect(pilot, 0)


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 5, 30), rng.normal(size=30)
    assert spearman(one, two) == pytest.approx(stats.spearmanr(one, two).statistic)
    assert np.isnan(spearman([1.0], [2.0])) and np.isnan(spearman([1, 1 + 1e-9], [1, 2]))
    assert np.isnan(spearman([1, 2, np.inf], [1, 2, 3]))


def test_rank_agreement_pairs_items_and_counts_places() -> None:
    rng = np.random.default_rng(0)
    order = np.array([0.0, 1, 2, 3, 4])
    noise = rng.normal(0, 4, (20, 5))
    one = order + noise
    found = rank_agreement(one, 10 * one + 3, same_items=True)
    assert (found.rho, found.low, found.high) == pytest.approx((1, 1, 1))  # the same error in both is no disagreement
    assert rank_agreement(one, 10 * one + 3, same_items=False).low < 0.95
    assert found.places == 5 and found.p == pytest.approx(2 / 120)  # of 120 orders, the same one and its reverse
    three = np.arange(3.0) + noise[:, :3]
    few = rank_agreement(three, three, same_items=True)
    assert few.p >= 1 / 3 - 1e-9  # three layers agree by chance
    many = rng.normal(size=(6, 24))
    many[2, 3] = np.nan
    found = rank_agreement(many, many, same_items=True)
    assert found.rho == pytest.approx(1) and found.p < 1e-6
    with pytest.raises(ValueError, match="same places"):
        rank_agreement(one, one[:5], same_items=True)


def test_resampled_statistics() -> None:
    data = np.random.default_rng(0).normal(size=(40, 2)) @ [[1, 0.8], [0, 0.6]]
    value, low, high = resampled(lambda drawn: spearman(*data[drawn].T), 40)
    assert value == pytest.approx(stats.spearmanr(*data.T).statistic) and low < value < high
    assert (high - low) == pytest.approx(2 * 1.96 * (1 - value**2) / np.sqrt(40), rel=0.5)
    again = resampled(lambda drawn: spearman(*data[drawn].T), 40)
    assert again == (value, low, high)
    assert np.isnan(resampled(lambda drawn: 1.0, 1)[1:]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resampled(lambda drawn: 0.5, 9) == (0.5, 0.5, 0.5)  # all draws alike: nothing to warn of
    half = resampled(lambda drawn: float("nan") if len(set(drawn)) < 3 else float(drawn.mean()), 4)
    assert half.mean == 1.5 and np.isfinite([half.low, half.high]).all()
    assert statistics.LEVEL == 0.95 and statistics.TAILS == (0.025, 0.975)
