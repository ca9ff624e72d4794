"""The embedded world as a data set: `scenes:val`, class masks exact to the pixel, nothing ignored."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.evaluate.datasets.base import Sample, SegDataset
from mmdit_probe.segment.vocabulary import SegClass

DEFAULT_COUNT = 200


def scenes(split: str, limit: int | None = None) -> SegDataset:
    """The first `limit` scenes of a split (default 200).

    Raises:
        UserError: unknown split.
    """
    from mmdit_probe.errors import unknown
    from mmdit_probe.scenes import CLASSES, SPLITS

    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    count = DEFAULT_COUNT if limit is None else limit
    samples = [
        Sample(f"scenes:{split}:{index}", partial(_image, split, index), partial(_labels, split, index))
        for index in range(count)
    ]
    return SegDataset(f"scenes:{split}", [SegClass((name,)) for name in CLASSES], samples)


def _image(split: str, index: int) -> NDArray[np.uint8]:
    from mmdit_probe.scenes import scene

    return scene(split, index).image


def _labels(split: str, index: int) -> NDArray[np.int64]:
    from mmdit_probe.scenes import scene

    return scene(split, index).classes.astype(np.int64)
