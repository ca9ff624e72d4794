"""The one table of sources: what a user types for pictures, labelled data sets and training data.

    samples("scenes:val", 8)                    # also scenes:val:3, a picture file, a folder of pictures, NAME:ROOT
    dataset("voc20:VOCdevkit/VOC2012")          # labelled: scenes:SPLIT, a folder with classes.txt, NAME:ROOT
    training_data("coco-stuff:coco", size=(1024, 1024))

NAME is a key of `DATASETS`. Every command and MAGNET read through here. Texts: `prompt_sets`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mmdit_probe.data.coco import KINDS, coco
from mmdit_probe.data.folder import labelled, picture, pictures
from mmdit_probe.data.labels import IGNORE
from mmdit_probe.data.picture import SUFFIXES, check_picture, listed
from mmdit_probe.data.prompt_sets import DEFAULT_COUNT, check_limit
from mmdit_probe.data.public import SETS
from mmdit_probe.data.sa1b import sa1b
from mmdit_probe.data.sample import Dataset, Sample
from mmdit_probe.data.scenes import ScenesData, scene_sample, scenes
from mmdit_probe.data.training import Data, PictureData
from mmdit_probe.errors import UserError, check_known, unknown
from mmdit_probe.scenes import SPLITS

DATASETS: dict[str, Callable[[Path], Dataset]] = {
    **{one.name: one.read for one in SETS},
    **{f"coco-{kind}": partial(coco, kind=kind) for kind in KINDS},
    "sa1b": sa1b,
    "folder": labelled,
}
"""Readers by name. A reader of one's own is a line here: NAME -> function of the root."""
SCENES = tuple(f"scenes:{split}" for split in SPLITS)
NAMES = (*SCENES, *(f"{name}:" for name in DATASETS))
"""How the sources begin that have a name."""


def samples(source: str, limit: int | None = None) -> list[Sample]:
    """The pictures that `source` means, opened when they are used; that files can be opened is checked first.

    Args:
        source: a picture file, a folder of pictures (the caption of `cat.png` is the text of `cat.txt` beside it, if
            there is one), `scenes:val`, `scenes:val:3`, or `NAME:ROOT`.
        limit: keep the first `limit`; for scenes also how many to take (default 50).

    Raises:
        UserError: there is no such source, no picture in it, or a file that is no picture.
    """
    check_limit(limit)
    one = re.fullmatch(r"scenes:(\w+):(\d+)", source)
    if one:
        return [scene_sample(one[1], int(one[2]))]
    if source == "scenes" or source.startswith("scenes:"):
        split = source.removeprefix("scenes").removeprefix(":") or "val"
        if split not in SPLITS:
            raise unknown("picture set", source, [f"scenes:{name}" for name in SPLITS])
        return [scene_sample(split, index) for index in range(limit or DEFAULT_COUNT)]
    if _named(source):
        return dataset(source, limit).samples
    path = Path(source)
    if not os.path.isdir(path):
        if not os.path.exists(path) and path.suffix.lower() not in SUFFIXES:
            raise UserError(f"no folder {source!r}; expected a picture, a folder of pictures, or scenes:val")
        check_picture(path)
        return [picture(path)]
    if (path / "classes.txt").exists():
        return labelled(path).samples[:limit]
    for file in listed(path)[:limit]:
        check_picture(file)
    return pictures(path).samples[:limit]


def single(source: str) -> Sample:
    """The one picture that `source` means.

    Raises:
        UserError: as `samples`, or it means several.
    """
    many = source.startswith("scenes:") and source.count(":") < 2
    found = [] if many else samples(source)
    if len(found) != 1:
        raise UserError(f"{source!r} is no single picture; expected scenes:val:0, or a picture file")
    return found[0]


def dataset(spec: str, limit: int | None = None) -> Dataset:
    """The labelled data set that `scenes:val`, `NAME:ROOT` or a folder with classes.txt means.

    Raises:
        UserError: unknown name, a folder that is not there or not of this layout, no images, or more classes than a
            label map holds.
    """
    check_limit(limit)
    name, _, rest = spec.partition(":")
    if name == "scenes":
        return scenes(rest or "val", limit)
    if name not in DATASETS and os.path.isdir(spec):
        name, rest = "folder", spec
    found = _nonempty(_read(name, rest, None).first(limit), name, rest)
    if len(found.classes) > IGNORE:
        raise UserError(
            f"{spec!r} has {len(found.classes)} classes; labels hold at most {IGNORE}: {IGNORE} says unknown"
        )
    return found


def training_data(
    spec: str, *, size: tuple[int, int] | None = None, masks: str = "class", prompt: Any = None,
    limit: int | None = None, fit: Any = "crop", split: str | None = None, sentences: int | None = None,
) -> Data:  # fmt: skip
    """The training data that `scenes:train`, `NAME:ROOT` or a folder of pictures means.

    Args:
        spec: see `samples`. size: (height, width) in pixels that pictures on disk are brought to; None: their own.
        masks: of scenes, "class" or "part". prompt: "list", "caption", of scenes also "mixed"; None: the source's own.
        limit: the first pictures only (scenes: how many, default 1000). fit, sentences: see `PictureData`.
        split: of COCO.

    Raises:
        UserError: as `dataset`, or a prompt that is for scenes alone.
    """
    check_limit(limit)
    name, _, rest = spec.partition(":")
    if name == "scenes":
        return ScenesData(rest or "train", limit or 1000, masks, prompt or "list")  # type: ignore[arg-type]
    if prompt == "mixed":
        raise UserError("prompt 'mixed' is for scenes; pictures on disk have captions: use caption or list")
    if _named(spec):
        found = _nonempty(_read(name, rest, split).first(limit), name, rest)
    else:
        path = Path(spec)
        found = (labelled(path) if (path / "classes.txt").exists() else pictures(path)).first(limit)
    return PictureData(found, size, fit, prompt, sentences=sentences)


def same_pictures(first: str, second: str) -> bool:
    """Whether two sources are the same pictures, by their names: a split of scenes, or a folder on disk."""

    def place(source: str) -> str:
        name, _, rest = source.partition(":")
        if name == "scenes":
            return f"scenes:{rest or 'train'}"
        return os.path.realpath(rest if _named(source) else source)

    return place(first) == place(second)


def _named(source: str) -> bool:
    """Whether a text is NAME:ROOT rather than a path.

    Raises:
        UserError: it looks like one, and the name is unknown.
    """
    name, colon, _ = source.partition(":")
    if name in DATASETS and colon:
        return True
    if colon and re.fullmatch(r"[\w-]{2,}", name) and not os.path.exists(source):
        raise unknown("dataset", name, ("scenes", *DATASETS))
    return False


def _read(name: str, rest: str, split: str | None) -> Dataset:
    root = _root(name, rest)
    if split is not None and name.startswith("coco-") and name.removeprefix("coco-") in KINDS:
        return coco(root, name.removeprefix("coco-"), split)
    return DATASETS[name](root)


def _root(name: str, rest: str) -> Path:
    """The folder of NAME:ROOT."""
    check_known("dataset", name, DATASETS)
    if not rest:
        raise UserError(f"dataset {name!r} needs its folder: {name}:ROOT")
    if not os.path.isdir(rest):
        raise UserError(f"no folder {rest!r}; expected the root of {name}")
    return Path(rest)


def _nonempty(found: Dataset, name: str, rest: str) -> Dataset:
    if not found.samples:
        raise UserError(
            f"{rest!r} holds no labelled images in the layout of {name}: an image and its label are called alike, and"
            " lie where `mmdit-probe datasets list` says"
        )
    return found
