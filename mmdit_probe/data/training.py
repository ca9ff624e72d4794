"""What a training reads: samples brought to one size with their masks, a prompt, and the words that masks belong to.

    data = training_data("coco-stuff:coco", size=(1024, 1024))            # or any other source, see `sources`
    data[0].image.shape, data[0].masks.shape, data[0].names          # (1024, 1024, 3), (3, 1024, 1024), ("sky", ...)

Not here: what masks and captions a source has (`folder`, `coco`, `sa1b`, `scenes`), and whether a model can be trained
on them (`magnet.check`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from mmdit_probe.data.fit import Fit
from mmdit_probe.data.masks import fitted, largest, stack
from mmdit_probe.data.sample import Dataset, Sample
from mmdit_probe.data.words import find
from mmdit_probe.errors import UserError, check_known, unknown

MAX_NAMES = 20
"""Names in a prompt that lists them, those of the largest masks: more do not fit the encoders of CLIP."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


class Data(Protocol):
    """A sequence of samples with arrays; `describe` is what run.json records and a resumed run has to equal."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PictureData:
    """Pictures on disk with masks, named or not, and captions.

    Attributes:
        dataset: the pictures; a class that is their background has no mask and stands in no list.
        size: (height, width) in pixels that they are brought to; None: their own.
        fit: "crop" cuts the centre to the aspect of `size`, "squash" does not keep the aspect.
        prompt: "caption", or "list" for the names of the masks joined by blanks; None: what masks with names call for.
        captions: by name of the picture, in place of the data set's own. sentences: of a caption that are used; None:
            all.

    Raises:
        UserError: no picture, an unknown fit or prompt, or a list of names that the masks do not have.
    """

    dataset: Dataset
    size: tuple[int, int] | None = None
    fit: Literal["crop", "squash"] = "crop"
    prompt: Literal["caption", "list"] | None = None
    captions: Mapping[str, str] = field(default_factory=dict)
    sentences: int | None = None

    def __post_init__(self) -> None:
        check_known("fit", self.fit, ("crop", "squash"))
        if self.prompt not in (None, "caption", "list"):
            raise unknown("prompt", self.prompt, ("caption", "list"))
        if not self.dataset.samples:
            raise UserError(f"{self.dataset.name!r} holds no picture to train on")
        if self.listed and not self.named:
            raise UserError(f"masks of {self.dataset.name!r} have no names for prompts to list")

    @property
    def named(self) -> bool:
        """Whether masks have names."""
        return not self.dataset.agnostic

    def pictures(self) -> dict[str, Callable[[], Any]]:
        """Functions that open the PIL images, by name: what a captioning model is shown."""
        return {sample.name: sample.open for sample in self.dataset.samples}

    def __len__(self) -> int:
        return len(self.dataset.samples)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.dataset.samples[index]
        picture = sample.open()
        stored = (picture.height, picture.width)
        size = self.size or stored
        regions, fit = sample.regions(stored), Fit.of(stored, size, how=self.fit)
        masks, names = fit.masks(fitted(regions.masks, stored, f"the label of {sample.name!r}")), regions.names
        image = np.asarray(fit.apply(picture, smooth=True))
        text = first_sentences(self.captions.get(sample.name) or sample.prompt, self.sentences)
        if not self.named:
            return Sample(sample.name, image, text, largest(list(masks), size), notes=sample.notes)
        background = self.dataset.background
        hidden = None if background is None else self.dataset.classes[background].name
        there = [k for k, name in enumerate(names) if masks[k].any() and name != hidden]
        there.sort(key=lambda k: -int(masks[k].sum()))
        listed = sorted(there[:MAX_NAMES])
        if self.listed:
            text = " ".join(names[k] for k in listed)
        kept = [k for k in listed if find(names[k], text, beside=names)]
        chosen = stack([masks[k] for k in kept], size)
        return Sample(sample.name, image, text, chosen, [names[k] for k in kept], notes=sample.notes)

    @property
    def listed(self) -> bool:
        """Whether prompts list the names of the masks; else they are captions."""
        return self.named if self.prompt is None else self.prompt == "list"

    def describe(self) -> dict[str, Any]:
        texts = "\n".join(f"{name}\t{self.captions[name]}" for name in sorted(self.captions))
        captions = hashlib.sha256(texts.encode()).hexdigest()[:16] if texts else None
        return {"data": self.dataset.name, "count": len(self), "fit": self.fit,
                "prompt": "list" if self.listed else "caption", "size": list(self.size or ()),
                "content": self.dataset.fingerprint(), "captions": captions, "sentences": self.sentences,
                **self.dataset.facts}  # fmt: skip


def first_sentences(text: str, count: int | None) -> str:
    """The first sentences of a text, whole where it has fewer or no full stop; None: all of it."""
    return text if count is None else " ".join(_SENTENCE.split(text.strip())[:count])
