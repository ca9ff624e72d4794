"""One picture with what is known of it, and a data set of them.

    sample = Sample("a.png", image, "a cat", masks, ("cat",))            # arrays, or functions that read them
    sample.open((64, 64)), sample.label(), sample.names                  # PIL RGB; ids [H, W] or None; ("cat",)
    dataset("voc20:VOCdevkit/VOC2012")[0].label()

Nothing is opened before it is used, so that a folder of thousands costs nothing at the start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.fit import Fit
from mmdit_probe.data.labels import IGNORE, Ids
from mmdit_probe.data.masks import Masks, Regions, fitted, paint, stack
from mmdit_probe.data.picture import Picture, open_picture
from mmdit_probe.data.text import regular

WHOLE, BLOCKS, BLOCK = 2**18, 4, 2**16
"""Bytes of a file that a fingerprint reads: `BLOCKS` of `BLOCK` over a large one that is compressed, else all."""
_COMPRESSED = (".png", ".jpg", ".jpeg", ".webp", ".gif")
"""Pictures in which no change stays in its place."""


class Sample:
    """One picture.

    Args:
        name: what tables and messages call it.
        image: uint8 [H, W, 3], what else `open_picture` takes, or a function that opens one (or a `Picture`).
        prompt: its text, or a function that reads it; empty where none is known.
        masks: boolean [K, H, W] of the K `names` (none for masks without names), or a function -> `Regions`.
        names: the words or phrases that masks belong to; with `label` the class names of its ids.
        label: function -> class ids [H, W], `IGNORE` where nothing is known.
        content: what a fingerprint reads: files, or texts that say what is drawn. notes: so far; `open` adds to them.
    """

    def __init__(
        self, name: str, image: NDArray[Any] | Image | Callable[[], Any],
        prompt: str | Callable[[], str] = "",
        masks: Masks | Callable[[], Regions] | None = None, names: Sequence[str] = (), *,
        label: Callable[[], Ids] | None = None, content: Iterable[Path | str] = (),
        notes: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.name = name
        self.notes = list(notes)
        self._image, self._prompt, self._masks, self._names, self._label = image, prompt, masks, tuple(names), label
        self._content = tuple(content)

    def __repr__(self) -> str:
        return f"Sample({self.name!r})"

    @property
    def prompt(self) -> str:
        """The picture's text; empty where none is known."""
        return self._prompt() if callable(self._prompt) else self._prompt

    @property
    def is_file(self) -> bool:
        """Whether the picture is read from a file, and not drawn or held in memory."""
        return any(isinstance(part, Path) for part in self._content)

    def open(self, size: tuple[int, int] | None = None, fit: str = "crop") -> Image:
        """The picture, RGB; of `size` (height, width) in pixels if given. What the opener decided goes to `notes`.

        Raises:
            UserError: it cannot be read.
        """
        found = self._image() if callable(self._image) else self._image
        picture = found if isinstance(found, Picture) else open_picture(found)
        self.notes.extend(note for note in picture.notes if note not in self.notes)
        if size is None:
            return picture.image
        return Fit.of((picture.image.height, picture.image.width), size, how=fit).apply(picture.image, smooth=True)

    @property
    def image(self) -> NDArray[np.uint8]:
        """The picture, uint8 [H, W, 3], opened where it is anything else."""
        held = self._image
        if isinstance(held, np.ndarray) and held.dtype == np.uint8 and held.ndim == 3 and held.shape[2] == 3:
            return held
        return np.asarray(self.open())

    def label(self, shown_at: tuple[int, int] | None = None) -> Ids | None:
        """Class ids [H, W] that index `names`, or None where nothing is known; overlapping masks: the smallest.

        Args:
            shown_at: size of `open`; then the part that the picture shows there, in the picture's own pixels.

        Raises:
            UserError: it cannot be read, or with `shown_at`: it has another aspect than the picture.
        """
        if self._label is None and self._masks is None:
            return None
        ids = paint(self.regions().masks) if self._label is None else self._label()
        if shown_at is None:
            return ids
        picture = self.open()
        ids = fitted(ids, (picture.height, picture.width), f"the label of {self.name!r}")
        top, left, bottom, right = Fit.of((picture.height, picture.width), shown_at, how="crop").shown
        return ids[top:bottom, left:right]

    def regions(self, size: tuple[int, int] | None = None) -> Regions:
        """Masks of what is in the picture, with their names: those of the masks, or of the ids that the label holds.

        Args:
            size: (height, width) of the picture, where it is known: one without truth is not opened for it.
        """
        if callable(self._masks):
            return self._masks()
        if self._masks is not None:
            return Regions(np.asarray(self._masks, bool), self._names)  # 0 and 1 would be taken for places
        label = self.label()
        if label is None:
            return Regions(np.zeros((0, *(size or self.image.shape[:2])), bool))
        ids = [int(i) for i in np.unique(label) if i != IGNORE]
        return Regions(stack([label == i for i in ids], label.shape), tuple(self._names[i] for i in ids))

    @property
    def masks(self) -> Masks:
        """`regions().masks`, boolean [K, H, W]."""
        return self.regions().masks

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the ids of `label`; of the masks where there is no label."""
        return self.regions().names if self._label is None and callable(self._masks) else self._names

    def fingerprint(self) -> str:
        """16 hex digits that change with the picture, its truth and its prompt, from a few blocks of each file.

        Raises:
            UserError: a file is gone.
        """
        digest = hashlib.sha256(f"{self.name}\0{self.prompt}\0".encode("utf-8", "surrogatepass"))
        for part in self._content:
            digest.update(_file(part) if isinstance(part, Path) else part.encode())
        if not self._content:
            digest.update(self.image.tobytes())
            digest.update(np.packbits(self.masks).tobytes() if self._label is None else self._label().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Dataset(Sequence[Sample]):
    """A labelled data set: a sequence of samples whose labels hold ids of `classes`.

    Attributes:
        name: as on the command line. classes: C of them, in the order of their ids.
        samples: the images. background: id of the class that is not named in prompts but found by a rule; None: none.
        note: what a reader should know, such as images without labels that were left out.
        agnostic: ids are masks without names that mean nothing in another image (SA-1B): only methods without names
            can be scored, and scores are means over masks.
        ignore: ids that stand in prompts but are not scored (COCO-Object's background in the paper's Table 1).
        facts: what else a record of the run should say of it.
    """

    name: str
    classes: list[SegClass]
    samples: list[Sample]
    background: int | None = None
    note: str = ""
    agnostic: bool = False
    ignore: tuple[int, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        return self.samples[index]

    def first(self, limit: int | None) -> Dataset:
        """The first `limit` samples."""
        return self if limit is None else replace(self, samples=self.samples[:limit])

    def fingerprint(self) -> str:
        """See `fingerprint`."""
        return fingerprint(self.samples)


def fingerprint(samples: Iterable[Sample]) -> str:
    """16 hex digits that change when a picture, prompt or label among the samples is another, or their order is."""
    parts = "\n".join(sample.fingerprint() for sample in samples)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _file(path: Path) -> bytes:
    facts = regular(path, "a picture, a label map or annotations").stat()
    return _digest(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> bytes:
    """Of a file as it was then: many samples share an annotation file."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        if size <= WHOLE or path.suffix.lower() not in _COMPRESSED:
            digest.update(stream.read())
        else:
            for k in range(BLOCKS):
                stream.seek((size - BLOCK) * k // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.digest()
