"""The only reader of label maps: class ids per pixel, from palette or grey pictures of 8, 16 or 32 bits.

    ids = read_label_map("labels/a.png")                      # int64 [H, W]
    read = mapped(Path("labels/a.png"), {1: 0, 2: 1}, 2)      # a function: values -> class ids, others IGNORE

Not here: pictures (`picture`), masks that overlap (`masks`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from mmdit_probe.data.picture import opened, stored
from mmdit_probe.errors import UserError

IGNORE = 255
"""Truth pixels with this id are not counted."""

Ids = NDArray[np.int64]
IdMapping = dict[int, int] | Callable[[Ids], Ids]
"""A class id, or `IGNORE`, of every value that a label may hold; of `IGNORE` itself without an entry."""


def read_label_map(path: Path | str, colours: bool = False) -> Ids:
    """The values of a label picture, int64 [height, width], upright as its picture is.

    Args:
        colours: ids are R + 256 G + 65536 B, as COCO's panoptic PNGs have them.

    Raises:
        UserError: unreadable, lossy, several frames, or a colour picture where ids are expected (or the reverse).
    """
    with opened(path, "label map") as image:
        if image.format in ("JPEG", "MPO", "JPEG2000") or image.info.get("compression") == "jpeg":  # in a TIFF
            raise UserError(f"label {str(path)!r} is a JPEG, which changes ids; expected a PNG")
        if getattr(image, "n_frames", 1) > 1:
            raise UserError(f"label {str(path)!r} holds several frames; expected one")
        inverted, step, _ = stored(image)
        array = np.asarray(ImageOps.exif_transpose(image))
        array = (~array if inverted else array) // step  # ids are what the file holds
    if colours:
        if array.ndim != 3 or array.dtype != np.uint8:
            raise UserError(f"label {str(path)!r} has shape {array.shape}; expected ids in three colour channels")
        return np.asarray(array[..., :3].astype(np.int64) @ np.array([1, 256, 256**2]))
    if array.ndim != 2:
        raise UserError(f"label {str(path)!r} is a colour picture {array.shape}; expected class ids in one channel")
    if array.dtype.kind not in "bui":
        raise UserError(f"label {str(path)!r} holds {array.dtype} values; expected class ids in whole numbers")
    return array.astype(np.int64)


def mapped(path: Path, table: IdMapping, classes: int) -> Callable[[], Ids]:
    """A function that reads a label map and maps its values to class ids.

    Raises (when called):
        UserError: a value that the table does not have, or an id that is neither a class nor IGNORE.
    """

    def read() -> Ids:
        raw = read_label_map(path)
        if callable(table):
            ids, most = table(raw), classes - 1
            bad = np.unique(ids[((ids < 0) | (ids >= classes)) & (ids != IGNORE)])
        else:
            known, most = {IGNORE: IGNORE, **table}, max(table)
            values, place = np.unique(raw, return_inverse=True)
            bad = values[[value not in known for value in values.tolist()]]
            ids = np.array([known.get(value, IGNORE) for value in values.tolist()], np.int64)[place].reshape(raw.shape)
        if len(bad):
            raise UserError(f"label {str(path)!r} holds ids {bad[:5].tolist()}; expected 0..{most} or {IGNORE}")
        return ids

    return read


def region_ids(regions: Any, *sizes: tuple[int, int]) -> NDArray[np.int64]:
    """A region map [H, W] of whole ids from 0, an array or tensor of one of these sizes.

    Raises:
        UserError: another size, other numbers.
    """
    ids = np.asarray(regions)
    if ids.shape not in sizes or ids.dtype.kind not in "iu" or (ids.size and ids.min() < 0):
        sides = " or ".join(f"{height} x {width}" for height, width in dict.fromkeys(sizes))
        raise UserError(f"regions {ids.dtype} {ids.shape}: expected whole ids from 0 (0: no region), {sides}")
    return ids.astype(np.int64)
