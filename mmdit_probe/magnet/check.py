"""Whether data can train.

    check(training_data("pictures", size=model.default_size), model, "token")

What data there are, and how they are read: `mmdit_probe.data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmdit_probe.data.sample import Sample
from mmdit_probe.data.training import Data
from mmdit_probe.errors import UserError, counted

_LOOKED_AT = 32


def check(data: Data | Sequence[Sample], model: Any, alignment: str, most: int = _LOOKED_AT) -> None:
    """Refuse data that cannot train, before anything is loaded onto a device.

    Some samples are looked at: pictures readable and of one size that the model takes, masks there, words found in the
    prompt and not cut off by the encoders.

    Args:
        model: an `MMDiT`. alignment: `MagnetOptions.level`. most: samples that are looked at, spread over the data.

    Raises:
        UserError: names the sample and what is wrong with it.
    """
    places = np.unique(np.linspace(0, len(data) - 1, min(len(data), most)).astype(int))
    size: tuple[int, ...] | None = None
    with_masks = 0
    for place in places:
        sample = data[int(place)]
        size = size or sample.image.shape
        if sample.image.shape != size:
            raise UserError(f"{sample.name}: image of shape {sample.image.shape}, the first one has {size}")
        if any(side % model.size_multiple for side in size[:2]):
            raise UserError(f"{sample.name}: {size[0]} x {size[1]} pixels, expected multiples of {model.size_multiple}")
        if alignment == "none":
            continue
        if sample.masks.shape[1:] != size[:2]:
            raise UserError(f"{sample.name}: masks of shape {sample.masks.shape[1:]} for an image of {size[:2]}")
        if alignment == "token" and len(sample.names) != len(sample.masks):
            found = f"{counted(len(sample.masks), 'mask')} and {counted(len(sample.names), 'name')}"
            raise UserError(
                f"{sample.name}: {found}; token-level alignment needs named masks (masks/classes.json), or use"
                " head-level alignment"
            )
        if alignment == "token" and sample.names:
            table = model.token_tables(sample.prompt)[0]
            for name in sample.names:
                table.word_spans(name, beside=sample.names)
        with_masks += len(sample.masks) > 0
    if alignment != "none" and with_masks == 0:
        raise UserError(
            f"none of {counted(len(places), 'sample')} looked at has a mask that its prompt names; expected"
            " masks/<name>.png, with class names that occur in the captions (or --prompt-kind list);"
            " self-segments and none need no masks"
        )
