"""One folder per command: tables, figures and `run.json`, the record of how they were made.

    runs/<command>/<timestamp>-<short hash>/
        attention_budget.parquet
        run.json
        attention_budget.png, .pdf

    folder = RunFolder.open("attention-budget", request={"layers": "all", "seed": 0})
    folder.record(model={"id": "scenes-sd3", "weight_hash": "..."})
    with TableWriter(folder.path, "attention_budget") as writer: ...
    folder.finish()

The short hash is that of the request (every option that decides the numbers), so that `--resume` finds the unfinished
run of the same request, and refuses to continue another one. A run folder is made when there is something to put into
it: a bad request leaves none behind.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdit_probe.errors import UserError
from mmdit_probe.results.atomic import disk
from mmdit_probe.results.provenance import environment, peak_memory

ROOT = Path("runs")
RECORD = "run.json"


class RunFolder:
    """A run folder that is open for writing. Use `RunFolder.open`.

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
        cls, command: str, request: Mapping[str, Any], *, out: Path | str | None = None, resume: bool = False,
        root: Path | str = ROOT,
    ) -> RunFolder:  # fmt: skip
        """Make a run folder, or find the one to continue.

        Args:
            command: name of the command, the folder's parent.
            request: every option that decides the numbers (JSON values); its hash names the folder.
            out: use this folder instead of `<root>/<command>/<timestamp>-<hash>`.
            resume: continue the run of the same request in `out`, or the latest one under `root`; a finished run is
                opened as it is (`complete`). Starts anew if there is none.

        Raises:
            UserError: `out` holds a run already and `resume` is off, or holds a run of another request.
        """
        request = json.loads(json.dumps(dict(request)))
        now = datetime.datetime.now().astimezone()
        if out is not None:
            path = Path(out)
            old = read_record(path)
            if old is None and path.is_dir() and any(path.iterdir()):
                raise UserError(f"{str(path)!r} is not empty and holds no {RECORD}; choose a new folder for --out")
            if old is not None and not resume:
                raise UserError(f"{str(path)!r} holds a run already; continue it with --resume or choose another --out")
            if old is not None:
                _same_request(path, old, request)
        else:
            found = latest_run(command, request, root=root) if resume else None
            path = found or Path(root) / command / f"{now:%Y%m%d-%H%M%S}-{short_hash(request)}"
            while found is None and path.exists():  # two runs in one second
                path = path.with_name(path.name + "x")
            old = read_record(path)
        with disk(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(
            path, old or {"command": command, "request": request, "created": now.isoformat(timespec="seconds")}
        )
        if not folder.complete:
            folder.record(argv=sys.argv, status="running", environment=environment())
        return folder

    def record(self, **facts: Any) -> None:
        """Add facts to `run.json` (replacing those of the same name)."""
        self.data |= facts
        self.data["wall_seconds"] = round(self._spent_before + time.perf_counter() - self._started, 3)
        self.data["peak_memory_bytes"] = peak_memory()
        temporary = self.path / f"{RECORD}.tmp"
        with disk(self.path / RECORD):
            temporary.write_text(json.dumps(self.data, indent=2, default=str) + "\n", encoding="utf-8")
            os.replace(temporary, self.path / RECORD)

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished."""
        self.record(status="finished", **facts)


def short_hash(request: Mapping[str, Any]) -> str:
    """First eight hex digits of the SHA-256 of the request in canonical JSON."""
    canonical = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def read_record(path: Path | str) -> dict[str, Any] | None:
    """`run.json` of a folder, or None where there is none.

    Raises:
        UserError: the file is there but is not a record.
    """
    file = Path(path) / RECORD
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} is not a run record: {error}") from error
    if not isinstance(data, dict) or "request" not in data:
        raise UserError(f"{str(file)!r} is not a run record: it has no 'request'")
    return data


def latest_run(command: str, request: Mapping[str, Any], *, root: Path | str = ROOT) -> Path | None:
    """The newest run folder of this request, finished or not. None: no such run."""
    wanted = json.loads(json.dumps(dict(request)))
    for path in sorted((Path(root) / command).glob(f"*-{short_hash(wanted)}*"), reverse=True):
        data = read_record(path)
        if data is not None and data["request"] == wanted:
            return path
    return None


def _same_request(path: Path, old: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    before = old["request"]
    for name in sorted({*before, *request}):
        if before.get(name) != request.get(name):
            raise UserError(
                f"cannot continue {str(path)!r}: it was made with {name} = {_short(before.get(name))}, "
                f"this request has {_short(request.get(name))}; choose another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
