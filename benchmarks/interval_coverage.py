"""How often 95 % intervals over n items cover the true mean: what decides the methods of `results.statistics`.

    python benchmarks/interval_coverage.py            # five minutes on one core; results/interval_coverage.md

For each kind of score, n and method: the share of simulated samples whose interval holds the true mean. Methods of a
mean: percentile bootstrap, BCa, studentised bootstrap, t. Of a share (0 or 1 per item): Wilson, t. Of
pairs of yes and no, some lost and half as many won: Bonett and Price, t. The package uses
`results.statistics.interval`; its column is measured through that function and no copy of it.

Items that share something beside what they are samples of cover less: a second table has edit minus control over n
prompts where the control moves along one of five directions, or along one of the prompt's own (`edit.control`).

Scores that are the same in most items (differences of 50, 70 or 90 % zeros) have no verdict from some samples, by
`statistics.FEWEST_OTHERS` and `FEWEST_EQUAL`: the column "told" is the coverage among the samples that get one, and
another table shows what it would be with other numbers. The last table has trainings of few seeds.

`statistics.FEWEST` is the smallest n from which on no kind of mean, and no share of .2 or more, falls below 93 % by
more than two standard errors of the simulation, among samples that get a verdict. (Few items say nothing of rare
events: Wilson's interval of a share of .05 goes up and down with n, and where one item in twenty loses everything and
the others a little, the loss is told too small.)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from mmdit_probe.errors import at_least, run_script
from mmdit_probe.results.atomic import write_text
from mmdit_probe.results.statistics import (
    FEWEST,
    FEWEST_EQUAL,
    FEWEST_OTHERS,
    FEWEST_SEEDS,
    TAILS,
    Kind,
    across_seeds,
    interval,
)

Samples = NDArray[np.float64]
Bounds = tuple[Samples, Samples]
Draw = Callable[[np.random.Generator, tuple[int, int]], Samples]

OUT = Path(__file__).parent / "results" / "interval_coverage.md"
SIZES = (3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100)
RESAMPLES = 999
ENOUGH = 0.93


def paired(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """Facts shown with an edit, minus those without, of four: correlated and discrete."""
    chance = rng.beta(4, 2, size)
    return (rng.binomial(4, 0.85 * chance) - rng.binomial(4, chance)) / 4


MEANS: dict[str, tuple[float, Draw]] = {
    "normal": (0.0, lambda rng, size: rng.normal(size=size)),
    "bounded (U-shaped, beta(.5, .5))": (0.5, lambda rng, size: rng.beta(0.5, 0.5, size)),
    "bounded and skewed (IoU-like, beta(4, 1.5))": (4 / 5.5, lambda rng, size: rng.beta(4, 1.5, size)),
    "paired difference of k/4 scores": (-0.15 * 4 / 6, paired),
    "skewed (gamma, skewness 1)": (4.0, lambda rng, size: rng.gamma(4, size=size)),
    "very skewed (exponential, skewness 2)": (1.0, lambda rng, size: rng.exponential(size=size)),
}
SHARES = {f"share of {p:g}": p for p in (0.5, 0.2, 0.05)}
PARTS = {f"facts shown of four, {p:g} of images lack some": p for p in (0.2, 0.05)}
RARE = "share of 0.05"
WITHIN = (0.02, 0.05, 0.1, 0.2)
"""Share of the variance of edit minus control that lies between directions of the control."""
SHARED = 5
"""Directions that all prompts take in turn."""
CHANGES = {f"pairs of yes and no, {p:g} lost": p for p in (0.2, 0.05, 0.02)}
ZEROS = (0.5, 0.7, 0.9)
REST: dict[str, tuple[Kind, float, Draw]] = {
    "normal about 0": ("mean", 0.0, lambda rng, size: rng.normal(size=size)),
    "normal about 1": ("mean", 1.0, lambda rng, size: rng.normal(1, 1, size)),
    "exponential": ("mean", 1.0, lambda rng, size: rng.exponential(size=size)),
    "yes and no, as many lost as won": ("change", 0.0, lambda rng, size: rng.choice([-1.0, 1.0], size)),
    "yes and no, four lost per one won": ("change", -0.6, lambda rng, size: np.where(rng.random(size) < 0.2, 1.0, -1)),
    "k/4, mostly 1/4 lost": ("change", -0.325, lambda rng, size: -(1 + rng.binomial(3, 0.1, size)) / 4),
    "1/4 lost, of one in ten all": ("change", -0.325, lambda rng, size: -np.where(rng.random(size) < 0.1, 1, 0.25)),
}
"""What the other items are, beside the share of zeros: how it is told, its mean, and samples of it."""
NOT_JUDGED = (RARE, *(f"{zeros:.0%} zeros, else 1/4 lost, of one in ten all" for zeros in ZEROS))
TOLD_BY = range(4)
METHODS = ("percentile", "BCa", "studentised", "t", "interval()", "told")
DESIGNS = (f"{SHARED} shared directions", "one direction per prompt")


def by_t(data: Samples) -> Bounds:
    error = data.std(-1, ddof=1) / np.sqrt(data.shape[-1]) * stats.t.ppf(0.975, data.shape[-1] - 1)
    return data.mean(-1) - error, data.mean(-1) + error


def by_bootstrap(data: Samples, rng: np.random.Generator) -> dict[str, Bounds]:
    """Percentile, BCa and studentised bounds, all of the same resamples, which are drawn once for all samples."""
    n = data.shape[-1]
    counts = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)
    mean, away = data.mean(-1), data - data.mean(-1, keepdims=True)
    shift = counts @ away.T / n  # (RESAMPLES, repeats)
    spread = np.sqrt(np.maximum(counts @ (away**2).T / n - shift**2, 0) * n / (n - 1))
    # A resample without variance counts as infinite.
    t = np.nan_to_num(shift / (spread / np.sqrt(n)), posinf=np.inf, neginf=-np.inf)
    above, below = (np.quantile(t, tail, axis=0, method="nearest") for tail in TAILS[::-1])
    error = data.std(-1, ddof=1) / np.sqrt(n)
    bias = stats.norm.ppf((shift < 0).mean(0) + (shift == 0).mean(0) / 2)
    skew = (away**3).sum(-1) / (6 * (away**2).sum(-1) ** 1.5)
    levels = ((bias + z) / (1 - skew * (bias + z)) + bias for z in stats.norm.ppf(TAILS))
    shift.sort(axis=0)
    found = {"percentile": [mean + at(shift, np.full(len(mean), tail)) for tail in TAILS]}
    found["BCa"] = [mean + at(shift, stats.norm.cdf(level)) for level in levels]
    found["studentised"] = [mean - above * error, mean - below * error]
    return {name: (low, high) for name, (low, high) in found.items()}


def at(ordered: Samples, levels: Samples) -> Samples:
    """The quantile of each column [draws, repeats] at its own level; NaN at a level that is none."""
    place = np.nan_to_num(levels) * (len(ordered) - 1)
    low = np.minimum(place.astype(int), len(ordered) - 2)
    column = np.arange(ordered.shape[1])
    found = ordered[low, column] + (place - low) * (ordered[low + 1, column] - ordered[low, column])
    return np.where(np.isfinite(levels), found, np.nan)


def ours(data: Samples, kind: Kind) -> Bounds:
    bounds = np.array([interval(sample, kind) for sample in data])
    return bounds[:, 1], bounds[:, 2]


def coverage(truth: float, bounds: Bounds) -> float:
    """Share of intervals that hold the truth; one of NaN does not (constant samples have no BCa interval)."""
    return float(((bounds[0] <= truth + 1e-12) & (truth - 1e-12 <= bounds[1])).mean())


def simulate(repeats: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for name, (truth, draw) in MEANS.items():
        for n in SIZES:
            data = draw(rng, (repeats, n))
            with np.errstate(all="ignore"):
                found = {
                    **by_bootstrap(data, rng), "t": by_t(data), "interval()": ours(data, "mean"),
                }  # fmt: skip
            rows.append({"scores": name, "n": n, **{m: coverage(truth, bounds) for m, bounds in found.items()}})
    for name, p in (SHARES | PARTS).items():
        for n in SIZES:
            some = (rng.random((repeats, n)) < p).astype(float)
            # Of four facts one or two are lacking, equally often.
            data, truth = (
                (some, p) if name in SHARES else (1 - some * rng.integers(1, 3, some.shape) / 4, 1 - 3 * p / 8)
            )
            rows.append(
                {"scores": name, "n": n, "t": coverage(truth, by_t(data)),
                 "interval()": coverage(truth, ours(data, "share"))}
            )  # fmt: skip
    return pd.DataFrame(rows + changes(repeats) + mostly_zeros(repeats))


def changes(repeats: int) -> list[dict[str, Any]]:
    """Rows of paired differences of yes and no, from draws of their own."""
    rng = np.random.default_rng(1)
    rows = []
    for name, lost in CHANGES.items():
        for n in SIZES:
            draw = rng.random((repeats, n))
            data = (draw > 1 - lost / 2).astype(float) - (draw < lost)
            rows.append(
                {"scores": name, "n": n, "t": coverage(-lost / 2, by_t(data)),
                 "interval()": coverage(-lost / 2, ours(data, "change"))}
            )  # fmt: skip
    return rows


def unlike(data: Samples) -> NDArray[np.int64]:
    """Of each sample, how many items differ from its most frequent value."""
    return np.array([len(one) - np.unique(one, return_counts=True)[1].max() for one in data])


def mostly_zeros(repeats: int) -> list[dict[str, Any]]:
    """Rows of scores that are 0 in most items: also coverage among the samples that get a verdict ("told"), their
    share ("verdicts"), and coverage among those with k items or more that differ from the most frequent value (k)."""
    rng = np.random.default_rng(3)
    rows = []
    for zeros in ZEROS:
        for name, (kind, mean, draw) in REST.items():
            for n in SIZES:
                data = np.where(rng.random((repeats, n)) < zeros, 0.0, draw(rng, (repeats, n)))
                truth, bounds, others = (1 - zeros) * mean, ours(data, kind), unlike(data)
                told = (others >= FEWEST_OTHERS) | ((others == 0) & (n >= FEWEST_EQUAL)) | (kind == "change")
                row = {"scores": f"{zeros:.0%} zeros, else {name}", "n": n, "t": coverage(truth, by_t(data))}
                row |= {"interval()": coverage(truth, bounds), "told": among(told, truth, bounds)}
                row |= {k: among(others >= k, truth, bounds) for k in TOLD_BY if kind == "mean"}
                rows.append(row | {"verdicts": float(told.mean())})
    return rows


SEEN = 0.05
"""Share of the samples from which on their coverage is told: of fewer, it is that of hardly any."""


def among(chosen: NDArray[np.bool_], truth: float, bounds: Bounds) -> float:
    """The coverage of these samples; NaN where they are hardly any."""
    return coverage(truth, (bounds[0][chosen], bounds[1][chosen])) if chosen.mean() >= SEEN else float("nan")


def directions(repeats: int) -> pd.DataFrame:
    """Coverage of edit minus control by n, and by how much of its variance lies between directions of the control."""
    rng = np.random.default_rng(2)
    rows = []
    for share in WITHIN:
        for n in (40, 120, 200):
            own = np.sqrt(1 - share) * rng.normal(size=(repeats, n))
            shared, each = (np.sqrt(share) * rng.normal(size=(repeats, count)) for count in (SHARED, n))
            found = (coverage(0.0, ours(own + between, "mean")) for between in (shared[:, np.arange(n) % SHARED], each))
            rows.append({"between directions": share, "n": n, **dict(zip(DESIGNS, found, strict=True))})
    return pd.DataFrame(rows)


SEEDS, BETWEEN, IMAGES = (2, 3, 5), (0.1, 0.3, 0.5, 0.7, 0.9), 40


def seeds(repeats: int) -> pd.DataFrame:
    """Coverage of a training's gain by its seeds, by the share of the mean's variance that lies between seeds."""
    rng = np.random.default_rng(4)
    rows = []
    for count in SEEDS:
        row: dict[Any, Any] = {"seeds": count}
        for share in BETWEEN:
            items = np.sqrt((1 - share) * IMAGES) * rng.normal(size=(repeats, IMAGES))  # the same for every seed
            each = np.sqrt(share * count) * rng.normal(size=(repeats, count))
            found = [across_seeds(interval(of + own.mean()), of.mean() + own, IMAGES, fewest=2)[1:3]
                     for of, own in zip(items, each, strict=True)]  # fmt: skip
            row[share] = coverage(0.0, tuple(np.array(found).T))
        rows.append(row)
    return pd.DataFrame(rows)


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of scores that are no rare events, `covered` being the coverage among the samples that get a verdict."""
    share = table["verdicts"].fillna(1.0)
    covered = table["told"].where(table["verdicts"].notna(), table["interval()"])
    return table.assign(covered=covered, share=share)[~table["scores"].isin(NOT_JUDGED)].dropna(subset=["covered"])


def fewest(table: pd.DataFrame, repeats: int) -> int:
    """Smallest n from which on `interval` covers enough, by the simulation."""
    of = judged(table)
    short = of.loc[of["covered"] < ENOUGH - 2 * np.sqrt(ENOUGH * (1 - ENOUGH) / (repeats * of["share"])), "n"]
    return min(n for n in SIZES if n > short.max()) if len(short) else SIZES[0]


def by_others(table: pd.DataFrame) -> list[str]:
    """The table of what `FEWEST_OTHERS` could be: the lowest coverage from `FEWEST` items on, by share of zeros."""
    own = table[(table["n"] >= FEWEST) & table[0].notna()]
    lines = [f"| scores | {' | '.join(f'{k} or more' for k in TOLD_BY)} |", "|-" * (len(TOLD_BY) + 1) + "|"]
    for zeros in ZEROS:
        part = own[own["scores"].str.startswith(f"{zeros:.0%} ")]
        cells = []
        for k in TOLD_BY:
            row = part.loc[part[k].idxmin()]
            cells.append(f"{row[k]:.3f} ({row['scores'].partition('else ')[2]}, n = {row['n']})")
        lines.append(f"| {zeros:.0%} zeros | {' | '.join(cells)} |")
    return lines


def of_seeds(trainings: pd.DataFrame) -> list[str]:
    """The table of trainings."""
    lines = [
        "",
        "# Seeds of a training",
        "",
        f"The same for a gain over {IMAGES} images and a few seeds, both normal (`across_seeds`), by the share of the"
        f" mean's variance that lies between seeds. `statistics.FEWEST_SEEDS` = {FEWEST_SEEDS}: of fewer the value"
        " stands alone.",
        "",
        f"| seeds | {' | '.join(f'{share:.0%}' for share in BETWEEN)} |",
        "|-" * (len(BETWEEN) + 1) + "|",
    ]
    for row in trainings.to_dict("records"):
        lines.append(f"| {row['seeds']:g} | {' | '.join(f'{row[share]:.3f}' for share in BETWEEN)} |")
    return lines


def report(table: pd.DataFrame, controls: pd.DataFrame, trainings: pd.DataFrame, repeats: int) -> str:
    of = judged(table)
    of = of[of["n"] >= FEWEST]
    worst = of.loc[of["covered"].idxmin()]
    lines = [
        "# Coverage of 95 % intervals by n",
        "",
        f"Share of {repeats} simulated samples whose interval holds the true mean (standard error"
        f" {np.sqrt(0.95 * 0.05 / repeats):.3f}); bootstraps of {RESAMPLES} resamples, those of `interval()` as the"
        " package has them. `interval()`: smoothed studentised bootstrap for means, and the t interval too where a"
        " third of the items or more are equal; Wilson for shares, Bonett and Price for differences with steps of which"
        " half are equal (pairs of yes and no: half as many won as lost). told: among samples that get a verdict"
        f" (empty: less than {SEEN:.0%} do).",
        "",
        f"Below n = {fewest(table, repeats)} some kind of score other than rare events ({RARE}; losses of 1/4 with one"
        f" in ten of 1) is covered in less than {ENOUGH:.0%} by more than two standard errors: `statistics.FEWEST` ="
        f" {FEWEST}, and no verdict below it. From there on the lowest is {worst['covered']:.3f} ({worst['scores']},"
        f" n = {worst['n']}).",
        "",
        f"A sample of differences without steps has no verdict either if fewer than `statistics.FEWEST_OTHERS` ="
        f" {FEWEST_OTHERS} items differ from the most frequent value, but for n = {FEWEST_EQUAL} or more that are all"
        f" equal. Lowest coverage from n = {FEWEST} on among samples in which so many differ:",
        "",
        *by_others(table),
        "",
        f"| scores | n | {' | '.join(METHODS)} |",
        f"|{'-|' * (len(METHODS) + 2)}",
    ]
    for row in table.to_dict("records"):
        cells = ["" if pd.isna(row.get(name, np.nan)) else f"{row[name]:.3f}" for name in METHODS]
        lines.append(f"| {row['scores']} | {row['n']} | {' | '.join(cells)} |")
    lines += [
        "",
        "# Directions of the control of equal size",
        "",
        "The same for edit minus control over n prompts, both normal, where the control's effect differs by its"
        " direction.",
        f"Directions that all prompts share are {SHARED} values, however many prompts there are. Intervals over prompts"
        " hold",
        "where each prompt has a direction of its own, as in the controls of the package.",
        "",
        f"| variance between directions | n | {' | '.join(DESIGNS)} |",
        "|-|-|-|-|",
    ]
    for row in controls.to_dict("records"):
        cells = " | ".join(f"{row[name]:.3f}" for name in DESIGNS)
        lines.append(f"| {row['between directions']:.0%} | {row['n']} | {cells} |")
    lines += of_seeds(trainings)
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=1500, help="simulated samples per kind of score and n")
    options = parser.parse_args()
    table = simulate(options.repeats)
    write_text(OUT, report(table, directions(options.repeats), seeds(options.repeats), options.repeats))
    print(f"FEWEST by this simulation: {fewest(table, options.repeats)}; in the package: {FEWEST}; {OUT}")


if __name__ == "__main__":
    run_script(main)
