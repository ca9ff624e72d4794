"""Tables on disk: what was finished stays, what was not is dropped, and the joined table is the sum of its items."""

from __future__ import annotations

import errno
import os

import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmdit_probe.errors import RunError, UserError
from mmdit_probe.results import TableWriter, read_table
from tests.tables import budget_table


def rows(item: int, n: int = 2) -> pd.DataFrame:
    return pd.DataFrame({"item": [item] * n, "span": ["word"] * n, "mass": [0.5 + item] * n})


def test_items_join_in_order_with_one_row_group_each(tmp_path):
    with TableWriter(tmp_path, "t") as writer:
        for index in (2, 0, 1):
            with writer.item(index) as item:
                item.write(rows(index))
                item.write(rows(index))
    table = read_table(tmp_path / "t.parquet")
    assert list(table.item) == [0] * 4 + [1] * 4 + [2] * 4
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 3
    assert not (tmp_path / "t.parts").exists()


def test_round_trip_keeps_values_and_types(tmp_path):
    table = budget_table(prompts=1)
    with TableWriter(tmp_path, "t") as writer, writer.item(0) as item:
        item.write(table)
    back = read_table(tmp_path / "t.parquet")
    for name in table:
        assert list(back[name]) == list(table[name]), name
    assert str(back["span"].dtype) == "category"


def test_categories_that_differ_between_writes_join(tmp_path):
    with TableWriter(tmp_path, "t") as writer:
        for index, span in enumerate(("word", "pad")):
            with writer.item(index) as item:
                item.write(rows(index).assign(span=pd.Categorical([span] * 2)))
    assert list(read_table(tmp_path / "t.parquet").span) == ["word", "word", "pad", "pad"]


def test_interrupted_item_is_dropped_and_the_others_resume(tmp_path):
    writer = TableWriter(tmp_path, "t")
    with writer.item(0) as item:
        item.write(rows(0))
    with pytest.raises(KeyboardInterrupt), writer.item(1) as item:
        item.write(rows(1))
        raise KeyboardInterrupt
    (tmp_path / "t.parts" / "000007.tmp").write_bytes(b"left by a kill")

    again = TableWriter(tmp_path, "t")
    assert again.done == {0}
    with again.item(1) as item:
        item.write(rows(1))
    again.finish()
    assert list(read_table(tmp_path / "t.parquet").item) == [0, 0, 1, 1]


def test_parts_of_an_unfinished_run_can_be_read(tmp_path):
    with TableWriter(tmp_path, "t").item(0) as item:
        item.write(rows(0))
    assert list(read_table(tmp_path / "t.parts").item) == [0, 0]


def test_an_item_without_rows_is_an_error(tmp_path):
    with pytest.raises(RunError, match="item 3 of t gave no rows"), TableWriter(tmp_path, "t").item(3) as item:
        item.close()


def test_a_table_without_items_is_an_error(tmp_path):
    with pytest.raises(RunError, match=r"t\.parquet has no rows"):
        TableWriter(tmp_path, "t").finish()


def test_full_disk_says_what_is_kept(tmp_path, monkeypatch):
    writer = TableWriter(tmp_path, "t")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    message = r"No space left on device; finished items are kept.*--resume"
    with pytest.raises(RunError, match=message), writer.item(0) as item:
        item.write(rows(0))


def test_missing_and_broken_tables(tmp_path):
    with pytest.raises(UserError, match="no table"):
        read_table(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="is not a parquet table"):
        read_table(tmp_path / "bad.parquet")


def test_a_finished_table_is_not_written_again(tmp_path):
    """A run that failed after its table was joined goes on without measuring: the items are known."""
    with TableWriter(tmp_path, "table") as writer:
        for index in (0, 3):
            with writer.item(index) as item:
                item.write({"item": [index], "value": [0.5]})
    before = (tmp_path / "table.parquet").read_bytes()
    with TableWriter(tmp_path, "table") as writer:
        assert writer.done == {0, 3}
    assert (tmp_path / "table.parquet").read_bytes() == before
    assert not (tmp_path / "table.parts").exists()
    assert read_table(tmp_path / "table.parquet")["item"].tolist() == [0, 3]
