"""How far a run is, on stderr: what is being loaded, a bar with the time left, remarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from mmdit_probe.experiments.text import TextTable


class Progress:
    """Shown on stderr unless quiet. `bars`: whether bars are drawn (not under `--json`). `render`: how a table is shown
    before all tasks are done; None leaves it out."""

    def __init__(
        self, quiet: bool = False, bars: bool = True, render: Callable[[TextTable, Console], object] | None = None
    ) -> None:
        self.quiet, self.render = quiet, render
        self.bars = bars and not quiet
        self.console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A remark for the person who asked."""
        if not self.quiet:
            self.console.print(text, style="yellow", markup=False)

    def early(self, table: TextTable) -> None:
        """A table of what is done so far."""
        if self.bars and self.render is not None and self.console.is_terminal:
            self.console.print(self.render(table, self.console))

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """`text` with a spinner while the block runs; on no terminal, the text once."""
        if not self.bars:
            yield
        elif not self.console.is_terminal:
            self.console.print(text, markup=False)
            yield
        else:
            from rich.text import Text

            with self.console.status(Text(text)):
                yield

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        """A bar with the time left, by the mean speed since it began: an item may take minutes. Yields the function
        that advances it, by one or by a part of one."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

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
