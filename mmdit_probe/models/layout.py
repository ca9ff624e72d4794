"""Which joint token is which: image, text, reference or other, and the joint-attention layers of a model.

    >>> layout = Layout.from_counts([("image", 4), ("text", 3)], grid=(2, 2))
    >>> layout.positions("text")
    slice(4, 7, None)

Positions here are joint positions, in the order of the attention call's keys; span kinds of text tokens are the
business of `models.tokens`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_probe.errors import UserError
from mmdit_probe.models.families.facts import Family
from mmdit_probe.models.families.token_order import KINDS as KINDS, Arrangement, Reference, positions

MODALITIES = ("image", "text", "reference")
"""Kinds of token whose queries are told apart."""


@dataclass(frozen=True)
class Layer:
    """A joint-attention layer: 0-based index in forward order, module path, attention module."""

    index: int
    path: str
    module: nn.Module

    def attends(self, heads: int) -> bool:
        """Whether a call of so many heads is one of all heads, as far as the module tells their number."""
        known = (getattr(self.module, name, None) for name in ("heads", "num_heads"))
        return heads == next((count for count in known if count is not None), heads)


@dataclass(frozen=True)
class Layout:
    """The kinds of the N joint tokens, the same for every sample of the call.

    Samples with fewer tokens, and masked ones, lack some: `keys` and `queries` say which are there.

    Attributes:
        labels: int64 [N] on the CPU, index into `KINDS`.
        grid: (h, w) of the image tokens, row-major, with frames * h * w = I; None if unknown.
        frames: frames of a video in the transformer's own time (each stands for several of the decoded video); 1 for
            an image.
        keys, queries: boolean [B, N] on the CPU, which tokens are keys and which are queries; None if all are. A token
            that no query may attend to is neither.
        references: per sample, the references in the order of their tokens; one entry stands for all samples.
    """

    labels: Tensor
    grid: tuple[int, int] | None = None
    frames: int = 1
    keys: Tensor | None = None
    queries: Tensor | None = None
    references: tuple[tuple[Reference, ...], ...] = ()

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

    def indices(self, *kinds: str) -> Tensor:
        """Joint positions of the tokens of some kinds, in joint order, on the CPU."""
        return torch.stack([self.labels == KINDS.index(kind) for kind in kinds]).any(0).nonzero()[:, 0]

    def positions(self, *kinds: str) -> slice | Tensor:
        """`indices`, as a slice where they are contiguous."""
        return as_slice(self.indices(*kinds))

    def references_of(self, row: int) -> list[tuple[Reference, Tensor]]:
        """The references of sample `row`, each with the joint positions of its tokens, on the CPU."""
        known = self.references[row if len(self.references) > 1 else 0] if self.references else ()
        counts = [one.count for one in known]
        own = self.indices("reference")[: sum(counts)]
        return list(zip(known, own.split(counts), strict=True)) if counts else []

    @cached_property
    def frame_positions(self) -> list[slice | Tensor]:
        """Joint positions of each frame's image tokens; empty of a single picture, of an unknown grid, or where a
        sample lacks image tokens."""
        image = self.labels == KINDS.index("image")
        complete = self.keys is None or bool(self.keys[:, image].all())
        if self.frames == 1 or self.grid is None or not complete:
            return []
        return [as_slice(index) for index in image.nonzero()[:, 0].reshape(self.frames, -1)]

    @property
    def modalities(self) -> tuple[str, ...]:
        """`MODALITIES`, references only where there are any."""
        return MODALITIES if self.counts["reference"] else MODALITIES[:2]

    def query_masks(self, *kinds: str) -> Tensor:
        """Which tokens are queries of each of these kinds: 0 and 1, [B or 1, kinds, N] float32 on the CPU."""
        found = torch.stack([self.labels == KINDS.index(kind) for kind in kinds])[None].float()
        return found if self.queries is None else found * self.queries[:, None]

    def present(self, row: int) -> Tensor:
        """[N] boolean: the keys that sample `row` has."""
        return torch.ones(self.total, dtype=torch.bool) if self.keys is None else self.keys[row]

    def key_count(self, kind: str, row: int) -> int:
        """Number of keys of one kind that sample `row` has."""
        return int((self.present(row) & (self.labels == KINDS.index(kind))).sum())

    def without(self, hidden: Tensor) -> Layout:
        """The layout without the tokens in `hidden` [B or 1, N], boolean: those that a mask hides from every query."""
        hidden = hidden.cpu()
        keys = ~hidden if self.keys is None else self.keys & ~hidden
        return replace(self, keys=keys, queries=~hidden if self.queries is None else self.queries & ~hidden)


def as_slice(index: Tensor) -> slice | Tensor:
    """Rising positions as a slice where they are contiguous."""
    if len(index) == 0:
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


@dataclass(frozen=True)
class Places:
    """Where the tokens of a canonical call are in the attention call: [B, N] each, -1 for one that is not there."""

    keys: Tensor
    queries: Tensor


def of_samples(layout: Layout, places: Places | None, rows: slice) -> tuple[Layout, Places | None]:
    """The layout of some samples of a call, and the places of their tokens."""

    def some(which: Tensor | None) -> Tensor | None:
        return which if which is None or len(which) == 1 else which[rows]

    layout = replace(layout, keys=some(layout.keys), queries=some(layout.queries))
    return layout, None if places is None else Places(places.keys[rows], places.queries[rows])


@functools.lru_cache(maxsize=64)
def arranged(arrangement: Arrangement) -> tuple[Layout, Places | None]:
    """The layout of an arrangement, and where its tokens are in the attention call (None: in the same order).

    Samples that differ, and text positions out of order, are brought into one order, that of `KINDS`.
    """
    first = arrangement.samples[0]
    if arrangement.regular:
        runs = [(kind, extent) for kind, extent in first if isinstance(extent, int)]
        layout = Layout.from_counts(runs, arrangement.grid)
        return replace(layout, frames=arrangement.frames, references=arrangement.references), None
    tokens = [{kind: _by_position(sample, kind) for kind in KINDS} for sample in arrangement.samples]
    counts = {kind: max(len(of[kind]) for of in tokens) for kind in KINDS}
    keys = [[p for kind in KINDS for p in of[kind] + [-1] * (counts[kind] - len(of[kind]))] for of in tokens]
    queries = []
    for row, sample in zip(keys, arrangement.samples, strict=True):
        asked = [place for place, kind in _in_order(sample) if kind in arrangement.queries]
        number = {place: count for count, place in enumerate(asked)}
        queries.append([number.get(place, -1) for place in row])
    places = Places(torch.tensor(keys), torch.tensor(queries))
    labels = Layout.from_counts(list(counts.items())).labels
    layout = Layout(
        labels, arrangement.grid, arrangement.frames, places.keys >= 0, places.queries >= 0, arrangement.references
    )
    return layout, places


def _in_order(sample: Sequence[Any]) -> list[tuple[int, str]]:
    kinds = [kind for kind, extent in sample for _ in range(extent if isinstance(extent, int) else len(extent))]
    return list(enumerate(kinds))


def _by_position(sample: Sequence[Any], kind: str) -> list[int]:
    """Key place of every token of one kind, in the order of its positions; -1 for a position that is not there."""
    places = [place for place, of in _in_order(sample) if of == kind]
    found = dict(zip(positions(sample, kind), places, strict=True))
    return [found.get(position, -1) for position in range(max(found, default=-1) + 1)]


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
    found: list[tuple[tuple[int, int], str, nn.Module]] = []
    for path, module in transformer.named_modules():
        place = family.layer_place(path)
        if place is not None:
            found.append((place, path, module))
    if not found:
        raise UserError(f"{type(transformer).__name__} has no joint-attention layer at {family.layers!r}")
    joint = len(found) - (getattr(transformer.config, family.textless) if family.textless else 0)
    ordered = sorted(found, key=lambda it: it[0])[:joint]
    return [Layer(index, path, module) for index, (_, path, module) in enumerate(ordered)]
