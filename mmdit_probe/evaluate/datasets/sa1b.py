"""SA-1B: pictures with masks that have no names, one JSON of run-length masks per picture.

    masks = sa1b_masks(Path("sa_000020/sa_223750.json"))        # boolean [K, H, W], largest first
    mmdit-probe evaluate --dataset sa1b:ROOT --method diffcut,diffseg
    mmdit-probe datasets check sa1b ROOT

Layouts, below the root or below any number of sub-folders: `sa_1.jpg` and `sa_1.json` side by side (as the archives
unpack), or `images/.../sa_1.jpg` and `annotations/.../sa_1.json` (as Seg4Diff's code expects). Masks overlap; for
evaluation they are painted from the largest to the smallest, so that parts lie on their wholes, and pixels of no mask
are not scored. Class k of a picture is its k-th largest mask: it means nothing in another picture, so scores are means
over masks (`SegDataset.agnostic`). Only run-length masks are read, the form of SA-1B.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import UserError
from mmdit_probe.evaluate.datasets.base import Sample, SegDataset, reader
from mmdit_probe.evaluate.scores import IGNORE
from mmdit_probe.segment.picture import read_picture
from mmdit_probe.segment.vocabulary import SegClass

MIN_AREA = 0.005
"""Masks below this share of the picture are left out, as in the paper's set-up."""
MAX_MASKS = 64
"""Masks per picture that are scored, the largest ones; head-level training takes fewer."""
SUFFIXES = (".jpg", ".jpeg", ".png")


def decode_rle(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """A COCO run-length mask, boolean [H, W].

    Runs alternate between 0 and 1, start with 0 and go down the columns. They are a list of counts, or the string form:
    per count little-endian groups of 5 bits, bit 5 says that another group follows, characters start at "0", the last
    group's top bit is the sign, and from the fourth count on a value is the difference to the one two before.

    Raises:
        ValueError: it is not such a mask, or its runs do not fill its size.
    """
    height, width = (int(side) for side in rle["size"])
    counts = rle["counts"]
    runs = np.asarray(_runs(counts) if isinstance(counts, str | bytes) else counts, np.int64)
    if height < 1 or width < 1 or runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"runs of {int(runs.sum())} pixels do not fill {height} x {width}")
    values = np.zeros(len(runs), bool)
    values[1::2] = True
    return np.repeat(values, runs).reshape(width, height).T


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


def sa1b_pairs(root: Path) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """(name, picture, JSON) of every annotated picture below a root, by name, and the names that lack one of the two.

    Raises:
        UserError: no JSON file is there.
    """
    split = (root / "images").is_dir() and (root / "annotations").is_dir()
    of_pictures, of_masks = (root / "images", root / "annotations") if split else (root, root)
    annotations = {str(p.relative_to(of_masks).with_suffix("")): p for p in of_masks.rglob("sa_*.json")}
    if not annotations:
        raise UserError(
            f"{str(root)!r} has no SA-1B annotations; expected sa_*.jpg and sa_*.json side by side, or in images/ and "
            "annotations/"
        )
    pictures = {
        str(p.relative_to(of_pictures).with_suffix("")): p
        for p in of_pictures.rglob("sa_*")
        if p.suffix.lower() in SUFFIXES
    }
    pairs = [(name, pictures[name], annotations[name]) for name in sorted(pictures.keys() & annotations.keys())]
    return pairs, sorted(pictures.keys() ^ annotations.keys())


def sa1b_masks(
    path: Path, *, limit: int = MAX_MASKS, min_area: float = MIN_AREA, size: tuple[int, int] | None = None
) -> NDArray[np.bool_]:
    """Masks of one JSON file, boolean [K, H, W], largest first.

    Args:
        path: the file. limit: at most so many. min_area: least share of the picture.
        size: (height, width) of the picture if it was stored smaller than its masks; masks are reduced to it (nearest).

    Raises:
        UserError: the file cannot be read or a mask in it is damaged; the message names it.
    """
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        masks = [decode_rle(one["segmentation"]) for one in annotations]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{str(path)!r} is no SA-1B annotation with run-length masks ({reason})") from error
    if len({mask.shape for mask in masks}) > 1:
        raise UserError(f"{str(path)!r} holds masks of different sizes")
    kept = [mask for mask in masks if mask.mean() >= min_area and mask.any()]
    kept.sort(key=lambda mask: -int(mask.sum()))
    shape = masks[0].shape if masks else (size or (1, 1))
    stacked = np.stack(kept[:limit]) if kept else np.zeros((0, *shape), bool)
    if size is not None and stacked.shape[1:] != size:
        if abs(shape[0] * size[1] / (shape[1] * size[0]) - 1.0) > 0.02:
            raise UserError(
                f"{str(path)!r} holds masks of {shape[0]} x {shape[1]} pixels, the picture has {size[0]} x {size[1]}: "
                "they are not of one picture"
            )
        rows = (np.arange(size[0]) + 0.5) * stacked.shape[1] / size[0]
        columns = (np.arange(size[1]) + 0.5) * stacked.shape[2] / size[1]
        stacked = stacked[:, rows.astype(int)][:, :, columns.astype(int)]
    return stacked


def paint(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """One label map [H, W] of masks [K, H, W] in order, later ones on top; pixels of none are not scored."""
    labels = np.full(masks.shape[1:], IGNORE, np.int64)
    for index, mask in enumerate(masks):
        labels[mask] = index
    return labels


@reader("sa1b")
def sa1b(root: Path) -> SegDataset:
    """See the module; pictures stored at half size, as advised for training, are read with masks reduced to them."""
    pairs, lost = sa1b_pairs(root)
    samples = [Sample(name, partial(read_picture, picture), _labels(picture, path)) for name, picture, path in pairs]
    note = f"{len(lost)} pictures lack their annotation or the other way round (first: {lost[0]})" if lost else ""
    classes = [SegClass((f"mask {rank}",)) for rank in range(1, MAX_MASKS + 1)]
    return SegDataset("sa1b", classes, samples, note=note, agnostic=True)


def _labels(picture: Path, annotation: Path) -> Callable[[], NDArray[np.int64]]:
    def read() -> NDArray[np.int64]:
        height, width = read_picture(picture).shape[:2]
        return paint(sa1b_masks(annotation, size=(height, width)))

    return read
