"""The MAGNET objective: flow matching + lambda_mask (lambda_focal focal + lambda_dice dice), arXiv:2509.18096.

    >>> import torch
    >>> plain = LossWeights(focal_alpha=-1.0, focal_gamma=0.0)                              # cross-entropy
    >>> float(focal(torch.tensor([6.0]), torch.tensor([0.0]), plain))
    6.0024...

Every term is a mean over samples of per-sample values, so that neither the split into micro-batches nor that over
processes changes it. Focal and dice take logits; `as_logits` brings maps after the softmax to that form.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.attention.gradients import Space
from mmdit_probe.errors import check_known
from mmdit_probe.magnet.config import LossWeights, Normalise
from mmdit_probe.segment.tail import minmax, resized

_EPS = 1e-4


def focal(logits: Tensor, targets: Tensor, weights: LossWeights) -> Tensor:
    """Focal loss per element (arXiv:1708.02002), of logits and targets in [0, 1] of one shape.

    With `weights.focal` "released" the defect of the published code (`prob = inputs` in its criterion and matcher): the
    focus is a power of the logit, not of its probability.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits if weights.focal == "released" else logits.sigmoid()
    missed = p * (1 - targets) + (1 - p) * targets
    loss = entropy * missed**weights.focal_gamma
    alpha = weights.focal_alpha
    return loss if alpha < 0 else loss * (alpha * targets + (1 - alpha) * (1 - targets))


def dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss per mask [...] of logits and targets [..., H, W], smoothed by one pixel."""
    p, t = logits.sigmoid().flatten(-2), targets.flatten(-2)
    return 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)


def flow_matching(velocity: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error to noise - latents, per sample [B]."""
    return (velocity.float() - (noise - latents).float()).square().flatten(1).mean(1)


def as_logits(maps: Tensor, space: Space, normalise: Normalise = "none") -> Tensor:
    """Maps [..., h, w] as logits.

    Args:
        maps: logits or probabilities, as `space` says.
        normalise: "minmax" stretches every map to [0, 1] over space (not over tokens) and reads it as a probability.
    """
    check_known("normalisation", normalise, ("none", "minmax"))
    if normalise == "minmax":
        maps = minmax(maps)
    elif space == "logit":
        return maps
    return torch.logit(maps, eps=_EPS)


def mask_loss(logits: Tensor, masks: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of one sample, each a mean over its K masks.

    Args:
        logits: [K, h, w], enlarged bilinearly to the size of the masks.
        masks: [K, H, W] boolean or in [0, 1].
    """
    targets = masks.to(logits.device, logits.dtype)
    large = resized(logits, (targets.shape[-2], targets.shape[-1]))
    return focal(large, targets, weights).mean(), dice(large, targets).mean()


@torch.no_grad()
def match_cost(logits: Tensor, masks: Tensor, weights: LossWeights) -> Tensor:
    """Cost [C, K] of pairing each of C maps with each of K masks, on the token grid.

    Args:
        logits: [C, h, w]. masks: [K, H, W]; a token's target is the share of its pixels inside the mask.
    """
    h, w = logits.shape[-2:]
    targets = F.adaptive_avg_pool2d(masks.to(logits.device, logits.dtype), (h, w)).flatten(1)
    flat = logits.flatten(1)
    ones = torch.ones_like(flat)
    as_positive = focal(flat, ones, weights)
    as_negative = focal(flat, 0 * ones, weights)
    of_focal = (as_positive @ targets.T + as_negative @ (1 - targets).T) / flat.shape[1]
    p = flat.sigmoid()
    of_dice = 1 - (2 * p @ targets.T + 1) / (p.sum(1)[:, None] + targets.sum(1)[None] + 1)
    return weights.match_focal * of_focal + weights.match_dice * of_dice


def match(logits: Tensor, masks: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """The cheapest pairing of maps and masks, one map per mask: indices of maps and of masks, equally long.

    Candidates are the maps of every layer, head and text token, so there are more of them than masks.
    """
    from scipy.optimize import linear_sum_assignment

    cost = match_cost(logits.detach(), masks, weights).cpu().double().numpy()
    rows, columns = linear_sum_assignment(np.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6))
    return torch.as_tensor(rows, device=logits.device), torch.as_tensor(columns, device=masks.device)
