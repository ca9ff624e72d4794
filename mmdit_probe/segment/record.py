"""What one captured forward holds: plain tensors, from which every method is a pure function.

    JointRecord   one layer: i2t [H, I, T], i2i [I, I], features [I, E], concept outputs [K, E]
    Pass          one prompt: its token table, the names in it, a record per layer
    Capture       one picture: its passes, its grid, how picture and grid lie on each other

Records of several noise seeds or noise levels are averaged part by part before a method sees them: a method reads one
record, whatever it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.fit import Fit
from mmdit_probe.errors import RunError
from mmdit_probe.segment.vocabulary import Prompt


@dataclass
class JointRecord:
    """The joint attention of one layer for one picture and one prompt. Parts that were not asked for are None.

    Attributes:
        i2t: [H, I, T] probabilities of the text keys in the joint softmax.
        i2i: [I, I] head mean of the image-image block, rows sum to 1 minus the text mass. i2i_walk: see `JointBlocks`.
        i2i_attn2: [I, I] head mean of the second, image-only attention (SD3.5), rows sum to 1.
        feat_out, feat_proj: [I, E] attention output before and after the output projection.
        concepts: [K, E] attention output of the concept stream, one row per name of the pass.
    """

    layer: int
    i2t: Tensor | None = None
    i2i: Tensor | None = None
    i2i_walk: Tensor | None = None
    feat_out: Tensor | None = None
    feat_proj: Tensor | None = None
    concepts: Tensor | None = None
    i2i_attn2: Tensor | None = None

    PARTS = ("i2t", "i2i", "i2i_walk", "feat_out", "feat_proj", "concepts", "i2i_attn2")

    def part(self, name: str) -> Tensor:
        """A part that must be there.

        Raises:
            RunError: it was not captured.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise RunError(f"layer {self.layer}: {name} was not captured; pass keep={name!r} to capture")
        return value


@dataclass
class Pass:
    """One prompt of a capture and its records by layer."""

    prompt: Prompt
    records: dict[int, JointRecord]


@dataclass
class Capture:
    """Everything a method may read about one picture.

    Attributes:
        image: uint8 [height, width, 3], the original picture.
        fit: how the picture lies in the network's input.
        grid: (h, w) of the image tokens, I = h * w, row-major.
        classes: what the prompts name; empty for the empty prompt.
        passes: one per prompt.
        sigmas, seeds: what was averaged over.
        layers: those that a method reads. weights: one per layer in means over layers, sum 1; () for equal ones.
    """

    image: NDArray[np.uint8]
    fit: Fit
    grid: tuple[int, int]
    classes: list[SegClass]
    passes: list[Pass]
    sigmas: tuple[float, ...]
    seeds: tuple[int, ...]
    layers: tuple[int, ...] = field(default=())
    weights: tuple[float, ...] = ()
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture in pixels."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def shares(self) -> tuple[float, ...]:
        """Weight of each of `layers` in a mean over layers."""
        return self.weights or (1.0 / len(self.layers),) * len(self.layers)

    def over_layers(self, read: Callable[[JointRecord], Tensor], of: int = 0) -> Tensor:
        """Weighted mean over layers of what `read` makes of the records of one pass."""
        records = self.passes[of].records
        parts = [share * read(records[layer]) for layer, share in zip(self.layers, self.shares, strict=True)]
        return torch.stack(parts).sum(0)

    def mean(self, part: str, of: int = 0) -> Tensor:
        """Weighted mean over layers of one part of one pass."""
        return self.over_layers(lambda record: record.part(part), of)

    def features(self, part: str) -> Tensor:
        """Unit features [I, E L] of the first pass: layers normalised and set side by side.

        A dot product of two rows is the weighted mean of the layers' cosines.
        """
        records = self.passes[0].records
        parts = [
            share**0.5 * F.normalize(records[layer].part(part), dim=-1)
            for layer, share in zip(self.layers, self.shares, strict=True)
        ]
        return F.normalize(torch.cat(parts, -1), dim=-1)

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave when it was called for this picture, these layers and weights before."""
        key = (name, self.layers, self.weights)
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


def average(records: Sequence[JointRecord]) -> JointRecord:
    """The mean of records of one layer, part by part."""
    first = records[0]
    mean = {
        entry.name: torch.stack([record.part(entry.name) for record in records]).mean(0)
        for entry in fields(JointRecord)
        if entry.name != "layer" and getattr(first, entry.name) is not None
    }
    return JointRecord(first.layer, **mean)
