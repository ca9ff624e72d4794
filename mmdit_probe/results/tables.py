"""Tidy tables on disk that grow item by item and survive a kill.

While a command works, each finished item (a prompt, an image) is one small parquet file under `<table>.parts/`; an
item is written in row groups as its rows come. An item counts once its file has been renamed into place, so a killed
run loses the item it was at and nothing else. `finish` joins the parts, row group by row group, into
`<table>.parquet`.

    with TableWriter(folder, "attention_budget") as writer:
        for index, prompt in enumerate(prompts):
            if index in writer.done:
                continue                        # finished before the interruption
            with writer.item(index) as item:
                item.write(frame)               # any number of times; rows are on disk when the block ends

Not a database: items are written once, in any order, and read back in the order of their index.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mmdit_probe.errors import RunError, UserError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

ROW_GROUP = 1 << 16
"""Rows of an item that wait in memory before they are written."""


class TableWriter:
    """Writer of one table of a run folder.

    Args:
        folder: the run folder.
        name: table name; the result is `<folder>/<name>.parquet`.

    Attributes:
        done: indices of the items already on disk, joined or not: a run that failed after its table was complete (while
            drawing, say) measures nothing again.
    """

    def __init__(self, folder: Path | str, name: str) -> None:
        self.path = Path(folder) / f"{name}.parquet"
        self.parts = Path(folder) / f"{name}.parts"
        with _disk(self.parts):
            self.parts.mkdir(parents=True, exist_ok=True)
            for leftover in self.parts.glob("*.tmp"):
                leftover.unlink()
        self.done: set[int] = {int(path.stem) for path in self.parts.glob("*.parquet")}
        if not self.done and self.path.exists():
            self.done = _items_of(self.path)

    @contextmanager
    def item(self, index: int) -> Iterator[ItemWriter]:
        """Writer of one item. The item is kept if the block ends without an exception, and dropped otherwise."""
        final = self.parts / f"{index:06d}.parquet"
        temporary = final.with_suffix(".tmp")
        item = ItemWriter(temporary)
        try:
            yield item
            item.close()
            if item.rows == 0:
                raise RunError(f"item {index} of {self.path.stem} gave no rows; nothing was captured")
            with _disk(final):
                os.replace(temporary, final)
        finally:
            item.close()
            temporary.unlink(missing_ok=True)
        self.done.add(index)

    def finish(self) -> Path:
        """Join the parts into `<name>.parquet` (row groups kept, one in memory at a time) and remove them."""
        import pyarrow.parquet as pq

        paths = sorted(self.parts.glob("*.parquet"))
        if not paths and self.path.exists():
            shutil.rmtree(self.parts)
            return self.path
        if not paths:
            raise RunError(f"{self.path.name} has no rows: no item was finished")
        temporary = self.path.with_suffix(".parquet.tmp")
        with _disk(self.path):
            writer: pq.ParquetWriter | None = None
            try:
                for path in paths:
                    with pq.ParquetFile(path) as part:
                        if writer is None:
                            known = {**(part.schema_arrow.metadata or {}), _ITEMS: _joined(paths)}
                            schema = part.schema_arrow.with_metadata(known)
                            writer = pq.ParquetWriter(temporary, schema, compression="zstd")
                        # One row group per item: fewer and larger ones than the calls made, so that reading is fast.
                        rows = part.read().cast(schema)
                        writer.write_table(rows, row_group_size=rows.num_rows)
            finally:
                if writer is not None:
                    writer.close()
            os.replace(temporary, self.path)
            shutil.rmtree(self.parts)
        return self.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish()


_ITEMS = b"mmdit_probe.items"
"""Key of a table's metadata: the indices of its items."""


def _joined(paths: list[Path]) -> bytes:
    return ",".join(str(int(path.stem)) for path in paths).encode()


def _items_of(path: Path) -> set[int]:
    """Indices of the items that a finished table holds; none if it does not say."""
    import pyarrow.parquet as pq

    known = (pq.read_schema(path).metadata or {}).get(_ITEMS, b"")
    return {int(index) for index in known.decode().split(",") if index}


class ItemWriter:
    """Rows of one item, gathered into row groups. Columns and types are fixed by the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def write(self, columns: pd.DataFrame | Mapping[str, Any]) -> None:
        """Append rows: a DataFrame, or columns of equal length."""
        self._waiting.append(_arrow(columns))
        self.rows += self._waiting[-1].num_rows
        if sum(table.num_rows for table in self._waiting) >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            with _disk(self.path):
                self._writer.close()
            self._writer = None

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._waiting:
            return
        rows = pa.concat_tables(self._waiting)
        self._waiting = []
        with _disk(self.path):
            if self._writer is None:
                self._writer = pq.ParquetWriter(self.path, rows.schema, compression="zstd")
            self._writer.write_table(rows)


def read_table(path: Path | str, columns: list[str] | None = None) -> pd.DataFrame:
    """A table of a run folder, repeated strings as categories (shares memory for millions of rows).

    Args:
        path: `<table>.parquet`, or the `<table>.parts` folder of a run that was interrupted.
        columns: read these only.

    Raises:
        UserError: no such file, or not a parquet table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.exists():
        raise UserError(f"no table {str(path)!r}; expected the .parquet file of a run folder")
    try:
        table = pq.read_table(path, columns=columns)
    except pa.ArrowException as error:
        raise UserError(f"{str(path)!r} is not a parquet table: {str(error).splitlines()[0]}") from error
    for position, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            table = table.set_column(position, field.name, table.column(position).dictionary_encode())
    return table.to_pandas()


def read_row_groups(path: Path | str, columns: list[str]) -> Iterator[pd.DataFrame]:
    """The items of a finished table one by one, for tables larger than memory; columns that are absent are left out."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=present).to_pandas()


def _arrow(columns: pd.DataFrame | Mapping[str, Any]) -> pa.Table:
    import pyarrow as pa

    if isinstance(columns, Mapping):
        table = pa.table({name: pa.array(column) for name, column in columns.items()})
    else:
        table = pa.Table.from_pandas(columns, preserve_index=False)
    fields = []
    for field in table.schema:
        # Categories are an encoding, not a type: parts with different categories must join.
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        fields.append(pa.field(field.name, pa.string() if pa.types.is_large_string(kind) else kind))
    return table.cast(pa.schema(fields))


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turns a failing write into one line that says what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            reason = f"cannot write {str(path)!r}: {error.strerror}"
            raise UserError(f"{reason}; choose another folder with --out") from error
        kept = "finished items are kept; free some space and continue with --resume"
        raise RunError(f"writing {str(path)!r} failed: {error.strerror or error}; {kept}") from error
