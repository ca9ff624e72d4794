"""What the options of a training name, read before weights are loaded: no torch here.

data, held_out = gather(MagnetOptions(layers=(4,), dataset="coco-stuff:coco", validation="coco-stuff:coco"))
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from mmdit_probe.data import Data, PictureData, training_data
from mmdit_probe.errors import UserError
from mmdit_probe.magnet.config import MagnetOptions
from mmdit_probe.options import changed


class Inputs(NamedTuple):
    """What a training reads: its data, and held-out pictures if there are any; of those on disk in their own size."""

    data: Data
    held_out: Data | None

    @property
    def notes(self) -> list[str]:
        """What the readers left out."""
        return [one.dataset.note for one in self if isinstance(one, PictureData) and one.dataset.note]


def gather(options: MagnetOptions) -> Inputs:
    """The inputs that the options name, read before a model is there.

    Raises:
        UserError: unknown data, data that cannot be read, or options that nothing would read.
    """
    data = training_data(
        options.dataset, prompt=options.prompt_kind, limit=options.limit, fit=options.fit, split=options.split,
        masks="part" if options.masks in ("part", "self-segments") else "class", sentences=options.sentences,
    )  # fmt: skip
    unread = changed(options, "captions", "sentences")
    if unread is not None and not isinstance(data, PictureData):
        raise UserError(f"scenes have captions of their own; {unread} is for pictures on disk")
    if unread is not None and isinstance(data, PictureData) and data.listed:
        raise UserError(f"prompts list the names of the masks; {unread} is read with --prompt-kind caption")
    if isinstance(data, PictureData) and options.captions is not None and options.caption_model is None:
        from mmdit_probe.data.captions import cached

        data = replace(data, captions=cached(data.pictures(), options.captions, None))
    return Inputs(data, _held_out(options))


def _held_out(options: MagnetOptions) -> Data | None:
    """Held-out pictures; none for data on disk unless named: validation on training pictures says nothing."""
    of_scenes = options.dataset.partition(":")[0] == "scenes"
    named = options.validation or ("scenes:val" if of_scenes else None)
    if named is None or options.validate_limit == 0:
        return None
    return training_data(named, prompt="list", limit=options.validate_limit, fit=options.fit,
                         split=options.split.replace("train", "val"))  # fmt: skip
