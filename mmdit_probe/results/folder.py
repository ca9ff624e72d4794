"""One folder per command: tables, figures and `run.json`, the record of how they were made.

    with RunFolder.open("attention-budget", {"layers": "all", "seed": 0}) as folder:
        folder.record(model={"id": "scenes-sd3", "weight_hash": "..."})
        with TableWriter(folder.path, "attention_budget") as writer: ...

The folder, runs/<command>/<timestamp>-<hash of the request>, is made when there is something to put into it; `--resume`
finds the unfinished run of the same request and refuses to continue another one. The block's end marks the run as
finished, interrupted (Ctrl-C, or a process that was killed) or failed. With several processes, process 0 opens it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from mmdit_probe.errors import ProbeError, UserError, brief
from mmdit_probe.results import atomic, processes
from mmdit_probe.results.documents import read_document
from mmdit_probe.results.provenance import environment, is_running, peak_memory, this_process

ROOT = Path("runs")
RECORD = "run.json"
VERSION = 3
"""Of run.json. 2: version, process, reason, and statuses other than running and finished. 3: tables, whose files say
what they are."""

Status = Literal["running", "finished", "interrupted", "failed"]
Said = Callable[[Mapping[str, Any]], Mapping[str, Any]]


AUTO = "auto"
"""Value of `out` that stands for `runs/<command>/<time>-<hash>`."""
FILES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".svg", ".pdf", ".html", ".json", ".csv", ".parquet", ".npz",
    ".safetensors", ".txt", ".md",
)  # fmt: skip
"""Suffixes of what is written into run folders, or might be expected of a command."""


class RunFolder:
    """A run folder that is open for writing. Use `RunFolder.open`, as a context manager.

    Attributes:
        path: the folder.
        data: what `run.json` holds; written anew (atomically) at every `record`.
        complete: the run was finished before it was opened (`resume` of a finished run): nothing is left to do.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data
        self.complete = data.get("status") == "finished"
        self._started = time.perf_counter()
        self._spent_before = float(data.get("wall_seconds", 0.0))

    @classmethod
    def open(
        cls, command: str, request: Mapping[str, Any], *, out: Path | str | None = None, resume: bool | None = None,
        root: Path | str = ROOT, said: Said = dict,
    ) -> RunFolder:  # fmt: skip
        """Make a run folder, or find the one to continue.

        Args:
            command: name of the command, the folder's parent.
            request: every option and input that decides the numbers (JSON values); its hash names the folder.
            out: use this folder instead of `<root>/<command>/<timestamp>-<hash>`.
            resume: continue the run of the same request in `out`, or the latest one under `root`; a finished run is
                opened as it is (`complete`). Starts anew if there is none. None: see `check_out`.
            said: see `latest_run`.

        Raises:
            UserError: `out` holds a run already and `resume` is off, or holds a run of another request; another process
                is writing the run; the folder cannot be written.
        """
        request = json.loads(json.dumps(dict(request)))
        path = Path(out) if out is not None else latest_run(command, request, root=root, said=said) if resume else None
        old = None if path is None else _to_continue(path, command, request, resume, said)
        now = datetime.datetime.now().astimezone()
        if path is None:
            path = _new_folder(Path(root) / command, f"{now:%Y%m%d-%H%M%S}-{short_hash(request)}")
        else:
            _hold(atomic.make_folder(path))
            try:  # of two processes that looked at once, one was first
                old = _to_continue(path, command, request, resume, said)
            except UserError:
                _release(path)
                raise
        made = {"version": VERSION, "command": command, "request": request, "created": now.isoformat()}
        folder = cls(path, made if old is None else old)
        if folder.complete:
            _release(path)
        else:
            folder.begin()
        return folder

    def begin(self) -> None:
        """Mark the run as running, in this process."""
        self.complete = False
        _hold(self.path)
        atomic.remove_leftovers(self.path)
        self.data.pop("reason", None)
        self.record(argv=sys.argv, process=this_process(), environment=environment(), status="running")

    def record(self, **facts: Any) -> None:
        """Add facts to `run.json` (replacing those of the same name).

        Raises:
            UserError, RunError: as `atomic.replacing`.
        """
        self.data |= facts
        self.data["wall_seconds"] = round(self._spent_before + time.perf_counter() - self._started, 3)
        self.data["peak_memory_bytes"] = peak_memory()
        if processes.rank() == 0:
            atomic.write_json(self.path / RECORD, self.data)

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished."""
        self._end("finished", **facts)

    def fail(self, reason: str) -> None:
        """Mark the run as failed, and say why."""
        self._end("failed", reason=reason)

    def _end(self, status: Status, **facts: Any) -> None:
        self.data.pop("process", None)
        try:
            self.record(status=status, **facts)
        finally:
            _release(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.data.get("status") != "running":  # complete before, or ended in the block
            return
        if error is None:
            self.finish()
            return
        with suppress(ProbeError):  # a full disk: the error that ended the block is the one to show
            if isinstance(error, Exception):
                self.fail(str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}")
            else:
                self._end("interrupted")


def short_hash(request: Mapping[str, Any]) -> str:
    """First eight hex digits of the SHA-256 of the request in canonical JSON."""
    canonical = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def read_record(path: Path | str) -> dict[str, Any] | None:
    """`run.json` of a folder, or None where there is none. A run whose process is gone reads as interrupted.

    Raises:
        UserError: no path; the file is there but is not a record, or was written by a newer version.
    """
    file = _folder(path) / RECORD
    if not file.is_file():
        return None
    data = read_document(file, "run record", VERSION)
    wrong = next((name for name, fits in _ENTRIES.items() if not fits(data.get(name))), None)
    if wrong is not None:
        found = f"its {wrong!r} is {_short(data[wrong])}" if wrong in data else f"it has no {wrong!r}"
        raise UserError(f"{str(file)!r} is not a run record: {found}")
    if data["status"] == "running" and not (data.get("process") and is_running(data["process"])):
        data["status"] = "interrupted"
    return data


def _folder(path: Any) -> Path:
    """A folder's path, as a user gave it."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{brief(path)} is no folder; expected its path")
    return Path(path)


def _moment(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.datetime.fromisoformat(value))
    except ValueError:
        return False


def _process(value: Any) -> bool:
    """Whether this is what `this_process` gives, or nothing (version 1, or a run that ended)."""
    if value is None:
        return True
    kinds = {"pid": int, "host": str, "started": int | float}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "request": lambda value: isinstance(value, dict),
    "command": lambda value: isinstance(value, str),
    "status": lambda value: value in get_args(Status),
    "created": _moment,
    "process": _process,
    "model": lambda value: value is None or (isinstance(value, dict) and isinstance(value.get("id"), str)),
    "tables": lambda value: value is None or (isinstance(value, dict) and all(type(n) is int for n in value.values())),
    "wall_seconds": lambda value: value is None or isinstance(value, int | float),
}
"""Entries of a record that this module goes by, each with what tells a sound one."""


def latest_run(command: str, request: Mapping[str, Any], *, root: Path | str = ROOT, said: Said = dict) -> Path | None:
    """The newest run folder of this request, by its record, finished or not. None: no such run.

    Args:
        said: a request with all said that it leaves to defaults: what was asked for in other words is the same.
    """
    wanted = said(json.loads(json.dumps(dict(request))))
    runs = []
    for path in (Path(root) / command).glob("*/"):
        with suppress(UserError):  # no record, or one of a newer version: not this run
            data = read_record(path)
            if data is not None and said(data["request"]) == wanted:
                runs.append((datetime.datetime.fromisoformat(data["created"]).astimezone(), path.name, path))
    return max(runs)[-1] if runs else None


def check_out(out: Path | str | None, resume: bool | None = None, command: str = "") -> dict[str, Any] | None:
    """Refuse a folder that no run can be written into, before anything is computed.

    Of several processes only the first looks: by the time the others do, it may be writing there.

    Args:
        out: the folder, which may not be there yet; "auto": one of a name of its own in `ROOT`; None: there is none.
        resume: it may hold a run, of `command` if that is named; None: what writes there cannot continue one.

    Returns: the record of the run that it holds.

    Raises:
        UserError: it is a file, or is called like one; it holds other things, or a run that is not to be continued.
    """
    if out is None or processes.rank() != 0:
        return None
    if out == AUTO:
        if not resume:  # a finished run is only shown
            _check_place(ROOT)
        return None
    path = _folder(out)
    if path.suffix.lower() in FILES:
        raise UserError(
            f"--out {str(path)!r} is called like a file; it names the folder that files of known names are written "
            f"into: {str(path.with_suffix(''))!r}"
        )
    with atomic.disk(path):  # a name that no file can have
        old = read_record(path)
        check_folder(path, "--out")
        if old is None:
            _check_place(path)
    if old is None and path.is_dir() and any(not one.name.endswith(atomic.SUFFIX) for one in path.iterdir()):
        raise UserError(f"{str(path)!r} is not empty and holds no {RECORD}; choose a new folder for --out")
    if old is not None and not resume:
        advice = "" if resume is None else "continue it with --resume or "
        raise UserError(f"{str(path)!r} holds a run already; {advice}choose another --out")
    if old is not None and old["command"] != (command or old["command"]):
        raise UserError(f"{str(path)!r} holds a run of {old['command']}, not of {command}; choose another --out")
    return old


def check_folder(path: Path, what: str) -> None:
    """Refuse a file where an option (`what`) names a folder to write into."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{what} {str(path)!r} is a file; choose another folder with {what}")


def _check_place(path: Path) -> None:
    """Refuse a folder that cannot be made or written into."""
    above = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not _takes_folders(above):
        why = "nothing may be written there" if above.is_dir() else "it is a file"
        raise UserError(f"--out {str(path)!r}: {str(above)!r} is no place for it, {why}; choose another folder")


def _takes_folders(path: Path) -> bool:
    """Whether a folder can be made in this one: permissions do not tell it of `/proc`, nor to an administrator."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".", suffix=atomic.SUFFIX, dir=path))
    except OSError:
        return False
    return True


def _to_continue(
    path: Path, command: str, request: Mapping[str, Any], resume: bool | None, said: Said
) -> dict[str, Any] | None:
    """The record of the run in a folder, if it may be continued; None for a folder that is free."""
    old = check_out(path, resume, command)
    if old is None:
        return None
    _same_request(path, said(old["request"]), said(request))
    here, writer = this_process(), old.get("process", {})
    if old["status"] == "running" and (writer["pid"], writer["host"]) != (here["pid"], here["host"]):
        gone = f' (if it is gone: set "status" to "interrupted" in {RECORD})' if writer["host"] != here["host"] else ""
        raise UserError(
            f"process {writer['pid']} on {writer['host']} is writing {str(path)!r}; wait for it{gone} or choose another"
            " --out"
        )
    return old


_held: dict[str, int] = {}
"""Folders that this process writes, by their real path, each open with a lock on it."""


def _hold(path: Path) -> None:
    """Keep a folder for this process until `_release`, or its end: the system knows of it whatever the clock says, and
    forgets it with a process that is killed. Without effect where the system, or the disk, has no such locks.

    Raises:
        UserError: another process has it.
    """
    place = os.path.realpath(path)
    if fcntl is None or place in _held:
        return
    with suppress(OSError):
        _held[place] = os.open(place, os.O_RDONLY)
        try:
            fcntl.flock(_held[place], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            _release(path)
            raise UserError(f"another process is writing {str(path)!r}; wait for it or choose another --out") from error


def _release(path: Path) -> None:
    """Let another process have a folder."""
    number = _held.pop(os.path.realpath(path), None)
    if number is not None:
        os.close(number)


def _new_folder(parent: Path, name: str) -> Path:
    """An empty folder of this name, or of a longer one where another run of the same second has it."""
    atomic.make_folder(parent)
    while True:
        path = parent / name
        with atomic.disk(path), suppress(FileExistsError):
            path.mkdir()
            return path
        name += "x"


def _same_request(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = list(differences(before, now))
    if differing:
        name, was, asked = differing[0]
        others = f" (and {len(differing) - 1} more differ)" if len(differing) > 1 else ""
        raise UserError(
            f"cannot continue {str(path)!r}: it was made with {name} = {_short(was)}, this request has {_short(asked)}"
            f"{others}; choose another --out"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, before, now) of each option that differs; entries of nested ones, such as the inputs, on their own, and
    those of lists that look the same from the start."""
    for name in sorted({*before, *now}):
        was, asked = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(asked, dict):
            yield from differences(was, asked, f"{at}{name}: ")
        elif isinstance(was, list) and isinstance(asked, list) and was != asked and _short(was) == _short(asked):
            if len(was) != len(asked):
                yield f"{at}number of {name}", len(was), len(asked)
            else:
                yield from differences(_numbered(was), _numbered(asked), f"{at}{name}: ")
        elif was != asked:
            yield f"{at}{name}", was, asked


def _numbered(values: list[Any]) -> dict[str, Any]:
    return {f"[{number}]": value for number, value in enumerate(values)}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
