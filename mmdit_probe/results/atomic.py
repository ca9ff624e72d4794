"""Files under their final names: complete or absent, whatever happens while they are written.

    write_json(folder / "index.json", index)
    with replacing(folder / "weights.safetensors") as temporary:
        save_file(tensors, temporary)

Everything the package writes where somebody may look for it goes through here: under a temporary name in the same
folder, flushed to the disk, then renamed. A write that fails is one line that names the file and the reason.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mmdit_probe.errors import RunError, UserError, first_line

SUFFIX = ".partial"
"""How temporary names end. A file of this name is what a killed process left."""

_advice: ContextVar[str] = ContextVar("advice", default="free some space and run again")
"""What to do when the disk is full."""

_REFUSED = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
}
_NOT_OSERROR = re.compile(r"\(os error (\d+)\)|PytorchStreamWriter failed|unexpected pos")
"""How safetensors (written in Rust) and torch.save tell that the system refused a write."""


@contextmanager
def resumable() -> Iterator[None]:
    """The block in which a run writes that `--resume` continues: there a full disk's message says so."""
    before = _advice.set("finished items are kept; free some space and continue with --resume")
    try:
        yield
    finally:
        _advice.reset(before)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, which becomes `path` when the block ends and is removed when it fails.

    The temporary name ends in ".partial": tell the writer its format. Missing folders are made. What stands under
    `path` stays there until the new file is complete.

    Raises:
        UserError: `path` cannot be written (no rights, a file or a folder in the way).
        RunError: the disk is full, or writing failed otherwise; also where the block wrote nothing.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex[:8]}{SUFFIX}")
    try:
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if not temporary.exists():
                raise RunError(f"writing {str(path)!r} failed: nothing was written")
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        _discard(temporary)


def write_bytes(path: Path | str, data: bytes) -> Path:
    """Write a file; errors as in `replacing`. Returns: the path."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file: UTF-8, lines as they stand on every system. Errors as in `replacing`."""
    return write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> Path:
    """Write indented JSON; values that JSON does not know as their text. Errors as in `replacing`."""
    return write_text(path, json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The value with null for NaN, and infinite numbers as their text: a scheduler's bound may be -inf."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(float(value))
    return value


def letters(text: str) -> str:
    """What of a text can stand in a file's name on every system: letters and digits, at most 40, else "-".

    Not unique, and maybe a name that Windows keeps for a device: put a number before it.
    """
    return re.sub(r"\W+", "-", text)[:40].strip("-")


def make_folder(path: Path | str) -> Path:
    """Make a folder and those above it; errors as in `replacing`. Returns: the path."""
    with disk(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def remove_leftovers(folder: Path | str) -> None:
    """Remove the temporary files that killed processes left in a folder and below it. Only while nothing else writes
    there."""
    with disk(folder):
        for path in Path(folder).rglob(f"*{SUFFIX}"):
            path.unlink(missing_ok=True)


@contextmanager
def disk(path: Path | str) -> Iterator[None]:
    """Turns a write that the system refuses into one line. For writers that stream; others use `replacing`.

    Args:
        path: what is being written.

    Raises:
        UserError: no rights, or something in the way. RunError: the disk is full, or writing failed otherwise.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        code = _code(error)
        if code is None:
            raise
        reason = os.strerror(code) if code else first_line(error)
        if code in _REFUSED:
            raise UserError(f"cannot write {str(path)!r}: {reason}; choose another folder") from error
        raise RunError(f"writing {str(path)!r} failed: {reason}; {_advice.get()}") from error


def _code(error: Exception) -> int | None:
    """The system's error number, 0 where it is not told; None for an error that is not about writing."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = _NOT_OSERROR.search(str(error))
    return int(told[1] or 0) if told else None


def _flush(path: Path) -> None:
    """Bring a closed file to the disk, so that the rename cannot get there before the contents."""
    with open(path, "rb+") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def _discard(path: Path) -> None:
    with suppress(OSError):  # Windows: a writer that failed still holds it open; its name says what it is
        path.unlink(missing_ok=True)
