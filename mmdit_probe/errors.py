"""What goes wrong, in one line for the person who asked.

`UserError` is a request that cannot be met (exit code 2), `RunError` is a failure on the way (exit code 1). The command
line prints the message and nothing else. A message says what was found, what was expected and what to do:

    >>> from mmdit_probe.errors import unknown
    >>> print(unknown("class", "hous", ["house", "ring"]))
    unknown class 'hous': did you mean 'house'? Known: house, ring

This module is not for bugs: those keep their traceback.
"""

from __future__ import annotations

import difflib
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Iterable, Sequence


class ProbeError(Exception):
    """Base of every error this package raises on purpose. `exit_code` is the process's exit status."""

    exit_code = 1


class UserError(ProbeError):
    """A bad request: an unknown name, an unreadable file, a model that cannot be probed. Exit code 2."""

    exit_code = 2


class RunError(ProbeError):
    """A failure of something that was asked for correctly. Exit code 1."""

    exit_code = 1


class ProbeWarning(UserWarning):
    """What this package warns of. Commands show it as a remark."""


MISSHAPEN = (LookupError, TypeError, ValueError, OverflowError, AttributeError, MemoryError, RecursionError)
"""What it raises to read a document whose entries are missing, of another kind, or too large."""


def is_text(text: str) -> bool:
    """Whether a name or an argument can be written: bytes that are not UTF-8 come as lone surrogates, NUL ends it."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def brief(value: object, most: int = 100) -> str:
    """A value for a message: its repr on one line, an array, a table or a model cut off."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number and what it counts: 1 picture, 2 pictures. `many`: where more than an s is added to `one`."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def check_pairs(images: Sequence[object], prompts: Sequence[object]) -> None:
    """Refuse images and prompts that are not as many."""
    if len(images) != len(prompts):
        told = f"{counted(len(images), 'image')} for {counted(len(prompts), 'prompt')}"
        raise UserError(f"{told}; give one prompt per image")


def run_script(main: Callable[[], None]) -> None:
    """Run a script beside the package: a request that cannot be met ends in one line, as that of a command does."""
    try:
        main()
    except (ProbeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


def at_least(low: int) -> Callable[[str], int]:
    """What an option of such a script is read by: a whole number of at least `low`."""

    def number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < low:
            raise ArgumentTypeError(f"{text!r}; expected a whole number of at least {low}")
        return int(text)

    return number


def unknown(kind: str, found: object, known: Iterable[object], limit: int = 12) -> UserError:
    """The error for a name that does not exist, with the closest match and the names that do.

    Args:
        kind: what the name stands for, e.g. "class" or "layer".
        found: the name that was asked for.
        known: the names that exist, in the order to print them.
        limit: at most this many known names are printed.

    Returns: an unraised `UserError`, so that the caller writes `raise unknown(...)`.
    """
    names = [str(name) for name in known]
    longer = [name for name in names if len(name) > 1]  # a single letter is like any short word that has it
    close = difflib.get_close_matches(str(found), longer, n=1, cutoff=0.5)
    hint = f" did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
    return UserError(f"unknown {kind} {str(found)!r}:{hint} Known: {listed or 'none'}")


def check_known(kind: str, found: object, known: Collection[object]) -> None:
    """Refuse a name that is not among those that exist: raises the `UserError` of `unknown`."""
    try:
        there = found in known
    except TypeError:  # a list among the keys of a mapping
        there = False
    if not there:
        raise unknown(kind, found, known)
