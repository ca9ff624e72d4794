"""Tidy tables on disk that grow item by item and survive a kill.

    with TableWriter(folder, "attention_budget") as writer:
        for index, prompt in enumerate(prompts):
            if index not in writer.done:            # else finished before the interruption
                with writer.item(index) as item:
                    item.write(frame)               # any number of times; rows are on disk when the block ends

A table is a folder, `<table>.parquet/`, with one parquet file per finished item: a parquet data set, which pandas,
polars and duckdb read as one table. A killed run loses the item it was at and nothing else. `MemorySink` takes the same
rows in memory. Text is stored as dictionaries (pandas' categories).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import ProbeWarning, RunError, UserError, first_line
from mmdit_probe.results.atomic import disk, make_folder, remove_leftovers, replacing

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROW_GROUP = 1 << 17
"""Rows of an item that wait in memory before they are written."""

MARK, NEEDS = b"mmdit_probe", b"mmdit_probe_needs"
"""Entries of a file's metadata: the table that its rows are of, its columns and the version of this layout; the other
files of its item."""

VERSION = 1

_SAMPLED = 1024
"""So many numbers of a column tell whether its values repeat."""


class TableWriter:
    """Writer of one table of a run folder.

    Args:
        folder: the run folder.
        name: table name; the result is the folder `<folder>/<name>.parquet`.

    Attributes:
        path: the table.
        done: indices of the items already on disk. Files that a power loss left empty or cut off are removed with a
            warning; their items, `cut`, are not done.
    """

    def __init__(self, folder: Path | str, name: str) -> None:
        self.path = make_folder(Path(folder) / f"{name}.parquet")
        remove_leftovers(self.path)
        self.done: set[int] = set()
        self.cut: set[int] = set()
        for path in items(self.path):
            if complete(path):
                self.done.add(int(path.stem))
                continue
            text = f"{str(path)!r} is cut off (power loss?): item {int(path.stem)} is done again"
            warnings.warn(text, ProbeWarning, stacklevel=2)
            self.cut.add(int(path.stem))
            self.remove(int(path.stem))

    def file(self, index: int) -> Path:
        """Where an item's rows are, or will be."""
        return self.path / f"{index:06d}.parquet"

    def remove(self, index: int) -> None:
        """Take an item's rows away."""
        with disk(self.file(index)):
            self.file(index).unlink(missing_ok=True)
        self.done.discard(index)

    @contextmanager
    def item(self, index: int) -> Iterator[ItemWriter]:
        """Writer of one item. The item is kept if the block ends without an exception, and dropped otherwise.

        Raises:
            UserError: no rights, or something in the way. RunError: the disk is full, or the block wrote no rows.
        """
        final = self.file(index)
        with ItemWriter(final.with_name(f"{final.name}.{os.getpid()}.partial")) as item:
            yield item
            item.close()
            if item.rows == 0:
                raise RunError(f"item {index} of {self.path.stem} gave no rows; nothing was captured")
            with replacing(final) as temporary:
                os.replace(item.path, temporary)
        self.done.add(index)

    def finish(self) -> Path:
        """The table.

        Raises:
            RunError: it has no items.
        """
        if not items(self.path):
            raise RunError(f"{self.path.name} has no rows: no item was finished")
        return self.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish()


class ItemWriter:
    """Rows of one item, gathered into row groups. Columns and types are fixed by the first write.

    Attributes:
        needs: other files of the item, by their path in the run folder; without them it is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.needs: list[str] = []
        self.rows = 0
        self._waiting = MemorySink()
        self._writer: pq.ParquetWriter | None = None

    def write(self, columns: pd.DataFrame | Mapping[str, Any]) -> None:
        """Append rows: a DataFrame, or columns as `MemorySink` takes them."""
        waited = len(self._waiting)
        self._waiting.write(columns)
        self.rows += len(self._waiting) - waited
        if len(self._waiting) >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what waits and the end of the file."""
        self._flush()
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with disk(self.path):
                writer.add_key_value_metadata({NEEDS: json.dumps(self.needs)})
                writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting = MemorySink()
        if self._writer is not None:
            with contextlib.suppress(OSError):  # dropped anyway; a full disk must not hide the first error
                self._writer.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not len(self._waiting):
            return
        rows = _encoded(pa.Table.from_pandas(self._waiting.table(), preserve_index=False))
        rows, self._waiting = _marked(rows, self.path.parent.stem), MemorySink()
        with disk(self.path):
            if self._writer is None:
                self._writer = pq.ParquetWriter(
                    self.path,
                    rows.schema,
                    compression="zstd",
                    use_dictionary=_repeating(rows),
                    write_statistics=False,  # every row group holds every layer: nothing could be skipped by them
                )
            self._writer.write_table(rows, row_group_size=rows.num_rows)


class Sink(Protocol):
    """Where finished rows go: `write` gets equally long columns, numbers as arrays, text as `pandas.Categorical`.

    They are not to be changed: later calls may give the same ones again.
    """

    def write(self, columns: dict[str, Any]) -> None: ...


def text_column(codes: np.ndarray, words: Iterable[str]) -> Any:
    """A column of text, `pandas.Categorical`, from the places of its entries among `words`."""
    return pd.Categorical.from_codes(codes, dtype=_categories(tuple(words)))


@functools.lru_cache(maxsize=256)
def _categories(words: tuple[str, ...]) -> pd.CategoricalDtype:
    """Pandas takes longer to make an index of a few words than of a thousand numbers."""
    return pd.CategoricalDtype(pd.Index(words))


class MemorySink:
    """Keeps rows in memory by column: text as codes, whole numbers in as few bytes as they fit, a constant once, and
    a column that is given again (the same object) once."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}
        self._last: dict[str, Any] = {}
        self._types: dict[str, np.dtype] = {}
        self._words: dict[str, dict[Any, int]] = {}
        self._lengths: list[int] = []

    def write(self, columns: pd.DataFrame | Mapping[str, Any]) -> None:
        """Append rows: a DataFrame, or columns of equal length (arrays, categories) and of one value (a number, a
        text). Arrays are not to be changed afterwards."""
        self._lengths.append(next(len(column) for _, column in columns.items() if not np.isscalar(column)))
        for label, column in columns.items():
            name = str(label)
            parts = self._parts.setdefault(name, [])
            parts.append(parts[-1] if parts and self._last[name] is column else _packed(self._numbers(name, column)))
            self._last[name] = column

    def _numbers(self, name: str, column: Any) -> np.ndarray:
        """A column as numbers: text as codes of the sink's own vocabulary."""
        column = getattr(column, "values", column)  # a Series' own array
        if np.isscalar(column) and not isinstance(column, str):
            column = _single(column)
        if getattr(getattr(column, "dtype", None), "kind", "O") not in "biuf":
            return self._codes(name, column)
        numbers = np.asarray(column)
        known = self._types.get(name, numbers.dtype)
        self._types[name] = known if known == numbers.dtype else np.promote_types(known, numbers.dtype)
        return numbers

    def __len__(self) -> int:
        return sum(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return sum({id(part): part.nbytes for parts in self._parts.values() for part in parts}.values())

    def table(self) -> pd.DataFrame:
        """Everything written so far, as `read_table` gives it: columns in the order of the first write, text as
        categories."""
        columns: dict[str, Any] = {}
        for name, parts in self._parts.items():
            whole = [
                part if len(part) != 1 else np.repeat(part, n) for part, n in zip(parts, self._lengths, strict=True)
            ]
            numbers = np.concatenate(whole)
            if name in self._words:
                columns[name] = pd.Categorical.from_codes(numbers, pd.Index(list(self._words[name])))
            else:
                columns[name] = numbers.astype(self._types[name], copy=False)
        return pd.DataFrame(columns)

    def _codes(self, name: str, column: Any) -> np.ndarray:
        known = self._words.setdefault(name, {})
        if isinstance(column, str):
            return np.array([known.setdefault(column, len(known))])
        if hasattr(column, "categories"):
            codes, words = column.codes, column.categories
        else:
            codes, words = pd.factorize(np.asarray(column, object))
        places = [known.setdefault(word, len(known)) for word in words]
        return np.array([*places, -1], np.int32)[codes]  # the code of what is missing, -1, takes the last place


def _single(value: Any) -> np.ndarray:
    """A column of one number."""
    small = np.iinfo(np.int32)
    whole = np.int32 if small.min <= value <= small.max else np.int64  # seeds may be large
    return np.array([value], np.float64 if isinstance(value, float | np.floating) else whole)


def _packed(numbers: np.ndarray) -> np.ndarray:
    """A constant as one number, whole numbers in the smallest signed type that holds them."""
    if len(numbers) < 2 or numbers.dtype.kind not in "iuf":
        return numbers
    low, high = numbers.min(), numbers.max()
    if low == high:
        return numbers[:1].copy()
    if numbers.dtype.kind == "f":
        return numbers
    fits = (kind for kind in (np.int8, np.int16, np.int32) if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return numbers.astype(next(fits, numbers.dtype))


def read_table(path: Path | str, columns: Sequence[str] | None = None, own: bool = False) -> pd.DataFrame:
    """A table of a run folder, finished or not, text as categories (shares memory for millions of rows).

    Args:
        path: `<table>.parquet`, or one parquet file.
        columns: read these only. own: only what `TableWriter` wrote under this name, unchanged.

    Raises:
        UserError: no such table, no rows in it, not parquet, or not our own.
    """
    import pyarrow as pa

    tables = [_read(file, columns, own=own) for file in _files(path)]
    try:
        return pa.concat_tables(tables, promote_options="permissive").unify_dictionaries().to_pandas()
    except pa.ArrowException as error:
        raise UserError(f"the files of {str(path)!r} are not of one table: {first_line(error)}") from error


def read_items(path: Path | str, columns: Sequence[str] | None = None, own: bool = False) -> Iterator[pd.DataFrame]:
    """The items of a table one by one, for tables larger than memory; columns that are absent are left out.

    Raises:
        UserError: as `read_table`.
    """
    for file in _files(path):
        yield _read(file, columns, absent=True, own=own).to_pandas()


def items(path: Path | str) -> list[Path]:
    """The files of a table's items, in order; none where there is no table."""
    files = (file for file in Path(path).glob("*.parquet") if file.stem.isdecimal())
    return sorted(files, key=lambda file: int(file.stem))


def complete(file: Path) -> bool:
    """Whether an item's file has its end, which is written last: the length of its footer, and "PAR1"."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(-8, os.SEEK_END)
        length, mark = opened.read(4), opened.read(4)
        return mark == b"PAR1" and int.from_bytes(length, "little") + 12 <= size
    return False


def needed(file: Path) -> list[Path]:
    """The other files that a complete item consists of."""
    import pyarrow.parquet as pq

    written = pq.read_metadata(file).metadata or {}
    return [file.parent.parent / name for name in json.loads(written.get(NEEDS, b"[]"))]


def column_names(file: Path) -> set[str]:
    """The columns of a complete item."""
    import pyarrow.parquet as pq

    return set(pq.read_schema(file).names)


def check_items(path: Path | str) -> None:
    """Refuse a table with an item that `TableWriter` did not write under its name, by a `UserError`."""
    for file in items(path):
        _read(file, [], own=True)


def _files(path: Path | str) -> list[Path]:
    path = Path(path)
    files = items(path) if path.is_dir() else [path] if path.exists() else []
    if not files:
        raise UserError(f"no table {str(path)!r}; expected a .parquet folder of a run folder with items in it")
    return files


def _read(file: Path, columns: Sequence[str] | None, absent: bool = False, own: bool = False) -> pa.Table:
    """Some columns (all if None) of one file; columns that are `absent` may be left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            known = table.schema_arrow.names
            if own and (found := _foreign(table, file.parent.stem)):
                raise UserError(f"{str(file)!r} is not the table {file.parent.stem!r} that a run wrote: {found}")
            missing = [] if columns is None or absent else [name for name in columns if name not in known]
            if missing:
                raise UserError(f"{str(file)!r} has no column {missing[0]!r}; it has: {', '.join(known)}")
            return _encoded(table.read(columns=known if columns is None else [n for n in columns if n in known]))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{str(file)!r} is not a parquet table: {first_line(error)}") from error


def _marked(rows: pa.Table, name: str) -> pa.Table:
    """Rows whose file will say that it is ours."""
    mark = json.dumps({"table": name, "version": VERSION, "columns": _types(rows.schema)})
    return rows.replace_schema_metadata({**(rows.schema.metadata or {}), MARK: mark})


def _types(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


def _foreign(file: pq.ParquetFile, name: str) -> str:
    """In what a file is not what `TableWriter` wrote for a table; "" for one that is."""
    schema = file.schema_arrow
    try:
        mark = json.loads((schema.metadata or {})[MARK])
        table, version, columns = mark["table"], int(mark["version"]), dict(mark["columns"])
    except (LookupError, TypeError, ValueError):
        return f"another program wrote it (columns {', '.join(schema.names)})"
    if version > VERSION:
        return f"it is of version {version}; this mmdit-probe reads up to {VERSION}: update it"
    if table != name:
        return f"it is of the table {table!r}"
    changed = sorted({name for name, _ in columns.items() ^ _types(schema).items()})
    if changed:
        return f"its column {changed[0]!r} was changed"
    return "" if file.metadata.num_rows else "it has no rows"


def _encoded(table: pa.Table) -> pa.Table:
    """The table with all text as dictionaries of one type, so that files with other words or categories join."""
    import pyarrow as pa

    text = pa.dictionary(pa.int32(), pa.string())
    for place, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            column = table.column(place)
            column = column if pa.types.is_dictionary(field.type) else column.dictionary_encode()
            table = table.set_column(place, field.name, column.cast(text))
        elif pa.types.is_dictionary(field.type):  # categories of numbers
            table = table.set_column(place, field.name, table.column(place).cast(kind))
    return table


def _repeating(rows: pa.Table) -> list[str]:
    """Columns that are worth a dictionary in the file: all but those whose numbers hardly repeat."""
    start = rows.slice(0, _SAMPLED)
    return [
        name for name in rows.schema.names if len(start) < _SAMPLED or 2 * len(start.column(name).unique()) < len(start)
    ]
