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
    from rich.console import Console, JustifyMethod
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
    columns go; then texts that are flush left are folded between words, and the columns furthest right go. What is
    flush left, and the first two columns, stay; where these are too wide, all that has blanks is folded."""

    def fits(*folding: int) -> bool:
        return _width(as_rich(table, left, folding), console) <= console.width

    left, hidden = list(range(len(table.columns))), list[int]()
    if not fits():
        table = _folded(table)
    headings = [_plain(one) for one in table.columns]
    flush = [place for place in left if table.columns[place] in table.left]
    spare = [place for name in dict.fromkeys(table.spare) for place, one in enumerate(headings) if one == name]
    last = [place for place in left[:1:-1] if place not in flush and place not in spare]
    for places, folding in ((spare, ()), (last, flush)):
        for place in places:
            if fits(*folding):
                break
            left.remove(place)
            hidden.append(place)
    blank = [place for place in left if any(" " in row[place] for row in table.rows)]
    folding = next((places for places in ([], flush, blank) if fits(*places)), left)
    return as_rich(table, left, folding), ", ".join(dict.fromkeys(_told(headings, place, left) for place in hidden))


def _told(headings: Sequence[str], place: int, left: Sequence[int]) -> str:
    """The heading of a column that is left out; where others of the name stay, with what it is of, which stands before
    it."""
    name = headings[place]
    if name not in [headings[one] for one in left]:
        return name
    return f"{name} of {next(one for one in reversed(headings[:place]) if headings.count(one) == 1)}"


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
    """Columns of the terminal that a table needs, whatever may be folded in it being folded."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=_ENDLESS), shown).minimum


def as_rich(table: TextTable, places: Sequence[int], folding: Sequence[int] = ()) -> Table:
    """The columns at these places in rich, names as they are (no markup), without rows that say nothing there.

    Args:
        folding: places of the columns whose texts may be folded between words.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text as Line

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place in places:
        name = table.columns[place]
        justify: JustifyMethod = "left" if name in table.left else "right"
        lines = (line for cell in (name, *(row[place] for row in table.rows)) for line in cell.split("\n"))
        whole = None if place in folding else max(map(cell_len, lines))
        result.add_column(Line(name), justify=justify, overflow="fold", no_wrap=whole is not None, min_width=whole)
    for row in table.rows:
        if any(row[place] for place in places):
            result.add_row(*(Line(row[place]) for place in places))
    return result
