"""How text and tables come out on a terminal: in its width, with what was left out named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from textwrap import fill
from typing import TYPE_CHECKING

from mmdit_probe.experiments.progress import say
from mmdit_probe.experiments.text import Text, TextTable

_ENDLESS = 100_000

if TYPE_CHECKING:
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table


def show(text: Text, console: Console, rest: str = "the CSV") -> None:
    """Print a line, or a table below its title. `rest`: where the columns are that do not fit."""
    if isinstance(text, str):
        say(console, text)
        return
    shown, hidden = fitted(text, console)
    if text.title:
        say(console, text.title)
    console.print(shown)
    if hidden:
        say(console, f"not shown for lack of width: {hidden} (see {rest})")


def fitted(table: TextTable, console: Console) -> tuple[Table, str]:
    """The table for a console, and the names of the columns that do not fit: headings are folded first, then the spare
    columns go, then those furthest right. What is flush left, and the first two columns, stay; where these are too
    wide, texts are folded between words."""
    left, hidden = list(range(len(table.columns))), list[str]()
    if _measured(as_rich(table, left), console).maximum > console.width:
        table = _folded(table)
        headings = [_plain(one) for one in table.columns]
        spare = [place for name in dict.fromkeys(table.spare) for place, one in enumerate(headings) if one == name]
        spare += [p for p in reversed(left[2:]) if table.columns[p] not in table.left and p not in spare]
        while spare and _measured(as_rich(table, left), console).maximum > console.width:
            left.remove(place := spare.pop(0))
            hidden.append(_plain(table.columns[place]))
    shown = as_rich(table, left)
    if _measured(shown, console).maximum > console.width:
        for column, place in zip(shown.columns, left, strict=True):
            column.no_wrap = not any(" " in row[place] for row in table.rows)
        if _measured(shown, console).minimum > console.width:
            for column in shown.columns:
                column.no_wrap = False
    return shown, ", ".join(dict.fromkeys(hidden))


def _folded(table: TextTable) -> TextTable:
    """The table with its headings folded to the width of what stands below them."""
    columns = []
    for place, name in enumerate(table.columns):
        widest = max((len(part) for part in (*name.split(), *(row[place] for row in table.rows))), default=1)
        columns.append(fill(name, max(widest, 1), break_long_words=False, break_on_hyphens=False))
    flush = [one for one in columns if _plain(one) in table.left]
    return replace(table, columns=columns, left=flush)


def _plain(heading: str) -> str:
    return heading.replace("\n", " ")


def _measured(shown: Table, console: Console) -> Measurement:
    """Columns that a table needs: `maximum` if nothing in it is folded, `minimum` if all is between words."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=_ENDLESS), shown)


def as_rich(table: TextTable, places: Sequence[int]) -> Table:
    """The columns at these places in rich, names as they are (no markup), without rows that say nothing there."""
    from rich import box
    from rich.table import Table
    from rich.text import Text as Line

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place in places:
        name = table.columns[place]
        result.add_column(Line(name), justify="left" if name in table.left else "right", overflow="fold")
    for row in table.rows:
        if any(row[place] for place in places):
            result.add_row(*(Line(row[place]) for place in places))
    return result
