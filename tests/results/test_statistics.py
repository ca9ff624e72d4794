"""Intervals cover, shares stay in [0, 1], few items decide nothing, many comparisons are corrected."""

from __future__ import annotations

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
    jackknifed,
    n_for_effect,
    no_worse,
    rank_agreement,
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
    (none,) = compare(table({0: [np.nan] * 9}), ["layer"]).to_dict("records")
    assert (none["n"], none["n_undefined"], none["verdict"]) == (0, 9, TOO_FEW) and np.isnan(none["difference"])


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


def test_yes_and_no_that_seldom_change() -> None:
    """Pairs of yes and no: that none of 20 changed does not exclude a loss of .05, which then happens in .95 ** 20 =
    36 % of samples. The bounds are the formula of Bonett and Price (2012): both discordant counts and n with one, and
    two, more; z is t with n + 1 degrees of freedom."""
    for lost, gained, n in ((0, 0, 20), (1, 0, 40), (3, 1, 200), (12, 0, 12)):
        changes = [-1.0] * lost + [1.0] * gained + [0.0] * (n - lost - gained)
        one, other = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
        middle, error = other - one, np.sqrt((other + one - (other - one) ** 2) / (n + 1))
        bounds = np.clip(middle + stats.t.ppf([0.025, 0.975], n + 1) * error, -1, 1)
        found = interval(changes, "change")
        assert found.mean == pytest.approx((gained - lost) / n) and found.low <= found.mean <= found.high
        np.testing.assert_allclose([found.low, found.high], bounds, rtol=1e-9)
        p = 2 * stats.t.sf(abs(middle) / error, n + 1)
        assert statistics.p_value(changes, "change") == pytest.approx(p)
    assert no_worse([0.0] * 20, 0.05, "change").verdict == UNDECIDED
    assert no_worse([0.0] * 200, 0.05, "change").verdict == NO_WORSE
    rows = [{"item": k, "control": name, "layer": 0, "value": 1.0} for k in range(20) for name in ("none", "stock")]
    (same,) = compare(pd.DataFrame(rows), ["layer"]).to_dict("records")
    assert (same["low"], same["high"], same["p_holm"]) == (*interval([0.0] * 20, "change")[1:], 1)
    with pytest.raises(ValueError, match="changes lie in"):
        interval([2.5, 0.0], "change")


def test_a_distance_of_none_is_exact() -> None:
    """That no picture moved is certain; that no answer changed in 20 is not."""
    rows = [{"item": i, "control": of, "outcome": name, "value": 0.0} for i in range(20) for of in ("none", "stock")
            for name in ("change", "facts")]  # fmt: skip
    found = compare(pd.DataFrame(rows), ["outcome"], distances=["change"]).set_index("outcome")
    assert found.loc["change", ["difference", "low", "high", "p_holm"]].tolist() == [0, 0, 0, 1]
    assert found.loc["facts", "low"] < 0 < found.loc["facts", "high"]
    assert statistics.kind_of([0.0] * 7 + [0.5], distance=True) == "change"  # one that moved says that others may


def test_a_loss_beside_a_gain_of_the_control() -> None:
    """Gains of yes and no lie in [-1, 1], so that one less its control's may be -2."""
    gains = {"none": [-1.0, -1.0] + [0.0] * 8, "random": [1.0] + [0.0] * 9}
    rows = [
        {"item": item, "control": of, "layer": 0, "value": value}
        for of, values in gains.items() for item, value in enumerate(values)
    ]  # fmt: skip
    found = compare(pd.DataFrame(rows), ["layer"]).iloc[0]
    more = [-2.0, -1.0] + [0.0] * 8 + [2.0, -2.0]  # the largest change once in each direction
    low, high = stats.t.interval(0.95, 11, np.mean(more), stats.sem(more))
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((-0.3, low, high))
    assert interval([-2.0] + [-1.0] * 9, "change").low < -1


def test_changes_of_yes_and_no_are_covered() -> None:
    """A t interval of such differences holds the truth in .14 to .9 of samples: most samples have no loss at all."""
    rng = np.random.default_rng(0)
    for n, rate in ((FEWEST, 0.02), (20, 0.05), (40, 0.1)):
        losses = -(rng.random((300, n)) < rate).astype(float)
        bounds = np.array([interval(one, "change")[1:] for one in losses])
        assert ((bounds[:, 0] <= -rate) & (-rate <= bounds[:, 1])).mean() > 0.93


def test_shares_that_are_all_equal_are_not_certain() -> None:
    """Two facts of four in every picture, three in one of ten: of eight pictures all show two in .9 ** 8 = 43 % of
    samples, in which an interval without width misses. By hand: nine times .5 beside 0 and 1 have the mean .5, the
    variance (2 / 4) / 10, and ten degrees of freedom."""
    found = interval([0.5] * 9, "share")
    reach = stats.t.ppf(0.975, 10) * np.sqrt(0.05 / 11)
    assert (found.mean, found.low, found.high) == (0.5, pytest.approx(0.5 - reach), pytest.approx(0.5 + reach))
    rng = np.random.default_rng(0)
    samples = np.where(rng.random((300, FEWEST)) < 0.1, 0.75, 0.5)
    bounds = np.array([interval(one, "share")[1:] for one in samples])
    assert ((bounds[:, 0] <= 0.525) & (bounds[:, 1] >= 0.525)).mean() > 0.93
    assert 0 <= interval([0.9] * 2, "share").low < 0.9 < interval([0.9] * 2, "share").high <= 1


@pytest.mark.parametrize("n", [FEWEST, 20])
@pytest.mark.parametrize("zeros", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("rest", ["normal", "shifted", "exponential"])
def test_verdicts_on_mostly_zeros_are_covered(rest: str, zeros: float, n: int) -> None:
    """Of samples that get a verdict, 91 % of intervals or more hold the mean (of 70 % zeros and n = 8, .85 of all did);
    of few zeros and n = 8, most samples get one."""
    rng = np.random.default_rng(n)
    size = (400, n)
    values, mean = {
        "normal": (rng.normal(size=size), 0), "shifted": (rng.normal(1, 1, size), 1),
        "exponential": (rng.exponential(size=size), 1),
    }[rest]  # fmt: skip
    data = np.where(rng.random(size) < zeros, 0, values)
    told = [one for one in data if np.isfinite(statistics.p_value(one, null=9))]
    bounds = np.array([interval(one)[1:] for one in told])
    missed = (bounds[:, 0] > mean * (1 - zeros)) | (bounds[:, 1] < mean * (1 - zeros))
    assert missed.mean() < 0.09 and (zeros > 0.5 or len(told) > 350)


def test_items_that_are_all_alike_but_one_get_no_verdict() -> None:
    """Seven zeros and a loss of unknown size, or eight times the same number, are no verdict in any table; eight zeros
    show no difference, but nothing to be no worse; fifty are enough for it."""

    def told(values: list[float]) -> tuple[str, str, str, str]:
        two = pd.concat([table({0: values}), table({1: spread(5)})]).assign(value=lambda rows: 9 * rows["value"])
        row = compare(two, ["layer"], margin=0.05)
        judged = statistics.judged(row.assign(margin=0.05))
        return row["verdict"][0], statistics.two_sided(row)[0], judged[0], no_worse(9 * np.array(values), 0.05).verdict

    assert told([0.0] * 7 + [-1.0]) == told([1.0] * 8) == told([1.0] * 49) == (TOO_FEW,) * 4
    assert told([0.0] * 8) == (NOT_ABOVE, statistics.ALIKE, TOO_FEW, TOO_FEW)
    assert told([0.0] * 50) == (NOT_ABOVE, statistics.ALIKE, NO_WORSE, NO_WORSE)
    assert told([1.0] * 50) == (ABOVE, statistics.HIGHER, NO_WORSE, NO_WORSE)
    assert TOO_FEW not in told([0.0] * 6 + [-1.0, -2.0])


def test_differences_of_few_scores_stay_possible() -> None:
    """By t, two differences of .94 and -.55 in scores of 0 to 1 reach from -9 to 10."""
    for n in (2, 3, 4):
        own, other = np.linspace(0.05, 0.95, n), np.linspace(0.6, 0.01, n)
        kind = statistics.kind_of(own, other)
        found = interval(own - other, kind)
        assert kind == "difference" and -1 <= found.low < found.mean < found.high <= 1
        rows = pd.DataFrame({"item": [*range(n)] * 2, "control": ["none"] * n + ["random"] * n, "layer": 0,
                             "value": [*own, *other]})  # fmt: skip
        (row,) = compare(rows, ["layer"]).to_dict("records")
        assert (row["low"], row["high"]) == (found.low, found.high)
    found = interval([1, 0.5, -1], "change")
    assert (found.low, found.high) == (-1, 1)
    assert interval([-1.5, 0.5, 1.0], "difference").low == -2  # of cosines
    with pytest.raises(ValueError, match="differences lie in"):
        interval([2.5, 0.0], "difference")


def test_what_has_steps_and_what_has_none() -> None:
    rng = np.random.default_rng(0)
    assert statistics.kind_of([0, 1, 1, 0, 1, 1, 0, 1], [1.0] * 8) == "change"
    assert statistics.kind_of(rng.integers(0, 5, 20) / 4, rng.integers(0, 5, 20) / 4) == "change"
    assert statistics.kind_of(rng.random(20)) == "difference"
    assert statistics.kind_of(1 + rng.random(20)) == statistics.kind_of([2.0, 3, 2, 3]) == "mean"
    assert statistics.kind_of([]) == statistics.kind_of(rng.random(20), []) == "mean"
    same = rng.random(20)  # two runs that agree to the last bit
    (row,) = compare(pd.DataFrame([{"item": k, "control": name, "layer": 0, "value": value}
                                   for k, value in enumerate(same) for name in ("none", "stock")]), ["layer"]
                     ).to_dict("records")  # fmt: skip
    assert (row["difference"], row["low"], row["high"], row["p_holm"]) == (0, 0, 0, 1)


def test_no_worse_among_many() -> None:
    """Of one comparison the loss is excluded at p = .01; of twenty such it is not by Holm's method, of twenty that are
    clear all are."""

    def told(p_margin: float, p_zero: float, low: float, high: float, count: int) -> set[str]:
        rows = pd.DataFrame(
            [{"n": 20, "low": low, "high": high, "margin": 0.05, "p_margin": p_margin, "p_holm": p_zero}]
        )
        rows = pd.concat([rows] * count, ignore_index=True)
        return set(statistics.judged(statistics.corrected(rows, ["p_margin", "p_holm"])))

    assert told(0.01, 0.9, -0.04, 0.03, 1) == {NO_WORSE} and told(0.01, 0.9, -0.04, 0.03, 20) == {UNDECIDED}
    assert told(0.5, 0.01, -0.09, -0.01, 1) == {WORSE} and told(0.5, 0.01, -0.09, -0.01, 20) == {UNDECIDED}
    assert told(1e-4, 0.9, -0.04, 0.03, 20) == {NO_WORSE}


def test_power_is_that_of_the_t_test() -> None:
    """Cohen's tables: d = .5 takes 34 pairs at 80 % power; simulated, 34 pairs find it in 80 % of samples."""
    pilot = np.array([-1, 1, -1, 1, -1, 1, -1, 1, -1, 1.0])
    pilot /= pilot.std(ddof=1)
    n = n_for_effect(pilot, 0.5)
    assert n == 34
    found = stats.ttest_1samp(np.random.default_rng(0).normal(0.5, 1, (4000, n)), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.03)
    assert n_for_effect(pilot, -0.5) == n < n_for_effect(pilot, 0.5, comparisons=10) < n_for_effect(pilot, 0.25)
    assert n_for_effect(pilot, 100.0) == n_for_effect(pilot / 1e9, 100.0) == FEWEST
    assert n_for_effect([1.0], 0.1) is n_for_effect([1, 1, 1], 0.1) is n_for_effect(pilot, 1e-9) is None
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


def test_statistics_that_are_no_means() -> None:
    """A correlation's error is that of large samples, (1 - rho^2) / sqrt(n); of a mean it is the t interval's."""
    data = np.random.default_rng(0).normal(size=(40, 2)) @ [[1, 0.8], [0, 0.6]]
    value, low, high, p = jackknifed(lambda kept: spearman(*data[kept].T), 40)
    assert value == pytest.approx(stats.spearmanr(*data.T).statistic) and low < value < high and p < 1e-6
    assert (high - low) == pytest.approx(2 * 1.96 * (1 - value**2) / np.sqrt(40), rel=0.5)
    mean = jackknifed(lambda kept: float(data[kept, 0].mean()), 40)
    expected = stats.t.interval(0.95, 39, data[:, 0].mean(), stats.sem(data[:, 0]))
    assert (mean.low, mean.high) == pytest.approx(expected)
    assert mean.p == pytest.approx(stats.ttest_1samp(data[:, 0], 0).pvalue)
    assert np.isnan(jackknifed(lambda kept: 1.0, 1)[1:]).all()
    assert jackknifed(lambda kept: 0.5, 50) == (0.5, 0.5, 0.5, 0) and jackknifed(lambda kept: 0.0, 9).p == 1
    for n, statistic in ((FEWEST - 1, lambda kept: data[kept, 0].mean()), (9, lambda kept: 0.5)):
        assert np.isnan(jackknifed(statistic, n).p)
    assert statistics.LEVEL == 0.95 and statistics.TAILS == (0.025, 0.975)


def test_a_correlation_over_the_pairs_of_few_items_is_covered() -> None:
    """Eight items of four pairs each, alike within an item: 88 % by a BCa bootstrap of items, and by pairs far less."""
    rng = np.random.default_rng(0)
    truth = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's of a normal pair of correlation .5
    hits = 0
    for _ in range(200):
        shared = rng.normal(size=(8, 1, 2)) * np.sqrt(0.3)
        pairs = (shared + rng.normal(size=(8, 4, 2)) * np.sqrt(0.7)) @ [[1, 0.5], [0, np.sqrt(0.75)]]
        found = jackknifed(lambda kept, pairs=pairs: spearman(*pairs[kept].reshape(-1, 2).T), 8)
        hits += found.low <= truth <= found.high
    assert hits / 200 > 0.91
