"""How text tables come out on a terminal: in its width, with what was left out named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.experiments.text import TextTable

_ENDLESS = 100_000

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def fitted(table: TextTable, console: Console) -> tuple[Table, str]:
    """The table for a console, without the spare columns that do not fit, and a line that names them."""
    spare, hidden = list(table.spare), list[str]()
    shown = as_rich(table, hidden)
    while spare and _width(shown, console) > console.width:
        if (name := spare.pop(0)) in table.columns:
            hidden.append(name)
            shown = as_rich(table, hidden)
    return shown, f"not shown for lack of width: {', '.join(hidden)} (see the CSV)" if hidden else ""


def _width(shown: Table, console: Console) -> int:
    """Columns that a table needs if nothing in it is folded."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=_ENDLESS), shown).maximum


def as_rich(table: TextTable, hidden: list[str]) -> Table:
    """The table in rich, names as they are (no markup)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    result.title = Text(table.title) if table.title else None
    places = [place for place, name in enumerate(table.columns) if name not in hidden]
    for place in places:
        name = table.columns[place]
        result.add_column(Text(name), justify="left" if name in table.left else "right")
    for row in table.rows:
        result.add_row(*(Text(row[place]) for place in places))
    return result
