"""Which joint token is which: image, text or other, and the joint-attention layers of a model.

    >>> layout = Layout.from_counts([("image", 4), ("text", 3)], grid=(2, 2))
    >>> layout.positions("text")
    slice(4, 7, None)

Positions here are joint positions, in the order of the attention call's keys; span kinds of text tokens are the
business of `models.tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_probe.errors import UserError
from mmdit_probe.models.families import Family

KINDS = ("image", "text", "other")


@dataclass(frozen=True)
class Layer:
    """A joint-attention layer: 0-based index in forward order, module path, attention module."""

    index: int
    path: str
    module: nn.Module


@dataclass(frozen=True)
class Layout:
    """The kinds of the N joint tokens, the same for every sample of the call.

    Attributes:
        labels: int64 [N] on the CPU, index into `KINDS`.
        grid: (h, w) of the image tokens, row-major, with h * w = I; None if unknown.
    """

    labels: Tensor
    grid: tuple[int, int] | None = None

    @classmethod
    def from_counts(cls, runs: Sequence[tuple[str, int]], grid: tuple[int, int] | None = None) -> Layout:
        """From runs of (kind, number of tokens) in joint order."""
        labels = torch.cat([torch.full((count,), KINDS.index(kind)) for kind, count in runs])
        return cls(labels, grid)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of tokens of each kind."""
        return {kind: int((self.labels == index).sum()) for index, kind in enumerate(KINDS)}

    @property
    def total(self) -> int:
        """N, the number of joint tokens."""
        return len(self.labels)

    def positions(self, kind: str) -> slice | Tensor:
        """Joint positions of one kind: a slice where they are contiguous, else a LongTensor."""
        index = (self.labels == KINDS.index(kind)).nonzero()[:, 0]
        if len(index) == 0:
            return slice(0, 0)
        first, last = int(index[0]), int(index[-1])
        return slice(first, last + 1) if last - first + 1 == len(index) else index


def attention_layout(family: Family, inputs: Sequence[Any], grid: tuple[int, int] | None) -> Layout:
    """The layout of one attention call from the attention module's own arguments.

    Args:
        family: whose facts apply.
        inputs: the module's arguments named in `family.attention_inputs`, in that order: [B, tokens, C] or None.
        grid: (h, w) of the image tokens.
    """
    counts = {
        kind: 0 if value is None else int(value.shape[1])
        for kind, value in zip(family.attention_inputs, inputs, strict=True)
    }
    return Layout.from_counts([(kind, counts[kind]) for kind in family.order], grid)


def unwrap(transformer: Any) -> Any:
    """The diffusers transformer inside wrappers of torch.compile, peft or data parallelism."""
    while True:
        if hasattr(transformer, "_orig_mod"):
            transformer = transformer._orig_mod
        elif hasattr(transformer, "get_base_model"):
            transformer = transformer.get_base_model()
        elif isinstance(transformer, nn.DataParallel | nn.parallel.DistributedDataParallel):
            transformer = transformer.module
        else:
            return transformer


def find_layers(family: Family, transformer: nn.Module) -> list[Layer]:
    """The joint-attention layers of a transformer in forward order.

    Raises:
        UserError: the transformer has none where its family says they are.
    """
    found: list[tuple[int, str, nn.Module]] = []
    for path, module in transformer.named_modules():
        place = family.layer_place(path)
        if place is not None:
            found.append((place, path, module))
    if not found:
        raise UserError(f"{type(transformer).__name__} has no joint-attention layer at {family.layers!r}")
    return [Layer(index, path, module) for index, (_, path, module) in enumerate(sorted(found, key=lambda it: it[0]))]
