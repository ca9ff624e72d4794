"""Rows on their way: batches of columns, numbers in few bytes and text as categories, and a table of them in memory.

    sink = MemorySink()
    sink.write({"layer": np.array([3, 4]), "span": text_column(np.array([0, 0]), ["word"])})
    sink.table()

Not here: tables on disk (`results.tables`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


class Sink(Protocol):
    """Where finished rows go: `write` gets equally long columns, numbers as arrays, text as `pandas.Categorical`."""

    def write(self, columns: dict[str, Any]) -> None: ...


def text_column(codes: np.ndarray, words: Iterable[str]) -> Any:
    """A column of text, `pandas.Categorical`, from the places of its entries among `words`."""
    import pandas as pd

    return pd.Categorical.from_codes(codes, pd.Index(list(words)))


def constant(value: int | str, count: int) -> Any:
    """A column of one value, as sinks take it."""
    return text_column(np.zeros(count, np.int8), [value]) if isinstance(value, str) else np.full(count, value, np.int32)


class MemorySink:
    """Keeps rows in memory by column: text as codes, whole numbers in as few bytes as they fit, a constant once."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}
        self._types: dict[str, np.dtype] = {}
        self._words: dict[str, dict[Any, int]] = {}
        self._plain: set[str] = set()
        self._lengths: list[int] = []

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append columns of equal length: arrays, categories, or object arrays."""
        self._lengths.append(len(next(iter(columns.values()))))
        for name, column in columns.items():
            if getattr(column, "dtype", None) is not None and getattr(column.dtype, "kind", "O") in "biuf":
                numbers = np.asarray(column)
                self._types[name] = np.promote_types(self._types.get(name, numbers.dtype), numbers.dtype)
            else:
                numbers = self._codes(name, column)
            self._parts.setdefault(name, []).append(_packed(numbers))

    def __len__(self) -> int:
        return sum(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return sum(part.nbytes for parts in self._parts.values() for part in parts)

    def table(self) -> pd.DataFrame:
        """Everything written so far, in the order of the columns of the first write; categories stay categories."""
        import pandas as pd

        columns: dict[str, Any] = {}
        for name, parts in self._parts.items():
            whole = [
                part if len(part) != 1 else np.repeat(part, n) for part, n in zip(parts, self._lengths, strict=True)
            ]
            numbers = np.concatenate(whole)
            if name not in self._words:
                columns[name] = numbers.astype(self._types[name], copy=False)
            elif name in self._plain:
                columns[name] = np.array([*self._words[name], None], dtype=object)[:-1][numbers]
            else:
                columns[name] = text_column(numbers, self._words[name])
        return pd.DataFrame(columns)

    def _codes(self, name: str, column: Any) -> np.ndarray:
        known = self._words.setdefault(name, {})
        column = getattr(column, "values", column)  # a Series' own array
        if hasattr(column, "categories"):
            places = [known.setdefault(word, len(known)) for word in column.categories]
            return np.array(places, np.int32)[column.codes]
        self._plain.add(name)
        return np.fromiter((known.setdefault(value, len(known)) for value in column), np.int32, len(column))


def _packed(numbers: np.ndarray) -> np.ndarray:
    """A constant as one number, whole numbers in the smallest signed type that holds them."""
    if len(numbers) == 0 or numbers.dtype.kind not in "iuf":
        return numbers
    low, high = numbers.min(), numbers.max()
    if low == high:
        return numbers[:1].copy()
    if numbers.dtype.kind == "f":
        return numbers
    fits = (kind for kind in (np.int8, np.int16, np.int32) if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return numbers.astype(next(fits, numbers.dtype))
