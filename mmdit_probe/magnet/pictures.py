"""What training data on disk have in common: pictures brought to one size with their masks, and a prompt.

A data set says what it holds (`PictureData`: keys, pictures, masks, captions); size, fit, prompt and captions made by a
model are the same for all. See `data.FolderData` and `readers`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.magnet.captions import first_sentences
from mmdit_probe.magnet.sample import Sample, largest, stack

MAX_NAMES = 20
"""Names in a prompt that lists them, those of the largest masks: more do not fit the encoders of CLIP."""


@dataclass(frozen=True)
class PictureData:
    """Pictures on disk with masks, named or not, and captions.

    Attributes:
        root: the folder. size: (height, width) in pixels that pictures are brought to.
        fit: "crop" cuts the centre to the aspect of `size`, "squash" does not keep the aspect.
        prompt: "caption", or "list" for the names of the masks joined by blanks.
        limit: use the first pictures only.
        captions: by key, in place of the data set's own. sentences: of a caption that are used; None: all.
    """

    root: Path
    size: tuple[int, int]
    fit: Literal["crop", "squash"] = "crop"
    prompt: Literal["caption", "list"] = "caption"
    limit: int | None = None
    captions: Mapping[str, str] = field(default_factory=dict)
    sentences: int | None = None

    def __post_init__(self) -> None:
        if self.fit not in ("crop", "squash"):
            raise unknown("fit", self.fit, ("crop", "squash"))
        if self.prompt not in ("caption", "list"):
            raise unknown("prompt", self.prompt, ("caption", "list"))
        if not self.keys():
            raise UserError(f"{str(self.root)!r} holds no picture to train on")

    def keys(self) -> Sequence[str]:
        """Names of the pictures in order, `limit` applied."""
        raise NotImplementedError

    def file(self, index: int) -> Path:
        """The picture's file."""
        raise NotImplementedError

    def truth(self, index: int, size: tuple[int, int]) -> tuple[NDArray[np.bool_], list[str]]:
        """Masks [K, H, W] of a picture of (H, W) pixels, and their K names, or none for masks without names."""
        raise NotImplementedError

    def caption(self, index: int) -> str:
        """The data set's own caption; empty if there is none."""
        raise NotImplementedError

    @property
    def named(self) -> bool:
        """Whether masks have names."""
        raise NotImplementedError

    def pictures(self) -> dict[str, Callable[[], Any]]:
        """Functions that open the PIL images, by key: what a captioning model is shown."""
        return {key: partial(read, self.file(index)) for index, key in enumerate(self.keys())}

    def __len__(self) -> int:
        return len(self.keys())

    def __getitem__(self, index: int) -> Sample:
        key, picture = self.keys()[index], read(self.file(index))
        raw, names = self.truth(index, (picture.height, picture.width))
        masks = fit_masks(raw, self.size, self.fit)
        image = np.asarray(fit_picture(picture, self.size, self.fit))
        text = first_sentences(self.captions.get(key) or self.caption(index), self.sentences)
        if not self.named:
            return Sample(key, image, text, largest(list(masks), self.size))
        there = sorted((k for k in range(len(names)) if masks[k].any()), key=lambda k: -int(masks[k].sum()))
        listed = sorted(there[:MAX_NAMES])
        if self.prompt == "list":
            text = " ".join(names[k] for k in listed)
        kept = [k for k in listed if says(text, names[k])]
        return Sample(key, image, text, stack([masks[k] for k in kept], self.size), tuple(names[k] for k in kept))

    def describe(self) -> dict[str, Any]:
        listing = "\n".join(f"{key} {self.file(index).stat().st_size}" for index, key in enumerate(self.keys()))
        texts = "\n".join(f"{key}\t{self.captions[key]}" for key in sorted(self.captions))
        return {"data": str(self.root), "count": len(self), "fit": self.fit, "prompt": self.prompt,
                "size": list(self.size), "listing": _short(listing), "captions": _short(texts) if texts else None,
                "sentences": self.sentences}  # fmt: skip


def read(file: Path) -> Any:
    """A picture as a PIL image, RGB.

    Raises:
        UserError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read as a picture; convert or remove it") from error


def fit_picture(picture: Any, size: tuple[int, int], fit: str) -> Any:
    """A PIL image brought to (height, width)."""
    from PIL import Image, ImageOps

    height, width = size
    if fit == "squash":
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    return ImageOps.fit(picture, (width, height), method=Image.Resampling.LANCZOS)


def fit_masks(masks: NDArray[np.bool_], size: tuple[int, int], fit: str) -> NDArray[np.bool_]:
    """Masks [K, H, W] brought to `size` as `fit_picture` brings their picture: the nearest pixel of the same part."""
    sides = np.array(masks.shape[1:], float)
    part = sides if fit == "squash" else np.array(size) * (sides / np.array(size)).min()
    rows, columns = (
        ((whole - of) / 2 + (np.arange(target) + 0.5) * of / target).astype(int).clip(0, int(whole) - 1)
        for whole, of, target in zip(sides, part, size, strict=True)
    )
    return np.ascontiguousarray(masks[:, rows][:, :, columns])


def says(text: str, name: str) -> bool:
    """Whether a text holds a name as whole words, in any case."""
    return f" {_words(name)} " in f" {_words(text)} "


def _words(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
