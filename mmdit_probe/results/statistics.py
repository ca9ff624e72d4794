"""Intervals that cover, comparisons with controls, margins, power, and agreement of ranks.

    mean, low, high = interval([0.1, 0.2, 0.3, 0.2])          # of a share of yes and no: interval(values, "share")
    compare(table, ["layer"], "value")                        # one row per layer and control, with a verdict
    no_worse(differences, margin=0.05).verdict                # "no worse", "worse" or "undecided"
    judged(table)                                             # the same of many rows, corrected for being many
    n_for_effect(differences, 0.05)                           # items that would show a difference of 0.05

A claim is about the difference of measurement and control on the same items, so items are what is resampled, not rows.
Undefined scores (NaN) are left out and counted. All intervals are of 95 %; how often they cover the truth, by n, is in
benchmarks/results/interval_coverage.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmdit_probe import lazy_pandas as pd

Kind = Literal["mean", "share", "change", "difference"]

NONE = "none"
"""Value of the column `control` in rows of the measurement itself."""

ABOVE, NOT_ABOVE, TOO_FEW = "above its control", "not above its control", "too few items"
TOO_FEW_SEEDS = "too few seeds"
BEYOND, NOT_BEYOND = "beyond control", "not beyond control"
NO_WORSE, WORSE, UNDECIDED = "no worse", "worse", "undecided"

FEWEST = 8
"""Items below which there is no verdict: with fewer, some kinds of scores are covered in less than 93 % of samples, by
more than the simulation's noise (benchmarks/results/interval_coverage.md)."""

FEWEST_OTHERS, FEWEST_EQUAL = 2, 50
"""There is no verdict either with fewer items that differ from the most frequent value: zeros and one more number do
not say how large the rest may be. If none differs, so many items are needed: fewer often have none of the one in ten
that does (there, too)."""

FEWEST_SEEDS = 3
"""Seeds below which nothing is told of a training but its value: where seeds differ more than items do, intervals of
two cover 88 %, of three 92 % (there, too)."""

A_VERDICT_TAKES = f"a verdict takes {FEWEST}, {FEWEST_OTHERS} of them unlike the most frequent value"

LEVEL = 0.95
TAILS = (0.025, 0.975)
DRAWS = 2000
MANY = 200
"""Items from which the t distribution stands for the resampled one; at 100 the two agree."""


class Interval(NamedTuple):
    """A mean (or another statistic) and its 95 % interval; the bounds are NaN where there is none (n < 2)."""

    mean: float
    low: float
    high: float

    def named(self, mean: str, prefix: str | None = None) -> dict[str, float]:
        """As columns of a table: `mean`, `<prefix>low` and `<prefix>high`; by default the prefix is `<mean>_`."""
        prefix = f"{mean}_" if prefix is None else prefix
        return {mean: self.mean, f"{prefix}low": self.low, f"{prefix}high": self.high}


def interval(values: ArrayLike, kind: Kind = "mean") -> Interval:
    """Mean over items and its 95 % interval.

    Args:
        values: one per item; undefined ones (not finite) are left out.
        kind: "mean": studentised bootstrap, smoothed (Polansky and Schucany 1997: without the smoothing, resamples of
            equal values have no t statistic), fixed seed. "share": values in [0, 1], and so is the interval; Wilson's
            where all are 0 or 1; where all are equal, such as two facts of four in every picture, the t interval of
            these and of 0 and 1. "change": differences of such scores per item, or of two changes (a gain beside that
            of a control), see `kind_of`; where half of them or more are equal (the same yes or no both times), the t
            interval of these and two items more, one for each direction (Bonett and Price 2012): twenty pairs that do
            not change do not say that none ever does. "difference": the same of scores without steps, as a mean, but
            within what such differences can be. Where a third of the values or more are equal, the t interval is in the
            bootstrap's, which of many zeros and few values of either sign covers too little.

    Raises:
        ValueError: a share outside [0, 1], a change or difference outside [-2, 2].
    """
    data = defined(values)
    lowest, highest = {"share": (0.0, 1.0), "mean": (-np.inf, np.inf)}.get(kind, (-2.0, 2.0))
    if data.size and not lowest <= data.min() <= data.max() <= highest:
        raise ValueError(f"{kind}s lie in [{lowest:g}, {highest:g}]; found {data.min():g} to {data.max():g}")
    if len(data) < 2:
        return Interval(float(data.mean()) if len(data) else np.nan, np.nan, np.nan)
    mean = float(data.mean())
    if kind in ("change", "difference") and np.abs(data).max() <= 1:
        lowest, highest = -1.0, 1.0
    if kind == "change" and 2 * _most_frequent(data) >= len(data):
        return _with_more(data, _both_ways(data), lowest, highest)
    if kind == "share" and np.isin(data, (0, 1)).all():
        from scipy.stats import binomtest

        found = binomtest(int(data.sum()), len(data)).proportion_ci(LEVEL, method="wilson")
        return Interval(mean, float(found.low), float(found.high))
    if kind == "share" and np.ptp(data) <= EQUAL * data.max():
        return _with_more(data, np.concatenate([data, [0.0, 1.0]]), 0.0, 1.0)
    below, above = _t_quantiles(data)
    if 3 * _most_frequent(data) >= len(data):
        by_t = _t_tails(len(data))
        below, above = min(below, by_t[0]), max(above, by_t[1])
    error = float(data.std(ddof=1)) / np.sqrt(len(data))
    return Interval(mean, max(lowest, float(mean - above * error)), min(highest, float(mean - below * error)))


def kind_of(*scores: ArrayLike, distance: bool = False) -> Kind:
    """The kind of differences between these scores: "change" where all are in [-1, 1] and many are equal, as yes and
    no or k facts of four are; "difference" without such steps; "mean" of other numbers.

    Args:
        distance: they are distances from the same picture unedited: where all are 0 nothing moved, and that is exact
            ("mean"): there is no direction that further items might take.
    """
    known = [*map(defined, scores)]
    if distance and not any(values.any() for values in known):
        return "mean"
    if any(not len(values) or np.abs(values).max() > 1 for values in known):
        return "mean"
    return "change" if all(4 * len(np.unique(values)) <= 3 * len(values) for values in known) else "difference"


def _most_frequent(data: NDArray[np.float64]) -> int:
    """How many items have the most frequent value; all of them where they are equal up to rounding."""
    largest = float(np.abs(data).max())
    if np.ptp(data) <= EQUAL * largest:
        return len(data)
    return int(np.unique((data / largest).round(9), return_counts=True)[1].max())


def _untested(data: NDArray[np.float64], null: float) -> float | None:
    """The p value where there is nothing to test: NaN of too few items for a verdict (`FEWEST`, `FEWEST_OTHERS`,
    `FEWEST_EQUAL`), 1 or 0 of items that are all equal; None of others."""
    if len(data) < FEWEST:
        return np.nan
    others = len(data) - _most_frequent(data)
    if others == 0 and (np.isclose(data[0], null, rtol=EQUAL, atol=0) or len(data) >= FEWEST_EQUAL):
        return float(np.isclose(data[0], null, rtol=EQUAL, atol=0))
    return np.nan if others < FEWEST_OTHERS else None


def _with_more(data: NDArray[np.float64], more: NDArray[np.float64], lowest: float, highest: float) -> Interval:
    """The mean of the data with the t interval of these and some values more, within bounds."""
    from scipy.stats import t

    mean, middle = float(data.mean()), float(more.mean())
    reach = float(t.ppf(TAILS[1], len(more) - 1) * more.std(ddof=1) / np.sqrt(len(more)))
    return Interval(mean, max(lowest, min(mean, middle - reach)), min(highest, max(mean, middle + reach)))


def _both_ways(data: NDArray[np.float64]) -> NDArray[np.float64]:
    """The data and the largest change among them (1 where there is none) once in each direction."""
    largest = float(np.abs(data).max()) or 1.0
    return np.concatenate([data, [largest, -largest]])


def defined(values: ArrayLike) -> NDArray[np.float64]:
    """The values that are finite; what is left out shows in their number."""
    data = np.asarray(values, float)
    return data[np.isfinite(data)]


def ends(draws: ArrayLike) -> tuple[float, float]:
    """2.5 and 97.5 % of what resamples gave, undefined ones left out; NaN without any."""
    known = defined(draws)
    low, high = np.quantile(known, TAILS) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


class Jackknife(NamedTuple):
    """A statistic of all items, its 95 % interval and the p value of its being 0 (two-sided); NaN with one item, and p
    with too few for a verdict (as `p_value`)."""

    value: float
    low: float
    high: float
    p: float


def jackknife(value: float, without: ArrayLike) -> Jackknife:
    """A smooth statistic that is no mean, such as an IoU of summed counts or a correlation over pairs of several items:
    t interval with the jackknife's error.

    Args:
        value: of all items. without: of all items but each one (n).

    With few images it covers the truth where bootstraps of images do not (benchmarks/results/miou_coverage.md).
    """
    from scipy.stats import t

    left = defined(without)
    if len(left) < 2 or not np.isfinite(value):
        return Jackknife(value, np.nan, np.nan, np.nan)
    error = float(np.sqrt((len(left) - 1) * left.var()))
    reach = float(t.ppf(TAILS[1], len(left) - 1)) * error
    p = _untested(len(left) * value - (len(left) - 1) * left, 0.0)  # pseudo-values: of a mean, the items themselves
    p = 2 * float(t.sf(abs(value) / error, len(left) - 1)) if p is None else p
    return Jackknife(float(value), value - reach, value + reach, p)


def jackknifed(statistic: Callable[[NDArray[np.int64]], float], n: int) -> Jackknife:
    """The `jackknife` of a statistic of n items.

    Args:
        statistic: of the items with these indices.
    """
    everything = np.arange(n)
    without = [statistic(np.delete(everything, k)) for k in range(n)] if n > 1 else []
    return jackknife(float(statistic(everything)), without)


def across_seeds(
    found: Jackknife | Interval, per_seed: Sequence[float], items: int, fewest: int = FEWEST_SEEDS
) -> Jackknife:
    """The interval of a mean over seeds of a training, their spread in it beside that of the items.

    Args:
        found: of the seeds' mean, over `items` items. per_seed: what each seed gave.

    Both errors are added in squares, with the degrees of freedom after Satterthwaite (1946): three seeds that differ
    much say little, however many items there are. Fewer than `fewest` seeds have no interval.
    """
    from scipy.stats import t

    values, value, reach = defined(per_seed), found[0], (found[2] - found[1]) / 2
    if not np.isfinite(reach) or items < 2 or len(values) < fewest:
        return Jackknife(value, np.nan, np.nan, np.nan)
    inside, between = reach / _t_tails(items)[1], float(values.std(ddof=1)) / np.sqrt(len(values))
    error = float(np.hypot(inside, between))
    if error == 0:
        return Jackknife(value, value, value, float(value == 0))
    free = error**4 / (inside**4 / (items - 1) + between**4 / (len(values) - 1))
    reach = float(t.ppf(TAILS[1], free)) * error
    return Jackknife(value, value - reach, value + reach, 2 * float(t.sf(abs(value) / error, free)))


def measured(table: pd.DataFrame, control: str = NONE) -> pd.DataFrame:
    """The rows of one control, by default those of the measurement itself; a table without controls as it is."""
    if "control" not in table:
        return table
    return table[table["control"] == control]


def compare(
    table: pd.DataFrame, cell: Sequence[str], value: str = "value", *, family: str | None = None,
    margin: float | None = None, distances: Collection[str] = (),
) -> pd.DataFrame:  # fmt: skip
    """The measurement minus each of its controls, paired by item.

    Args:
        table: columns item, control, those of `cell`, and `value`; one row for each of them.
        cell: what is compared on its own, such as ["layer"].
        family: column of `cell` whose values are questions of their own, such as outcomes; None: the table is one.
        margin: also test the difference being -margin, for `judged`.
        distances: values of the cell's column `outcome` that are distances (`kind_of`).

    Returns: the columns of `cell`, control, n (items that have both), n_undefined (items that lack one), value,
    control_value (means), difference, low, high (as `interval`), p_holm (paired t test, by Holm's method corrected for
    all comparisons of the family that have enough items; NaN of the others, see `p_value`) and verdict: "above its
    control" if the interval lies above 0 and p_holm is at most .05, "not above its control" if not, "too few items"
    where p_holm is NaN. With a margin p_margin too, corrected likewise.
    """
    rows: list[dict[str, Any]] = []
    for place, part in table.groupby(list(cell), sort=False, observed=True):
        labels = dict(zip(cell, place, strict=True))
        distance = labels.get("outcome") in distances
        wide = part.pivot(index="item", columns="control", values=value).astype(float)
        for control in (name for name in dict.fromkeys(part["control"]) if name != NONE and NONE in wide):
            pairs = wide[[NONE, control]]
            both = pairs[np.isfinite(pairs).all(axis=1)]
            differences = both[NONE] - both[control]
            kind = kind_of(both[NONE], both[control], distance=distance)
            difference, low, high = interval(differences, kind)
            rows.append(
                labels
                | {"control": control, "n": len(both), "n_undefined": len(pairs) - len(both),
                   "value": float(both[NONE].mean()), "control_value": float(both[control].mean()),
                   "difference": difference, "low": low, "high": high, "p_holm": p_value(differences, kind)}
                | ({} if margin is None else {"p_margin": p_value(differences, kind, -margin)})
            )  # fmt: skip
    tests = ["p_holm"] if margin is None else ["p_holm", "p_margin"]
    columns = [*cell, "control", "n", "n_undefined", "value", "control_value", "difference", "low", "high", *tests]
    result = corrected(pd.DataFrame(rows, columns=columns), tests, family)
    return result.assign(verdict=verdicts(result["p_holm"], result["low"] > 0))


def verdicts(p_holm: pd.Series, beyond: pd.Series, yes: str = ABOVE, no: str = NOT_ABOVE) -> NDArray[np.str_]:
    """`yes` where the interval is beyond the control and p_holm at most .05, "too few items" where p_holm is NaN, else
    `no`."""
    return np.where(p_holm.isna(), TOO_FEW, np.where(beyond & (p_holm <= 1 - LEVEL), yes, no))


def corrected(table: pd.DataFrame, tests: Sequence[str], family: str | None = None) -> pd.DataFrame:
    """The table with the p values of these columns corrected (`holm`) for its rows, or for those of each family."""
    families = table[family] if family else np.zeros(len(table))
    return table.assign(
        **{name: table[name].astype(float).groupby(families, observed=True).transform(holm) for name in tests}
    )


HIGHER, LOWER, ALIKE = "higher", "lower", "no difference shown"


def two_sided(compared: pd.DataFrame) -> pd.Series:
    """Verdicts on rows of `compare` where either sign is of interest: "higher" or "lower" than the control if the
    interval excludes 0 and p_holm is at most .05, else "no difference shown"; "too few items" where p_holm is NaN."""
    sure = (compared["p_holm"] <= 1 - LEVEL) & ((compared["low"] > 0) | (compared["high"] < 0))
    found = compared["difference"].gt(0).map({True: HIGHER, False: LOWER}).where(sure, ALIKE)
    return found.where(compared["p_holm"].notna(), TOO_FEW)


def p_value(differences: ArrayLike, kind: Kind = "mean", null: float = 0.0) -> float:
    """Two-sided p value of a paired t test of the mean difference being `null`, of the same kind of numbers as the
    `interval`; NaN where they are too few for a verdict (`FEWEST`; without steps also `FEWEST_OTHERS`).
    Differences that are all `null` show no other: 1."""
    from scipy.stats import ttest_1samp

    data = defined(differences)
    if kind == "change" and len(data) >= FEWEST and 2 * _most_frequent(data) >= len(data):
        return float(ttest_1samp(_both_ways(data), null).pvalue)
    p = _untested(data, null)
    return float(ttest_1samp(data, null).pvalue) if p is None else p


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """p values corrected for being several, in the same order (Holm 1979); NaN stands outside the family."""
    found = np.asarray(p_values, float)
    result = np.full(found.shape, np.nan)
    order = np.argsort(found)[: np.isfinite(found).sum()]
    steps = found[order] * np.arange(len(order), 0, -1)
    result[order] = np.minimum(1, np.maximum.accumulate(steps))
    return result


class NonInferiority(NamedTuple):
    """Whether something is no worse by more than a margin.

    Attributes:
        mean, low, high: of the paired differences, new minus old. margin: as it was stated.
        p_margin, p: two-sided, of the true difference being -margin, and of its being 0; NaN as of `p_value`.
        verdict: of this comparison alone; of many in one table: `judged`.
    """

    mean: float
    low: float
    high: float
    margin: float
    p_margin: float
    p: float
    verdict: str


def no_worse(differences: ArrayLike, margin: float, kind: Kind = "mean") -> NonInferiority:
    """Non-inferiority: the interval of the paired differences (new minus old, more is better) against a stated margin.

    Returns: the interval and the verdict: "no worse" if it lies above -margin, "worse" if it lies below 0, else
    "undecided"; "too few items" where p_margin is NaN. An interval between -margin and 0 is "no worse": the
    loss is real and smaller than what was said to matter.

    Raises:
        ValueError: a margin that is not positive.
    """
    if not margin > 0:
        raise ValueError(f"margin {margin}: expected the largest loss that does not matter, above 0")
    data = defined(differences)
    found, p_margin = interval(data, kind), p_value(data, kind, -margin)
    few, lossless = np.isnan(p_margin), found.low > -margin
    verdict = TOO_FEW if few else NO_WORSE if lossless else WORSE if found.high < 0 else UNDECIDED
    return NonInferiority(*found, margin, p_margin, p_value(data, kind), verdict)


def judged(table: pd.DataFrame) -> NDArray[np.str_]:
    """The verdicts of `no_worse` on the rows of a table, whose p values are `corrected` for their being many.

    Args:
        table: columns low, high, margin, p_margin and p_holm (of the difference being -margin, and 0; NaN of too few).
    """
    lossless = (table["low"] > -table["margin"]) & (table["p_margin"] <= 1 - LEVEL)
    lossy = (table["high"] < 0) & (table["p_holm"] <= 1 - LEVEL)
    return np.where(table["p_margin"].isna(), TOO_FEW, np.where(lossless, NO_WORSE, np.where(lossy, WORSE, UNDECIDED)))


def n_for_effect(differences: ArrayLike, effect: float, *, power: float = 0.8, comparisons: int = 1) -> int | None:
    """Items at which a paired t test (5 %, two-sided) finds a mean difference of `effect` with probability `power`.

    Args:
        differences: of the items measured so far; their spread is what counts. comparisons: tests in the table, each
            at 5 % / comparisons (Holm's first step).

    Returns: at least `FEWEST`; None where the differences do not vary, so that nothing is known of their spread, or a
    million items would not do.

    Raises:
        ValueError: an effect of 0, or a power outside (0, 1).
    """
    from scipy.stats import nct, t

    if not (effect and np.isfinite(effect) and 0 < power < 1):
        raise ValueError(f"effect {effect} at power {power}: expected an effect other than 0 and a power in (0, 1)")
    data = defined(differences)
    if len(data) < 2 or np.ptp(data) <= EQUAL * np.abs(data).max():
        return None
    size = min(abs(effect) / float(data.std(ddof=1)), 100.0)  # far beyond, scipy's noncentral t is NaN

    def enough(n: int) -> bool:
        limit = t.ppf(1 - (1 - LEVEL) / (2 * comparisons), n - 1)
        return float(nct.sf(limit, n - 1, size * np.sqrt(n))) >= power

    low, high = FEWEST - 1, FEWEST
    while not enough(high):
        low, high = high, 2 * high
        if high > 1_000_000:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


class Agreement(NamedTuple):
    """Rank correlation of two orders of the same places, such as layers.

    It is that of the means as measured, which noise lowers: orders that agree in truth stay below 1 with few items, and
    so does their interval. It is no proof of disagreement.

    Attributes:
        rho: Spearman's; NaN where one has no order. low, high: 95 % interval over items, the places being as they are.
        p: chance of such a correlation (either sign) among orders without relation; with few places it is never small.
        places: their number.
    """

    rho: float
    low: float
    high: float
    p: float
    places: int


def rank_agreement(
    first: NDArray[np.float64], second: NDArray[np.float64], *, same_items: bool, draws: int = DRAWS
) -> Agreement:
    """How much two evidences agree on the order of places, after averaging each over its items.

    Args:
        first, second: [items, places], items in the same order where they are the same.
        same_items: the two were measured on the same items, which are then drawn together.

    Raises:
        ValueError: different places, or different numbers of the same items.
    """
    if first.shape[1] != second.shape[1] or (same_items and len(first) != len(second)):
        raise ValueError(f"evidence of the same places and items expected; found {first.shape} and {second.shape}")
    rng = np.random.default_rng(0)
    drawn = resample_counts(rng, len(first), draws)
    other = drawn if same_items else resample_counts(rng, len(second), draws)
    low, high = np.nan, np.nan
    if min(len(first), len(second)) > 1:
        low, high = ends(_rank_correlation(count_means(drawn, first), count_means(other, second)))
    one, two = (count_means(np.ones((1, len(values))), values)[0] for values in (first, second))
    return Agreement(spearman(one, two), low, high, _rank_p(one, two), first.shape[1])


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation; NaN where one has no order: fewer than two values, or all equal up to rounding."""
    one, two = np.asarray(first, float), np.asarray(second, float)
    if min(_spread(one), _spread(two)) <= EQUAL:
        return float("nan")
    return float(_rank_correlation(one, two))


EQUAL = 1e-5
"""Values that differ by less than this share of the largest are equal up to rounding: they have no ranks."""


def _spread(values: NDArray[np.float64]) -> float:
    """Range of the values as a share of the largest; 0 where there is none to speak of."""
    if len(values) < 2 or not np.isfinite(values).all():
        return 0.0
    return float(np.ptp(values) / (np.abs(values).max() or 1.0))


def _rank_p(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Two-sided p value of Spearman's correlation: over all orders up to eight places, then by the t distribution."""
    from scipy.stats import permutation_test, rankdata, spearmanr

    if not np.isfinite(spearman(first, second)):
        return float("nan")
    if len(first) > 8:
        return float(spearmanr(first, second).pvalue)
    ranks = rankdata(second) - (len(second) + 1) / 2
    found = permutation_test(
        (rankdata(first),), lambda order, axis: (order * ranks).sum(axis), permutation_type="pairings",
        n_resamples=np.inf, vectorized=True,
    )  # fmt: skip
    return float(found.pvalue)


def _rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's correlation along the last axis, NaN where values are equal."""
    from scipy.stats import rankdata

    one, two = (
        ranks - ranks.mean(-1, keepdims=True) for ranks in (rankdata(values, axis=-1) for values in (first, second))
    )
    with np.errstate(invalid="ignore"):
        return np.asarray((one * two).sum(-1) / np.sqrt((one**2).sum(-1) * (two**2).sum(-1)))


def resample_counts(rng: np.random.Generator, n: int, draws: int = DRAWS) -> NDArray[np.float64]:
    """How often each of n items is in each resample (draws, n)."""
    return rng.multinomial(n, np.full(n, 1 / n), draws).astype(float)


def count_means(counts: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of resamples over items, from how often each is drawn: (draws, items) x (items, places) -> (draws, places);
    undefined values left out."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts @ np.where(known, values, 0)) / (counts @ known)


def _t_quantiles(data: NDArray[np.float64]) -> tuple[float, float]:
    """2.5 and 97.5 % of (mean* - mean) / error* over smoothed resamples: what the t distribution is for normal data."""
    n, spread = len(data), float(data.std(ddof=1))
    if n >= MANY or spread <= 1e-12 * np.abs(data).max():  # equal up to rounding
        return _t_tails(n)
    counts, noise, total, squares = _resamples(n)
    away, scale = data - data.mean(), spread / np.sqrt(n)
    sums = counts @ away + scale * total  # (DRAWS,)
    variance = (counts @ away**2 + 2 * scale * (noise @ away) + scale**2 * squares - sums**2 / n) / (n - 1)
    return ends(sums / np.sqrt(n * variance))


def _t_tails(n: int) -> tuple[float, float]:
    """2.5 and 97.5 % of the t distribution of n items."""
    from scipy.stats import t

    return float(t.ppf(TAILS[0], n - 1)), float(t.ppf(TAILS[1], n - 1))


@lru_cache(maxsize=8)
def _resamples(n: int) -> tuple[NDArray[np.float64], ...]:
    """Resamples of n items, the same at every call: how often each item is drawn and the sum of its standard normal
    noise (DRAWS, n), and over items the sum of the noise and of its squares (DRAWS,)."""
    rng = np.random.default_rng(0)
    drawn, noise = rng.integers(0, n, (DRAWS, n)), rng.standard_normal((DRAWS, n))
    cell = (np.arange(DRAWS)[:, None] * n + drawn).ravel()
    counts, of_item = (
        np.bincount(cell, weights, DRAWS * n).reshape(DRAWS, n).astype(np.float64)
        for weights in (np.ones(cell.size), noise.ravel())
    )
    return counts, of_item, noise.sum(1), (noise**2).sum(1)
