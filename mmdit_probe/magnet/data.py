"""What a MAGNET training reads: pictures with a prompt, masks, and the words that the masks belong to.

    data = ScenesData("train", 1000, masks="class", prompt="list")
    data[0].names, data[0].masks.shape          # (["house", "grass"], (2, 64, 64))
    data = FolderData("pictures", size=(1024, 1024))

A folder holds pictures with `<name>.txt` captions beside them. Masks are optional: `masks/<name>.png` with one integer
per pixel (0: unlabelled), and `masks/classes.json` {"1": "cat", ...}; without names the masks are for head-level
alignment. Errors name the file, and come before the training starts (`check`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import UserError, unknown

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


class Data(Protocol):
    """A sequence of samples; `describe` is what run.json records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ScenesData:
    """The embedded world.

    Attributes:
        split, count: the first scenes of a split. first: index of the first one.
        masks: "class" for masks of the classes (named), "part" for masks of every object's parts (unnamed, as SA-1B's).
        prompt: "list" for the bare class names, shuffled (the paper's choice for class masks), "caption" for a true
            caption, "mixed" for either, half each. Classes that the caption does not name have no mask.
    """

    split: str
    count: int
    masks: Literal["class", "part"] = "class"
    prompt: Literal["list", "caption", "mixed"] = "list"
    first: int = 0

    def __post_init__(self) -> None:
        if self.masks not in ("class", "part"):
            raise unknown("masks", self.masks, ("class", "part"))
        if self.prompt not in ("list", "caption", "mixed"):
            raise unknown("prompt", self.prompt, ("list", "caption", "mixed"))
        if self.count < 1:
            raise UserError(f"{self.count} scenes leave nothing to train on; expected 1 or more")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return _scene_sample(self.split, self.first + index, self.masks, self.prompt)

    def describe(self) -> dict[str, Any]:
        return {"data": f"scenes:{self.split}", "first": self.first, "count": self.count, "masks": self.masks,
                "prompt": self.prompt}  # fmt: skip


@lru_cache(maxsize=4096)
def _scene_sample(split: str, index: int, masks: str, prompt: str) -> Sample:
    from mmdit_probe.scenes import CLASSES, describe, scene
    from mmdit_probe.scenes.captions import PLURALS

    item = scene(split, index)
    listed = prompt == "list" or (prompt == "mixed" and index % 2 == 0)
    text = describe(item, "list") if listed else item.caption
    key = f"scenes:{split}:{index}"
    if masks == "part":
        pieces = item.instances.astype(np.int64) * 256 + item.parts
        return Sample(key, item.image, text, largest([pieces == piece for piece in np.unique(pieces)]))
    words = text.split()
    names, found = [], []
    for name in item.class_names:
        word = name if name in words else PLURALS.get(name, name)
        if word in words:
            names.append(word)
            found.append(item.classes == CLASSES.index(name))
    return Sample(key, item.image, text, _stack(found, item.classes.shape), tuple(names))


@dataclass(frozen=True)
class FolderData:
    """A folder of pictures with captions and, if there are any, masks (see the module's description).

    Attributes:
        folder: the folder. size: (height, width) in pixels that pictures are brought to.
        fit: "crop" cuts the centre to the aspect of `size`, "squash" does not keep the aspect.
        prompt: "caption", or "list" for the names of the masks joined by blanks.
        limit: use the first pictures only.
    """

    folder: Path
    size: tuple[int, int]
    fit: Literal["crop", "squash"] = "crop"
    prompt: Literal["caption", "list"] = "caption"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.fit not in ("crop", "squash"):
            raise unknown("fit", self.fit, ("crop", "squash"))
        if self.prompt not in ("caption", "list"):
            raise unknown("prompt", self.prompt, ("caption", "list"))
        if not self.files:
            raise UserError(f"no picture in {str(self.folder)!r}; expected pictures with captions in .txt files")

    @property
    def files(self) -> list[Path]:
        return _pictures(self.folder)[: self.limit]

    @property
    def names(self) -> dict[int, str]:
        """Name of each mask id; {} where the masks have none."""
        return _names(self.folder / "masks" / "classes.json")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        picture, labels = _read(file), _labels(self.folder / "masks" / f"{file.stem}.png")
        if labels is not None and labels.size != picture.size:
            raise UserError(f"{str(file)!r} is {picture.size} pixels, its mask {labels.size}; they must be equal")
        image = np.asarray(self._fit(picture, smooth=True))
        ids, masks = np.zeros(self.size, np.int64), []
        if labels is not None:
            ids = np.asarray(self._fit(labels, smooth=False)).astype(np.int64)
        present = [int(i) for i in np.unique(ids) if i != 0]
        missing = [i for i in present if self.names and i not in self.names]
        if missing:
            raise UserError(
                f"mask of {file.name!r} has ids {missing[:8]} that classes.json does not name; it names "
                f"{sorted(self.names)[:12]}"
            )
        masks = [ids == i for i in present]
        caption = file.with_suffix(".txt")
        text = " ".join(caption.read_text(encoding="utf-8").split()) if caption.is_file() else ""
        if not self.names:
            return Sample(file.name, image, text, largest(masks, self.size))
        if self.prompt == "list":
            text = " ".join(self.names[i] for i in present)
        named = [(self.names[i], mask) for i, mask in zip(present, masks, strict=True) if _says(text, self.names[i])]
        return Sample(file.name, image, text, _stack([m for _, m in named], self.size), tuple(n for n, _ in named))

    def describe(self) -> dict[str, Any]:
        listing = "\n".join(f"{p.name} {p.stat().st_size}" for p in self.files)
        return {"data": str(self.folder), "count": len(self), "fit": self.fit, "prompt": self.prompt,
                "size": list(self.size), "listing": hashlib.sha256(listing.encode()).hexdigest()[:16]}  # fmt: skip

    def _fit(self, picture: Any, smooth: bool) -> Any:
        from PIL import Image, ImageOps

        how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
        height, width = self.size
        if self.fit == "squash":
            return picture.resize((width, height), how)
        return ImageOps.fit(picture, (width, height), method=how)


def largest(masks: Sequence[NDArray[np.bool_]], size: tuple[int, int] = (0, 0)) -> NDArray[np.bool_]:
    """The masks of at least `MIN_AREA`, largest first, at most `MAX_MASKS`: boolean [K, H, W]."""
    kept = sorted((m for m in masks if m.mean() >= MIN_AREA), key=lambda m: -int(m.sum()))[:MAX_MASKS]
    return _stack(kept, masks[0].shape if len(masks) else size)


def check(data: Data, model: Any, alignment: str, probe_count: int = 32) -> None:
    """Refuse data that cannot train, before anything is loaded onto a device.

    Looks at `probe_count` samples spread over the data: pictures readable and of one size that the model takes, masks
    there, words found in the prompt and not cut off by the encoders.

    Args:
        model: an `MMDiT`. alignment: as in `MagnetConfig`.

    Raises:
        UserError: names the sample and what is wrong with it.
    """
    places = np.unique(np.linspace(0, len(data) - 1, min(len(data), probe_count)).astype(int))
    size: tuple[int, ...] | None = None
    with_masks = 0
    for place in places:
        sample = data[int(place)]
        size = size or sample.image.shape
        if sample.image.shape != size:
            raise UserError(f"{sample.key}: image of shape {sample.image.shape}, the first one has {size}")
        if any(side % model.size_multiple for side in size[:2]):
            raise UserError(f"{sample.key}: {size[0]} x {size[1]} pixels, expected multiples of {model.size_multiple}")
        if alignment == "none":
            continue
        if sample.masks.shape[1:] != size[:2]:
            raise UserError(f"{sample.key}: masks of shape {sample.masks.shape[1:]} for an image of {size[:2]}")
        if alignment == "token" and len(sample.names) != len(sample.masks):
            raise UserError(
                f"{sample.key}: {len(sample.masks)} masks and {len(sample.names)} names; token-level alignment needs"
                " named masks (masks/classes.json), or use head-level alignment"
            )
        if alignment == "token" and sample.names:
            table = model.token_tables(sample.prompt)[0]
            for name in sample.names:
                table.word_spans(name)
        with_masks += len(sample.masks) > 0
    if alignment != "none" and with_masks == 0:
        raise UserError(
            f"none of {len(places)} samples looked at has a mask that its prompt names; expected masks/<name>.png, with"
            " class names that occur in the captions (or prompt 'list')"
        )


def _stack(masks: Sequence[NDArray[np.bool_]], size: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.stack(masks) if len(masks) else np.zeros((0, *size), bool)


def _says(text: str, name: str) -> bool:
    padded = " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
    wanted = " ".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    return f" {wanted} " in f" {padded} "


@lru_cache(maxsize=8)
def _pictures(folder: Path) -> list[Path]:
    from mmdit_probe.data.images import SUFFIXES

    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}; expected pictures with captions, or scenes")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


@lru_cache(maxsize=8)
def _names(file: Path) -> dict[int, str]:
    if not file.is_file():
        return {}
    try:
        return {int(key): str(value) for key, value in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f'{str(file)!r} cannot be read: {error}; expected {{"1": "cat", ...}}') from error


def _read(file: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read as a picture; convert or remove it") from error


def _labels(file: Path) -> Any:
    from PIL import Image

    if not file.is_file():
        return None
    try:
        with Image.open(file) as picture:
            if picture.mode not in ("L", "P", "I", "I;16"):
                raise UserError(f"mask {str(file)!r} has mode {picture.mode}; expected one integer per pixel")
            return picture.copy() if picture.mode != "I;16" else picture.convert("I")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"mask {str(file)!r} cannot be read; convert or remove it") from error
