"""What a data set folder holds, and what is wrong with it, before an evaluation finds out after an hour.

report = check(dataset("voc20:VOCdevkit/VOC2012"))
report.problems                                 # [(image, what is wrong), ...]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mmdit_probe.data.labels import IGNORE
from mmdit_probe.data.sample import Dataset
from mmdit_probe.errors import UserError


@dataclass
class DatasetReport:
    """Findings.

    Attributes:
        images: images looked at. pixels: scored pixels per class [C]. ignored: share of pixels that are not scored.
        never: names of classes that no image holds. per_image: mean number of classes (or masks) in an image.
        problems: (image, what is wrong). notes: (image, what the opener decided).
    """

    images: int
    pixels: np.ndarray
    ignored: float
    never: list[str]
    per_image: float
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def check(dataset: Dataset, advance: Callable[[], None] = lambda: None) -> DatasetReport:
    """Open every picture, label and caption: what is unreadable, of other ids or sizes, or leaves nothing to score."""
    count = len(dataset.classes)
    pixels = np.zeros(count, np.int64)
    total = 0
    problems: list[tuple[str, str]] = []
    there: list[int] = []
    for sample in dataset.samples:
        try:
            labels, image = np.asarray(sample.label()), sample.image
            if labels.shape != image.shape[:2]:
                problems.append((sample.name, f"picture {image.shape[:2]} and label {labels.shape} differ in size"))
            scored = labels[labels != IGNORE]
            if not scored.size:
                problems.append((sample.name, "every pixel is ignored"))
            there.append(len(np.unique(scored)))
            pixels += np.bincount(scored, minlength=count)[:count]
            total += labels.size
            _ = sample.prompt
        except UserError as error:
            problems.append((sample.name, str(error)))
        advance()
    ignored = 1.0 - pixels.sum() / total if total else float("nan")
    never = [one.name for one, amount in zip(dataset.classes, pixels, strict=True) if amount == 0]
    notes = [(sample.name, note) for sample in dataset.samples for note in sample.notes]
    return DatasetReport(
        len(dataset.samples), pixels, float(ignored), never, float(np.mean(there or [0])), problems, notes
    )
