"""Scores and matching on counts that can be done by hand, and the defects of released evaluators by name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mmdit_probe.errors import UserError
from mmdit_probe.evaluate import confusion, mean_iou
from mmdit_probe.evaluate.scores import ImageCounts, assign, histogram, matched_by_rows


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


def test_interval_holds_the_score_and_shrinks_with_images(random_counts: list[np.ndarray]) -> None:
    few, many = (ImageCounts.from_table(table(random_counts * times), 4) for times in (1, 9))
    (low, high), (low9, high9) = few.interval("miou"), many.interval("miou")
    assert low < few.score("miou") < high and high9 - low9 < 0.6 * (high - low)
    difference, d_low, d_high = few.gain(few)
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
    with pytest.raises(UserError):
        assign(counts, background=5)
    with pytest.raises(UserError):
        assign(counts, "hungarian")


def test_the_row_wise_defect() -> None:
    """Three bands and one segment: 100 % with an assignment per pixel row, 33 % with one per image."""
    truth = np.repeat(np.arange(3), 6).reshape(3, 6)
    found = np.zeros_like(truth)
    per_row = matched_by_rows(truth, found, 3)
    assert np.trace(per_row[:, :3]) == truth.size
    ids = assign(histogram(truth, found, 3))
    right = confusion(truth, ids[found], 3)
    assert np.trace(right) * 3 == truth.size


def test_ignored_pixels_do_not_count() -> None:
    truth = np.array([[0, 255, 1, 255]])
    assert histogram(truth, np.array([[0, 1, 1, 0]]), 2).sum() == 2
