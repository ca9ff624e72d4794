"""What observers are: reducers that see every attention call of the selected layers and keep only numbers of one
denoising call.

A probe calls `observe` once per attention call, `end_call` when the transformer's forward is over. State that outlives
a denoising call goes to a sink as finished rows, so that it does not grow with prompts or steps.

    class Calls(Observer):                        # the smallest observer
        needs = "call"
        count = 0
        def observe(self, seen): self.count += 1

Not here: where calls are caught (`attention.intercept`) and how probabilities are computed (`attention.exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import Record
from mmdit_probe.errors import UserError
from mmdit_probe.models.layout import Layer, Layout
from mmdit_probe.models.tokens import TokenTable, unknown_table
from mmdit_probe.specs import HeadSpec

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class DenoisingCall:
    """One forward of the transformer, with what is known of each of its B rows.

    Attributes:
        number: 0-based count of transformer calls in this probe.
        step: 0-based sampling step. sigmas: noise level per row.
        prompts, seeds, branches: per row; "" and -1 and "unknown" where unknown.
        grid: (h, w) of the image tokens.
    """

    number: int
    step: int
    sigmas: list[float]
    prompts: list[str]
    seeds: list[int]
    branches: list[str]
    grid: tuple[int, int]
    _tokens: Sequence[TokenTable | None] = field(default=(), repr=False)
    _tables: dict[int, list[TokenTable]] = field(default_factory=dict, repr=False)

    def tokens(self, text_length: int) -> list[TokenTable]:
        """One token table per row; of kind "unknown" where the text is not known to have this many positions.

        Every layer with this many gets the same list.
        """
        if text_length not in self._tables:
            self._tables[text_length] = [
                table if table is not None and len(table) == text_length else unknown_table(text_length, prompt)
                for table, prompt in zip(self._tokens or [None] * len(self.prompts), self.prompts, strict=True)
            ]
        return self._tables[text_length]


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

    @property
    def tokens(self) -> list[TokenTable]:
        """Token table per row."""
        return self.denoising.tokens(self.layout.counts["text"])


class Observer:
    """Base class of observers. `needs` says whether the row log-sum-exp must be at hand ("lse") or not ("call")."""

    needs: ClassVar[Literal["call", "lse"]] = "call"

    def observe(self, seen: LayerCall) -> None:
        """See one attention call. State must be keyed by layer, so that seeing a call again overwrites."""
        raise NotImplementedError

    def end_call(self, denoising: DenoisingCall) -> None:
        """The transformer call is over: hand finished rows on."""

    def abandon_call(self) -> None:
        """The transformer call raised: drop what belongs to it."""


class RowObserver(Observer):
    """Base of observers whose finished rows go to a sink after every denoising call, layer by layer.

    A subclass fills `_seen` by layer index in `observe`, names its columns, and turns one entry into rows.

    Args:
        sink: an object with `write(columns)` or a function of the columns; rows are kept in memory if None.
        heads: which heads get rows: "all", 3, "0-3", [0, 5], or layer -> one of these.
    """

    columns: ClassVar[tuple[str, ...]]

    def __init__(
        self, sink: Sink | Callable[[dict[str, np.ndarray]], object] | None = None, heads: HeadSpec = "all"
    ) -> None:
        self.sink: Any = MemorySink() if sink is None else sink
        self.heads = heads
        self._seen: dict[int, Any] = {}

    def _rows(self, denoising: DenoisingCall, layer: int, *kept: Any) -> dict[str, np.ndarray]:
        """Rows of one layer, from what `observe` kept of it."""
        raise NotImplementedError

    def end_call(self, denoising: DenoisingCall) -> None:
        for layer in sorted(self._seen):
            rows = self._rows(denoising, layer, *self._seen[layer])
            if callable(self.sink):
                self.sink(rows)
            else:
                self.sink.write(rows)
        self._seen.clear()

    def abandon_call(self) -> None:
        self._seen.clear()

    def table(self) -> pd.DataFrame:
        """All rows so far as a tidy table.

        Raises:
            UserError: the rows went to a sink of the caller's, which has no `table`.
        """
        if not hasattr(self.sink, "table"):
            raise UserError(f"the rows went to {type(self.sink).__name__}; read them there")
        return self.sink.table()[list(self.columns)]


class Sink(Protocol):
    """Where finished rows go: `write` gets equally long columns, numbers as numpy arrays, text as object arrays."""

    def write(self, columns: dict[str, np.ndarray]) -> None: ...


class MemorySink:
    """Keeps rows in memory by column; text as integer codes, because it repeats."""

    def __init__(self) -> None:
        self._numbers: dict[str, list[np.ndarray]] = {}
        self._codes: dict[str, list[np.ndarray]] = {}
        self._vocabulary: dict[str, dict[Any, int]] = {}

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        for name, column in columns.items():
            if column.dtype != object:
                self._numbers.setdefault(name, []).append(column)
                continue
            known = self._vocabulary.setdefault(name, {})
            codes = np.fromiter((known.setdefault(value, len(known)) for value in column), np.int32, len(column))
            self._codes.setdefault(name, []).append(codes)

    def __len__(self) -> int:
        parts = next(iter(self._numbers.values()), [])
        return sum(len(part) for part in parts)

    def table(self) -> pd.DataFrame:
        """Everything written so far, in the order of the columns of the first write."""
        import pandas as pd

        columns: dict[str, Any] = {}
        for name, parts in self._numbers.items():
            columns[name] = np.concatenate(parts)
        for name, parts in self._codes.items():
            columns[name] = np.array(list(self._vocabulary[name]), dtype=object)[np.concatenate(parts)]
        return pd.DataFrame(columns)
