"""Masks that may overlap: COCO's run-length form, which of many are kept, and the label map that they paint.

    mask = decode_rle({"size": [480, 640], "counts": [...]})       # boolean [480, 640]
    paint(largest([mask, other]))                                  # int64 [480, 640], smaller ones on top

Only run-length masks and arrays; polygons are filled in `coco`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.data.fit import Fit
from mmdit_probe.data.labels import IGNORE
from mmdit_probe.data.picture import BOMB
from mmdit_probe.errors import UserError

MAX_MASKS = 32
MIN_AREA = 0.005
"""Head-level alignment: at most so many masks, each of at least this share of the picture, largest first."""

Masks = NDArray[np.bool_]


class Regions(NamedTuple):
    """Masks, boolean [K, H, W], and their K names; no names where they have none (SA-1B)."""

    masks: Masks
    names: tuple[str, ...] = ()


def decode_rle(rle: Mapping[str, Any]) -> Masks:
    """A COCO run-length mask, boolean [H, W].

    Runs alternate between 0 and 1, start with 0 and go down the columns. They are a list of counts, or the string form:
    per count little-endian groups of 5 bits, bit 5 says that another group follows, characters start at "0", the last
    group's top bit is the sign, and from the fourth count on a value is the difference to the one two before.

    Raises:
        ValueError: it is not such a mask, or its runs do not fill its size.
    """
    height, width = check_size(rle["size"])
    counts = rle["counts"]
    runs = np.asarray(_runs(counts) if isinstance(counts, str | bytes) else counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"runs of {int(runs.sum())} pixels do not fill {height} x {width}")
    values = np.zeros(len(runs), bool)
    values[1::2] = True
    return np.repeat(values, runs).reshape(width, height).T


def check_size(size: Sequence[Any]) -> tuple[int, int]:
    """(height, width) that an annotation tells.

    Raises:
        ValueError: no pixels, or more than any picture may have.
    """
    height, width = (int(side) for side in size)
    if min(height, width) < 1 or height * width > BOMB:
        raise ValueError(f"{height} x {width} is no size of a picture")
    return height, width


def _runs(text: str | bytes) -> list[int]:
    data = text.encode("ascii") if isinstance(text, str) else text
    runs: list[int] = []
    value, shift = 0, 0
    for character in data:
        group = character - 48
        if not 0 <= group < 64:
            raise ValueError(f"character {chr(character)!r} is not of a run-length string")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError("the run-length string ends inside a count")
    return runs


def largest(
    masks: Sequence[Masks], size: tuple[int, ...] = (0, 0), *, limit: int = MAX_MASKS, min_area: float = MIN_AREA
) -> Masks:
    """The masks of at least `min_area` (share of the picture), largest first, at most `limit`: boolean [K, H, W]."""
    kept = sorted((m for m in masks if m.any() and m.mean() >= min_area), key=lambda m: -int(m.sum()))[:limit]
    return stack(kept, masks[0].shape if len(masks) else size)


def in_order(masks: Sequence[Masks]) -> list[Masks]:
    """Masks in an order of their own, whatever the file's: two of equal area stay apart."""
    return sorted(masks, key=lambda mask: np.packbits(mask).tobytes(), reverse=True)


def stack(masks: Sequence[Masks], size: tuple[int, ...]) -> Masks:
    """Masks as one array [K, H, W], also if there are none."""
    return np.stack(masks) if len(masks) else np.zeros((0, *size), bool)


def paint(masks: Masks, ids: Sequence[int] | None = None, bare: int = IGNORE) -> NDArray[np.int64]:
    """A label map [H, W] of masks [K, H, W]: `ids` (default 0..K-1), smaller masks on top, `bare` where none is."""
    labels = np.full(masks.shape[1:], bare, np.int64)
    for k in sorted(range(len(masks)), key=lambda k: -int(masks[k].sum())):
        labels[masks[k]] = k if ids is None else ids[k]
    return labels


def fitted(masks: NDArray[Any], size: tuple[int, int], name: str) -> NDArray[Any]:
    """Masks or a label map [..., H, W] at the size (height, width) of their picture's file, which may be stored smaller
    or larger.

    Raises:
        UserError: the aspects differ: they are not of one picture.
    """
    shape = masks.shape[-2:]
    if shape == size:
        return masks
    if abs(shape[0] * size[1] / (shape[1] * size[0]) - 1.0) > 0.02:
        raise UserError(
            f"{name} holds masks of {shape[0]} x {shape[1]} pixels, the picture has {size[0]} x {size[1]}: "
            "they are not of one picture"
        )
    return Fit.of((shape[0], shape[1]), size).masks(masks)
