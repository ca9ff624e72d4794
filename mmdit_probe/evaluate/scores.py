"""The one measure of label maps: confusion counts, matching of segments, IoU under both averaging rules, map quality.

    score = segmentation_score(predictions, labels, classes=["cat", "sky"], rule="gt")    # arrays, or lists of arrays
    score.miou, score.accuracy, score.iou["cat"], score.interval()

Counts are summed over images before any ratio is taken; intervals are over images. Two rules of averaging stand
side by side in the literature; they differ when a class is predicted that occurs nowhere:

    union   mean IoU over classes in label or prediction (mmseg; used beside CLIP methods)
    gt      mean IoU over classes in the label (detectron2; used by Seg4Diff)

A prediction may hold the id C, "no class", e.g. an unmatched segment: a miss of the true class, a false alarm of none.
Segments without names are matched to classes first, each variant from the counts [C, P] of class x segment of an image:

    image      Hungarian within the image over the classes that occur in it (as DiffSeg and DiffCut intend; the default)
    upstream   the same over all C classes: left-over segments go to absent classes, as in the released evaluators
    majority   each segment takes its most frequent true class: an upper bound, it uses the label
    dataset    one Hungarian over the sum of all images: only for segment ids that mean the same in every image
    row        the released Seg4Diff evaluation: one assignment per pixel row; shows what that does to scores

`map_quality` counts what the argmax of maps gets right. Not here: which images, prompts and methods (`evaluate.plan`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.data.labels import IGNORE
from mmdit_probe.errors import UserError, check_known, counted, unknown
from mmdit_probe.results.statistics import Jackknife, jackknife
from mmdit_probe.segment.tail import STRETCHES

if TYPE_CHECKING:
    import pandas as pd

Counts = NDArray[np.int64]
"""[C, P] pixels by true class and predicted class or segment; P is at least C."""

RULES = ("union", "gt")
MATCHES = ("image", "upstream", "majority", "dataset", "row")
SCORES = ("miou", "miou_gt", "accuracy", "macc", "fwiou")


def confusion(
    label: NDArray[np.integer], prediction: NDArray[np.integer], classes: int, columns: int | None = None,
    ignore: int | Collection[int] = IGNORE,
) -> NDArray[np.int64]:  # fmt: skip
    """Counts [..., C, P] of a label map and one or more predictions of it.

    Args:
        label: true ids [H, W] (or of any shape), 0..C-1 or `ignore`. prediction: ids 0..P-1, [..., H, W].
        columns: P; C if None. ignore: ids of label pixels that are not counted.

    Raises:
        ValueError: shapes differ, or a counted pixel has another id.
    """
    before = prediction.shape[: max(0, prediction.ndim - label.ndim)]
    if prediction.shape != (*before, *label.shape):
        raise ValueError(f"the label has shape {label.shape}, the prediction {prediction.shape}")
    width = classes if columns is None else columns
    counted = ~np.isin(label, list(ignore)) if isinstance(ignore, Collection) else label != ignore
    rows = label[counted].astype(np.int64)  # (n,)
    cells = prediction.reshape(-1, *label.shape)[:, counted].astype(np.int64)  # (M, n)
    for name, ids, count in (("label", rows, classes), ("prediction", cells, width)):
        if ids.size and (ids.min() < 0 or ids.max() >= count):
            raise ValueError(f"{name} holds ids {ids.min()}..{ids.max()}, expected 0..{count - 1}")
    flat = (np.arange(len(cells))[:, None] * classes + rows) * width + cells
    return np.bincount(flat.ravel(), minlength=len(cells) * classes * width).reshape(*before, classes, width)


def histogram(
    label: NDArray[np.integer], segments: NDArray[np.integer], classes: int, ignore: int | Collection[int] = IGNORE
) -> Counts:
    """Counts [C, P] of class x segment; P is the largest segment id + 1 (ignored pixels included), or C if larger."""
    return confusion(label, segments, classes, max(classes, int(segments.max(initial=0)) + 1), ignore)


def assign(counts: Counts, match: str = "image", background: int | None = None) -> NDArray[np.int64]:
    """Class of each segment [P]; C, the number of classes, means none.

    Args:
        counts: [C, P] of `histogram`; for "dataset" the sum over images.
        match: one of `MATCHES` but "row", which has no counts of whole images.
        background: with a class id, DiffCut's rule: segments match the other classes first, and all that are left over
            join this one; "upstream" matches once more what they became (`_many_to_one`).

    Raises:
        UserError: unknown variant, or a background that is no class.
    """
    from scipy.optimize import linear_sum_assignment

    check_known("matching", match, MATCHES[:-1])
    classes, segments = counts.shape
    if background is not None and not 0 <= background < classes:
        raise UserError(f"background class {background}: expected 0..{classes - 1}")
    if match == "upstream" and background is not None:
        return _many_to_one(counts, background)
    if match == "majority":
        return np.where(counts.sum(0) > 0, counts.argmax(0), classes)
    rows = np.arange(classes) if match in ("upstream", "dataset") else np.flatnonzero(counts.sum(1))
    if background is not None:
        rows = rows[rows != background]
    result = np.full(segments, classes if background is None else background, np.int64)
    if len(rows):
        left, right = linear_sum_assignment(counts[rows], maximize=True)
        useful = np.ones(len(left), bool) if match == "upstream" else counts[rows][left, right] > 0
        result[right[useful]] = rows[left[useful]]
    return result


def _many_to_one(counts: Counts, background: int) -> NDArray[np.int64]:
    """Class of each segment as in DiffCut's released evaluation (eval_diffcut.py): without the background, segments are
    matched to all other classes; all but those of classes that occur become one; all classes are matched to what is
    then there. With the order of rows and columns of that code, on which ties depend."""
    from scipy.optimize import linear_sum_assignment

    classes, width = counts.shape
    rows = np.array([*(one for one in range(classes) if one != background), background])
    used = np.flatnonzero(counts.any(0))
    last = width if width > classes or not len(used) else int(used[-1]) + 1  # number of segments
    first = counts[rows[:-1], : max(classes - 1, last)]
    _, column = linear_sum_assignment(first, maximize=True)
    kept = np.zeros(width + 1, bool)
    kept[column[first.any(1)]] = True
    joined = np.flatnonzero(~kept[:last])
    table = np.zeros((classes, max(classes, last + bool(len(joined)))), np.int64)
    table[:, :last] = np.where(kept[:last], counts[rows, :last], 0)
    if len(joined):
        table[:, last] = counts[rows][:, joined].sum(1)
    left, right = linear_sum_assignment(table, maximize=True)
    to = np.full(max(width, table.shape[1]), classes, np.int64)
    to[right] = rows[left]
    if len(joined):
        to[joined] = to[last]
    return to[:width]


def matched(counts: Counts, to: NDArray[np.int64]) -> Counts:
    """Counts [C, C + 1] of classes from counts [C, P] of segments whose classes are `to` [P]."""
    classes = len(counts)
    total = np.zeros((classes + 1, classes), np.int64)
    np.add.at(total, to, counts.T)
    return total.T


def matched_by_rows(
    label: NDArray[np.integer], segments: NDArray[np.integer], classes: int, ignore: int | Collection[int] = IGNORE
) -> Counts:
    """Counts [C, C + 1] with one "upstream" assignment per pixel row: the released evaluation's defect, on purpose."""
    rows = (histogram(*pair, classes, ignore) for pair in zip(label, segments, strict=True))
    return np.sum([matched(counts, assign(counts, "upstream")) for counts in rows], axis=0)


def ious(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union per class [..., C] of counts [..., C, P]; NaN where a class never occurs."""
    return _ious(*_parts(counts))


def mean_iou(counts: NDArray[np.int64], rule: str = "union") -> Any:
    """Mean IoU [...] of counts [..., C, P] under one of `RULES`; NaN where nothing occurs."""
    check_known("averaging rule", rule, RULES)
    hit, truth, found = _parts(counts)
    return _mean(np.where((truth > 0) | (rule == "union"), _ious(hit, truth, found), np.nan))[()]


def accuracy(counts: Counts) -> float:
    """Share of counted pixels that are right."""
    return float(np.diagonal(counts).sum() / counts.sum()) if counts.sum() else float("nan")


def map_quality(
    maps: Tensor, label: NDArray[np.integer], ids: Sequence[int], classes: int, stretch: str = "none"
) -> NDArray[np.int64]:
    """Counts [..., C, C] of the argmax over class maps, at the label's size, on the pixels of these classes.

    Args:
        maps: [..., K, h, w] on the token grid; any axes before, such as layers or heads, are scored one by one.
        label: ids [H, W]. ids: the K classes of the maps; pixels of others are not counted.
        stretch: what is done to each map over space first, one of `segment.tail.STRETCHES`.
    """
    check_known("stretch", stretch, STRETCHES)
    sets = STRETCHES[stretch](maps.float()).reshape(-1, *maps.shape[-3:])  # (M, K, h, w)
    large = F.interpolate(sets, label.shape, mode="bilinear", align_corners=False)
    predictions = np.asarray(ids)[large.argmax(1).numpy()]
    truth = np.where(np.isin(label, ids), label.astype(np.int64), -1)
    return confusion(truth, predictions, classes, ignore=-1).reshape(*maps.shape[:-3], classes, classes)


def area_under_curve(values: NDArray[Any], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Area under the ROC curve [...] of values [..., n] against inside [n]; ties count half, NaN if either is empty."""
    from scipy.stats import mannwhitneyu

    hits, others = int(inside.sum()), int((~inside).sum())
    if not hits or not others:
        return np.full(values.shape[:-1], np.nan)
    ranked = mannwhitneyu(values[..., inside], values[..., ~inside], axis=-1, method="asymptotic").statistic
    return np.asarray(ranked) / (hits * others)


@dataclass(frozen=True)
class ImageCounts:
    """Per image and class: pixels that are right, that are in the label, that are predicted; [n, C] each, float64. An
    image without a scored pixel is none of the n: no interval is surer for it.

    Ids that mean nothing in another image (masks without names, SA-1B) are not summed over images: `agnostic` scores
    are means over all masks of all images, and the two rules agree.
    """

    hit: NDArray[np.float64]
    truth: NDArray[np.float64]
    found: NDArray[np.float64]
    agnostic: bool = False

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> ImageCounts:
        """From counts [n, C, P]."""
        hit, truth, found = (part.astype(np.float64) for part in _parts(counts[counts.any((1, 2))]))
        return cls(hit, truth, found)

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
        scored = parts[1].any(1)
        return cls(parts[0][scored], parts[1][scored], parts[2][scored], agnostic)

    def __len__(self) -> int:
        return len(self.hit)

    def ious(self) -> NDArray[np.float64]:
        """IoU per class [C]; NaN where a class is in neither."""
        return _ious(self.hit.sum(0), self.truth.sum(0), self.found.sum(0))

    def score(self, name: str) -> float:
        """One of `SCORES` over all images."""
        return float(self.leave_one_out(name)[0])

    def miou(self, rule: str = "union") -> float:
        """Mean IoU under a rule.

        Raises:
            UserError: an unknown rule.
        """
        check_known("averaging rule", rule, RULES)
        return self.score("miou" if rule == "union" else "miou_gt")

    def interval(self, name: str) -> tuple[float, float]:
        """95 % interval of a score over images (`jackknife`), within 0..1; NaN with one image."""
        scores = self.leave_one_out(name)
        found = jackknife(scores[0], scores[1:])
        low, high = np.clip([found.low, found.high], 0, 1)
        return float(low), float(high)

    def gain(self, other: ImageCounts, name: str = "miou") -> Jackknife:
        """How much better than `other` on the same images: difference, its 95 % interval and p value, images paired."""
        if len(self) != len(other):
            raise ValueError(f"paired scores need the same images; found {len(self)} and {len(other)}")
        differences = self.leave_one_out(name) - other.leave_one_out(name)
        return jackknife(differences[0], differences[1:])

    def leave_one_out(self, name: str) -> NDArray[np.float64]:
        """A score of all images, then of all but each one [1 + n]."""
        hit, truth, found = map(_but_one, (self.hit, self.truth, self.found))
        if name == "accuracy":
            return _ratio(hit.sum(-1), truth.sum(-1))
        if self.agnostic and name in SCORES:
            return self._over_masks(name)
        if name == "macc":
            return _mean(_ratio(hit, truth))
        by_class = _ious(hit, truth, found)
        if name == "miou":
            return _mean(by_class)
        if name == "miou_gt":
            return _mean(np.where(truth > 0, by_class, np.nan))
        if name == "fwiou":
            return _ratio(np.nansum(by_class * truth, -1), truth.sum(-1))
        raise unknown("score", name, SCORES)

    def _over_masks(self, name: str) -> NDArray[np.float64]:
        """A score as the mean over masks of the images; fwIoU weights a mask by its pixels."""
        there = self.truth > 0
        of_mask = _ratio(self.hit, self.truth) if name == "macc" else _ious(self.hit, self.truth, self.found)
        share = self.truth if name == "fwiou" else there.astype(float)
        sums = np.where(there, of_mask * share, 0.0).sum(1), share.sum(1)
        return _ratio(*map(_but_one, sums))


@dataclass(frozen=True)
class SegmentationScore:
    """What `segmentation_score` found.

    Attributes:
        miou, accuracy, mean_accuracy, fwiou: shares, 0..1. iou: class -> IoU; NaN where it is in neither.
        counts: per image and class; their `interval`s and `gain`s over images. rule, match: as asked for.
    """

    miou: float
    accuracy: float
    mean_accuracy: float
    fwiou: float
    iou: dict[Any, float]
    counts: ImageCounts
    rule: str
    match: str | None

    def interval(self) -> tuple[float, float]:
        """95 % interval of the mIoU over images."""
        return self.counts.interval("miou" if self.rule == "union" else "miou_gt")


MOST_IDS = 10_000
"""So many classes or segments, and no more, are counted against each other."""


def segmentation_score(
    prediction: Any, label: Any, classes: int | Sequence[str], *, ignore: int | Collection[int] | None = None,
    rule: str = "union", match: str | None = None, background: int | None = None,
) -> SegmentationScore:  # fmt: skip
    """Score label maps, or segments without names, against labels.

    >>> segmentation_score(np.array([[0, 1, 1]]), np.array([[0, 0, 1]]), classes=["cat", "sky"]).iou
    {'cat': 0.5, 'sky': 0.5}

    Args:
        prediction: ids [H, W], an array or tensor, or a list of them; 0..C-1, or C for no class.
        label: ids [H, W], likewise. classes: C, or the names of the C classes.
        ignore: one id, or several, of label pixels that are not counted; None: 255, where that is no class.
        rule: "union" or "gt". match: None if the prediction's ids are the classes, else one of `MATCHES`.
        background: many-to-one matching, see `assign`; not with "majority" and "row".

    Raises:
        UserError: nothing to score, other numbers or shapes, an id that is no class, an unknown rule or matching.
    """
    if match is not None and match not in MATCHES:
        raise unknown("matching", match, MATCHES)
    if background is not None and match in (None, "majority", "row"):
        raise UserError(f"background={background} joins segments that are left over, and match={match!r} leaves none")
    predictions, labels = _maps(prediction), _maps(label)
    if len(predictions) != len(labels) or not labels:
        told = f"{counted(len(predictions), 'prediction')} for {counted(len(labels), 'label')}"
        raise UserError(f"{told}; expected as many, at least one")
    names = _class_names(classes)
    if ignore is None:
        ignore = IGNORE if len(names) <= IGNORE else ()
    largest = max(int(one.max()) for one in predictions)
    if largest >= MOST_IDS:
        raise UserError(f"predictions hold ids up to {largest}; expected below {MOST_IDS}: renumber them from 0")
    try:
        counts = _counted(predictions, labels, len(names), ignore, match, background)
    except ValueError as error:
        raise UserError(f"these maps cannot be scored: {error}") from error
    found = ImageCounts.of(np.stack(counts))
    right, recall, weighted = (found.score(name) for name in ("accuracy", "macc", "fwiou"))
    by_class = dict(zip(names, found.ious().tolist(), strict=True))
    return SegmentationScore(found.miou(rule), right, recall, weighted, by_class, found, rule, match)


def _class_names(classes: Any) -> list[Any]:
    """The classes by name, or by number."""
    if isinstance(classes, int | np.integer) and classes is not True and 0 < classes < MOST_IDS:
        return list(range(int(classes)))
    names = list(classes) if isinstance(classes, Collection) and not isinstance(classes, str) else []
    if not 0 < len(set(names)) == len(names) < MOST_IDS:
        found = f"{counted(len(names), 'name')}, {len(set(names))} of them different" if names else repr(classes)
        raise UserError(f"classes are {found}; expected their number, or different names, at most {MOST_IDS - 1}")
    return names


def _maps(given: Any) -> list[NDArray[np.integer]]:
    maps = []
    for one in given if isinstance(given, list | tuple) else [given]:
        found = one.detach().cpu() if isinstance(one, Tensor) else one
        # Numpy has no bfloat16; other numbers than whole ones are refused below.
        maps.append(np.asarray(found.float() if isinstance(one, Tensor) and one.is_floating_point() else found))
    for one in maps:
        if one.ndim != 2 or one.dtype.kind not in "iu" or not one.size:
            raise UserError(f"a map of shape {one.shape} and type {one.dtype}: expected whole-number ids [H, W]")
    return maps


def _counted(
    predictions: list[NDArray[np.integer]], labels: list[NDArray[np.integer]], classes: int,
    ignore: int | Collection[int], match: str | None, background: int | None,
) -> list[Counts]:  # fmt: skip
    pairs = list(zip(labels, predictions, strict=True))
    if match is None:
        return [confusion(one, found, classes, classes + 1, ignore) for one, found in pairs]
    if match == "row":
        return [matched_by_rows(one, found, classes, ignore) for one, found in pairs]
    tables = [histogram(one, found, classes, ignore) for one, found in pairs]
    if match != "dataset":
        return [matched(one, assign(one, match, background)) for one in tables]
    width = max(one.shape[1] for one in tables)
    tables = [np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in tables]
    to = assign(np.sum(tables, axis=0), match, background)
    return [matched(one, to) for one in tables]


def _but_one(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of values [n, ...] over images, then without each one: [1 + n, ...]."""
    total = values.sum(0)
    return np.concatenate([total[None], total - values])


def _parts(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Right, in the label, predicted: [..., C] each, of counts [..., C, P]."""
    classes = counts.shape[-2]
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)[..., :classes]


def _ious(hit: NDArray[Any], truth: NDArray[Any], found: NDArray[Any]) -> NDArray[np.float64]:
    return _ratio(hit, truth + found - hit)


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """part / whole; NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis without NaN; NaN where nothing is left."""
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1))
