"""The tail that all methods share, so that differences between them come from the method.

    scores [C, h, w] -> bilinear to the picture -> optional refinement -> background rule -> argmax

Scores are upsampled, never labels. Background rules, by name: "none" (every pixel gets a class), "threshold:T" (pixels
whose best probability is below T), "power:A" (a background score (1 - max)^A competes, as in iSeg), "class:NAME" (one
class of the vocabulary is the background). "threshold" and "power" read scores that were scaled to 0..1 per class over
the picture, because methods differ in scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.errors import UserError, unknown

RULES = ("none", "threshold:T", "power:A", "class:NAME")


@dataclass(frozen=True)
class Background:
    """A parsed background rule."""

    kind: str = "none"
    value: float = 0.0
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Background:
        """From "none", "threshold:0.5", "power:2" or "class:sky".

        Raises:
            UserError: not one of these.
        """
        kind, _, rest = text.partition(":")
        if kind == "none" and not rest:
            return cls()
        if kind == "class" and rest.strip():
            return cls("class", name=rest.strip())
        if kind in ("threshold", "power"):
            try:
                value = float(rest)
            except ValueError:
                raise unknown("background rule", text, RULES) from None
            if kind == "threshold" and not 0.0 <= value <= 1.0:
                raise UserError(f"background rule {text!r}: the threshold is a share, expected 0 to 1")
            if kind == "power" and not 0.0 < value < float("inf"):
                raise UserError(f"background rule {text!r}: expected a power above 0, e.g. power:2")
            return cls(kind, value)
        raise unknown("background rule", text, RULES)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [C, h, w] at another size, bilinear; as they are where they have it."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def minmax(maps: Tensor) -> Tensor:
    """Scale each map [..., h, w] to 0..1 over space; a constant map becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def centre(maps: Tensor) -> Tensor:
    """Divide each map [..., h, w] by its mean over space; probabilities only."""
    return maps / maps.mean((-2, -1), keepdim=True).clamp(min=1e-12)


STRETCHES: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda maps: maps, "minmax": minmax, "centre": centre}
"""What may be done to each map over space before maps compete, by name."""


def probabilities(scores: Tensor, temperature: float | None = None) -> Tensor:
    """Shares [C, h, w] over classes per pixel: softmax with a temperature, else each score's share of the sum."""
    if temperature is not None:
        return (scores * temperature).softmax(0)
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
    best = scores.argmax(0)
    if rule.kind in ("threshold", "power"):
        top = minmax(scores).amax(0)
        away = top < rule.value if rule.kind == "threshold" else top < (1.0 - top) ** rule.value
        best = torch.where(away, len(scores), best)
    elif rule.kind == "class":
        known = names or []
        if rule.name not in known:
            raise unknown("background class", rule.name, known)
        index = known.index(rule.name)
        best = torch.where(best == index, len(scores), best)
    if len(scores) >= np.iinfo(np.uint16).max:
        raise UserError(f"{len(scores)} classes are more than a label map holds")
    return best.numpy().astype(np.uint16)
