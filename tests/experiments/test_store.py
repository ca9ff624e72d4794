"""Run folders of an experiment: what counts as done."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mmdit_probe.errors import RunError, UserError
from mmdit_probe.experiments.store import FolderStore
from mmdit_probe.pages import Page
from mmdit_probe.plots import save
from mmdit_probe.results import RunFolder, atomic
from mmdit_probe.results.clip import Clip
from mmdit_probe.results.folder import read_record

TABLES = ("main", "side")


def opened_in(folder: Path, resume: bool) -> FolderStore:
    return FolderStore.open("demo", {}, {}, out=folder / "run", resume=resume)


def test_a_run_goes_on_with_its_own_scheduler_alone(tmp_path: Path) -> None:
    """No request tells of it: of a pipeline at hand it may be another one, and items of both stood in one table."""

    def opened(kind: str, levels: list[float], resume: bool = True) -> FolderStore:
        facts = {"scheduler": {"class": kind}, "sigmas": levels}
        return FolderStore.open("demo", {}, facts, out=tmp_path / "run", resume=resume)

    with pytest.raises(KeyboardInterrupt), (store := opened("Euler", [1.0, 0.5], False)), store.writing(TABLES):
        do(store, 0)
        raise KeyboardInterrupt
    for _ in range(2):  # refused once, it is still the run that it was
        with pytest.raises(UserError, match="scheduler: Euler -> Heun"):
            opened("Heun", [1.0, 0.5])
        with pytest.raises(UserError, match=r"noise levels: 1, 0\.5 -> 1, 0\.75"):
            opened("Euler", [1.0, 0.75])
    with (again := opened("Euler", [1.0, 0.5 + 1e-9])), again.writing(TABLES):
        assert again.done == {0}
        do(again, 1)
    with pytest.raises(UserError, match="noise levels"):  # nor is a finished one told as that of another
        opened("Euler", [1.0, 0.75])
    assert opened("Euler", [1.0, 0.5]).complete


def test_a_run_goes_on_with_its_own_text_encoders_alone(tmp_path: Path) -> None:
    """The hash of the transformer does not tell of them; a network that one of both lacks is the request's to tell."""

    def opened(resume: bool = True, **parts: str) -> FolderStore:
        return FolderStore.open(
            "demo",
            {},
            {"model": {"id": "m", "weight_hash": "w", "dtype": "float32", "parts": parts}},
            out=tmp_path / "run",
            resume=resume,
        )

    with pytest.raises(KeyboardInterrupt), (store := opened(False, t5="a", vae="b")), store.writing(TABLES):
        do(store, 0)
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="other weights of t5; choose another --out"):
        opened(t5="c", vae="b")
    with (again := opened(vae="b")), again.writing(TABLES):
        assert again.done == {0}


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="the system does not list open files")
def test_pictures_that_are_looked_at_leave_no_files_open(tmp_path: Path) -> None:
    """A process may have 1024: a run of as many pictures ended in an error once all were made, and so did --resume."""
    store = opened_in(tmp_path, False)
    for number in range(3):
        store.keep_picture(f"{number:03d}-stock", Image.new("RGB", (4, 4)))
    before = len(os.listdir("/dev/fd"))
    held = [store.load_picture(name) for name in store.picture_names()]
    assert len(held) == 3 and len(os.listdir("/dev/fd")) == before


def test_half_a_picture_is_none(tmp_path: Path) -> None:
    store = opened_in(tmp_path, False)
    (path,) = store.keep_picture("000-stock", Image.effect_noise((64, 64), 50))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cannot be read: .* --resume"):
        store.load_picture("000-stock")


def test_a_run_goes_on_with_what_its_paths_held_alone(tmp_path: Path) -> None:
    """A request tells of adapters and of other runs by path; a record of an earlier version says nothing of them."""

    def opened(resume: bool = True, **contents: str) -> FolderStore:
        return FolderStore.open("demo", {}, {"contents": contents}, out=tmp_path / "run", resume=resume)

    with pytest.raises(KeyboardInterrupt), (store := opened(False, lora="a1")), store.writing(TABLES):
        do(store, 0)
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="'lora' holds something else"):
        opened(lora="b2")
    with (again := opened(lora="a1")), again.writing(TABLES):
        assert again.done == {0}
        do(again, 1)
    with pytest.raises(UserError, match="'lora' holds something else"):
        opened(lora="b2")
    again.folder.record(contents=None)
    assert opened(lora="b2").complete


def do(store: FolderStore, number: int) -> None:
    """A task of two rows in each table; the third has none in the second table."""
    with store.task(number, lambda _: None) as task:
        for table in TABLES[: 1 if number == 2 else 2]:
            task.write(table, {"value": [10 * number, 10 * number + 1]})
        task.picture(f"{number:03d}", Image.new("RGB", (2, 2)))
        task.picture(f"clip{number}", Clip.of([Image.new("RGB", (2, 2))] * 2))
        task.arrays(f"{number:03d}", a=np.full(2, number))


def values(store: FolderStore) -> list[list[int]]:
    return [store.table(name)["value"].tolist() for name in TABLES]


WHOLE = [[0, 1, 10, 11, 20, 21], [0, 1, 10, 11]]


@pytest.mark.parametrize("cut", TABLES)
def test_an_item_of_which_any_table_was_cut_is_done_again(tmp_path: Path, cut: str) -> None:
    """Item 2 has no rows in the second table, as it may; a run that is killed once more before it got to item 1 does
    not take it for done either."""

    def opened(resume: bool) -> FolderStore:
        return opened_in(tmp_path, resume)

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
    assert values(store) == WHOLE


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run of three tasks."""
    with (store := opened_in(tmp_path, False)), store.writing(TABLES):
        for number in range(3):
            do(store, number)
    return tmp_path / "run"


def reading(folder: Path) -> FolderStore:
    record = read_record(folder)
    assert record is not None
    return FolderStore(RunFolder(folder, record))


@pytest.mark.filterwarnings("ignore:.*of an earlier version")
@pytest.mark.parametrize("table", TABLES)
def test_rows_of_an_earlier_version_are_measured_again(finished: Path, table: str) -> None:
    """Rows that lack a column of now: readers refuse, `--resume` does the items that have such rows again."""
    columns = {table: ("value", "low")}

    def opened() -> FolderStore:
        return FolderStore.open("demo", {}, {}, out=finished, resume=True, columns=columns)

    record = read_record(finished)
    assert record is not None
    with pytest.raises(UserError, match=r"lacks columns of this version's rows; .* --resume"):
        values(FolderStore(RunFolder(finished, record), columns))
    left = {2} if table == "side" else set()  # item 2 has no rows there
    with (
        pytest.warns(UserWarning, match="of an earlier version: item 0 is done again"),
        (store := opened()),
        store.writing(TABLES),
    ):
        assert store.done == left
        for number in {0, 1, 2} - left:
            with store.task(number, lambda _: None) as task:
                for name in TABLES:
                    task.write(name, {"value": [number], "low": [-number]})
    assert opened().complete and opened().table(table)["low"].tolist() == [0, -1, -2][: 2 if table == "side" else 3]


PARTS = ("main.parquet/000001.parquet", "side.parquet/000001.parquet", "images/001.png", "images/clip1/001.png",
         "arrays/001.npz")  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is cut off")
@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_what_a_finished_run_lost_is_measured_again(finished: Path, part: str, gone: bool) -> None:
    """A part cut off, or gone: readers refuse and say how to go on, `--resume` does that item again."""
    assert opened_in(finished.parent, True).complete
    file = finished / part
    whole = file.read_bytes() if file.suffix == ".png" else b""
    file.unlink() if gone else os.truncate(file, 60)
    if part.endswith(".parquet"):
        with pytest.raises(UserError, match=r"lacks 1 of its items \(cut off, or gone\); .* --resume"):
            values(reading(finished))
    store = opened_in(finished.parent, True)
    assert not store.complete and store.data["status"] == "running"
    with store, store.writing(TABLES):
        assert store.done == {0, 2}
        do(store, 1)
    assert values(store) == WHOLE == values(reading(finished))
    assert whole in (b"", file.read_bytes()) and reading(finished).load_arrays("001")["a"].tolist() == [1, 1]
    assert opened_in(finished.parent, True).complete


def test_a_foreign_part_is_refused_before_anything_is_measured(finished: Path) -> None:
    part = finished / "side.parquet" / "000001.parquet"
    pd.DataFrame({"value": [10, 11]}).to_parquet(part)
    message = "000001.parquet' is not the table 'side' that a run wrote: another program wrote it"
    with pytest.raises(UserError, match=message):
        values(reading(finished))
    os.truncate(finished / "main.parquet" / "000002.parquet", 100)
    store = opened_in(finished.parent, True)
    with (
        pytest.warns(UserWarning, match="item 2 is done again"),
        pytest.raises(UserError, match=message),
        store,
        store.writing(TABLES),
    ):
        pass
    assert part.exists()


def test_a_run_is_read_where_it_was_opened(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another working directory a relative path was another run's, if there was one, in silence."""
    monkeypatch.chdir(finished.parent)
    store = reading(Path(finished.name))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert values(store) == WHOLE and store.load_picture("001").size == (2, 2)
    assert store.folder.path == Path(finished.name)


def test_runs_from_before_tables_said_what_they_are_stay_readable(finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    del record["tables"]
    (finished / "run.json").write_text(json.dumps(record | {"version": 2}))
    pd.DataFrame({"value": [10, 11]}).to_parquet(finished / "main.parquet" / "000001.parquet")
    assert values(reading(finished)) == WHOLE
    assert opened_in(finished.parent, True).complete


@pytest.mark.parametrize("write", ["rows", "picture", "arrays", "csv", "page", "figure", "record"])
def test_a_full_disk_at_any_write_of_a_run_advises_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    """The same writes outside of a run that can be continued do not."""

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flush = atomic._flush
    picture, axes = Image.new("RGB", (2, 2)), Figure()
    store = opened_in(tmp_path, False)
    writes: dict[str, Callable[[], object]] = {
        "rows": lambda: do(store, 1),
        "picture": lambda: store.keep_picture("a", picture),
        "arrays": lambda: store.keep_arrays("a", {"a": np.zeros(2)}),
        "csv": lambda: atomic.write_text(tmp_path / "a.csv", "a"),
        "page": lambda: Page("a", "<p>").save(tmp_path / "a.html"),
        "figure": lambda: save(axes, tmp_path / "a"),
        "record": lambda: store.record(a=1),
    }

    told = pytest.raises(RunError, match=r"No space left on device; finished items are kept; .* with --resume")
    with told, store, store.writing(TABLES):
        do(store, 0)
        monkeypatch.setattr(atomic, "_flush", full)
        writes[write]()
    if write != "rows":
        with pytest.raises(RunError, match="No space left on device; free some space and run again"):
            writes[write]()
    monkeypatch.setattr(atomic, "_flush", flush)
    with (again := opened_in(tmp_path, True)), again.writing(TABLES):
        assert again.done == {0}
