"""How commands talk: results on stdout, progress and remarks on stderr, one JSON document with `--json`.

output = Output(quiet=False, as_json=False)
with output.progress("prompts", total=50) as advance: ...
output.result({"run": "runs/..."}, tables=[table])
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Table

PIPED_WIDTH = 140
"""Columns when stdout is no terminal: tables are not folded to a width that nobody has."""


class Output:
    """Where the parts of a command's answer go."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False, debug: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        plain: dict[str, Any] = {"highlight": False, "emoji": False, "markup": False}  # names print as they are
        self.out = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, **plain)
        self.log = Console(stderr=True, soft_wrap=True, **plain)
        if not debug:
            hush_libraries()

    def note(self, text: str) -> None:
        """A remark for the person at the terminal, on stderr. Not printed with `-q`."""
        if not self.quiet:
            self.log.print(text, style="yellow")

    def result(self, document: dict[str, Any], tables: Sequence[Table | str] = (), path: object = None) -> None:
        """The answer: `document` with `--json`, `path` with `-q`, otherwise the tables (and lines of text)."""
        if self.as_json:
            print(json.dumps(document, indent=2, default=str, allow_nan=False))
        elif self.quiet:
            if path is not None:
                print(path)
        else:
            for table in tables:
                self.out.print(table)

    @contextmanager
    def progress(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
        """A progress bar with time left, on stderr; yields the function that advances it by one."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.log, disable=self.quiet or self.as_json, transient=True) as bar:
            task = bar.add_task(label, total=total, completed=done)
            yield lambda: bar.advance(task)


def hush_libraries() -> None:
    """Only errors from the libraries underneath: their advice is about calls that users of a command do not make."""
    warnings.filterwarnings("ignore")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
