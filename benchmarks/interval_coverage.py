"""How often 95 % intervals over n items cover the true mean: what decides the methods of `results.statistics`.

    python benchmarks/interval_coverage.py            # eight minutes on one core; results/interval_coverage.md

For each kind of score, n and method: the share of simulated samples whose interval holds the true mean. Methods of a
mean: percentile bootstrap, BCa (both scipy), studentised bootstrap, t. Of a share (0 or 1 per item): Wilson, t. Of
pairs of yes and no, some lost and half as many won: Bonett and Price, t. The package uses
`results.statistics.interval`; its column is measured through that function and no copy of it.

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
from mmdit_probe.results.statistics import FEWEST, interval

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]

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
RARE = "share of 0.05"
CHANGES = {f"pairs of yes and no, {p:g} lost": p for p in (0.2, 0.05, 0.02)}
METHODS = ("percentile", "BCa", "studentised", "t", "interval()")


def by_t(data: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    error = data.std(-1, ddof=1) / np.sqrt(data.shape[-1]) * stats.t.ppf(0.975, data.shape[-1] - 1)
    return data.mean(-1) - error, data.mean(-1) + error


def by_studentised(
    data: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Quantiles of the t statistic over resamples; resamples without variance count as infinite."""
    low, high = np.empty(len(data)), np.empty(len(data))
    n = data.shape[-1]
    for k, sample in enumerate(data):
        again = sample[rng.integers(0, n, (RESAMPLES, n))]
        shift = again.mean(-1) - sample.mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.nan_to_num(shift / (again.std(-1, ddof=1) / np.sqrt(n)), posinf=np.inf, neginf=-np.inf)
        below, above = np.quantile(t, [0.025, 0.975], method="nearest")
        error = sample.std(ddof=1) / np.sqrt(n)
        low[k], high[k] = sample.mean() - above * error, sample.mean() - below * error
    return low, high


def by_scipy(data: NDArray[np.float64], method: str, rng: np.random.Generator) -> tuple[NDArray[np.float64], ...]:
    bounds = [
        stats.bootstrap((part,), np.mean, axis=-1, n_resamples=RESAMPLES, method=method, rng=rng).confidence_interval
        for part in np.array_split(data, max(1, data.size // 2000))
    ]
    return np.concatenate([b.low for b in bounds]), np.concatenate([b.high for b in bounds])


def ours(data: NDArray[np.float64], kind: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    bounds = np.array([interval(sample, kind) for sample in data])
    return bounds[:, 1], bounds[:, 2]


def coverage(truth: float, bounds: tuple[NDArray[np.float64], ...]) -> float:
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
                    "percentile": by_scipy(data, "percentile", rng), "BCa": by_scipy(data, "BCa", rng),
                    "studentised": by_studentised(data, rng), "t": by_t(data), "interval()": ours(data, "mean"),
                }  # fmt: skip
            rows.append({"scores": name, "n": n, **{m: coverage(truth, bounds) for m, bounds in found.items()}})
    for name, truth in SHARES.items():
        for n in SIZES:
            data = (rng.random((repeats, n)) < truth).astype(float)
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


def fewest(table: pd.DataFrame, repeats: int) -> int:
    """Smallest n from which on `interval` covers enough, by the simulation."""
    noise = 2 * np.sqrt(ENOUGH * (1 - ENOUGH) / repeats)
    short = table.loc[(table["interval()"] < ENOUGH - noise) & (table["scores"] != RARE), "n"]
    return min(n for n in SIZES if n > short.max()) if len(short) else SIZES[0]


def report(table: pd.DataFrame, repeats: int) -> str:
    lines = [
        "# Coverage of 95 % intervals by n",
        "",
        f"Share of {repeats} simulated samples whose interval holds the true mean (standard error"
        f" {np.sqrt(0.95 * 0.05 / repeats):.3f}); bootstraps of {RESAMPLES} resamples, those of `interval()` as the"
        " package has them. `interval()`: smoothed studentised bootstrap for means, Wilson for shares, Bonett and Price"
        " for pairs of yes and no (half as many won as lost).",
        "",
        f"Below n = {fewest(table, repeats)} some kind of score other than rare events ({RARE}) is covered in less than"
        f" {ENOUGH:.0%}: `statistics.FEWEST` = {FEWEST}, and no verdict below it.",
        "",
        f"| scores | n | {' | '.join(METHODS)} |",
        f"|{'-|' * (len(METHODS) + 2)}",
    ]
    for row in table.to_dict("records"):
        cells = ["" if pd.isna(row.get(name, np.nan)) else f"{row[name]:.3f}" for name in METHODS]
        lines.append(f"| {row['scores']} | {row['n']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=2500, help="simulated samples per kind of score and n")
    options = parser.parse_args()
    table = simulate(options.repeats)
    write_text(OUT, report(table, options.repeats))
    print(f"FEWEST by this simulation: {fewest(table, options.repeats)}; in the package: {FEWEST}; {OUT}")


if __name__ == "__main__":
    run_script(main)
