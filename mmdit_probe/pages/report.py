"""The report's page: what was measured on a model, section by section, figures inside.

    report("scenes-sd3", ["what this is"], [Section("Attention budget", ["..."], [table])]).save("index.html")

Not here: which experiments are run and what they say (`experiments.report`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from mmdit_probe.pages.page import Page, data_url


@dataclass(frozen=True, eq=False)
class Section:
    """A part of a report.

    Attributes:
        title: plain text. lines: paragraphs, plain text. tables: as HTML. figures: PNG files' bytes by what they show,
            in words. answer: the one line that the overview quotes.
    """

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[str] = ()
    figures: dict[str, bytes] = field(default_factory=dict)
    answer: str = ""


def report(
    title: str, summary: Sequence[str], sections: Sequence[Section], links: Mapping[str, str] | None = None
) -> Page:
    """The page of sections, with an overview that leads to them.

    Args:
        title, summary: plain text. links: text -> name of a file beside the page.
    """
    marks = [f"{number}-{re.sub(r'[^a-z]+', '-', one.title.lower())}" for number, one in enumerate(sections)]
    overview = "".join(
        f'<li><a href="#{mark}">{escape(one.title)}</a>{": " if one.answer else ""}{escape(one.answer)}</li>'
        for mark, one in zip(marks, sections, strict=True)
    )
    overview += "".join(f'<li><a href="{escape(file)}">{escape(text)}</a></li>' for text, file in (links or {}).items())
    parts = "".join(_section(mark, one) for mark, one in zip(marks, sections, strict=True))
    lines = "".join(f"<p>{escape(line)}</p>" for line in summary)
    body = (
        f'<div class="report"><h1>{escape(title)}</h1>{lines}<nav aria-label="Sections"><ul>{overview}</ul></nav>'
        f"{parts}</div>"
    )
    return Page.of(title, body)


def _section(mark: str, one: Section) -> str:
    figures = "".join(
        f'<figure class="wide"><img alt="{escape(what)}" src="{data_url(drawn)}"></figure>'
        for what, drawn in one.figures.items()
    )
    tables = "".join(f'<div class="wide">{table}</div>' for table in one.tables)
    folded = f"<details><summary>numbers</summary>{tables}</details>" if tables else ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in one.lines)
    title = f'<h2 id="{mark}">{escape(one.title)}</h2>'
    return f'<section aria-labelledby="{mark}">{title}{figures}{lines}{folded}</section>'
