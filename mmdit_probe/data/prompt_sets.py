"""Prompts from what a user types: a text, a file with one prompt per line, or a named set.

    >>> prompts("a red ring on grass")
    ['a red ring on grass']
    >>> len(prompts("everyday"))
    50

Sets: `scenes:train`, `scenes:val`, `scenes:test` (captions of the embedded world) and `everyday` (50 plain sentences
for models trained on photographs). Every prompt counts once: a repeated line is a repeated measurement.
"""

from __future__ import annotations

import os
import re
from importlib import resources

from mmdit_probe.data.text import lines, read_lines
from mmdit_probe.errors import UserError, unknown
from mmdit_probe.scenes import SPLITS, captions

DEFAULT_COUNT = 50
SETS = ("everyday", *(f"scenes:{split}" for split in SPLITS))

_LOOKS_LIKE_FILE = re.compile(r"\S*(\.(txt|csv|tsv|json|jsonl|md|yaml|yml)|[/\\]\S*)", re.IGNORECASE)
_LOOKS_LIKE_SET = re.compile(r"[\w-]+:[\w-]+")


def prompts(source: str, limit: int | None = None) -> list[str]:
    """The prompts that `source` means: an existing file, else a set name, else the text itself.

    Args:
        source: path of a UTF-8 text file with one prompt per line (blank lines and lines starting with `#` are left
            out), one of `SETS`, or a prompt. The empty text is a prompt: the unconditional one.
        limit: keep the first `limit` prompts; for `scenes:` sets also how many to take (default 50).

    Raises:
        UserError: missing, unreadable or empty file, or an unknown set.
    """
    check_limit(limit)
    if os.path.exists(source):  # False, not an error, for a prompt too long for a path
        found = _of_file(source)
    elif source in SETS:
        found = _set(source, limit or DEFAULT_COUNT)
    elif _LOOKS_LIKE_FILE.fullmatch(source):
        raise UserError(f"no prompts file {source!r}; expected a text file with one prompt per line, a set or a text")
    elif source == "scenes" or _LOOKS_LIKE_SET.fullmatch(source):
        raise unknown("prompt set", source, list(SETS))
    else:
        found = [source]
    return found[:limit]


def check_limit(limit: int | None) -> None:
    """A limit leaves something.

    Raises:
        UserError: it does not.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} leaves nothing to do; expected 1 or more")


def _of_file(source: str) -> list[str]:
    stripped = [line.strip(" \t") for line in read_lines(source, "a text file with one prompt per line")]
    found = [line for line in stripped if line.strip() and not line.startswith("#")]
    if not found:
        raise UserError(f"{source!r} holds no prompt; expected one per line (lines starting with # are left out)")
    return found


def _set(name: str, count: int) -> list[str]:
    if name == "everyday":
        return lines((resources.files("mmdit_probe.data") / "everyday.txt").read_text(encoding="utf-8"))
    return captions(name.removeprefix("scenes:"), count)
