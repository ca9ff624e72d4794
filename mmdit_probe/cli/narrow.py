"""`--help` where there are fewer than 80 columns: headings and names stay, what an option does is folded beside them.

typer's panels, drawn by rich, cut the names of options to what they leave of the width.
"""

from __future__ import annotations

from textwrap import wrap
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand

PANELLED = 78
"""Width of a text on 80 columns."""
NAMES = 20
"""Most columns of names and types that are set beside what an option does; longer ones stand above it."""


class Command(TyperCommand):
    """A command whose help is in panels where these fit."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if formatter.width >= PANELLED:
            super().format_help(ctx, formatter)
            return
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        self.format_options(ctx, formatter)
        lines = (self.epilog or "").replace(r"\[", "[").split("\n\n")  # whole: they are for copying
        formatter.write("\n" + "\n".join(lines) + "\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for one in self.get_params(ctx):
            told = one.get_help_record(ctx)
            if told is not None:
                unnamed = "Arguments" if isinstance(one, TyperArgument) else "Options"
                panels.setdefault(getattr(one, "rich_help_panel", None) or unnamed, []).append(told)
        for name, rows in panels.items():
            with formatter.section(name):
                for names, help_text in rows:
                    formatter.write("".join(f"{line}\n" for line in row(names, help_text, formatter.width)))


def row(first: str, told: str, width: int) -> list[str]:
    """The lines of an option: its names and type, and beside or below them what it does; broken at blanks alone."""
    whole: dict[str, Any] = {"width": width, "break_long_words": False, "break_on_hyphens": False}
    beside = " " * (NAMES + 4)
    names = wrap(first, initial_indent="  ", subsequent_indent="    ", **whole)
    lines = wrap(told, initial_indent=beside, subsequent_indent=beside, **whole)
    if lines and len(names) == 1 and len(first) <= NAMES:
        return [names[0] + lines[0][len(names[0]) :], *lines[1:]]
    return [*names, *lines]


class App(typer.Typer):
    """A group of such commands."""

    def command(self, name: str | None = None, **how: Any) -> Any:
        return super().command(name, **{"cls": Command} | how)
