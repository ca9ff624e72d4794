"""Tables on disk: what was finished stays, what was not is dropped, and the table is the sum of its items."""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmdit_probe.errors import RunError, UserError
from mmdit_probe.results import TableWriter, read_items, read_table
from mmdit_probe.results.atomic import resumable
from mmdit_probe.results.tables import MemorySink, check_items
from tests.tables import budget_table


def rows(item: int, n: int = 2) -> pd.DataFrame:
    return pd.DataFrame({"item": [item] * n, "span": ["word"] * n, "mass": [0.5 + item] * n})


def written(folder: Path, *indices: int) -> TableWriter:
    writer = TableWriter(folder, "t")
    for index in indices:
        with writer.item(index) as item:
            item.write(rows(index))
    return writer


def test_items_join_in_order_with_one_file_each(tmp_path):
    with TableWriter(tmp_path, "t") as writer:
        for index in (2, 0, 1):
            with writer.item(index) as item:
                item.write(rows(index))
                item.write(rows(index))
    path = tmp_path / "t.parquet"
    assert list(read_table(path).item) == [0] * 4 + [1] * 4 + [2] * 4
    assert [set(part["item"]) for part in read_items(path, ["item", "absent"])] == [{0}, {1}, {2}]
    assert sorted(file.name for file in path.iterdir()) == ["000000.parquet", "000001.parquet", "000002.parquet"]
    assert all(pq.ParquetFile(file).num_row_groups == 1 for file in path.iterdir())


def test_pandas_reads_the_folder_as_one_table(tmp_path):
    with TableWriter(tmp_path, "t") as writer:
        for index, span in enumerate(("word", "pad")):
            with writer.item(index) as item:
                item.write(rows(index).assign(span=span))
    for table in (pd.read_parquet(tmp_path / "t.parquet"), read_table(tmp_path / "t.parquet")):
        assert list(table["span"]) == ["word", "word", "pad", "pad"]
        assert list(table["mass"]) == [0.5, 0.5, 1.5, 1.5] and list(table["item"]) == [0, 0, 1, 1]


def test_round_trip_keeps_values_and_types(tmp_path):
    table = budget_table(prompts=1).astype({"mass": np.float32, "layer": np.int16})
    with TableWriter(tmp_path, "t") as writer, writer.item(0) as item:
        item.write(table)
    back = read_table(tmp_path / "t.parquet")
    for name in table:
        assert list(back[name]) == list(table[name]), name
    assert str(back["span"].dtype) == "category"
    assert (back["mass"].dtype, back["layer"].dtype) == (np.float32, np.int16)


def test_categories_that_differ_between_writes_join(tmp_path):
    with TableWriter(tmp_path, "t") as writer:
        with writer.item(0) as item:
            item.write(rows(0).assign(span=pd.Categorical(["word"] * 2)))
            item.write({"item": np.array([0]), "span": np.array(["bos"], object), "mass": np.array([0.0])})
        with writer.item(1) as item:
            item.write(rows(1).assign(span=pd.Categorical(["pad"] * 2)))
    assert list(read_table(tmp_path / "t.parquet").span) == ["word", "word", "bos", "pad", "pad"]


def test_an_item_larger_than_a_row_group_keeps_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr("mmdit_probe.results.tables.ROW_GROUP", 5)
    with TableWriter(tmp_path, "t") as writer, writer.item(0) as item:
        for part in range(4):
            item.write(rows(part, 3))
    assert list(read_table(tmp_path / "t.parquet").item) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert len(list(read_items(tmp_path / "t.parquet", ["item"]))) == 1


def test_interrupted_item_is_dropped_and_the_others_resume(tmp_path):
    writer = written(tmp_path, 0)
    with pytest.raises(KeyboardInterrupt), writer.item(1) as item:
        item.write(rows(1))
        raise KeyboardInterrupt
    left = tmp_path / "t.parquet" / "000007.parquet.77.partial"
    left.write_bytes(b"left by a kill")

    again = TableWriter(tmp_path, "t")
    assert again.done == {0} and not left.exists()
    with again.item(1) as item:
        item.write(rows(1))
    again.finish()
    assert list(read_table(tmp_path / "t.parquet").item) == [0, 0, 1, 1]


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_an_item_cut_off_by_a_power_loss_is_done_again(tmp_path, kept):
    written(tmp_path, 0, 1)
    part = tmp_path / "t.parquet" / "000001.parquet"
    part.write_bytes(part.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"000001.parquet' is not a parquet table"):
        read_table(tmp_path / "t.parquet")
    with pytest.warns(UserWarning, match=r"000001.parquet' is cut off .* item 1 is done again"):
        again = TableWriter(tmp_path, "t")
    assert again.done == {0} and not part.exists()
    with again.item(1) as item:
        item.write(rows(1))
    assert list(read_table(tmp_path / "t.parquet").item) == [0, 0, 1, 1]


def test_an_unfinished_table_can_be_read(tmp_path):
    written(tmp_path, 3)
    assert list(read_table(tmp_path / "t.parquet").item) == [3, 3]


def test_an_item_without_rows_is_an_error(tmp_path):
    writer = TableWriter(tmp_path, "t")
    with pytest.raises(RunError, match="item 3 of t gave no rows"), writer.item(3) as item:
        item.close()
    assert list(writer.path.iterdir()) == []


def test_a_table_without_items_is_an_error(tmp_path):
    with pytest.raises(RunError, match=r"t\.parquet has no rows"):
        TableWriter(tmp_path, "t").finish()
    with pytest.raises(UserError, match="no table"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize("call", ["write", "close", "rename"])
def test_full_disk_says_what_is_kept(tmp_path, monkeypatch, call):
    writer = written(tmp_path, 0)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner, name = {
        "write": (pq.ParquetWriter, "write_table"),
        "close": (pq.ParquetWriter, "close"),
        "rename": (os, "replace"),
    }[call]
    monkeypatch.setattr(pq.ParquetWriter, "__del__", lambda writer: None)
    monkeypatch.setattr(owner, name, full)
    message = r"No space left on device; finished items are kept.*--resume"
    with pytest.raises(RunError, match=message), resumable(), writer.item(1) as item:
        item.write(rows(1))
    monkeypatch.undo()
    assert [file.name for file in writer.path.iterdir()] == ["000000.parquet"]
    assert TableWriter(tmp_path, "t").done == {0}


def test_something_in_the_way_is_named(tmp_path):
    (tmp_path / "t.parquet").write_text("a file of an older run")
    with pytest.raises(UserError, match=r"cannot write .*t\.parquet': File exists; choose another folder"):
        TableWriter(tmp_path, "t")


def test_missing_and_broken_tables(tmp_path):
    with pytest.raises(UserError, match="no table"):
        read_table(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="is not a parquet table"):
        read_table(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="is not a parquet table"):
        list(read_items(tmp_path / "bad.parquet", ["item"]))
    written(tmp_path, 0)
    with pytest.raises(UserError, match="has no column 'masses'; it has: item, span, mass"):
        read_table(tmp_path / "t.parquet", ["item", "masses"])


def test_the_disk_holds_every_row_once_at_any_time(tmp_path):
    """Peak disk is the final table: an item's file is renamed, never copied, and nothing is merged."""
    table, sizes = budget_table(prompts=1), []
    writer = TableWriter(tmp_path, "t")
    for index in range(3):
        with writer.item(index) as item:
            item.write(table.assign(item=index))
            item.close()
            sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
    final = sum(file.stat().st_size for file in writer.finish().iterdir())
    assert max(sizes) <= 1.01 * final


def test_a_finished_table_is_not_written_again(tmp_path):
    """A run that failed after its table was complete goes on without measuring: the items are known."""
    written(tmp_path, 0, 3).finish()
    before = {file: file.read_bytes() for file in (tmp_path / "t.parquet").iterdir()}
    with TableWriter(tmp_path, "t") as writer:
        assert writer.done == {0, 3}
    assert {file: file.read_bytes() for file in (tmp_path / "t.parquet").iterdir()} == before
    assert read_table(tmp_path / "t.parquet")["item"].tolist() == [0, 0, 3, 3]


def test_a_table_that_another_program_wrote_or_changed_is_refused(tmp_path: Path) -> None:
    """Every way in which a file is not what was written under its name."""
    path = written(tmp_path, 0, 1).finish()
    file = path / "000001.parquet"
    whole, own = pq.read_table(file), file.read_bytes()
    assert read_table(path, own=True)["item"].tolist() == [0, 0, 1, 1]
    mark = json.loads(whole.schema.metadata[b"mmdit_probe"])
    newer = whole.replace_schema_metadata({b"mmdit_probe": json.dumps(mark | {"version": 2})})
    foreign = {
        "another program wrote it .columns item, mass": pd.DataFrame({"item": [1], "mass": [0.5]}),
        "another program": whole.replace_schema_metadata({b"mmdit_probe": b"[1"}),
        "its column 'span' was changed": whole.drop_columns(["span"]),
        "its column 'mass' was changed": whole.set_column(2, "mass", pa.array([1, 2])),
        "it has no rows": whole.slice(0, 0),
        "it is of version 2; this mmdit-probe reads up to 1": newer,
    }
    for said, table in foreign.items():
        table.to_parquet(file) if isinstance(table, pd.DataFrame) else pq.write_table(table, file)
        for read in (check_items, partial(read_table, own=True), lambda path: list(read_items(path, own=True))):
            with pytest.raises(UserError, match=f"000001.parquet' is not the table 't' that a run wrote: {said}"):
                read(path)
    file.write_bytes(own)
    assert len(read_table(path, ["span"], own=True)) == 4
    path.rename(tmp_path / "u.parquet")
    with pytest.raises(UserError, match="is not the table 'u' that a run wrote: it is of the table 't'"):
        read_table(tmp_path / "u.parquet", own=True)


def test_a_column_of_one_value_takes_large_whole_numbers() -> None:
    for value, kind in ((2**31 - 1, "int32"), (-(2**31), "int32"), (2**31, "int64"), (2**63 - 1, "int64"),
                        (2.5, "float64"), (np.float32(2.5), "float64"), ("a", "category")):  # fmt: skip
        sink = MemorySink()
        sink.write({"one": value, "each": [1, 2]})
        assert sink.table()["one"].tolist() == [value, value] and sink.table()["one"].dtype == kind


def test_a_column_that_is_given_again_is_kept_once() -> None:
    sink, column = MemorySink(), np.arange(1000.0)
    for number in range(3):
        sink.write({"same": column, "other": column + number, "text": "ab"[number % 2]})
    assert sink.table()["same"].tolist() == [*range(1000)] * 3
    assert sink.table()["other"].tolist() == [value + number for number in range(3) for value in range(1000)]
    assert sink.table()["text"].tolist() == ["a"] * 1000 + ["b"] * 1000 + ["a"] * 1000
    assert sink.nbytes < 4.1 * column.nbytes


def test_missing_text_stays_missing() -> None:
    sink = MemorySink()
    sink.write({"a": pd.Categorical(["x", None, "y"]), "b": pd.Series(["x", None, "y"]).array})
    for name in ("a", "b"):
        assert sink.table()[name].isna().tolist() == [False, True, False]
        assert sink.table()[name].dropna().tolist() == ["x", "y"]


def test_memory_takes_objects_and_numbers_of_growing_type() -> None:
    sink = MemorySink()
    sink.write({"a": np.array([1, 2], np.int16), "b": np.array(["x", None], object), "c": pd.Categorical(["u", "v"])})
    sink.write({"a": np.array([2.5, 1e9]), "b": np.array([7, "x"], object), "c": pd.Categorical(["w", "u"])})
    table = sink.table()
    assert table["a"].tolist() == [1, 2, 2.5, 1e9]
    assert table["b"].astype(object).where(table["b"].notna(), None).tolist() == ["x", None, 7, "x"]
    assert table["c"].tolist() == ["u", "v", "w", "u"] and table["c"].dtype == "category"


def test_memory_does_not_grow_with_the_number_of_items(tmp_path: Path) -> None:
    """Rows of one item at a time: the same peak for a few items and for many."""
    import tracemalloc

    import pyarrow as pa

    peaks = []
    for count in (3, 3, 60):  # the first for what is made once
        columns = {"head": np.arange(10_000, dtype=np.int16), "mass": np.linspace(0, 1, 10_000, dtype=np.float32)}
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        with TableWriter(tmp_path / str(len(peaks)), "t") as writer:
            for index in range(count):
                with writer.item(index) as item:
                    for _ in range(2):
                        item.write(columns)
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1] + 50_000 < 60 * 2 * 60_000
