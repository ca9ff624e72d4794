"""Confusion matrices over a data set, and the scores read from them.

Counts are summed over images before any ratio is taken (the data-set level rule of the segmentation literature); a
class that occurs neither in the truth nor in the prediction has no IoU and takes no part in the mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.data.labels import IGNORE


def confusion(truth: NDArray[np.integer], found: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Counts [classes, classes], truth by row and prediction by column, of label maps of one shape.

    Raises:
        ValueError: shapes differ, or an id lies outside 0..classes-1 (``IGNORE`` in the truth excepted).
    """
    if truth.shape != found.shape:
        raise ValueError(f"truth has shape {truth.shape}, the prediction {found.shape}")
    counted = truth != IGNORE
    rows, columns = truth[counted].astype(np.int64), found[counted].astype(np.int64)
    for name, ids in (("truth", rows), ("prediction", columns)):
        if ids.size and (ids.min() < 0 or ids.max() >= classes):
            raise ValueError(f"{name} holds ids {ids.min()}..{ids.max()}, expected 0..{classes - 1}")
    return np.bincount(rows * classes + columns, minlength=classes * classes).reshape(classes, classes)


def ious(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union per class [classes]; NaN where a class never occurs."""
    hit = np.diag(matrix).astype(float)
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


def mean_iou(matrix: NDArray[np.int64]) -> float:
    """Mean IoU over the classes that occur."""
    values = ious(matrix)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def accuracy(matrix: NDArray[np.int64]) -> float:
    """Share of counted pixels that are right."""
    return float(np.diag(matrix).sum() / matrix.sum()) if matrix.sum() else float("nan")
