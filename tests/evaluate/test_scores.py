"""Scores and matching on counts that can be done by hand, and the defects of released evaluators by name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe.errors import UserError
from mmdit_probe.evaluate import confusion, map_quality, mean_iou, segmentation_score
from mmdit_probe.evaluate.league import matched
from mmdit_probe.evaluate.plan import _Rows
from mmdit_probe.evaluate.scores import ImageCounts, area_under_curve, assign, histogram, matched_by_rows


def table(images: list[np.ndarray]) -> pd.DataFrame:
    """Sparse rows of dense confusion matrices."""
    frames = []
    for index, matrix in enumerate(images):
        truth, found = np.nonzero(matrix)
        frames.append(pd.DataFrame({"image": index, "truth": truth, "found": found, "pixels": matrix[truth, found]}))
    return pd.concat(frames)


@pytest.fixture
def random_counts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 50, (4, 5)) * (rng.random((4, 5)) > 0.4) for _ in range(12)]


def test_rules_by_hand() -> None:
    """Class 0 right on 6 of 8; class 1 on 2 of 2; class 2 is never true, 2 pixels are called so."""
    counts = ImageCounts.from_table(table([np.array([[6, 0, 2], [0, 2, 0], [0, 0, 0]])]), 3)
    assert counts.miou("union") == pytest.approx((6 / 8 + 1 + 0) / 3)
    assert counts.miou("gt") == pytest.approx((6 / 8 + 1) / 2)
    assert counts.score("accuracy") == pytest.approx(0.8)
    assert counts.score("macc") == pytest.approx((6 / 8 + 1) / 2)
    assert counts.score("fwiou") == pytest.approx((0.75 * 8 + 1 * 2) / 10)
    with pytest.raises(UserError):
        counts.miou("mean")
    # a class of one true pixel is there; one that is only said counts as 0 by "union" and not at all by "gt"
    assert [mean_iou(np.array([[0, 1], [0, 3]]), rule) for rule in ("union", "gt")] == [3 / 8, 3 / 8]
    assert [mean_iou(np.array([[0, 0], [1, 3]]), rule) for rule in ("union", "gt")] == [3 / 8, 3 / 4]


def test_no_class_is_a_miss_of_one_class_and_an_alarm_of_none() -> None:
    counts = ImageCounts.from_table(table([np.array([[3, 0, 1], [0, 4, 0]])]), 2)
    assert counts.ious().tolist() == pytest.approx([3 / 4, 1.0])


def test_sums_over_images_come_before_ratios(random_counts: list[np.ndarray]) -> None:
    counts = ImageCounts.from_table(table(random_counts), 4)
    whole = np.zeros((5, 5), np.int64)
    whole[:4] = sum(random_counts)
    ious = np.diag(whole)[:4] / (whole.sum(0)[:4] + whole.sum(1)[:4] - np.diag(whole)[:4])
    assert counts.ious() == pytest.approx(ious)
    assert counts.miou() == pytest.approx(ious.mean())
    square = [m[:, :4] for m in random_counts]
    assert ImageCounts.from_table(table(square), 4).miou() == pytest.approx(mean_iou(np.sum(square, 0)))


def test_a_picture_without_a_scored_pixel_says_nothing() -> None:
    columns = []
    for index, counts in enumerate((np.diag([3, 1]), np.array([[2, 1], [0, 4]]), *[np.zeros((2, 2), int)] * 8)):
        rows = _Rows(index, 2)
        rows.add(("p", "m", "r", "4", "mean", "0.5", "classes"), counts)
        columns.append(pd.DataFrame(rows.columns()))
    scored, all_of_them = (ImageCounts.from_table(pd.concat(of), 2) for of in (columns[:2], columns))
    assert columns[2]["pixels"].tolist() == [0] and len(scored) == len(all_of_them) == 2
    for name in ("miou", "accuracy"):  # eight that say nothing made an interval of ten images
        assert all_of_them.interval(name) == scored.interval(name) and all_of_them.score(name) == scored.score(name)
    label = [np.array([[0, 1, 1]]), np.array([[0, 0, 1]]), np.full((1, 3), 255)]
    found = segmentation_score([np.array([[0, 1, 0]])] * 3, label, 2)
    assert found.interval() == segmentation_score([np.array([[0, 1, 0]])] * 2, label[:2], 2).interval()


def test_interval_holds_the_score_and_shrinks_with_images(random_counts: list[np.ndarray]) -> None:
    few, many = (ImageCounts.from_table(table(random_counts * times), 4) for times in (1, 9))
    (low, high), (low9, high9) = few.interval("miou"), many.interval("miou")
    assert low < few.score("miou") < high and high9 - low9 < 0.6 * (high - low)
    right, wrong = np.eye(2, dtype=int), np.eye(2, dtype=int)[::-1]
    half = ImageCounts.from_table(table([right, wrong] * 100), 2)
    low, high = half.interval("accuracy")  # of a share of one half over 200 images, 95 %
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5, rel=0.1)
    difference, d_low, d_high, _ = few.gain(few)
    assert (difference, d_low, d_high) == (0.0, 0.0, 0.0)
    assert np.isnan(ImageCounts.from_table(table(random_counts[:1]), 4).interval("miou")).all()


def test_a_permutation_of_segments_is_matched_back() -> None:
    truth = np.repeat(np.arange(3), 8).reshape(4, 6)
    found = np.array([2, 0, 1])[truth]
    counts = histogram(truth, found, 3)
    for match in ("image", "upstream", "majority", "dataset"):
        assert np.array_equal(assign(counts, match)[found], truth), match


def test_segments_left_over_are_no_class_by_default_and_absent_classes_upstream() -> None:
    counts = np.array(
        [[10, 4, 0], [0, 0, 8], [0, 0, 0]]
    )  # class 2 does not occur; segment 1 is a second part of class 0
    assert assign(counts).tolist() == [0, 3, 1]
    assert assign(counts, "upstream").tolist() == [0, 2, 1]
    assert assign(counts, "majority").tolist() == [0, 0, 1]


def test_background_takes_what_is_left_over() -> None:
    counts = np.array([[2, 6, 7], [9, 0, 1]])  # class 0 is the background
    assert assign(counts, background=0).tolist() == [1, 0, 0]
    # the best pairing of all classes would give the first segment to the background
    assert assign(np.array([[9, 0], [8, 1]]), background=0).tolist() == [1, 0]
    for wrong in (-1, 2):
        with pytest.raises(UserError, match=r"expected 0\.\.1"):
            assign(counts, background=wrong)
    with pytest.raises(UserError):
        assign(counts, "hungarian")


def diffcuts(label: np.ndarray, segments: np.ndarray, classes: int) -> tuple[np.ndarray, ...]:
    """TP, FP, FN of DiffCut's evaluation with a background, class C - 1, from its definition: segments are matched
    without it, those of no class that occurs become one, then all classes are matched."""
    from scipy.optimize import linear_sum_assignment

    known = np.where(label == classes - 1, -1, label)
    table = np.zeros((classes - 1, max(classes - 1, segments.max() + 1)), int)
    for one, segment in zip(known.ravel(), segments.ravel(), strict=True):
        if one >= 0:
            table[one, segment] += 1
    of, to = linear_sum_assignment(table, maximize=True)
    taken = {segment for one, segment in zip(of, to, strict=True) if table[one].max() > 0}
    joined = np.array([[one if one in taken else segments.max() + 1 for one in row] for row in segments])
    return released(label, joined, classes)


@pytest.mark.parametrize("seed", range(12))
def test_upstream_with_a_background_is_diffcuts_evaluation(seed: int) -> None:
    """Fewer and more segments than classes, absent classes, ties; on disk the same."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(3, 8))
    present = rng.integers(0, classes, classes)
    label = present[rng.integers(0, classes, (9, 7))]
    found = rng.integers(0, rng.integers(1, 12), (9, 7))
    parts = diffcuts(label, found, classes)
    last = segmentation_score(found, label, classes, match="upstream", background=classes - 1).counts
    first = segmentation_score(found, (label + 1) % classes, classes, match="upstream", background=0).counts
    for counts, place in ((last, np.arange(classes)), (first, (np.arange(classes) + 1) % classes)):
        assert counts.hit[0][place].tolist() == parts[0].tolist()
        assert (counts.found - counts.hit)[0][place].tolist() == parts[1].tolist()
        assert (counts.truth - counts.hit)[0][place].tolist() == parts[2].tolist()


def test_the_row_wise_defect() -> None:
    """Three bands and one segment: 100 % with an assignment per pixel row, 33 % with one per image."""
    truth = np.repeat(np.arange(3), 6).reshape(3, 6)
    found = np.zeros_like(truth)
    per_row = matched_by_rows(truth, found, 3)
    assert np.trace(per_row[:, :3]) == truth.size
    with pytest.raises(ValueError, match="shorter"):
        matched_by_rows(truth, found[:2], 3)
    ids = assign(histogram(truth, found, 3))
    right = confusion(truth, ids[found], 3)
    assert np.trace(right) * 3 == truth.size


def test_ignored_pixels_do_not_count() -> None:
    truth = np.array([[0, 255, 1, 255]])
    assert histogram(truth, np.array([[0, 1, 1, 0]]), 2).sum() == 2


def released(label: np.ndarray, segments: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TP, FP, FN of the released evaluators, from their definition: a histogram of at least C columns, all matched."""
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((classes, max(classes, segments.max() + 1)), int)
    for one, segment in zip(label.ravel(), segments.ravel(), strict=True):
        if 0 <= one < classes:
            table[one, segment] += 1
    of, to = linear_sum_assignment(table, maximize=True)
    right = table[of, to]
    return right, table[:, to].sum(0) - right, table.sum(1) - right


@pytest.mark.parametrize("segments", [2, 4, 6, 9])
@pytest.mark.parametrize("seed", range(6))
def test_upstream_and_row_are_the_released_rules(segments: int, seed: int) -> None:
    """Ties, absent classes, more and fewer segments than classes, the last segment on ignored pixels only."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, (8, 12)) % 5
    label[label == 3] = 0
    label[:2] = 255
    found = rng.integers(0, segments, (8, 12))
    found[0, 0], found[2:] = segments + 2, np.minimum(found[2:], segments - 1)
    whole = segmentation_score(found, label, 6, match="upstream")
    parts = released(label, found, 6)
    for one, want in zip((whole.counts.hit, whole.counts.found - whole.counts.hit), parts[:2], strict=True):
        assert one[0].tolist() == want.tolist()
    assert (whole.counts.truth - whole.counts.hit)[0].tolist() == parts[2].tolist()
    assert whole.accuracy == pytest.approx(parts[0].sum() / (label != 255).sum())
    union = np.sum(parts, axis=0)
    assert whole.miou == pytest.approx(np.mean(parts[0][union > 0] / union[union > 0]))
    by_row = segmentation_score(found, label, 6, match="row").counts
    rows = [released(one[None], two[None], 6) for one, two in zip(label, found, strict=True)]
    assert by_row.hit[0].tolist() == np.sum([one[0] for one in rows], 0).tolist()
    assert (by_row.found - by_row.hit)[0].tolist() == np.sum([one[1] for one in rows], 0).tolist()


def test_one_call_scores_arrays_tensors_and_lists() -> None:
    """By hand: cat right on 1 of 2, union 3; sky right on 2 of 3, union 4; "no class" is an alarm of none."""
    label = np.array([[0, 0, 1], [1, 1, 255]])
    found = torch.tensor([[0, 1, 1], [1, 0, 0]])
    score = segmentation_score(found, label, ["cat", "sky", "sea"])
    assert score.iou["cat"] == pytest.approx(1 / 3) and score.iou["sky"] == pytest.approx(2 / 4)
    assert np.isnan(score.iou["sea"]) and score.miou == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert score.accuracy == pytest.approx(3 / 5) and score.mean_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    alarm = np.where(np.array(found) == 0, 2, found)
    both = {rule: segmentation_score([alarm], [label], 3, rule=rule).miou for rule in ("union", "gt")}
    assert both == {"union": pytest.approx((0 + 2 / 4 + 0) / 3), "gt": pytest.approx((0 + 2 / 4) / 2)}
    none = segmentation_score(np.where(alarm == 2, 3, alarm), label, 3)
    assert none.iou[2] != none.iou[2] and none.miou == pytest.approx((0 + 2 / 4) / 2)
    two = segmentation_score([found, found], [label, label], 3)
    assert two.iou[0] == pytest.approx(1 / 3) and len(two.counts) == 2 and two.interval()[0] == pytest.approx(two.miou)
    ignored = segmentation_score(found, label, np.int64(3), ignore=np.array([0, 255]))
    assert segmentation_score(found, label, np.array(["a", "b", "c"]), ignore=np.uint8(255)).iou["a"] == pytest.approx(
        1 / 3
    )
    assert ignored.iou[1] == pytest.approx(2 / 3) and ignored.accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "label", "how", "words"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), {}, r"shape \(3, 2\), the prediction \(2, 3\)"),
        (np.full((2, 2), 7), np.zeros((2, 2), int), {}, r"prediction holds ids 7\.\.7, expected 0\.\.3"),
        (np.zeros((2, 2), int), np.full((2, 2), 9), {}, r"label holds ids 9\.\.9, expected 0\.\.2"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), {}, "whole-number ids"),
        (torch.zeros((2, 2), dtype=torch.bfloat16), np.zeros((2, 2), int), {}, "whole-number ids"),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), {"background": 0}, "match=None leaves none"),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), {"background": 0, "match": "row"}, "match='row' leaves none"),
        ([], [], {}, "0 predictions for 0 labels"),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), {"match": "hungarian"}, "matching"),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), {"rule": "mean"}, "averaging rule"),
    ],
)
def test_what_cannot_be_scored_is_said(prediction: object, label: object, how: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        segmentation_score(prediction, label, 3, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [0, -1, 2.5, None, "cat", [], ["cat", "cat"], True, 10**9])
def test_classes_are_a_number_or_different_names(classes: object) -> None:
    with pytest.raises(UserError, match=r"classes are .*; expected their number, or different names"):
        segmentation_score(np.zeros((2, 2), int), np.zeros((2, 2), int), classes)  # type: ignore[arg-type]


def test_scattered_segment_ids_are_to_be_renumbered() -> None:
    maps = np.zeros((2, 2), int)
    with pytest.raises(UserError, match=r"predictions hold ids up to 1000000000000; .* renumber them from 0"):
        segmentation_score(maps + 10**12, maps, 2, match="image")
    with pytest.raises(UserError, match=r"a map of shape \(0, 0\)"):
        segmentation_score(np.zeros((0, 0), int), np.zeros((0, 0), int), 2)


def test_dataset_matching_is_one_assignment_of_the_sums() -> None:
    """Segment 0 is class 0 in the larger image; alone the second image would have it as class 1."""
    labels, found = [np.zeros((4, 4), int), np.array([[1, 1]])], [np.zeros((4, 4), int), np.array([[0, 0]])]
    assert segmentation_score(found, labels, 2, match="dataset").accuracy == pytest.approx(16 / 18)
    assert segmentation_score(found, labels, 2, match="image").accuracy == 1.0


def test_map_quality_counts_the_argmax_of_every_set_of_maps() -> None:
    """Maps at the label's size. Raw, class 5 has the larger numbers everywhere; stretched, each finds its half."""
    label = np.array([[2, 2, 5, 5], [2, 2, 5, 0]], np.uint8)
    left = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0]])
    maps = torch.stack([left, 3 - left])
    raw, stretched = (map_quality(torch.stack([maps, maps.flip(0)]), label, [2, 5], 6, s) for s in ("none", "minmax"))
    assert raw.shape == (2, 6, 6) and raw[0].sum() == 7  # the pixel of class 0 has no map and is not counted
    assert raw[0][2, 5] == 4 and raw[0][5, 5] == 3 and stretched[0][2, 2] == 4 and stretched[0][5, 5] == 3
    assert mean_iou(raw).tolist() == pytest.approx([3 / 14, 4 / 14]) and mean_iou(stretched).tolist() == [1.0, 0.0]
    with pytest.raises(UserError, match="stretch"):
        map_quality(maps, label, [2, 5], 6, "max")


def test_area_under_the_curve_by_hand() -> None:
    inside = np.array([True, False, False, True])
    values = np.array([[3.0, 1, 2, 4], [0, 1, 2, 3], [1, 1, 1, 1]])
    assert area_under_curve(values, inside).tolist() == [1.0, 0.5, 0.5]
    assert np.isnan(area_under_curve(values, np.zeros(4, bool))).all()


@pytest.mark.parametrize("match", ["upstream", "image"])
@pytest.mark.parametrize("seed", range(4))
def test_counts_on_disk_are_matched_as_the_maps_are(match: str, seed: int) -> None:
    """Sparse rows keep how many segments there were, also where the last lies on ignored pixels only."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, (6, 9))
    label[0] = 255
    found = rng.integers(0, 6, (6, 9))
    found[0, 0] = 8
    rows = _Rows(0, 4)
    rows.add(("unsupervised", "diffcut", "none", "", "", "", "segments"), histogram(label, found, 4))
    part = pd.DataFrame(rows.columns())
    counts = ImageCounts.from_table(matched(part, 4, match), 4)
    want = segmentation_score(found, label, 4, match=match).counts
    assert part["found"].max() == 8 and part["pixels"].sum() == (label != 255).sum()
    for name in ("hit", "truth", "found"):
        assert np.array_equal(getattr(counts, name), getattr(want, name)), name


def test_a_class_255_is_counted_where_there_are_as_many() -> None:
    """The id that says "unknown" in label maps of a byte; among 300 classes it was left out in silence."""
    label, found = np.array([[255, 254, 0]]), np.array([[255, 255, 0]])
    score = segmentation_score(found, label, 300)
    assert score.accuracy == pytest.approx(2 / 3) and score.iou[255] == 0.5
    assert segmentation_score(found, label, 300, ignore=255).accuracy == 0.5
    assert segmentation_score(np.array([[1, 0]]), np.array([[255, 0]]), 2).accuracy == 1.0
