"""Scores over a data set from sparse counts per image, with intervals by bootstrap over images.

    counts = ImageCounts.from_table(frame, classes=15)
    counts.miou("union"), counts.miou("gt"), counts.interval("miou")

A score is a ratio of sums over images, so images are resampled and the sums are taken again; no image has a score of
its own. Two averaging rules stand side by side in the literature; they differ when an absent class is predicted:

    union   mean IoU over classes in truth or prediction (mmseg; used beside CLIP methods)
    gt      mean IoU over classes in the truth (detectron2; used by Seg4Diff)

The prediction may hold one index more than there are classes: "no class", e.g. an unmatched segment or the background
of a set without one. It is a miss of the true class and a false alarm of none.

Ids that mean nothing in another image (masks without names, SA-1B) are not summed over images: `agnostic` scores are
means over all masks of all images, and the two rules agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import unknown

if TYPE_CHECKING:
    import pandas as pd

RULES = ("union", "gt")
SCORES = ("miou", "miou_gt", "accuracy", "macc", "fwiou")
DRAWS = 1000


@dataclass(frozen=True)
class ImageCounts:
    """Per image and class: pixels that are right, that are in the truth, that are predicted; [n, C] each, float64."""

    hit: NDArray[np.float64]
    truth: NDArray[np.float64]
    found: NDArray[np.float64]
    agnostic: bool = False

    @classmethod
    def from_table(cls, frame: pd.DataFrame, classes: int, agnostic: bool = False) -> ImageCounts:
        """From rows of columns image, truth, found, pixels; images are numbered in the order of their index."""
        images, place = np.unique(frame["image"].to_numpy(), return_inverse=True)
        rows, columns = frame["truth"].to_numpy(np.int64), frame["found"].to_numpy(np.int64)
        pixels = frame["pixels"].to_numpy(np.float64)
        parts = []
        for kept, of in ((rows == columns, rows), (rows >= 0, rows), (columns < classes, columns)):
            kept = kept & (of >= 0) & (of < classes)
            flat = np.bincount(place[kept] * classes + of[kept], pixels[kept], len(images) * classes)
            parts.append(flat.reshape(len(images), classes).astype(np.float64))
        return cls(parts[0], parts[1], parts[2], agnostic)

    def __len__(self) -> int:
        return len(self.hit)

    @cached_property
    def _draws(self) -> NDArray[np.float64]:
        """How often each image is in each bootstrap draw [DRAWS, n]; the same for every method on n images."""
        count = len(self)
        return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), DRAWS).astype(float)

    def ious(self) -> NDArray[np.float64]:
        """IoU per class [C]; NaN where a class is in neither."""
        return _ious(self.hit.sum(0), self.truth.sum(0), self.found.sum(0))

    def score(self, name: str) -> float:
        """One of `SCORES` over all images."""
        return float(self._scores(name, np.ones((1, len(self))))[0])

    def miou(self, rule: str = "union") -> float:
        """Mean IoU under a rule.

        Raises:
            UserError: an unknown rule.
        """
        if rule not in RULES:
            raise unknown("averaging rule", rule, RULES)
        return self.score("miou" if rule == "union" else "miou_gt")

    def interval(self, name: str) -> tuple[float, float]:
        """95 % interval of a score: percentiles over bootstrap draws of images; NaN with one image."""
        if len(self) < 2:
            return float("nan"), float("nan")
        values = self._scores(name, self._draws)
        return float(np.nanquantile(values, 0.025)), float(np.nanquantile(values, 0.975))

    def gain(self, other: ImageCounts, name: str = "miou") -> tuple[float, float, float]:
        """How much better than `other` on the same images: difference and its 95 % interval, images paired."""
        if len(self) != len(other):
            raise ValueError(f"paired scores need the same images; found {len(self)} and {len(other)}")
        difference = self.score(name) - other.score(name)
        if len(self) < 2:
            return difference, float("nan"), float("nan")
        values = self._scores(name, self._draws) - other._scores(name, self._draws)
        return difference, float(np.nanquantile(values, 0.025)), float(np.nanquantile(values, 0.975))

    def _scores(self, name: str, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        hit, truth, found = weights @ self.hit, weights @ self.truth, weights @ self.found
        total = truth.sum(-1)
        if name == "accuracy":
            return np.divide(hit.sum(-1), total, out=np.full(len(total), np.nan), where=total > 0)
        if self.agnostic and name in SCORES:
            return self._over_masks(name, weights)
        if name == "macc":
            recall = np.divide(hit, truth, out=np.full(hit.shape, np.nan), where=truth > 0)
            return _mean(recall)
        ious = _ious(hit, truth, found)
        if name == "miou":
            return _mean(ious)
        if name == "miou_gt":
            return _mean(np.where(truth > 0, ious, np.nan))
        if name == "fwiou":
            return np.divide(np.nansum(ious * truth, -1), total, out=np.full(len(total), np.nan), where=total > 0)
        raise unknown("score", name, SCORES)

    def _over_masks(self, name: str, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """A score as the mean over masks of the weighted images; fwIoU weights a mask by its pixels."""
        there = self.truth > 0
        of_mask = _ious(self.hit, self.truth, self.found)
        if name == "macc":
            of_mask = np.divide(self.hit, self.truth, out=np.full(self.hit.shape, np.nan), where=there)
        share = self.truth if name == "fwiou" else there.astype(float)
        count = weights @ share.sum(1)
        total = weights @ np.where(there, of_mask * share, 0.0).sum(1)
        return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def _ious(hit: NDArray[np.float64], truth: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    union = truth + found - hit
    return np.divide(hit, union, out=np.full(hit.shape, np.nan), where=union > 0)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis without NaN; NaN where nothing is left."""
    known = np.isfinite(values)
    count = known.sum(-1)
    return np.divide(np.where(known, values, 0.0).sum(-1), count, out=np.full(len(count), np.nan), where=count > 0)
