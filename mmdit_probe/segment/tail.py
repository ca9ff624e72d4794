"""The tail that all methods share, so that differences between them come from the method.

    scores [C, h, w] -> bilinear to the picture -> optional refinement -> background rule -> argmax

Scores are upsampled, never labels. Background rules, by name: "none" (every pixel gets a class), "threshold:T" (pixels
whose best score is below T), "power:A" (a background score (1 - max)^A competes, as in iSeg), "probability:T" (pixels
whose best score, as the method gives it, is below T: for methods that give probabilities), "class:NAME" (one class of
the vocabulary is the background). "threshold" and "power" read scores that were scaled to 0..1 per class over the
picture, because methods differ in scale.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.errors import UserError, check_known
from mmdit_probe.segment.settings import Background

ROUNDING = 1e-6
"""Share of a map's largest value below which differences are those of float32 sums, not of the map."""


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [C, h, w] at another size, bilinear; as they are where they have it."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def above_least(maps: Tensor) -> Tensor:
    """Each map [..., h, w] less its least value; 0 everywhere where its values differ by rounding alone."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) * (high - low > ROUNDING * maps.abs().amax((-2, -1), keepdim=True))


def minmax(maps: Tensor) -> Tensor:
    """Scale each map [..., h, w] to 0..1 over space; a constant map becomes 0."""
    found = above_least(maps)
    return found / found.amax((-2, -1), keepdim=True).clamp(min=1e-30)


def centre(maps: Tensor) -> Tensor:
    """Divide each map [..., h, w] by its mean over space; probabilities only."""
    return maps / maps.mean((-2, -1), keepdim=True).clamp(min=1e-12)


STRETCHES: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda maps: maps, "minmax": minmax, "centre": centre}
"""What may be done to each map over space before maps compete, by name."""


def strongest(maps: Tensor) -> Tensor:
    """The first of the largest of maps [C, ...] at each place, [...]: argmax(0), which takes several times as long."""
    return maps.max(0).indices


def probabilities(scores: Tensor) -> Tensor:
    """Shares [C, h, w] over classes per pixel: each score's share of the sum."""
    positive = scores - scores.amin().clamp(max=0.0)
    return positive / positive.sum(0, keepdim=True).clamp(min=1e-12)


def label(scores: Tensor, background: Background | None = None, names: list[str] | None = None) -> NDArray[np.uint16]:
    """Labels [H, W] of scores [C, H, W]: class index 0..C-1, or C for the background.

    Args:
        background: rule; None keeps every pixel labelled. names: of the classes, for the rule "class".

    Raises:
        UserError: the rule names a class that is not among `names`.
    """
    rule = background or Background()
    best = strongest(scores)
    if rule.kind in ("threshold", "power"):
        top = minmax(scores).amax(0)
        away = top < rule.value if rule.kind == "threshold" else top < (1.0 - top) ** rule.value
        best = torch.where(away, len(scores), best)
    elif rule.kind == "probability":
        best = torch.where(scores.amax(0) < rule.value, len(scores), best)
    elif rule.kind == "class":
        known = names or []
        check_known("background class", rule.name, known)
        index = known.index(rule.name)
        best = torch.where(best == index, len(scores), best)
    if len(scores) >= np.iinfo(np.uint16).max:
        raise UserError(f"{len(scores)} classes are more than a label map holds")
    return best.numpy().astype(np.uint16)
