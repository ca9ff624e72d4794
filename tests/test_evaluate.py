"""Confusion matrices against counts made by hand."""

import numpy as np
import pytest

from mmdit_probe.evaluate import accuracy, confusion, ious, mean_iou


def test_scores_of_a_known_map():
    truth = np.array([[0, 0, 1], [1, 2, 255]])
    found = np.array([[0, 1, 1], [1, 0, 2]])
    matrix = confusion(truth, found, 4)
    assert matrix.sum() == 5
    assert np.allclose(ious(matrix)[:3], [1 / 3, 2 / 3, 0]) and np.isnan(ious(matrix)[3])
    assert mean_iou(matrix) == pytest.approx(1 / 3)
    assert accuracy(matrix) == pytest.approx(3 / 5)


def test_matrices_add_up_over_images():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, (2, 8, 16, 16))
    parts = sum(confusion(t, f, 5) for t, f in zip(truth, found, strict=True))
    assert np.array_equal(parts, confusion(truth, found, 5))
    several = confusion(truth[0], found, 5)  # many predictions of one label
    assert np.array_equal(several, np.stack([confusion(truth[0], f, 5) for f in found]))


def test_bad_maps_are_refused():
    with pytest.raises(ValueError, match="shape"):
        confusion(np.zeros((2, 2), int), np.zeros((3, 3), int), 2)
    with pytest.raises(ValueError, match=r"prediction holds ids 0..7, expected 0..2"):
        confusion(np.zeros(2, int), np.array([0, 7]), 3)
    assert np.isnan(mean_iou(np.zeros((2, 2), np.int64)))
