"""How often 95 % intervals over n items cover the true mean: what decides the methods of `results.statistics`.

    python benchmarks/interval_coverage.py            # three minutes on one core; results/interval_coverage.md

For each kind of score, n and method: the share of simulated samples whose interval holds the true mean. Methods of a
mean: percentile bootstrap, BCa, studentised bootstrap, t. Of a share (0 or 1 per item): Wilson, t. Of
pairs of yes and no, some lost and half as many won: Bonett and Price, t. The package uses
`results.statistics.interval`; its column is measured through that function and no copy of it.

Items that share something beside what they are samples of cover less: a second table has edit minus control over n
prompts where the control moves along one of five directions, or along one of the prompt's own (`edit.control`).

`statistics.FEWEST` is the smallest n from which on no kind of mean, and no share of .2 or more, falls below 93 % by
more than two standard errors of the simulation. (Few items say nothing of rare events: Wilson's interval of a share of
.05 goes up and down with n.)
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
from mmdit_probe.results.statistics import FEWEST, TAILS, interval

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
METHODS = ("percentile", "BCa", "studentised", "t", "interval()")
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


def ours(data: Samples, kind: str) -> Bounds:
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
    return pd.DataFrame(rows + changes(repeats))


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


def fewest(table: pd.DataFrame, repeats: int) -> int:
    """Smallest n from which on `interval` covers enough, by the simulation."""
    noise = 2 * np.sqrt(ENOUGH * (1 - ENOUGH) / repeats)
    short = table.loc[(table["interval()"] < ENOUGH - noise) & (table["scores"] != RARE), "n"]
    return min(n for n in SIZES if n > short.max()) if len(short) else SIZES[0]


def report(table: pd.DataFrame, controls: pd.DataFrame, repeats: int) -> str:
    judged = table[(table["n"] >= FEWEST) & (table["scores"] != RARE)]
    worst = judged.loc[judged["interval()"].idxmin()]
    lines = [
        "# Coverage of 95 % intervals by n",
        "",
        f"Share of {repeats} simulated samples whose interval holds the true mean (standard error"
        f" {np.sqrt(0.95 * 0.05 / repeats):.3f}); bootstraps of {RESAMPLES} resamples, those of `interval()` as the"
        " package has them. `interval()`: smoothed studentised bootstrap for means, Wilson for shares, Bonett and Price"
        " for pairs of yes and no (half as many won as lost).",
        "",
        f"Below n = {fewest(table, repeats)} some kind of score other than rare events ({RARE}) is covered in less than"
        f" {ENOUGH:.0%} by more than two standard errors: `statistics.FEWEST` = {FEWEST}, and no verdict below it. From"
        f" there on the lowest is {worst['interval()']:.3f} ({worst['scores']}, n = {worst['n']}).",
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
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=1500, help="simulated samples per kind of score and n")
    options = parser.parse_args()
    table = simulate(options.repeats)
    write_text(OUT, report(table, directions(options.repeats), options.repeats))
    print(f"FEWEST by this simulation: {fewest(table, options.repeats)}; in the package: {FEWEST}; {OUT}")


if __name__ == "__main__":
    run_script(main)
