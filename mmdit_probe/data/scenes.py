"""The embedded world as samples, as a labelled data set (exact to the pixel, nothing ignored) and as training data.

scenes("val", 24)[0].label()                                     # Dataset of 15 classes
data = ScenesData("train", 1000, masks="class", prompt="list")
data[0].names, data[0].masks.shape                               # (("house", "grass"), (2, 64, 64))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.masks import largest, stack
from mmdit_probe.data.sample import Dataset, Sample
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.scenes import CLASSES, SPLITS, WORLD_VERSION, describe, scene, split_of_world
from mmdit_probe.scenes.captions import PLURALS

DEFAULT_COUNT = 200

_scene = lru_cache(maxsize=256)(scene)
"""Scenes that were drawn last: the picture, the labels and the caption of one are asked for one by one."""


def scenes(split: str, limit: int | None = None) -> Dataset:
    """The first `limit` scenes of a split (default 200).

    Raises:
        UserError: unknown split.
    """
    count = DEFAULT_COUNT if limit is None else limit
    samples = [scene_sample(split, index) for index in range(count)]
    return Dataset(f"scenes:{split}", [SegClass((name,)) for name in CLASSES], samples)


def scene_sample(split: str, index: int) -> Sample:
    """One scene with its caption and class map.

    Raises:
        UserError: unknown split.
    """
    check_known("split", split, SPLITS)
    return Sample(
        f"scenes:{split}:{index}", lambda: _scene(split, index).image, lambda: describe(_scene(split, index)),
        names=CLASSES, label=lambda: _scene(split, index).classes.astype(np.int64),
        content=(f"scenes {WORLD_VERSION}",),
    )  # fmt: skip


@dataclass(frozen=True)
class ScenesData:
    """The embedded world as training data.

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
        check_known("masks", self.masks, ("class", "part"))
        check_known("prompt", self.prompt, ("list", "caption", "mixed"))
        if self.count < 1:
            raise UserError(f"{self.count} scenes leave nothing to train on; expected 1 or more")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return _drawn(self.split, range(self.first, self.first + self.count)[index], self.masks, self.prompt)

    def describe(self) -> dict[str, Any]:
        return {"data": f"scenes:{split_of_world(self.split)}", "first": self.first, "count": self.count,
                "masks": self.masks, "prompt": self.prompt}  # fmt: skip


@lru_cache(maxsize=4096)
def _drawn(split: str, index: int, masks: str, prompt: str) -> Sample:
    item = scene(split, index)
    listed = prompt == "list" or (prompt == "mixed" and index % 2 == 0)
    text = describe(item, "list") if listed else describe(item)
    name = f"scenes:{split}:{index}"
    if masks == "part":
        pieces = item.instances.astype(np.int64) * 256 + item.parts
        return Sample(name, item.image, text, largest([pieces == piece for piece in np.unique(pieces)]))
    words = text.split()
    names, found = [], []
    for class_name in item.class_names:
        word = class_name if class_name in words else PLURALS.get(class_name, class_name)
        if word in words:
            names.append(word)
            found.append(item.classes == CLASSES.index(class_name))
    return Sample(name, item.image, text, stack(found, item.classes.shape), names)
