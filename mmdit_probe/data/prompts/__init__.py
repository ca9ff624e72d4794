"""Prompts from what a user types: a text, a file with one prompt per line, or a named set.

    >>> from mmdit_probe.data.prompts import resolve
    >>> resolve("a red ring on grass")
    ['a red ring on grass']
    >>> len(resolve("everyday"))
    50

Sets: `scenes:train`, `scenes:val`, `scenes:test` (captions of the embedded world, first 50 unless a limit is given) and
`everyday` (50 plain sentences written for this toolkit, for models trained on photographs). Every prompt counts once: a
repeated line is a repeated measurement.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from mmdit_probe.errors import UserError, unknown

DEFAULT_COUNT = 50
SPLITS = ("train", "val", "test")
SETS = ("everyday", *(f"scenes:{split}" for split in SPLITS))

_LOOKS_LIKE_FILE = re.compile(r"\S*(\.(txt|csv|tsv|json|jsonl|md|yaml|yml)|[/\\]\S*)")
_LOOKS_LIKE_SET = re.compile(r"[\w-]+:[\w-]+")


def resolve(source: str, limit: int | None = None) -> list[str]:
    """The prompts that `source` means: an existing file, else a set name, else the text itself.

    Args:
        source: path of a UTF-8 text file with one prompt per line (blank lines and lines starting with `#` are left
        out),
            one of `SETS`, or a prompt. The empty text is a prompt: the unconditional one.
        limit: keep the first `limit` prompts; for `scenes:` sets also how many to take (default 50).

    Raises:
        UserError: missing, unreadable or empty file, or an unknown set.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves nothing to do; expected 1 or more")
    if _is_file(source):
        prompts = _read(Path(source))
    elif source in SETS:
        prompts = _set(source, limit or DEFAULT_COUNT)
    elif _LOOKS_LIKE_FILE.fullmatch(source):
        raise UserError(f"no prompts file {source!r}; expected a text file with one prompt per line, a set or a text")
    elif source == "scenes" or _LOOKS_LIKE_SET.fullmatch(source):
        raise unknown("prompt set", source, list(SETS))
    else:
        prompts = [source]
    return prompts[:limit]


def _is_file(source: str) -> bool:
    try:
        return bool(source) and Path(source).exists()
    except OSError:  # a long prompt is not a valid path
        return False


def _read(path: Path) -> list[str]:
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; expected a text file with one prompt per line")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"{str(path)!r} holds no prompt; expected one per line (lines starting with # are left out)")
    return prompts


def _set(name: str, count: int) -> list[str]:
    if name == "everyday":
        return (resources.files(__name__) / "everyday.txt").read_text(encoding="utf-8").splitlines()
    from mmdit_probe import scenes

    return list(scenes.captions(name.removeprefix("scenes:"), count))
