"""Which segment stands for which class, when segments have no names (PROTOCOLS: unsupervised evaluation).

    found = assign(histogram, match="image")        # [segments] class of each segment, or C for none

Every variant reads the counts [C, P] of true class x segment of one image. By name:

    image      Hungarian within the image over the classes that occur in it (as DiffSeg and DiffCut intend; the default)
    upstream   the same over all C classes: left-over segments go to absent classes, as in the released evaluators
    majority   each segment takes its most frequent true class: an upper bound, it uses the truth as a label
    dataset    one Hungarian over the sum of all images: only for segment ids that mean the same in every image
    row        the defect of the released Seg4Diff evaluation: one assignment per pixel row (`rows`), made while the
               images are seen; for showing what it does to scores

Background: "many_to_one" gives every segment that is left over to the background class.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import UserError, unknown

VARIANTS = ("image", "upstream", "majority", "dataset", "row")


def histogram(truth: NDArray[np.integer], found: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Counts [C, P] of true class x segment over pixels whose truth is a class; P is the largest segment id + 1."""
    known = (truth >= 0) & (truth < classes)
    segments = int(found.max()) + 1
    flat = truth[known].astype(np.int64) * segments + found[known]
    return np.bincount(flat, minlength=classes * segments).reshape(classes, segments)


def assign(counts: NDArray[np.int64], match: str = "image", background: int | None = None) -> NDArray[np.int64]:
    """Class of each segment [P]; C, the number of classes, means none.

    Args:
        counts: [C, P]; for "dataset" the sum over images.
        match: one of `VARIANTS` but "row", which has no counts of whole images.
        background: with a class id, DiffCut's rule: segments match the other classes first, and all that are left over
            join this one.

    Raises:
        UserError: unknown variant, or a background that is no class.
    """
    from scipy.optimize import linear_sum_assignment

    if match not in VARIANTS[:-1]:
        raise unknown("matching", match, VARIANTS[:-1])
    classes, segments = counts.shape
    if background is not None and not 0 <= background < classes:
        raise UserError(f"background class {background}: expected 0..{classes - 1}")
    if match == "majority":
        taken = counts.argmax(0)
        return np.where(counts.sum(0) > 0, taken, classes)
    rows = np.arange(classes) if match in ("upstream", "dataset") else np.flatnonzero(counts.sum(1))
    if background is not None:
        rows = rows[rows != background]
    result = np.full(segments, classes if background is None else background, np.int64)
    if len(rows):
        left, right = linear_sum_assignment(counts[rows], maximize=True)
        useful = np.ones(len(left), bool) if match == "upstream" else counts[rows][left, right] > 0
        result[right[useful]] = rows[left[useful]]
    return result


def rows(truth: NDArray[np.integer], found: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Confusion [C, C + 1] with one assignment per pixel row: the released evaluation's defect, on purpose."""
    total = np.zeros((classes, classes + 1), np.int64)
    for one_truth, one_found in zip(truth, found, strict=True):
        if ((one_truth >= 0) & (one_truth < classes)).any():
            counts = histogram(one_truth, one_found, classes)
            for segment, of_class in enumerate(assign(counts, "upstream")):
                total[:, of_class] += counts[:, segment]
    return total
