"""What observers are: reducers that see every attention call of the selected layers and keep only numbers of one
denoising call.

    class MeanLength(Observer):                                  # keeps one number per layer, of the last call
        def measure(self, seen): return seen.call.query.norm(dim=-1).mean()
        def commit(self, denoising, measured): self.lengths = measured

An observer is a transaction: what `measure` makes of one attention call waits until the transformer's forward is over,
and is handed to `commit` if that ended well and everything in it is finite. A call that failed or was cut short leaves
nothing behind. State that outlives a call goes to a sink as finished rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention import exact, gradients
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import Record
from mmdit_probe.errors import RunError, UserError, brief, check_known
from mmdit_probe.models.layout import Layer, Layout, as_slice
from mmdit_probe.models.tokens import TokenTable, unknown_table
from mmdit_probe.results.tables import MemorySink, Sink, text_column
from mmdit_probe.specs import HeadSpec, heads_at, reread

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class DenoisingCall:
    """One forward of the transformer, with what is known of each of its B samples.

    Attributes:
        number: 0-based count of transformer calls in this probe.
        step: 0-based sampling step. sigmas: noise level per sample.
        prompts, seeds, branches: per sample; "" and -1 and "unknown" where unknown.
    """

    number: int
    step: int
    sigmas: list[float]
    prompts: list[str]
    seeds: list[int]
    branches: list[str]
    _tokens: Sequence[TokenTable | None] = field(default=(), repr=False)
    _tables: dict[int, list[TokenTable]] = field(default_factory=dict, repr=False)

    def of_samples(self, rows: slice) -> DenoisingCall:
        """The same call with some of its samples."""
        names = ("sigmas", "prompts", "seeds", "branches", "_tokens")
        return replace(self, _tables={}, **{name: getattr(self, name)[rows] for name in names})

    def tokens(self, text_length: int) -> list[TokenTable]:
        """One token table per sample; of kind "unknown" where the text is not known to have this many positions.

        Every layer with this many gets the same list.
        """
        if text_length not in self._tables:
            self._tables[text_length] = [
                table if table is not None and len(table) == text_length else unknown_table(text_length, prompt)
                for table, prompt in zip(self._tokens or [None] * len(self.prompts), self.prompts, strict=True)
            ]
        return self._tables[text_length]


@dataclass(frozen=True)
class PictureTokens:
    """The tokens of a picture among the N joint ones: their positions, (h, w) grid and frames."""

    positions: exact.Columns
    grid: tuple[int, int]
    frames: int

    @property
    def space(self) -> tuple[int, ...]:
        """`grid`, where there are several frames (frames, h, w)."""
        return self.grid if self.frames == 1 else (self.frames, *self.grid)


@dataclass
class LayerCall:
    """One attention call of one selected layer: q, k, v after norm and rotary embedding, before any edit of the
    output."""

    layer: Layer
    layout: Layout
    denoising: DenoisingCall
    record: Record

    @property
    def call(self) -> SDPACall:
        return self.record.call

    @property
    def output(self) -> Tensor:
        """The attention output the model goes on with, [B, H, N, Dv]."""
        return self.record.output

    @property
    def lse(self) -> Tensor | None:
        """Row log-sum-exp [B, H, N] float32, or None where no kernel gives it."""
        return self.record.lse

    @cached_property
    def logsumexp(self) -> Tensor:
        """Row log-sum-exp [B, H, N] float32: the kernel's, else computed here over chunks of queries."""
        return self.record.lse if self.record.lse is not None else gradients.streamed_lse(self.call)

    @cached_property
    def finite(self) -> Tensor:
        """A number (0-dim, on the device) that is finite if the log-sum-exp of every query that sees a key is."""
        if self.record.lse is None:
            return torch.zeros(())
        live = exact.live_queries(self.call)
        lse = self.record.lse if live is None else self.record.lse.masked_fill(~live, 0.0)
        return _finite(lse)

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as the model has it, to call modules of the model: it is off while observers measure."""
        dtype = self.record.module_call.autocast
        return nullcontext() if dtype is None else torch.autocast(self.call.query.device.type, dtype)

    @property
    def tokens(self) -> list[TokenTable]:
        """Token table per sample."""
        return self.denoising.tokens(self.layout.counts["text"])

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the image tokens.

        Raises:
            UserError: it is unknown.
        """
        grid, count = self.layout.grid, self.layout.counts["image"]
        if grid is None or self.layout.frames * math.prod(grid) != count:
            raise UserError(f"the image tokens have no known grid: {count} tokens")
        return grid

    @property
    def space(self) -> tuple[int, ...]:
        """`grid`, of a video (frames, h, w)."""
        return self.picture().space

    def picture(self, reference: int | None = None) -> PictureTokens:
        """Where the tokens of the image are, or those of a reference picture by number, from 0.

        Raises:
            UserError: no such reference, samples that differ in it, or an unknown grid.
        """
        if reference is None:
            return PictureTokens(self.layout.positions("image"), self.grid, self.layout.frames)
        known = [self.layout.references_of(sample) for sample in range(len(self.denoising.prompts))]
        fewest = min(map(len, known))
        if not 0 <= reference < fewest:
            raise UserError(f"no reference {reference}: the samples of this call have {fewest} (the first is 0)")
        of, positions = known[0][reference]
        if any(row[reference][0] != of or not row[reference][1].equal(positions) for row in known):
            raise UserError(
                f"the samples of this call differ in the size of reference {reference}: run them one by one"
            )
        if of.grid is None:
            raise UserError(f"the tokens of reference {reference} have no known grid: {of.count} tokens")
        return PictureTokens(as_slice(positions), of.grid, of.frames)


class Observer:
    """Base class of observers.

    A subclass implements `measure` and `commit`. One that only looks, and keeps nothing of a call that may still fail,
    can override `observe` instead.
    """

    needs: ClassVar[Literal["call", "lse"]] = "call"
    """Whether the row log-sum-exp must be at hand ("lse") or not ("call")."""

    reads: ClassVar[str] = "attention"
    """What it measures, for the message about numbers that are not finite."""

    def measure(self, seen: LayerCall) -> Any:
        """Numbers of one attention call: a tensor, array or number, or a tuple, list or dict with such in it."""
        raise NotImplementedError

    def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
        """The denoising call ended well: take what `measure` gave, layer by layer in forward order."""
        raise NotImplementedError

    def observe(self, seen: LayerCall) -> None:
        """See one attention call. Seeing a layer again (a recomputed forward) replaces what it gave before."""
        measured = self.measure(seen)
        signs = [seen.finite, *_signs(measured)] if self.needs == "lse" else list(_signs(measured))
        self._pending[seen.layer.index] = (measured, signs, seen.call.query.dtype)

    def settle(self) -> None:
        """All layers of the transformer call have been seen: measure what was put off."""

    def broken_layer(self) -> int | None:
        """The first layer of the call of which something measured is not finite."""
        signs = [(layer, sign) for layer, (_, signs, _) in sorted(self._pending.items()) for sign in signs]
        if not signs:
            return None
        device = signs[-1][1].device
        # All in one transfer: a device would wait once for each.
        fine = torch.stack([sign.to(device) for _, sign in signs]).isfinite().tolist()
        return next((layer for (layer, _), good in zip(signs, fine, strict=True) if not good), None)

    def end_call(self, denoising: DenoisingCall) -> None:
        """The transformer call ended well."""
        if self._pending:
            self.commit(denoising, {layer: measured for layer, (measured, _, _) in sorted(self._pending.items())})

    def abandon_call(self) -> None:
        """The transformer call is over, well or not: drop what belongs to it."""
        self._pending.clear()

    def pictured(self, made: Any) -> None:
        """The pipeline has made pictures, or videos, of the calls before: what its image processor gives."""

    @cached_property
    def _pending(self) -> dict[int, tuple[Any, list[Tensor], torch.dtype]]:
        """Layer -> what was measured, numbers that tell whether it is finite, and the precision of the call."""
        return {}


def check_finite(observers: Sequence[Observer], denoising: DenoisingCall) -> None:
    """Before any observer commits a denoising call: whether all that was measured in it is finite.

    Raises:
        RunError: something is not; names the first layer where it is not, and the step.
    """
    found = [(layer, observer) for observer in observers if (layer := observer.broken_layer()) is not None]
    if found:
        layer, observer = min(found, key=lambda pair: pair[0])
        raise not_finite(layer, observer.reads, observer._pending[layer][2], denoising.step)


def not_finite(layer: int, reads: str, dtype: torch.dtype, step: int | None = None) -> RunError:
    """The error of a layer whose numbers, read in a call of this precision, hold NaN or infinity."""
    why = "float16 overflow? try dtype bfloat16"
    if dtype != torch.float16:
        why = f"in {str(dtype).removeprefix('torch.')}: NaN or inf in the weights, an adapter or the input?"
    when = "" if step is None else f" at step {step}"
    return RunError(f"layer {layer}: {reads} is not finite{when} ({why})")


class RowObserver(Observer):
    """Base of observers whose finished rows go to a sink, in one batch per denoising call.

    A subclass names its columns, and turns what it measured of all layers into rows.

    Args:
        sink: an object with `write(columns)` or a function of the columns, called once per denoising call; rows are
            kept in memory if None.
        heads: which heads are read: "all", 3, "0-3", [0, 5], or layer -> one of these.
        rows: "head" for a row per head; "layer" for the heads' mean alone, in rows of head -1.
    """

    columns: ClassVar[tuple[str, ...]]

    _before: RowBatch | None = None
    """The batch of the call before, where a subclass keeps its axes for the next one."""

    def __init__(
        self,
        sink: Sink | Callable[[dict[str, Any]], object] | None = None,
        heads: HeadSpec = "all",
        rows: Literal["head", "layer"] = "head",
    ) -> None:
        check_known("rows option", rows, ("head", "layer"))
        if not (sink is None or callable(sink) or hasattr(sink, "write")):
            raise UserError(f"sink is {brief(sink)}: expected a function of the columns, or an object that has write")
        self.sink: Any = MemorySink() if sink is None else sink
        self.heads, self.rows = reread(heads), rows

    def add_rows(self, batch: RowBatch, measured: dict[int, Any]) -> None:
        """Rows of all layers of a denoising call, from what `measure` gave of each."""
        raise NotImplementedError

    def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
        batch = RowBatch(denoising, self._before)
        self.add_rows(batch, measured)
        if not batch:  # of this call there is nothing to tell
            return
        (self.sink if callable(self.sink) else self.sink.write)(batch.columns(self.columns))

    def table(self) -> pd.DataFrame:
        """All rows so far as a tidy table, text as categories.

        Raises:
            UserError: there are none yet, or they went to a sink of the caller's, which has no `table`.
        """
        if not hasattr(self.sink, "table"):
            raise UserError(f"the rows went to {type(self.sink).__name__}; read them there")
        found = self.sink.table()
        if not len(found):
            raise UserError("no rows were kept yet: call the model inside `with probe(...)`")
        return found[list(self.columns)]

    def _heads(self, layer: int, count: int) -> tuple[int, ...]:
        return heads_at(self.heads, layer, count)


Group = tuple[str, str, str]
"""(kind of token, span, stream): ("text", "word", "t5"), ("reference", "0", ""), ("image", "all", "")."""


def token_groups(layout: Layout, table: TokenTable, sample: int) -> dict[Group, Tensor]:
    """Joint positions of the tokens of every group of a sample, on the CPU: of its layout, whether or not it has them.

    Image and other tokens, then the span kinds of each stream in the order of the text, then references by number.
    """
    spans: dict[Group, list[int]] = {}
    for position, token in zip(layout.indices("text").tolist(), table.tokens, strict=True):
        spans.setdefault(("text", token.kind, token.stream), []).append(position)
    references = enumerate(layout.references_of(sample))
    return {
        ("image", "all", ""): layout.indices("image"), ("other", "all", ""): layout.indices("other"),
        **{group: torch.tensor(positions) for group, positions in spans.items()},
        **{("reference", str(number), ""): positions for number, (_, positions) in references},
    }  # fmt: skip


Axis = Mapping[str, Sequence[Any] | np.ndarray]
"""Columns that vary together along one axis of a block of rows; all of one length."""


class RowBatch:
    """The rows of one denoising call: one builder of the columns that all tables have in common.

    Rows come in blocks, outer products of axes, and every block of a sample gets its prompt, seed, step, sigma and
    branch:

        batch.add(sample, [{"layer": [3, 4]}, {"head": [0, 1]}, {"query": ["image", "text"]}], mass=values)  # [2, 2, 2]

    Numbers take few bytes (`TYPES`, else int32 and float32); text is a `pandas.Categorical`, which pandas and pyarrow
    both take as it is.

    Args:
        before: the batch of the call before. Where that had the same axes (the same objects) and labels, the columns
            that they make are the same objects too, and no time is spent on them.
    """

    TYPES: ClassVar[dict[str, Any]] = {
        "seed": np.int64, "step": np.int16, "sigma": np.float64, "layer": np.int16, "head": np.int16,
    }  # fmt: skip

    def __init__(self, denoising: DenoisingCall, before: RowBatch | None = None) -> None:
        self.denoising, self._before = denoising, before
        self._blocks: list[tuple[dict[str, Any], Sequence[Axis], dict[str, Any]]] = []
        self._words: dict[str, dict[str, int]] = {}
        self._fixed: dict[str, Any] = {}

    def __len__(self) -> int:
        """How often rows were added."""
        return len(self._blocks)

    def add(self, sample: int | None, axes: Sequence[Axis], **values: np.ndarray) -> None:
        """Rows of one sample (None: of the whole call, which has a step alone), the last axis varying fastest.

        Args:
            axes: the columns along each axis. values: numbers that broadcast to the axes' lengths.
        """
        call = self.denoising
        labels: dict[str, Any] = {}
        changing: dict[str, Any] = {"step": call.step, **values}
        if sample is not None:
            labels = {"prompt": call.prompts[sample], "seed": call.seeds[sample], "branch": call.branches[sample]}
            changing["sigma"] = call.sigmas[sample]
        self._blocks.append((labels, axes, changing))

    def columns(self, names: Sequence[str]) -> dict[str, Any]:
        """The columns by name, in this order."""
        before, self._before = self._before, None  # else every batch would be kept
        pairs = zip(self._blocks, () if before is None else before._blocks, strict=False)
        if before is not None and len(before._blocks) == len(self._blocks) and all(map(_alike, pairs)):
            self._fixed = before._fixed
        else:
            self._fixed = self._joined([labels for labels, _, _ in self._blocks], with_axes=True)
        columns = self._fixed | self._joined([changing for _, _, changing in self._blocks])
        return {name: columns[name] for name in names}

    def _joined(self, given: list[dict[str, Any]], with_axes: bool = False) -> dict[str, Any]:
        """Columns of all blocks, one after the other, from what is given of each, and from their axes."""
        parts: dict[str, list[np.ndarray]] = {}
        for columns, (_, axes, _) in zip(given, self._blocks, strict=True):
            shape = tuple(len(next(iter(axis.values()))) for axis in axes)
            spread = [(name, self._numbers(name, column)) for name, column in columns.items()]
            for number, axis in enumerate(axes if with_axes else ()):
                along = (-1,) + (1,) * (len(axes) - 1 - number)
                spread += [(name, self._numbers(name, column).reshape(along)) for name, column in axis.items()]
            for name, numbers in spread:
                parts.setdefault(name, []).append(np.broadcast_to(numbers, shape).ravel())
        joined = {name: np.concatenate(of) for name, of in parts.items()}
        return {
            name: text_column(column, self._words[name]) if name in self._words else column
            for name, column in joined.items()
        }

    def _numbers(self, name: str, column: Any) -> np.ndarray:
        """A column, or one value, as numbers: text as codes of the batch's own vocabulary."""
        numbers = np.asarray(column)
        if numbers.dtype.kind in "OU":
            words = self._words.setdefault(name, {})
            return np.array([words.setdefault(word, len(words)) for word in numbers.ravel().tolist()], np.int32)
        kind = self.TYPES.get(name, np.float32 if numbers.dtype.kind == "f" else np.int32)
        return numbers.astype(kind, copy=False)


def _alike(pair: tuple[Any, Any]) -> bool:
    """Whether two blocks of rows differ in no more than what changes with every call."""
    (labels, axes, _), (others, other_axes, _) = pair
    return axes is other_axes and labels == others


def _signs(measured: Any) -> Iterator[Tensor]:
    """`_finite` of all numbers in what an observer measured."""
    if isinstance(measured, Tensor):
        if measured.is_floating_point():
            yield _finite(measured)
    elif isinstance(measured, float | np.floating | np.ndarray):
        if np.asarray(measured).dtype.kind == "f":
            yield torch.tensor(float(np.sum(measured, dtype=np.float64)))
    elif isinstance(measured, Mapping | tuple | list):
        for part in measured.values() if isinstance(measured, Mapping) else measured:
            yield from _signs(part)


def _finite(tensor: Tensor) -> Tensor:
    """The sum, 0-dim float32 on the tensor's device: finite if every number of the tensor is. Nothing is copied."""
    return tensor.detach().sum(dtype=torch.float32)
