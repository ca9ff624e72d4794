"""What a MAGNET training reads: pictures with a prompt, masks, and the words that the masks belong to.

    data = ScenesData("train", 1000, masks="class", prompt="list")
    data[0].names, data[0].masks.shape          # (["house", "grass"], (2, 64, 64))
    data = FolderData("pictures", size=(1024, 1024))

A folder holds pictures with `<name>.txt` captions beside them. Masks are optional: `masks/<name>.png` with one integer
per pixel (0: unlabelled), and `masks/classes.json` {"1": "cat", ...}; without names the masks are for head-level
alignment. Errors name the file, and come before the training starts (`check`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.magnet.pictures import PictureData
from mmdit_probe.magnet.sample import Sample, largest, stack


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
    return Sample(key, item.image, text, stack(found, item.classes.shape), tuple(names))


@dataclass(frozen=True)
class FolderData(PictureData):
    """A folder of pictures with captions and, if there are any, masks (see the module's description)."""

    @property
    def named(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> dict[int, str]:
        """Name of each mask id; {} where the masks have none."""
        return _names(self.root / "masks" / "classes.json")

    def keys(self) -> list[str]:
        return [path.name for path in _pictures(self.root)[: self.limit]]

    def file(self, index: int) -> Path:
        return _pictures(self.root)[index]

    def caption(self, index: int) -> str:
        beside = self.file(index).with_suffix(".txt")
        return " ".join(beside.read_text(encoding="utf-8").split()) if beside.is_file() else ""

    def truth(self, index: int, size: tuple[int, int]) -> tuple[NDArray[np.bool_], list[str]]:
        file = self.file(index)
        ids = _labels(self.root / "masks" / f"{file.stem}.png")
        if ids is None:
            return np.zeros((0, *size), bool), []
        if ids.shape != size:
            raise UserError(
                f"{str(file)!r} is {size[1]} x {size[0]} pixels, its mask {ids.shape[1]} x {ids.shape[0]};"
                " they must be equal"
            )
        present = [int(i) for i in np.unique(ids) if i != 0]
        missing = [i for i in present if self.names and i not in self.names]
        if missing:
            raise UserError(
                f"mask of {file.name!r} has ids {missing[:8]} that classes.json does not name; it names "
                f"{sorted(self.names)[:12]}"
            )
        return stack([ids == i for i in present], size), [self.names[i] for i in present if self.names]


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


@lru_cache(maxsize=8)
def _pictures(folder: Path) -> list[Path]:
    from mmdit_probe.data.images import SUFFIXES

    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}; expected pictures with captions, or scenes")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"no picture in {str(folder)!r}; expected pictures with captions in .txt files")
    return found


@lru_cache(maxsize=8)
def _names(file: Path) -> dict[int, str]:
    if not file.is_file():
        return {}
    try:
        return {int(key): str(value) for key, value in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f'{str(file)!r} cannot be read: {error}; expected {{"1": "cat", ...}}') from error


def _labels(file: Path) -> NDArray[np.int64] | None:
    """The integers of a mask file [H, W], or None where there is none."""
    from PIL import Image

    if not file.is_file():
        return None
    try:
        with Image.open(file) as picture:
            if picture.mode not in ("L", "P", "I", "I;16"):
                raise UserError(f"mask {str(file)!r} has mode {picture.mode}; expected one integer per pixel")
            return np.asarray(picture if picture.mode != "I;16" else picture.convert("I")).astype(np.int64)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"mask {str(file)!r} cannot be read; convert or remove it") from error
