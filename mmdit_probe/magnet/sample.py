"""One training picture, and the few masks of it that are used.

Sample("a.png", image, "a cat", masks, ("cat",))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_MASKS = 32
MIN_AREA = 0.005
"""Head-level alignment: at most so many masks, each of at least this share of the picture, largest first."""


@dataclass(frozen=True)
class Sample:
    """One training picture.

    Attributes:
        key: what error messages call it.
        image: uint8 [H, W, 3]. prompt: its text.
        masks: boolean [K, H, W].
        names: the K words or phrases of the prompt that the masks belong to; empty for masks without names.
    """

    key: str
    image: NDArray[np.uint8]
    prompt: str
    masks: NDArray[np.bool_]
    names: tuple[str, ...] = ()


def largest(masks: Sequence[NDArray[np.bool_]], size: tuple[int, int] = (0, 0)) -> NDArray[np.bool_]:
    """The masks of at least `MIN_AREA`, largest first, at most `MAX_MASKS`: boolean [K, H, W]."""
    kept = sorted((m for m in masks if m.mean() >= MIN_AREA), key=lambda m: -int(m.sum()))[:MAX_MASKS]
    return stack(kept, masks[0].shape if len(masks) else size)


def stack(masks: Sequence[NDArray[np.bool_]], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Masks as one array [K, H, W], also if there are none."""
    return np.stack(masks) if len(masks) else np.zeros((0, *size), bool)
