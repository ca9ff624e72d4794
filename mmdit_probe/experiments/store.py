"""Where a run's rows, pictures and arrays go: memory, or a run folder that survives a kill.

    with store, store.writing(("perturb",)):
        with store.task(0, advance) as record:
            record.write("perturb", columns)            # any number of times
            record.picture("000-stock", image)

Both kinds answer the same questions, so that a result does not care which it came from. Rows of a task that failed or
was cut short never count. In a run folder several processes share the tasks (`results.processes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self
from zipfile import BadZipFile

import numpy as np

from mmdit_probe.errors import UserError, first_line
from mmdit_probe.results import RunFolder, TableWriter, atomic, processes, read_items, read_table
from mmdit_probe.results.clip import Clip
from mmdit_probe.results.tables import MemorySink, constant

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

PICTURES, ARRAYS = "images", "arrays"

Rows = Mapping[str, Any]
"""Columns of one length: arrays, or categories."""


class TaskRecord:
    """What one task writes to."""

    def __init__(self, store: Store, sink_of: Callable[[str], Any], advance: Callable[..., None]) -> None:
        self._store, self._sink_of = store, sink_of
        self.ticked = 0.0
        self._advance = advance

    def write(self, table: str, columns: Rows | pd.DataFrame, **labels: int | float | str) -> None:
        """Add rows to a table; `labels`, columns of one value, come before the others."""
        if not isinstance(columns, Mapping):
            columns = {str(name): columns[name].values for name in columns.columns}
        count = len(next(iter(columns.values())))
        if count:
            repeated = {name: constant(value, count) for name, value in labels.items()}
            self._sink_of(table).write(repeated | dict(columns))

    def picture(self, name: str, image: Image | Clip) -> None:
        """Keep a picture or a video."""
        self._store.keep_picture(name, image)

    def arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Keep arrays that a figure needs."""
        self._store.keep_arrays(name, arrays)

    def workplace(self, name: str) -> Path | None:
        """A folder for what a long task keeps of itself; None in memory."""
        return self._store.workplace(name)

    def advance(self, ticks: float = 1) -> None:
        """Move the progress bar, for tasks of several ticks, or by a part of one; the task's end adds what is left."""
        self.ticked += ticks
        self._advance(ticks)


class Store(Protocol):
    """What both kinds have in common. `data` is the record: command, request, model, ..."""

    complete: bool
    done: set[int]

    @property
    def data(self) -> dict[str, Any]: ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def writing(self, tables: Sequence[str]) -> Any: ...
    def task(self, number: int, advance: Callable[..., None], ticks: int = 1) -> Any: ...
    def mine(self, count: int) -> list[int]: ...
    def record(self, **facts: Any) -> None: ...
    def table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame: ...
    def chunks(self, name: str, columns: Sequence[str]) -> Iterable[pd.DataFrame]: ...
    def has(self, name: str) -> bool: ...
    def keep_picture(self, name: str, image: Image | Clip) -> None: ...
    def pictures(self) -> dict[str, Image | Clip]: ...
    def keep_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None: ...
    def load_picture(self, name: str) -> Image | Clip: ...
    def load_arrays(self, name: str) -> dict[str, np.ndarray]: ...
    def array_names(self) -> list[str]: ...
    def workplace(self, name: str) -> Path | None: ...


class MemoryStore:
    """Everything in memory; one process."""

    complete = False

    def __init__(self, command: str, request: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        if processes.world() > 1:
            raise UserError("several processes share a run through its folder: name one with out=")
        self._data: dict[str, Any] = {"command": command, "request": dict(request), **facts}
        self.done: set[int] = set()
        self._sinks: dict[str, MemorySink] = {}
        self._pictures: dict[str, Image | Clip] = {}
        self._arrays: dict[str, dict[str, np.ndarray]] = {}

    @property
    def data(self) -> dict[str, Any]:
        return self._data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        self._data |= facts

    def has(self, name: str) -> bool:
        return name in self._sinks

    def table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        table = self._sinks[name].table()
        return table if columns is None else table[[c for c in columns if c in table]]

    def chunks(self, name: str, columns: Sequence[str]) -> Iterable[pd.DataFrame]:
        return [self.table(name, columns)]

    def keep_picture(self, name: str, image: Image | Clip) -> None:
        self._pictures[name] = image

    def pictures(self) -> dict[str, Image | Clip]:
        return dict(self._pictures)

    def keep_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays[name] = dict(arrays)

    def load_picture(self, name: str) -> Image | Clip:
        return self._pictures[name]

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        return dict(self._arrays[name])

    def array_names(self) -> list[str]:
        return list(self._arrays)

    def workplace(self, name: str) -> Path | None:
        return None


class FolderStore:
    """A run folder. Attributes: folder. first: whether this process is the one that writes what is about all tasks."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.first = processes.rank() == 0
        self.complete = folder.complete
        self.done: set[int] = set()
        self._writers: dict[str, TableWriter] = {}

    @classmethod
    def open(
        cls, command: str, request: Mapping[str, Any], facts: Mapping[str, Any], *, out: Path | None, resume: bool
    ) -> FolderStore:
        """Make the folder, or find the one to continue; of several processes the first does, the others join it."""
        store = cls(processes.from_first(lambda: RunFolder.open(command, request, out=out, resume=resume)))
        if store.complete:
            store.folder.data = {**facts, **store.folder.data}
        elif store.first:
            store.folder.record(**facts)
        return store

    @property
    def data(self) -> dict[str, Any]:
        return self.folder.data

    def __enter__(self) -> Self:
        self.folder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.folder.__exit__(kind, error, trace)

    @contextmanager
    def writing(self, tables: Sequence[str]) -> Iterator[None]:
        """Tables are open for writing inside; the first must get rows, the others may."""
        self._writers = {name: TableWriter(self.folder.path, name) for name in tables}
        main, *others = self._writers.values()
        for number in main.done & {number for writer in others for number in writer.cut}:
            with atomic.disk(main.file(number)):  # on disk too: one that is killed again must not count it as done
                main.file(number).unlink(missing_ok=True)
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
        self._writers = {}
        processes.barrier()

    @contextmanager
    def task(self, number: int, advance: Callable[..., None], ticks: int = 1) -> Iterator[TaskRecord]:
        main = next(iter(self._writers))
        with ExitStack() as stack:
            # Closed last, so that a task counts only when its rows in the other tables are there.
            items = {main: stack.enter_context(self._writers[main].item(number))}

            def sink_of(name: str) -> Any:
                if name not in items:
                    items[name] = stack.enter_context(self._writers[name].item(number))
                return items[name]

            recorder = TaskRecord(self, sink_of, advance)
            yield recorder
        if ticks > recorder.ticked:
            advance(ticks - recorder.ticked)

    def mine(self, count: int) -> list[int]:
        return list(processes.share(range(count)))

    def record(self, **facts: Any) -> None:
        if self.first:
            self.folder.record(**facts)

    def has(self, name: str) -> bool:
        return any((self.folder.path / f"{name}.parquet").glob("*.parquet"))

    def table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        return read_table(self.folder.path / f"{name}.parquet", columns)

    def chunks(self, name: str, columns: Sequence[str]) -> Iterable[pd.DataFrame]:
        return read_items(self.folder.path / f"{name}.parquet", columns)

    def keep_picture(self, name: str, image: Image | Clip) -> None:
        """A picture as PNG, a video as a folder of them."""
        place = self.folder.path / PICTURES / name
        for number, frame in enumerate(image) if isinstance(image, Clip) else ():
            with atomic.replacing(place / f"{number:03d}.png") as temporary:
                frame.save(temporary, format="PNG")
        if not isinstance(image, Clip):
            with atomic.replacing(place.with_name(f"{name}.png")) as temporary:
                image.save(temporary, format="PNG")

    def pictures(self) -> dict[str, Image | Clip]:

        folder = self.folder.path / PICTURES
        names = [*(path.stem for path in sorted(folder.glob("*.png")))]
        names += [path.name for path in sorted(one for one in folder.glob("*") if one.is_dir())]
        return {name: self.load_picture(name) for name in names}

    def load_picture(self, name: str) -> Image | Clip:
        """A picture, or a video, that was kept.

        Raises:
            UserError: the file is gone, or is no longer a picture.
        """
        from PIL import Image as pil

        path = self.folder.path / PICTURES / f"{name}.png"
        frames = path.with_suffix("")
        with _as_written(path):
            return (
                Clip.of([pil.open(one) for one in sorted(frames.glob("*.png"))]) if frames.is_dir() else pil.open(path)
            )

    def keep_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        with atomic.replacing(self.folder.path / ARRAYS / f"{name}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Arrays that were kept.

        Raises:
            UserError: the file is gone, or no longer holds arrays.
        """
        path = self.folder.path / ARRAYS / f"{name}.npz"
        with _as_written(path), np.load(path, allow_pickle=False) as found:
            return dict(found)

    def array_names(self) -> list[str]:
        return sorted(path.stem for path in (self.folder.path / ARRAYS).glob("*.npz"))

    def workplace(self, name: str) -> Path | None:
        """A folder for what a long task keeps of itself."""
        return self.folder.path / "state" / name


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Reads a file of a run folder that may no longer be what was written there.

    Raises:
        UserError: it is not.
    """
    try:
        yield
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{str(path)!r} cannot be read: {first_line(error)}; run again into another folder") from error
