"""How often the 95 % interval of an mIoU over n images covers the mIoU of all images: what `ImageCounts` takes.

    python benchmarks/miou_coverage.py                # two minutes on one core; results/miou_coverage.md

An mIoU is no mean of images: counts are summed first, so few images show few classes. Simulated images have 2 to 4 of
12 classes and an accuracy of their own; percentile and BCa bootstrap of images beside `ImageCounts.interval` (t
interval with the jackknife's error), measured through that function.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mmdit_probe.errors import at_least, run_script
from mmdit_probe.evaluate.scores import ImageCounts
from mmdit_probe.results.atomic import write_text

OUT = Path(__file__).parent / "results" / "miou_coverage.md"
CLASSES, POPULATION, RESAMPLES = 12, 20_000, 999
SIZES = (4, 6, 8, 12, 20, 40, 100, 200)
METHODS = ("percentile", "BCa", "ImageCounts.interval")


def images(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Counts [count, 3, C] of images: right, in the label, predicted; a wrong pixel has another class of its image."""
    found = np.zeros((count, 3, CLASSES))
    for image in found:
        names = rng.choice(CLASSES, rng.integers(2, 5), replace=False)
        area, quality = rng.dirichlet(np.full(len(names), 2.0)), rng.beta(4, 1.5)
        right = area * np.clip(quality + rng.normal(0, 0.15, len(names)), 0, 1)
        spilt = (area - right) / (len(names) - 1)
        image[:, names] = right, area, right + spilt.sum() - spilt
    return found


def miou(weights: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """mIoU of images [n, 3, C] drawn `weights` [draws, n] times."""
    hit, truth, found = np.moveaxis(np.tensordot(weights, counts, 1), 1, 0)
    return np.asarray(np.nanmean(hit / (truth + found - hit), -1))


def bootstrap(counts: NDArray[np.float64], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Percentile and BCa bounds."""
    n = len(counts)
    draws = miou(rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float), counts)
    value = miou(np.ones((1, n)), counts)[0]
    away = miou(1 - np.eye(n), counts)
    away = away.mean() - away
    bias = stats.norm.ppf((draws < value).mean() + (draws == value).mean() / 2)
    skew = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    ends = bias + stats.norm.ppf((0.025, 0.975))
    levels = (0.025, 0.975), stats.norm.cdf(bias + ends / (1 - skew * ends))
    return [tuple(np.quantile(draws, level)) for level in levels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=1000, help="simulated samples per n")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    every = images(POPULATION, rng)
    truth = miou(np.ones((1, POPULATION)), every)[0]
    lines = [
        "# Coverage of 95 % intervals of an mIoU by number of images", "",
        f"Share of {options.repeats} simulated samples whose interval holds the mIoU of all {POPULATION} images"
        f" ({truth:.3f}; standard error of a share {np.sqrt(0.95 * 0.05 / options.repeats):.3f}).", "",
        f"| n | {' | '.join(METHODS)} |", f"|{'-|' * (1 + len(METHODS))}",
    ]  # fmt: skip
    for n in SIZES:
        covered = np.zeros(len(METHODS))
        for _ in range(options.repeats):
            sample = every[rng.integers(0, POPULATION, n)]
            with np.errstate(all="ignore"):
                bounds = [*bootstrap(sample, rng), ImageCounts(*np.moveaxis(sample, 1, 0)).interval("miou")]
            covered += [low <= truth <= high for low, high in bounds]
        lines.append(f"| {n} | {' | '.join(f'{share:.3f}' for share in covered / options.repeats)} |")
        print(lines[-1], flush=True)
    write_text(OUT, "\n".join([*lines, ""]))


if __name__ == "__main__":
    run_script(main)
