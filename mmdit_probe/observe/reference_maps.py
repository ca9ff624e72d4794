"""ReferenceMaps: which patches of a reference picture the image reads, and where in the image a patch is read.

    with probe(pipe, ReferenceMaps([(3, 4)]), layers=9) as run:             # what does this token of the image read?
        pipe(image=picture, prompt="make the ring blue")
    run[ReferenceMaps].map(0)                                               # [h, w] of the reference
    ReferenceMaps([(0, 0, 8, 8)], within="reference", reference=1)          # who reads this corner of the second one?

Columns of the exact attention probabilities of editing models, whose sequence holds clean latents of the pictures they
are given. Not here: words over a reference (`observe.maps.TextMaps`), masses by picture (`observe.mass`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention import exact
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.observe.maps import GridMaps
from mmdit_probe.observe.observer import LayerCall, PictureTokens

Region = tuple[int, int] | tuple[int, int, int, int] | np.ndarray | Tensor
"""A token (row, column); a box of tokens (top, left, bottom, right), the last two outside it; or a mask [h, w], of a
video also [frames, h, w]. The first two take every frame."""


class ReferenceMaps(GridMaps):
    """Observer of maps between the image and one reference picture.

    Args:
        regions: one map each; None is one region, all of the picture.
        within: whose regions. "image": maps over the reference, the mean over the region's queries of the probability
            on each of the reference's tokens; such a map's sum is the mass that the region gives to the reference.
            "reference": maps over the image, the probability of every image query on the region's keys, summed up.
        reference: its number, from 0.
        heads: "mean" averages over heads, "all" keeps them.
    """

    of = "region"

    def __init__(
        self,
        regions: Sequence[Region] | None = None,
        within: Literal["image", "reference"] = "image",
        reference: int = 0,
        heads: Literal["mean", "all"] = "mean",
    ) -> None:
        super().__init__(heads)
        check_known("picture", within, ("image", "reference"))
        self.regions, self.within, self.reference = regions, within, reference
        if regions is not None and len(regions) == 0:
            raise UserError("no regions are named; expected one or more, or None for all of the picture")

    @property
    def of_picture(self) -> bool:
        return self.within == "reference"

    def measure(self, seen: LayerCall) -> Tensor:
        image, reference = seen.picture(), seen.picture(self.reference)
        if self.within == "image":
            inside = self._masks(image)
            weights = {"query_weights": (inside / inside.sum(-1, keepdim=True))[None]}  # [1, G, I]
        else:
            weights = {"key_weights": self._masks(reference).T[None]}  # [1, R, G]
        maps = exact.reduce(
            seen.call, seen.logsumexp, reference.positions, image.positions, head_mean=self.heads == "mean", **weights
        )
        maps = maps.mT.unflatten(-2, reference.space) if self.within == "image" else maps.unflatten(-2, image.space)
        return maps if self.heads == "mean" else maps.cpu()

    def _masks(self, picture: PictureTokens) -> Tensor:
        """Which of the picture's tokens are in each region, float32 of 0 and 1 [regions, tokens]."""
        whole = torch.ones(picture.frames, *picture.grid)
        if self.regions is None:
            return whole.reshape(1, -1)
        return torch.stack([(whole * _mask(region, picture)).flatten() for region in self.regions])

    def _columns(self, which: Any, layer: int, step: int, sample: int, branch: str | None, length: int) -> list[int]:
        if not 0 <= which < length:
            raise UserError(f"no region {which!r}: there are {length}, from 0")
        return [which]


def _mask(region: Region, picture: PictureTokens) -> Tensor:
    """A region as a mask [h, w] or [frames, h, w] of 0 and 1."""
    h, w = picture.grid
    if isinstance(region, np.ndarray | Tensor):
        mask = torch.as_tensor(region).bool()
        if tuple(mask.shape) not in ((h, w), (picture.frames, h, w)) or not mask.any():
            raise UserError(f"a region of shape {tuple(mask.shape)}: expected a mask of {h} x {w} tokens, not empty")
        return mask.float()
    top, left, bottom, right = (*region, region[0] + 1, region[1] + 1) if len(region) == 2 else region
    if not (0 <= top < bottom <= h and 0 <= left < right <= w):
        raise UserError(
            f"region {region}: expected rows in 0..{h - 1} and columns in 0..{w - 1} of the picture's tokens"
        )
    mask = torch.zeros(h, w)
    mask[top:bottom, left:right] = 1.0
    return mask
