"""Run folders of an experiment: what counts as done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmdit_probe.experiments.store import FolderStore

TABLES = ("main", "side")


@pytest.mark.parametrize("cut", TABLES)
def test_an_item_of_which_any_table_was_cut_is_done_again(tmp_path: Path, cut: str) -> None:
    """Item 2 has no rows in the second table, as it may; a run that is killed once more before it got to item 1 does
    not take it for done either."""

    def opened(resume: bool) -> FolderStore:
        store = FolderStore.open("demo", {}, {}, out=tmp_path / "run", resume=resume)
        store.complete = False
        return store

    def do(store: FolderStore, number: int) -> None:
        with store.task(number, lambda _: None) as task:
            for table in TABLES[: 1 if number == 2 else 2]:
                task.write(table, {"value": [10 * number, 10 * number + 1]})

    with pytest.raises(KeyboardInterrupt), (store := opened(False)), store.writing(TABLES):
        for number in range(3):
            do(store, number)
        raise KeyboardInterrupt
    os.truncate(tmp_path / "run" / f"{cut}.parquet" / "000001.parquet", 100)
    with (
        pytest.warns(UserWarning, match="item 1 is done again"),
        pytest.raises(KeyboardInterrupt),
        (store := opened(True)),
        store.writing(TABLES),
    ):
        assert store.done == {0, 2}
        raise KeyboardInterrupt
    with (store := opened(True)), store.writing(TABLES):
        assert store.done == {0, 2}
        do(store, 1)
    assert [store.table(name)["value"].tolist() for name in TABLES] == [[0, 1, 10, 11, 20, 21], [0, 1, 10, 11]]
