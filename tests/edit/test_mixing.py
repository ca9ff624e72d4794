"""Blur matrices against convolutions and by their invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from mmdit_probe.edit.edits import BORDERS, blur_matrix, spread, taps
from mmdit_probe.errors import UserError

SCIPY = {"reflect": "mirror", "symmetric": "reflect", "replicate": "nearest"}


def test_taps_of_the_paper() -> None:
    assert np.round(taps(9, 5).numpy(), 4).tolist() == [0.1975, 0.2012, 0.2025, 0.2012, 0.1975]
    assert taps(0, 5).tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 24])
def test_matrix_is_the_convolution(border, length: int) -> None:
    weights, values = taps(1.3, 5), np.random.default_rng(0).normal(size=length)
    expected = ndimage.correlate1d(values, weights.numpy(), mode=SCIPY[border])
    np.testing.assert_allclose(blur_matrix(length, weights, border).numpy() @ values, expected, atol=1e-12)


def test_only_the_symmetric_border_conserves_each_tokens_mass() -> None:
    weights = taps(9, 5)
    columns = {border: blur_matrix(24, weights, border).sum(0) for border in BORDERS}
    assert torch.allclose(columns["symmetric"], torch.ones(24).double())
    assert columns["reflect"][:3].tolist() == pytest.approx([0.601, 1.201, 1.198], abs=1e-3)


def test_spread_leaves_other_positions_alone() -> None:
    full = spread(torch.full((2, 2), 0.5), torch.tensor([1, 3]), 4)
    assert full.tolist() == [[1, 0, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 1, 0], [0, 0.5, 0, 0.5]]


@pytest.mark.parametrize(("sigma", "kernel"), [(-1, 5), (9, 4), (9, 0), (float("nan"), 3)])
def test_bad_settings_are_refused(sigma: float, kernel: int) -> None:
    with pytest.raises(UserError):
        taps(sigma, kernel)
