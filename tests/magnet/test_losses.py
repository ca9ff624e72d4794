"""The objective: against torch, against hand-computed values, and the published defect as a control."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mmdit_probe.errors import UserError
from mmdit_probe.magnet.config import LossWeights
from mmdit_probe.magnet.losses import as_logits, dice, flow_matching, focal, mask_loss, match, match_cost


def test_focal_without_focus_is_cross_entropy() -> None:
    logits, targets = torch.randn(3, 5), (torch.rand(3, 5) > 0.5).float()
    found = focal(logits, targets, LossWeights(focal_alpha=-1.0, focal_gamma=0.0))
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, targets, reduction="none"))


def test_focal_against_its_formula() -> None:
    logit, p = torch.tensor([1.5, -0.5]), torch.sigmoid(torch.tensor([1.5, -0.5])).double()
    found = focal(logit, torch.tensor([1.0, 0.0]), LossWeights()).double()
    expected = torch.stack([-0.25 * (1 - p[0]) ** 2 * p[0].log(), -0.75 * p[1] ** 2 * (1 - p[1]).log()])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_wrong_pixel_does_not_cost_the_square_of_its_logit() -> None:
    """The published code took logits for probabilities: 6.0 * 6 ** 2 = 216 for logit 6 on a negative pixel."""
    logit, target = torch.tensor([6.0]), torch.tensor([0.0])
    found = float(focal(logit, target, LossWeights(focal_alpha=-1.0)))
    assert found == pytest.approx(6.0, abs=0.05)
    broken = float(focal(logit, target, LossWeights(focal_alpha=-1.0, focal="released")))
    assert broken == pytest.approx(float(F.binary_cross_entropy_with_logits(logit, target) * logit**2))
    assert broken == pytest.approx(216, abs=1)
    # and on a positive one, where p_t is the logit itself
    of_one = float(focal(logit, 1 - target, LossWeights(focal_alpha=-1.0, focal="released")))
    assert of_one == pytest.approx(float(F.binary_cross_entropy_with_logits(logit, 1 - target)) * 25)


def test_dice_of_right_wrong_and_half() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    sure = 60 * (2 * mask - 1)
    assert float(dice(sure, mask)) == pytest.approx(0, abs=1e-6)
    assert float(dice(-sure, mask)) > 0.98
    assert float(dice(torch.zeros_like(mask), mask)) == pytest.approx(1 - 33 / 65, abs=1e-6)


def test_flow_matching_is_zero_at_the_velocity() -> None:
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert flow_matching(noise - latents, latents, noise).tolist() == [0, 0]
    assert flow_matching(noise - latents + torch.tensor([1.0, 2.0])[:, None, None, None], latents, noise).tolist() == (
        pytest.approx([1, 4])
    )


def test_maps_before_and_after_the_softmax_come_to_one_form() -> None:
    maps = torch.rand(2, 3, 4, 4)
    assert torch.equal(as_logits(maps, "logit"), maps)
    torch.testing.assert_close(as_logits(maps, "probability").sigmoid(), maps.clamp(1e-4, 1 - 1e-4))
    stretched = as_logits(maps, "probability", "minmax").sigmoid()
    torch.testing.assert_close(stretched.amax((-2, -1)), torch.full((2, 3), 1 - 1e-4))
    torch.testing.assert_close(as_logits(3 * maps + 1, "logit", "minmax").sigmoid(), stretched)
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        as_logits(maps, "logit", "minmx")  # type: ignore[arg-type]


def test_mask_loss_enlarges_maps_to_the_masks() -> None:
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, :8], masks[1, 8:] = True, True
    right = torch.where(F.adaptive_avg_pool2d(masks.float(), 4) > 0.5, 40.0, -40.0)
    good = sum(mask_loss(right, masks, LossWeights()))
    bad = sum(mask_loss(right.flip(0), masks, LossWeights()))
    assert float(good) < 0.1 < 1 < float(bad)


def test_matching_finds_the_maps_of_the_masks_among_many() -> None:
    masks = torch.zeros(3, 8, 8)
    masks[0, :4], masks[1, 4:, :4], masks[2, 4:, 4:] = 1, 1, 1
    candidates = torch.randn(20, 8, 8)
    candidates[[17, 4, 9]] = 8 * (masks - 0.5)
    maps, of = match(candidates, masks, LossWeights())
    assert {int(m): int(k) for m, k in zip(maps, of, strict=True)} == {17: 0, 4: 1, 9: 2}


@pytest.mark.parametrize("form", ["paper", "released"])
def test_match_cost_is_the_loss_of_each_pair(form: Any) -> None:
    weights = LossWeights(match_focal=0.7, match_dice=0.4, focal=form)
    logits, masks = torch.randn(4, 6, 6), (torch.rand(3, 6, 6) > 0.5).float()
    cost = match_cost(logits, masks, weights)
    for c in range(4):
        for k in range(3):
            expected = 0.7 * focal(logits[c], masks[k], weights).mean() + 0.4 * dice(logits[c], masks[k])
            torch.testing.assert_close(cost[c, k], expected)
