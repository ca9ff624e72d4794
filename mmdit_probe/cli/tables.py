"""How text tables come out on a terminal: in its width, with what was left out named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from textwrap import fill
from typing import TYPE_CHECKING

from mmdit_probe.experiments.text import TextTable

_ENDLESS = 100_000

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def fitted(table: TextTable, console: Console) -> tuple[Table, str]:
    """The table for a console, and a line that names the columns that do not fit: headings are folded first, then the
    spare columns go, then those furthest right. What is flush left, and the first two columns, stay."""
    left, hidden = list(range(len(table.columns))), list[str]()
    if _width(as_rich(table, left), console) > console.width:
        table = _folded(table)
        spare = [place for name in table.spare for place, one in enumerate(table.columns) if _plain(one) == name]
        spare += [p for p in reversed(left[2:]) if table.columns[p] not in table.left and p not in spare]
        while spare and _width(as_rich(table, left), console) > console.width:
            left.remove(place := spare.pop(0))
            hidden.append(_plain(table.columns[place]))
    said = ", ".join(dict.fromkeys(hidden))
    return as_rich(table, left), f"not shown for lack of width: {said} (see the CSV)" if hidden else ""


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


def _width(shown: Table, console: Console) -> int:
    """Columns that a table needs if nothing in it is folded."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=_ENDLESS), shown).maximum


def as_rich(table: TextTable, places: Sequence[int]) -> Table:
    """The columns at these places in rich, names as they are (no markup)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    result.title = Text(table.title) if table.title else None
    for place in places:
        name = table.columns[place]
        result.add_column(Text(name), justify="left" if name in table.left else "right")
    for row in table.rows:
        result.add_row(*(Text(row[place]) for place in places))
    return result
