"""segment and discover: one picture in, one label map out.

    picture = single("cat.jpg").image
    result = segment(model, picture, "cat, wet grass, sky", method="seg4diff", refine="affinity+pamr")
    result.labels, result.names, result.areas()

The functions here put capture, method, refinement and tail in their order and decide nothing themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdit_probe.data.class_names import SegClass, parse_classes
from mmdit_probe.data.labels import region_ids
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.segment import methods
from mmdit_probe.segment.capture import DEFAULT, capture
from mmdit_probe.segment.methods.base import Method
from mmdit_probe.segment.record import Capture, Reading
from mmdit_probe.segment.refine import Refinement
from mmdit_probe.segment.settings import Background, wrong_kind
from mmdit_probe.segment.tail import probabilities


@dataclass
class Segmentation:
    """A labelled picture.

    Attributes:
        labels: [height, width] index into `names`; `unlabelled` where the network was not shown the picture, or where
            the background rule says so (then "background" is the last name, "background 2" beside a class so called).
        probabilities: [C, height, width] share of each class per pixel.
        names: class names, or "segment 1", ... of unsupervised methods.
        capture: what the method read.
    """

    labels: NDArray[np.uint16]
    probabilities: Tensor
    names: list[str]
    capture: Capture

    UNLABELLED = np.iinfo(np.uint16).max

    def areas(self) -> dict[str, dict[str, Any]]:
        """Pixels and share of the picture per name, in the order of names; names without a pixel too."""
        total = self.labels.size
        counts = {name: int((self.labels == index).sum()) for index, name in enumerate(self.names)}
        return {name: {"pixels": count, "share": count / total} for name, count in counts.items()}


def segment(
    model: MMDiT,
    image: NDArray[np.uint8],
    classes: str | Path | Sequence[str | SegClass],
    reading: Reading = DEFAULT,
    *,
    method: str | Method = "seg4diff",
    options: Mapping[str, Any] | None = None,
    background: str = "none",
    refine: str = "none",
    regions: Any = None,
) -> Segmentation:
    """Open-vocabulary segmentation of one picture.

    Args:
        model: the model. image: uint8 [height, width, 3], any size.
        classes: names, synonyms by semicolon; see `parse_classes`.
        reading: layers, noise levels, seeds, fit: what of the forward is read.
        method: name of an open-vocabulary method, with `options` of its own.
        background: rule of `segment.tail`. refine: steps of `segment.refine`.
        regions: ids [height, width] of another program's regions (SAM, ...), 0 where there is none.

    Raises:
        UserError: unknown names, or an unsupervised method.
    """
    parsed = parse_classes(classes)
    chosen = _method(method, options, unsupervised=False)
    steps, rule = Refinement.parse(refine), Background.parse(background)
    record = _captured(model, image, parsed, reading, chosen, steps, regions)
    return finish(record, chosen(record), [one.name for one in parsed], steps, rule)


def discover(
    model: MMDiT,
    image: NDArray[np.uint8],
    reading: Reading = DEFAULT,
    *,
    method: str | Method = "seg4diff-unsup",
    options: Mapping[str, Any] | None = None,
    refine: str = "none",
    regions: Any = None,
) -> Segmentation:
    """Segments of one picture without any names, from the empty prompt. Arguments as in `segment`."""
    chosen = _method(method, options, unsupervised=True)
    steps = Refinement.parse(refine)
    record = _captured(model, image, [], reading, chosen, steps, regions)
    plain = bool((image == image[:1, :1]).all())  # one colour has no parts; maps of it are noise
    scores = torch.ones(1, *record.grid) if plain else chosen(record)
    return finish(record, scores, None, steps, Background())


def name_segments(
    model: MMDiT,
    found: Segmentation,
    classes: str | Path | Sequence[str | SegClass],
    *,
    method: str | Method = "seg4diff",
    options: Mapping[str, Any] | None = None,
    weights: Mapping[int, float] | None = None,
    reference: Literal["none", "beside", "read"] = "none",
) -> Segmentation:
    """Segments of `discover` with the name that fits each best: "cat", "cat 2", ... by area.

    A second forward of the same picture at the same layers, noise levels and seeds reads the candidate names; a segment
    takes the name whose map, divided by its mean over the picture, is largest on average in it.

    Args:
        found: what `discover` gave. classes: candidates, as in `segment`.
        method: open-vocabulary method whose maps are read: "seg4diff" (the I2T words), "proxyclip" (a CLIP), ...
        options: of that method. weights: layer -> weight in means over layers.
        reference: as in the reading that `found` was made with.
    """
    old, parsed = found.capture, parse_classes(classes)
    chosen = _method(method, options, unsupervised=False)
    reading = Reading(list(old.layers), weights, None, old.sigmas, old.seeds, old.fit.how, old.fit.size, reference)
    steps = Refinement.parse("centre")
    record = _captured(model, old.image, parsed, reading, chosen, steps)
    maps = steps(chosen(record), record).flatten(1).numpy()  # (C, pixels)
    names: list[str] = []
    for index in range(len(found.names)):
        inside = found.labels.ravel() == index
        name = parsed[int(maps[:, inside].mean(1).argmax())].name if inside.any() else found.names[index]
        names.append(_unlike(name, names))
    return replace(found, names=names)


def _unlike(name: str, names: Sequence[str]) -> str:
    """The name, or with the first number from 2 that makes it differ from the others."""
    return next(one for one in chain([name], (f"{name} {number}" for number in count(2))) if one not in names)


def _captured(
    model: MMDiT, image: NDArray[np.uint8], classes: Sequence[SegClass], reading: Reading, method: Method,
    refine: Refinement, regions: Any = None,
) -> Capture:  # fmt: skip
    """What a method and a refinement read of a picture."""
    found = capture(
        model, image, classes, reading, keep=(*method.needs, *refine.keep), together=method.together,
        heads_apart=method.reads_heads, text_kinds=method.text_kinds,
    )  # fmt: skip
    return found if regions is None else replace(found, regions=region_ids(regions, found.size))


def finish(
    record: Capture, scores: Tensor, names: list[str] | None, refine: Refinement, background: Background
) -> Segmentation:
    """The shared tail on one method's maps [C, h, w]: refinement, upsampling, background rule, labels.

    Args:
        names: of the maps; None numbers those that own at least one pixel by area, the largest first.
    """
    pixels = refine(scores, record)
    labels = refine.labels(pixels, record, background, names)
    shares = probabilities(pixels)
    if names is None:
        counts = np.bincount(labels[~record.fit.unseen], minlength=len(shares))
        order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
        rank = np.zeros(len(shares), np.uint16)
        rank[order] = np.arange(len(order), dtype=np.uint16)
        labels, shares = rank[labels], shares[order]
        names = [f"segment {number}" for number in range(1, len(order) + 1)]
    else:
        names = list(names)
        if background.kind != "none":
            names.append(_unlike("background", names))
    labels[record.fit.unseen] = Segmentation.UNLABELLED
    return Segmentation(labels, shares, names, record)


def _method(method: str | Method, options: Mapping[str, Any] | None, *, unsupervised: bool) -> Method:
    chosen = methods.find(method) if isinstance(method, str) else method
    if chosen.unsupervised != unsupervised:
        raise wrong_kind(chosen.name, unsupervised)
    return chosen.configure(options or {})
