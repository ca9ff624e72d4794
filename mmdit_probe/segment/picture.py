"""How a picture of any size lies in the network's input, and how token scores come back to its pixels.

    fit = Fit.of((480, 640), model_size=(1024, 1024), multiple=16, how="letterbox")
    fit.apply(picture)                   # PIL image of fit.size, for the network
    fit.back(scores)                     # [C, h, w] on the token grid -> [C, 480, 640]

"squash" stretches the whole picture to the model's size (Seg4Diff's code), "letterbox" keeps the aspect and fills up
with the picture's mean colour, "crop" takes the largest centred part of the model's aspect (the paper's text) and
leaves the rest unlabelled, "aspect" changes the token grid instead: as many tokens as the model's own, in the
picture's aspect.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as pil
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.errors import UserError, unknown

HOW = ("squash", "letterbox", "crop", "aspect")


@dataclass(frozen=True)
class Fit:
    """The geometry. All boxes are (top, left, bottom, right) in pixels.

    Attributes:
        picture: (height, width) of the picture. size: (height, width) of the network's input.
        source: the part of the picture that is shown. target: where it lies in the input.
    """

    picture: tuple[int, int]
    size: tuple[int, int]
    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]
    how: str = "squash"

    @classmethod
    def of(
        cls, picture: tuple[int, int], model_size: tuple[int, int], multiple: int, how: str = "squash",
        most: int | None = None,
    ) -> Fit:  # fmt: skip
        """The fit of a picture of this size.

        Args:
            picture: (height, width) in pixels. model_size: (height, width) of the network's input.
            multiple: side of one token in pixels. how: one of `HOW`.
            most: tokens along a side that the network has positions for; "aspect" stays within them.

        Raises:
            UserError: unknown `how`, a picture without pixels, an input size that is no whole number of tokens, or one
                that the network has no positions for.
        """
        if how not in HOW:
            raise unknown("fit", how, HOW)
        height, width = picture
        rows, columns = model_size
        if min(picture) < 1:
            raise UserError(f"picture of {height} x {width} pixels: expected at least one")
        if rows % multiple or columns % multiple or min(model_size) < multiple:
            raise UserError(f"input size {rows} x {columns}: both sides must be multiples of {multiple}")
        if most is not None and max(model_size) > most * multiple:
            raise UserError(
                f"input size {rows} x {columns}: this model has positions for {most * multiple} pixels a side"
            )
        whole, source = (0, 0, height, width), (0, 0, height, width)
        if how == "aspect":
            ratio = (height / width) ** 0.5
            area = (rows * columns) ** 0.5
            rows = max(1, round(area * ratio / multiple)) * multiple
            columns = max(1, round(area / ratio / multiple)) * multiple
            if most is not None:
                rows, columns = min(rows, most * multiple), min(columns, most * multiple)
        target = (0, 0, rows, columns)
        if how == "letterbox":
            scale = min(rows / height, columns / width)
            inner_h, inner_w = max(1, round(height * scale)), max(1, round(width * scale))
            top, left = (rows - inner_h) // 2, (columns - inner_w) // 2
            target = (top, left, top + inner_h, left + inner_w)
        if how == "crop":
            scale = min(height / rows, width / columns)
            inner_h, inner_w = max(1, round(rows * scale)), max(1, round(columns * scale))
            top, left = (height - inner_h) // 2, (width - inner_w) // 2
            source = (top, left, top + inner_h, left + inner_w)
        return cls(picture, (rows, columns), source if how == "crop" else whole, target, how)

    def apply(self, image: NDArray[np.uint8]) -> pil.Image:
        """The network's input, RGB, from the picture uint8 [height, width, 3]."""
        top, left, bottom, right = self.source
        part = pil.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
        up, across, down, over = self.target
        if part.size != (over - across, down - up):
            part = part.resize((over - across, down - up), pil.Resampling.BICUBIC)
        if (down - up, over - across) == self.size:
            return part
        mean = tuple(int(v) for v in np.asarray(part).reshape(-1, 3).mean(0))
        canvas = pil.new("RGB", (self.size[1], self.size[0]), mean)
        canvas.paste(part, (across, up))
        return canvas

    def back(self, scores: Tensor, fill: float = 0.0) -> Tensor:
        """Scores [C, h, w] over the input, bilinear, at the picture's pixels: [C, height, width] float32.

        Pixels outside `source` (how="crop") get `fill`; see `unseen`.
        """
        full_size, inner = self.target == (0, 0, *self.size), scores.float()
        if not full_size:
            top, left, bottom, right = self.target
            inner = F.interpolate(inner[None], self.size, mode="bilinear", align_corners=False)[0]
            inner = inner[:, top:bottom, left:right]
        top, left, bottom, right = self.source
        inner = F.interpolate(inner[None], (bottom - top, right - left), mode="bilinear", align_corners=False)[0]
        if self.source == (0, 0, *self.picture):
            return inner
        out = torch.full((len(scores), *self.picture), fill)
        out[:, top:bottom, left:right] = inner
        return out

    @property
    def unseen(self) -> NDArray[np.bool_]:
        """Pixels of the picture that the network was not shown, [height, width]."""
        top, left, bottom, right = self.source
        mask = np.ones(self.picture, bool)
        mask[top:bottom, left:right] = False
        return mask


def read_picture(path: object) -> NDArray[np.uint8]:
    """A picture file as uint8 [height, width, 3], turned upright by its EXIF tag.

    Raises:
        UserError: not there, or not a picture.
    """
    from PIL import ImageOps

    try:
        with pil.open(str(path)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"no picture {str(path)!r}; expected a picture file, or scenes:val:0") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a picture; convert it to PNG or JPEG") from error
