"""What an evaluation reads of a data set: classes, and per image a picture and a label map.

    @reader("mine")                     # mmdit-probe evaluate --dataset mine:ROOT
    def mine(root: Path) -> SegDataset: ...

Label maps hold 0..C-1, and `IGNORE` (255) where a pixel is not scored. Pictures and labels are opened when used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.evaluate.scores import IGNORE
from mmdit_probe.segment.vocabulary import SegClass


@dataclass(frozen=True)
class Sample:
    """One picture with its truth: uint8 [height, width, 3] and class ids [height, width]."""

    name: str
    image: Callable[[], NDArray[np.uint8]]
    labels: Callable[[], NDArray[np.int64]]


@dataclass(frozen=True)
class SegDataset:
    """A data set.

    Attributes:
        name: as on the command line. classes: C of them, in the order of their ids.
        samples: the images. background: id of the class that is not named in prompts but found by a rule; None: none.
        note: what a reader should know, such as images without labels that were left out.
        agnostic: ids are masks without names that mean nothing in another image (SA-1B): only methods without names
            can be scored, and scores are means over masks.
    """

    name: str
    classes: list[SegClass]
    samples: list[Sample]
    background: int | None = None
    note: str = ""
    agnostic: bool = False

    def first(self, limit: int | None) -> SegDataset:
        """The first `limit` samples."""
        return self if limit is None else replace(self, samples=self.samples[:limit])


Reader = Callable[[Path], SegDataset]
READERS: dict[str, Reader] = {}
"""Readers of data sets on disk, by name."""


def reader(name: str) -> Callable[[Reader], Reader]:
    """Register a reader under a name."""

    def keep(function: Reader) -> Reader:
        READERS[name] = function
        return function

    return keep


def load_dataset(text: str, limit: int | None = None) -> SegDataset:
    """The data set that `scenes:val` or `NAME:ROOT` means.

    Raises:
        UserError: unknown name, a folder that is not there or not of this layout, or no images.
    """
    from mmdit_probe.evaluate.datasets import folder, readers, sa1b, scenes  # noqa: F401  (they register themselves)

    name, _, rest = text.partition(":")
    if name == "scenes":
        return scenes.scenes(rest or "val", limit)
    if name not in READERS:
        raise unknown("dataset", name, ("scenes", *READERS))
    if not rest:
        raise UserError(f"dataset {name!r} needs its folder: --dataset {name}:ROOT")
    root = Path(rest)
    if not root.is_dir():
        raise UserError(f"no folder {rest!r}; expected the root of {name}")
    found = READERS[name](root).first(limit)
    if not found.samples:
        raise UserError(f"{rest!r} holds no labelled images in the layout of {name}; see datasets check {name} {rest}")
    return found


def read_ids(path: Path) -> NDArray[np.int64]:
    """The values of a label PNG [height, width]: palette indices or grey values, 8 or 16 bits.

    Raises:
        UserError: unreadable, or a colour picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            array = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"label {str(path)!r} cannot be read; it may be damaged") from error
    if array.ndim != 2:
        raise UserError(f"label {str(path)!r} is a colour picture {array.shape}; expected class ids in one channel")
    return array.astype(np.int64)


def mapped(path: Path, table: dict[int, int] | Callable[[NDArray[np.int64]], NDArray[np.int64]], classes: int) -> Any:
    """A function that reads a label PNG and maps its values to class ids; values not in a table become IGNORE.

    Raises (when called):
        UserError: an id that is neither a class nor IGNORE.
    """

    def read() -> NDArray[np.int64]:
        raw = read_ids(path)
        if callable(table):
            ids = table(raw)
        else:
            ids = np.full(raw.shape, IGNORE, np.int64)
            for value, target in table.items():
                ids[raw == value] = target
        bad = np.unique(ids[((ids < 0) | (ids >= classes)) & (ids != IGNORE)])
        if len(bad):
            raise UserError(f"label {str(path)!r} holds ids {bad[:5].tolist()}; expected 0..{classes - 1} or {IGNORE}")
        return ids

    return read
