"""How far a run is, on stderr: what is being loaded, a bar with the time left, remarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from mmdit_probe.experiments.text import TextTable

PROSE = 80
"""Columns of what is said in words, on terminals that are wider and in pipes too."""


def say(console: Console, text: str, **how: Any) -> None:
    """Print text as it is (no markup), its lines broken between words; a path longer than a line stays whole."""
    from rich.text import Text

    lines = [row for line in text.split("\n") for row in _rows(line, min(PROSE, console.width))]
    console.print(Text("\n".join(lines), **how), soft_wrap=True)


def _rows(line: str, width: int) -> Iterator[str]:
    """A line broken between words; rich breaks paths too, and textwrap does not know signs of two columns."""
    from rich.cells import cell_len

    row, *words = line.split(" ")
    for word in words:
        if row and cell_len(f"{row} {word}") > width:
            yield row
            row = word
        else:
            row = f"{row} {word}"
    yield row


class Progress:
    """Shown on stderr unless quiet. `bars`: whether bars are drawn (not under `--json`). `show`: prints a table before
    all tasks are done; None leaves it out."""

    def __init__(
        self, quiet: bool = False, bars: bool = True, show: Callable[[TextTable, Console], None] | None = None
    ) -> None:
        self.quiet, self.show = quiet, show
        self.bars = bars and not quiet
        self.console = Console(stderr=True, highlight=False, emoji=False)

    def note(self, text: str) -> None:
        """A remark for the person who asked."""
        if not self.quiet:
            say(self.console, text, style="yellow")

    def early(self, table: TextTable) -> None:
        """A table of what is done so far."""
        if self.bars and self.show is not None and self.console.is_terminal:
            self.show(table, self.console)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """`text` with a spinner while the block runs; on no terminal, the text once."""
        if not self.bars:
            yield
        elif not self.console.is_terminal:
            say(self.console, text)
            yield
        else:
            from rich.text import Text

            with self.console.status(Text(text)):
                yield

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        """A bar with the time left, by the mean speed since it began: an item may take minutes. Yields the function
        that advances it, by one or by a part of one."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress as Bar,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        how: dict[str, Any] = {"console": self.console, "disable": not self.bars, "transient": True}
        with Bar(*columns, speed_estimate_period=math.inf, **how) as shown:
            task = shown.add_task(label, total=total, completed=done)
            shown.advance(task, 0)  # the first reading of the speed: the time left is known after one advance
            at = [float(done)]

            def advance(items: float = 1) -> None:
                at[0] = round(at[0] + items, 6)  # parts of one add up to one
                shown.update(task, completed=at[0])

            yield advance
