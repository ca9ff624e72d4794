"""How a picture of any size lies in another size, and how scores over it come back to its pixels.

    fit = Fit.of((480, 640), (1024, 1024), multiple=16, how="letterbox")
    fit.apply(picture)                   # PIL image of fit.size, for the network
    fit.masks(masks)                     # boolean [K, 480, 640] -> [K, 1024, 1024]
    fit.back(scores)                     # [C, h, w] on the token grid -> [C, 480, 640]

"squash" stretches the whole picture to the size (Seg4Diff's code), "letterbox" keeps the aspect and fills up with the
picture's mean colour, "crop" takes the largest centred part of the size's aspect (the paper's text), "aspect" changes
the token grid instead: as many tokens as the model's own, in the picture's aspect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pil
from PIL.Image import Image

from mmdit_probe.errors import UserError, check_known

if TYPE_CHECKING:
    from torch import Tensor

HOW = ("squash", "letterbox", "crop", "aspect")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Fit:
    """The geometry. All boxes are (top, left, bottom, right) in pixels.

    Attributes:
        picture: (height, width) of the picture. size: (height, width) of the result.
        source: the part of the picture that is shown. target: where it lies in the result, whole pixels.
        how: one of `HOW`.
    """

    picture: tuple[int, int]
    size: tuple[int, int]
    source: Box
    target: tuple[int, int, int, int]
    how: str = "squash"

    @classmethod
    def of(
        cls, picture: tuple[int, int], size: tuple[int, int], multiple: int | None = None, how: str = "squash",
        most: int | None = None,
    ) -> Fit:  # fmt: skip
        """The fit of a picture of this size.

        Args:
            picture, size: (height, width) in pixels; "aspect" keeps the area of `size` alone.
            multiple: side of one token in pixels, where scores are to come back: a crop then falls on whole pixels.
            how: one of `HOW`.
            most: tokens along a side that the network has positions for; "aspect" stays within them.

        Raises:
            UserError: unknown `how`, a picture without pixels, an input size that is no whole number of tokens, or one
                that the network has no positions for.
        """
        check_known("fit", how, HOW)
        if min(picture) < 1:
            raise UserError(f"picture of {picture[0]} x {picture[1]} pixels: expected at least one")
        if multiple is not None:
            check_size(size, multiple, most)
        (height, width), (rows, columns) = picture, size
        source: Box = (0, 0, height, width)
        target = (0, 0, rows, columns)
        if how == "aspect":
            size = _aspect(picture, size, multiple or 1, most)
            target = (0, 0, *size)
        if how == "letterbox":
            target = _centred(size, picture)
        if how == "crop":
            source = _centre(picture, size) if multiple is None else _centred(picture, size)
        return cls(picture, size, source, target, how)

    def apply(self, image: Image | NDArray[np.uint8], smooth: bool = False) -> Image:
        """The picture in its new size, RGB.

        Args:
            image: PIL image or uint8 [height, width, 3] of size `picture`.
            smooth: Lanczos as training and probing pictures are resized, instead of bicubic as official code of
                segmentation does.
        """
        whole = pil.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
        up, across, down, over = self.target
        top, left, bottom, right = self.source
        if all(float(edge).is_integer() for edge in self.source) and not smooth:
            whole = whole.crop((int(left), int(top), int(right), int(bottom)))
            top, left, bottom, right = 0, 0, whole.height, whole.width
        method = pil.Resampling.LANCZOS if smooth else pil.Resampling.BICUBIC
        part = whole.resize((over - across, down - up), method, box=(left, top, right, bottom))
        if (down - up, over - across) == self.size:
            return part
        mean = tuple(int(v) for v in np.asarray(part).reshape(-1, 3).mean(0))
        canvas = pil.new("RGB", (self.size[1], self.size[0]), mean)
        canvas.paste(part, (across, up))
        return canvas

    def masks(self, masks: NDArray[Any]) -> NDArray[Any]:
        """Masks or label maps [..., height, width] brought to `size` as `apply` brings their picture: nearest pixels.

        Letterbox bars repeat the edge: they show nothing, so no result there means anything.
        """
        rows, columns = (
            (start + (np.arange(side) + 0.5 - first) * (stop - start) / (last - first)).astype(int).clip(0, whole - 1)
            for start, stop, first, last, side, whole in zip(
                self.source[:2], self.source[2:], self.target[:2], self.target[2:], self.size, self.picture, strict=True
            )
        )
        return np.ascontiguousarray(masks[..., rows, :][..., columns])

    def at(self, size: tuple[int, int]) -> Fit:
        """The fit of the same part of the picture to another size (height, width).

        Raises:
            UserError: the picture does not fill the result ("letterbox").
        """
        if self.target != (0, 0, *self.size):
            raise UserError(f"{self.how} leaves bars around the picture, so it has no other size; take squash or crop")
        return replace(self, size=size, target=(0, 0, *size))

    def back(self, scores: Tensor) -> Tensor:
        """Scores [C, h, w] over the result, bilinear, at the picture's pixels: [C, height, width]; 0 where `unseen`."""
        import torch
        from torch.nn import functional as F

        inner = scores.float()
        if self.target != (0, 0, *self.size):
            top, left, bottom, right = self.target
            inner = F.interpolate(inner[None], self.size, mode="bilinear", align_corners=False)[0]
            inner = inner[:, top:bottom, left:right]
        top, left, bottom, right = self.shown
        inner = F.interpolate(inner[None], (bottom - top, right - left), mode="bilinear", align_corners=False)[0]
        if self.shown == (0, 0, *self.picture):
            return inner
        out = torch.zeros(len(scores), *self.picture)
        out[:, top:bottom, left:right] = inner
        return out

    @property
    def unseen(self) -> NDArray[np.bool_]:
        """Pixels of the picture that the network was not shown, [height, width]."""
        top, left, bottom, right = self.shown
        mask = np.ones(self.picture, bool)
        mask[top:bottom, left:right] = False
        return mask

    @property
    def shown(self) -> tuple[int, int, int, int]:
        """`source` in whole pixels."""
        top, left, bottom, right = (round(edge) for edge in self.source)
        return top, left, bottom, right


def check_size(size: tuple[int, int], multiple: int, most: int | None) -> None:
    """Hold an input size (height, width) in pixels to whole tokens, and to those that the network has positions for.

    Raises:
        UserError: it is another.
    """
    rows, columns = size
    if rows % multiple or columns % multiple or min(size) < multiple:
        raise UserError(f"input size {rows} x {columns}: both sides must be multiples of {multiple}")
    if most is not None and max(size) > most * multiple:
        raise UserError(f"input size {rows} x {columns}: this model has positions for {most * multiple} pixels a side")


def _aspect(picture: tuple[int, int], size: tuple[int, int], multiple: int, most: int | None) -> tuple[int, int]:
    """As many pixels as `size`, in the picture's aspect, both sides multiples of a token's."""
    ratio, side = (picture[0] / picture[1]) ** 0.5, (size[0] * size[1]) ** 0.5
    rows, columns = (max(1, round(length / multiple)) for length in (side * ratio, side / ratio))
    return min(rows, most or rows) * multiple, min(columns, most or columns) * multiple


def _centred(outer: tuple[int, int], aspect: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centred part of a size that has an aspect, on whole pixels."""
    scale = min(outer[0] / aspect[0], outer[1] / aspect[1])
    height, width = (max(1, round(side * scale)) for side in aspect)
    top, left = (outer[0] - height) // 2, (outer[1] - width) // 2
    return top, left, top + height, left + width


def _centre(picture: tuple[int, int], size: tuple[int, int]) -> Box:
    """The same part of a picture, exactly: as `PIL.ImageOps.fit`."""
    (height, width), (rows, columns) = picture, size
    wanted, has = columns / rows, width / height
    part_h, part_w = float(height), float(width)
    if has > wanted:
        part_w = wanted * height
    elif has < wanted:
        part_h = width / wanted
    upper, start = (height - part_h) * 0.5, (width - part_w) * 0.5
    return upper, start, upper + part_h, start + part_w
