"""What results say in words and small tables, before a terminal, a notebook or a markdown file shows it."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import counted
from mmdit_probe.results.statistics import A_VERDICT_TAKES, NOT_ABOVE, TOO_FEW

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TextTable:
    """A table of cells that are text already.

    Attributes:
        columns: headings. rows: cells, as many as columns. left: columns that are set flush left.
        title: a line above. spare: columns that a narrow terminal leaves out, the first one first; after them it leaves
            out those furthest right that are not in `left`.
    """

    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    left: Sequence[str] = ()
    title: str = ""
    spare: Sequence[str] = ()

    def add(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(list(cells))

    def markdown(self) -> str:
        """The table as GitHub-flavoured markdown."""
        lines = [self.columns, ["-" if name in self.left else "-:" for name in self.columns], *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)

    def html(self) -> str:
        """The table as HTML, everything in it escaped; a number and its interval stay on one line."""
        from html import escape

        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in map(escape, cells)) + "</tr>"

        whole = (
            [cell.replace(" ", "\N{NO-BREAK SPACE}") if len(cell) <= 32 else cell for cell in cells]
            for cells in self.rows
        )
        body = "".join(row(cells, "td") for cells in whole)
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}<thead>{row(self.columns, 'th')}</thead><tbody>{body}</tbody></table>"


Text = str | TextTable


def page(what: str, figure: Figure, texts: Iterable[Text]) -> str:
    """A figure with tables and lines below it as HTML, for a notebook; `what` describes the picture."""
    from html import escape

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    picture = base64.b64encode(buffer.getvalue()).decode()
    parts = [text.html() if isinstance(text, TextTable) else f"<p>{escape(text)}</p>" for text in texts]
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{picture}">' + "".join(parts)


def share(value: Any) -> str:
    """Three digits, as the paper's tables print shares: .785; nothing for NaN."""
    return "" if value != value else re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}")


def signed(value: Any, low: Any, high: Any, digits: int = 3) -> str:
    """A difference with its interval: +0.031 [+0.010, +0.052]; without one where there is none."""
    return bounded(value, low, high, digits, "+")


def bounded(value: Any, low: Any, high: Any, digits: int = 3, sign: str = "-") -> str:
    """A value with its interval: 0.731 [0.680, 0.782]; nothing for NaN. `sign`: "+" shows it of positive ones too."""
    if value != value:
        return ""
    as_text = f"{sign}.{digits}f"
    bounds = "" if low != low else f" [{low:{as_text}}, {high:{as_text}}]"
    return f"{value:{as_text}}{bounds}"


def claim_table(claims: pd.DataFrame) -> TextTable:
    """A measurement beside its controls, from rows of `results.statistics.compare`."""
    values = ["n", "value", "control_value", "difference", "low", "high", "verdict"]
    # Columns that say nothing here (every head, every span) are left to the CSV.
    names = [c for c in claims.columns if c not in values and (c == "layer" or claims[c].nunique() > 1)]
    names = [c for c in names if c in _PLACES]
    names += [] if "control" in names else ["control"]
    return paired_table(claims, names, {"value": "value", "control's": "control_value"})


def paired_table(rows: pd.DataFrame, names: Sequence[str], both: Mapping[str, str]) -> TextTable:
    """The columns `names`, two means (heading -> column), and their difference with its interval and verdict."""
    columns = [*names, "n", *both, "difference", "verdict"]
    texts = [name for name in names if name not in _NUMBERED]
    table = TextTable(columns, left=(*texts, "verdict"), spare=(*[*both][::-1], "n"))
    for row in rows.to_dict("records"):
        means = (bounded(row[column], float("nan"), float("nan")) for column in both.values())
        difference = signed(row["difference"], row["low"], row["high"])
        places = ("all" if name in _NUMBERED and row[name] == -1 else str(row[name]) for name in names)
        table.add(*places, str(row["n"]), *means, difference, str(row["verdict"]))
    return table


_NUMBERED = ("layer", "head")
"""Columns of places that count from 0; -1 in them is all together."""
_PLACES = ("layer", "layers", "head", "span", "kind", "evidence", "scale", "measure", "outcome", "control")


def claim_lines(claims: pd.DataFrame, claim: str, explained: dict[str, str]) -> list[str]:
    """What was claimed, against what, and in how many comparisons it failed.

    Args:
        claims: the rows that are told. claim: what the value says. explained: control -> what it is.
    """
    known = "; ".join(f"{name}: {explained.get(name, name)}" for name in dict.fromkeys(claims["control"]))
    failed, undecided = (int((claims["verdict"] == verdict).sum()) for verdict in (NOT_ABOVE, TOO_FEW))
    decided = len(claims) - undecided
    of_all = counted(decided, "comparison is not above its control", "comparisons are not above their control")
    verdict = f"{failed} of {of_all}." if decided else ""
    if undecided:
        of = "The comparison has" if undecided == 1 else f"All {undecided} comparisons have"
        of = counted(undecided, "more has", "more have") if decided else of
        verdict = f"{verdict} {of} too few items: {A_VERDICT_TAKES}.".lstrip()
    claimed = (
        f"Claim: {claim}. Paired differences over items, 95 % interval; verdicts are corrected for many comparisons"
        f" (Holm). Controls: {known}."
    )
    return [claimed, verdict]


def records(value: Any) -> Any:
    """Data frames and arrays as JSON values: what is not finite (NaN: no interval with one item) becomes null."""
    if isinstance(value, pd.DataFrame):
        return [{str(name): records(cell) for name, cell in row.items()} for row in value.to_dict("records")]
    if isinstance(value, dict):
        return {str(name): records(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [records(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return records(value.tolist()) if hasattr(value, "tolist") else value
