"""Where a run's rows, pictures and arrays go: memory, or a run folder that survives a kill.

    with store, store.writing(("perturb",)):
        with store.task(0, advance) as record:
            record.write("perturb", columns)            # any number of times
            record.picture("000-stock", image)

Both kinds answer the same questions, so that a result does not care which it came from. Rows of a task that failed or
was cut short never count. In a run folder several processes share the tasks (`results.processes`).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from zipfile import BadZipFile, is_zipfile

import numpy as np

from mmdit_probe.errors import ProbeWarning, UserError, first_line
from mmdit_probe.models.names import other_parts
from mmdit_probe.results import RunFolder, TableWriter, atomic, processes, read_items, read_table
from mmdit_probe.results.clip import Clip
from mmdit_probe.results.folder import Said, read_record
from mmdit_probe.results.tables import MemorySink, check_items, column_names, complete, items, needed

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

PICTURES, ARRAYS = "images", "arrays"

AGAIN = "run the same command with --resume, which measures what is lost again"

Rows = Mapping[str, Any]
"""Columns of one length: arrays, or categories."""


class TaskRecord:
    """What one task writes to."""

    def __init__(self, store: Store, sink_of: Callable[[str], Any], advance: Callable[..., None]) -> None:
        self._store, self._sink_of = store, sink_of
        self.ticked = 0.0
        self._advance = advance
        self.files: list[Path] = []
        """What was kept beside rows: without these files the task is not done."""

    def write(self, table: str, columns: Rows | pd.DataFrame, **labels: int | float | str) -> None:
        """Add rows to a table; `labels`, columns of one value, come before the others."""
        columns = {str(name): column for name, column in columns.items()}
        if len(next(iter(columns.values()))):
            self._sink_of(table).write(labels | columns)

    def picture(self, name: str, image: Image | Clip) -> None:
        """Keep a picture or a video."""
        self.files += self._store.keep_picture(name, image)

    def arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Keep arrays that a figure needs."""
        self.files += self._store.keep_arrays(name, arrays)

    def workplace(self, name: str) -> Path | None:
        """A folder for what a long task keeps of itself; None in memory."""
        return self._store.workplace(name)

    def advance(self, ticks: float = 1) -> None:
        """Move the progress bar, for tasks of several ticks, or by a part of one; the task's end adds what is left."""
        self.ticked += ticks
        self._advance(ticks)


class MemoryStore:
    """Everything in memory; one process. Attributes: data: the record: command, request, model, ..."""

    complete = False

    def __init__(self, command: str, request: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        if processes.world() > 1:
            raise UserError("several processes share a run through its folder: name one with out=")
        # As a run folder holds it: both can be compared.
        self.data: dict[str, Any] = {"command": command, "request": json.loads(json.dumps(dict(request))), **facts}
        self.done: set[int] = set()
        self._sinks: dict[str, MemorySink] = {}
        self._pictures: dict[str, Image | Clip] = {}
        self._arrays: dict[str, dict[str, np.ndarray]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""

    @contextmanager
    def writing(self, tables: Sequence[str]) -> Iterator[None]:
        yield

    @contextmanager
    def task(self, number: int, advance: Callable[..., None], ticks: int = 1) -> Iterator[TaskRecord]:
        recorder = TaskRecord(self, lambda name: self._sinks.setdefault(name, MemorySink()), advance)
        yield recorder
        if ticks > recorder.ticked:
            advance(ticks - recorder.ticked)

    def mine(self, count: int) -> list[int]:
        return list(range(count))

    def record(self, **facts: Any) -> None:
        self.data |= facts

    def has(self, name: str) -> bool:
        return name in self._sinks

    def table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        table = self._sinks[name].table()
        return table if columns is None else table[[c for c in columns if c in table]]

    def chunks(self, name: str, columns: Sequence[str]) -> Iterable[pd.DataFrame]:
        return [self.table(name, columns)]

    def keep_picture(self, name: str, image: Image | Clip) -> list[Path]:
        self._pictures[name] = image
        return []

    def picture_names(self) -> list[str]:
        return list(self._pictures)

    def keep_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> list[Path]:
        self._arrays[name] = dict(arrays)
        return []

    def load_picture(self, name: str) -> Image | Clip:
        return self._pictures[name]

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        return dict(self._arrays[name])

    def array_names(self) -> list[str]:
        return list(self._arrays)

    def workplace(self, name: str) -> Path | None:
        return None


class FolderStore:
    """A run folder.

    Attributes:
        folder: what it wraps. place: where it is, whatever the working directory is later.
        columns: table -> columns without which rows are those of an earlier version.
        first: whether this process is the one that writes what is about all tasks.
    """

    def __init__(self, folder: RunFolder, columns: Mapping[str, Sequence[str]] | None = None) -> None:
        self.folder, self.columns = folder, columns or {}
        self.place = folder.path.absolute()
        self.first = processes.rank() == 0
        self.complete = folder.complete
        self.done: set[int] = set()
        self._writers: dict[str, TableWriter] = {}
        self._open = ExitStack()

    @classmethod
    def open(
        cls, command: str, request: Mapping[str, Any], facts: Mapping[str, Any], *, out: Path | None, resume: bool,
        said: Said = dict, columns: Mapping[str, Sequence[str]] | None = None,
    ) -> FolderStore:  # fmt: skip
        """Make the folder, or find the one to continue; of several processes the first does, the others join it. A
        finished run that has lost something since, or has rows of an earlier version, goes on.

        Args:
            said: as of `RunFolder.open`. columns: see the class.
        """

        def opened() -> RunFolder:
            folder = RunFolder.open(command, request, out=out, resume=resume, said=said)
            _check_facts(folder, facts)
            if folder.complete and cls(folder, columns).lost():
                folder.begin()
            return folder

        with atomic.resumable():
            store = cls(processes.from_first(opened), columns)
            if store.complete:  # it is told as it was asked for now
                store.folder.data = {**facts, **store.folder.data, "request": json.loads(json.dumps(dict(request)))}
            elif store.first:
                store.folder.record(**facts)
        return store

    def lost(self) -> bool:
        """Whether items of a finished run are cut off, gone, or of an earlier version."""
        tables = self.data.get("tables") or {}
        if any(self._lacks(name) > 0 for name in tables):
            return True
        main = items(self._path(next(iter(tables)))) if tables else []
        return any(self._unsound(file) for file in main)

    def _unsound(self, item: Path) -> Path | None:
        """The first of a whole item's files that is cut off, gone, or of an earlier version."""
        others = (file for file in needed(item) if not _sound(file) or self._earlier(file))
        return item if self._earlier(item) else next(others, None)

    def _earlier(self, file: Path) -> bool:
        """Whether a sound file of a table lacks columns that its rows now have."""
        wanted = self.columns.get(file.parent.stem)
        return wanted is not None and not set(wanted) <= column_names(file)

    def _lacks(self, name: str) -> int:
        """How many items a finished run's table had and has no more."""
        return int((self.data.get("tables") or {}).get(name, 0)) - sum(map(complete, items(self._path(name))))

    def _path(self, name: str) -> Path:
        return self.place / f"{name}.parquet"

    @property
    def _own(self) -> bool:
        """Whether the tables' files say what they are."""
        return bool(self.data["version"] >= 3)

    def _whole(self, name: str) -> Path:
        """A table to be read.

        Raises:
            UserError: items of it are cut off, gone, or of an earlier version.
        """
        if (lost := self._lacks(name)) > 0:
            raise UserError(f"{str(self._path(name))!r} lacks {lost} of its items (cut off, or gone); {AGAIN}")
        if name in self.columns and any(map(self._earlier, items(self._path(name)))):
            raise UserError(f"{str(self._path(name))!r} lacks columns of this version's rows; {AGAIN}")
        return self._path(name)

    @property
    def data(self) -> dict[str, Any]:
        return self.folder.data

    def __enter__(self) -> Self:
        self._open.enter_context(atomic.resumable())
        self._open.enter_context(self.folder)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @contextmanager
    def writing(self, tables: Sequence[str]) -> Iterator[None]:
        """Tables are open for writing inside; the first must get rows, the others may."""
        self._writers = {name: TableWriter(self.place, name) for name in tables}
        if self._own:
            for writer in self._writers.values():
                check_items(writer.path)
        processes.barrier()  # nothing is removed while another process reads
        main, *others = self._writers.values()
        for number in sorted(main.done):
            file = self._unsound(main.file(number))
            if file is not None:
                why = "of an earlier version" if _sound(file) else "cut off, or gone"
                text = f"{str(file)!r} is {why}: item {number} is done again"
                warnings.warn(text, ProbeWarning, stacklevel=2)
            if file is not None or any(number in writer.cut for writer in others):
                main.remove(number)  # on disk too: a run that is killed again must not count it as done
        for writer in others:
            for number in writer.done - main.done:
                writer.remove(number)
        processes.barrier()  # every writer has cleaned up before any task is begun
        self.done = {number for number in main.done if main.file(number).exists()}
        yield
        for writer in self._writers.values():
            own = map(writer.file, sorted(writer.done))
            processes.collect(path for path in own if path.exists())
        main.finish()
        if self.first:
            for writer in others:
                if not any(writer.path.iterdir()):
                    writer.path.rmdir()
            counts = {name: len(items(writer.path)) for name, writer in self._writers.items()}
            self.folder.record(tables={name: count for name, count in counts.items() if count})
        self._writers = {}
        processes.barrier()

    @contextmanager
    def task(self, number: int, advance: Callable[..., None], ticks: int = 1) -> Iterator[TaskRecord]:
        main = next(iter(self._writers))
        with ExitStack() as stack:
            # Closed last, so that a task counts only when its rows in the other tables are there.
            sinks = {main: stack.enter_context(self._writers[main].item(number))}

            def sink_of(name: str) -> Any:
                if name not in sinks:
                    sinks[name] = stack.enter_context(self._writers[name].item(number))
                return sinks[name]

            recorder = TaskRecord(self, sink_of, advance)
            yield recorder
            files = recorder.files + [self._writers[name].file(number) for name in sinks if name != main]
            sinks[main].needs = [file.relative_to(self.place).as_posix() for file in files]
        if ticks > recorder.ticked:
            advance(ticks - recorder.ticked)

    def mine(self, count: int) -> list[int]:
        return list(processes.share(range(count)))

    def record(self, **facts: Any) -> None:
        if self.first:
            self.folder.record(**facts)

    def has(self, name: str) -> bool:
        return bool(items(self._path(name))) or name in (self.data.get("tables") or {})

    def table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        return read_table(self._whole(name), columns, self._own)

    def chunks(self, name: str, columns: Sequence[str]) -> Iterable[pd.DataFrame]:
        return read_items(self._whole(name), columns, self._own)

    def keep_picture(self, name: str, image: Image | Clip) -> list[Path]:
        """A picture as PNG, a video as a folder of them. Returns: the files."""
        place = self.place / PICTURES
        if isinstance(image, Clip):
            files = {place / name / f"{number:03d}.png": frame for number, frame in enumerate(image)}
        else:
            files = {place / f"{name}.png": image}
        for file, one in files.items():
            with atomic.replacing(file) as temporary:
                one.save(temporary, format="PNG")
        return list(files)

    def picture_names(self) -> list[str]:
        folder = self.place / PICTURES
        names = [*(path.stem for path in sorted(folder.glob("*.png")))]
        return names + [path.name for path in sorted(one for one in folder.glob("*") if one.is_dir())]

    def load_picture(self, name: str) -> Image | Clip:
        """A picture, or a video, that was kept.

        Raises:
            UserError: the file is gone, or is no longer a picture.
        """
        from PIL import Image as pil

        path = self.place / PICTURES / f"{name}.png"
        frames = path.with_suffix("")
        with _as_written(path):
            if frames.is_dir():
                return Clip.of(map(pil.open, sorted(frames.glob("*.png"))))
            found = pil.open(path)
            found.load()  # and close the file
            return found

    def keep_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> list[Path]:
        path = self.place / ARRAYS / f"{name}.npz"
        with atomic.replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]
        return [path]

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Arrays that were kept.

        Raises:
            UserError: the file is gone, or no longer holds arrays.
        """
        path = self.place / ARRAYS / f"{name}.npz"
        with _as_written(path), np.load(path, allow_pickle=False) as found:
            return dict(found)

    def array_names(self) -> list[str]:
        return sorted(path.stem for path in (self.place / ARRAYS).glob("*.npz"))

    def workplace(self, name: str) -> Path | None:
        """A folder for what a long task keeps of itself."""
        return self.place / "state" / name


Store = MemoryStore | FolderStore


def _check_facts(folder: RunFolder, facts: Mapping[str, Any]) -> None:
    """Hold what is continued to what no request tells: the scheduler that it was sampled with, the weights of text
    encoders and VAE, and what stood under the paths that it names.

    Raises:
        UserError: it is another one.
    """
    others = (told(folder.data, facts) for told in (other_sampling, _other_parts, _other_contents))
    if other := next(filter(None, others), ""):
        error = UserError(f"cannot continue {str(folder.path)!r}: {other}; choose another --out")
        if not folder.complete:
            folder.fail(str(error))
        raise error


def _other_parts(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """How the networks beside the transformer differ between two records."""
    return other_parts(first.get("model") or {}, second.get("model") or {})


def _other_contents(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The path that holds something else than a record tells; "" where none does, or one of them tells of none."""
    was, now = (of.get("contents") or {} for of in (first, second))
    changed = [path for path in now if was.get(path, now[path]) != now[path]]
    return f"{changed[0]!r} holds something else than then" if changed else ""


def other_sampling(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """How the scheduler that a record tells differs from that of another one; "" where it does not, or one of them
    tells of none."""
    classes = [of["scheduler"]["class"] for of in (first, second) if of.get("scheduler")]
    if len(set(classes)) > 1:
        return f"scheduler: {classes[0]} -> {classes[1]}"
    levels = [of["sigmas"] for of in (first, second) if classes and of.get("sigmas")]
    if len(levels) < 2 or (len(levels[0]) == len(levels[1]) and np.allclose(levels[0], levels[1], rtol=0, atol=1e-6)):
        return ""
    return "noise levels: {} -> {}".format(*(", ".join(f"{level:.3g}" for level in of) for of in levels))


def _sound(path: Path) -> bool:
    """Whether a file of a run has its end, which is written last; whether a run in a run is finished and has lost
    nothing."""
    if path.is_dir():
        record = read_record(path)
        found = None if record is None else FolderStore(RunFolder(path, record))
        return found is not None and found.complete and not found.lost()
    checks = {".parquet": complete, ".npz": is_zipfile, ".png": _has_end}
    return path.is_file() and checks.get(path.suffix, Path.exists)(path)


def _has_end(picture: Path) -> bool:
    """Whether a PNG has its last chunk."""
    with suppress(OSError), picture.open("rb") as file:
        file.seek(-12, os.SEEK_END)
        return file.read()[4:8] == b"IEND"
    return False


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Reads a file of a run folder that may no longer be what was written there.

    Raises:
        UserError: it is not.
    """
    try:
        yield
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{str(path)!r} cannot be read: {first_line(error)}; {AGAIN}") from error
