"""The only reader of text files: UTF-8, with or without a byte order mark; lines end at newline characters only.

    >>> lines("one\\u2028still one\\r\\ntwo\\n")
    ['one\\u2028still one', 'two']

Not here: what lines mean (prompts, class names, listings).
"""

from __future__ import annotations

import json
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from mmdit_probe.errors import UserError

STRUCTURED = (".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml")
"""Files whose lines are no prompts and no names: with a header, quotes or brackets they would be read as such."""
_NEWLINE = re.compile(r"\r\n|\n|\r")
_KINDS = (
    (stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"),
    (stat.S_ISSOCK, "socket"),
)  # fmt: skip


def regular(path: Path | str, expected: str, what: str = "file") -> Path:
    """A path that is a regular file or a link to one: opening anything else may wait for ever or never end.

    Args:
        expected: what the file should be, for the message: "a text file". what: and what it is called.

    Raises:
        UserError: not there, a folder, a pipe, a device, or a name that no file can have.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(f"no {what} {str(path)!r}; expected {expected}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)!r} cannot be opened ({reason}); expected {expected}") from error
    kind = next((name for test, name in _KINDS if test(mode)), None)
    if kind is not None:
        raise UserError(f"{str(path)!r} is a {kind}; expected {expected}")
    return path


def read_text(path: Path | str, expected: str = "a text file", what: str = "file") -> str:
    """The text of a file, without its byte order mark.

    Raises:
        UserError: no regular file, unreadable, or not UTF-8; the message names the file and the byte.
    """
    path = regular(path, expected, what)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if b"\0" in data:
        raise UserError(f"{str(path)!r} is not UTF-8 text (NUL at byte {data.index(0)}); save it as UTF-8")
    return text.removeprefix("\ufeff")


def lines(text: str) -> list[str]:
    """Lines of a text. Unlike `str.splitlines`, a form feed or U+2028 ends none."""
    found = _NEWLINE.split(text)
    return found if found[-1] else found[:-1]


def read_lines(path: Path | str, expected: str = "a text file", what: str = "file") -> list[str]:
    """The lines of a text file.

    Raises:
        UserError: as in `read_text`, or the file is a table or a document, whose lines hold more than one thing each.
    """
    text, kind = read_text(path, expected, what), Path(path).suffix.lower()
    if kind in STRUCTURED:
        raise UserError(f"{str(path)!r} is no plain text but {kind.removeprefix('.').upper()}; expected {expected}")
    return lines(text)


def one_line(text: str) -> str:
    """Blanks, tabs and newlines collapsed to single blanks; every other character stays."""
    return re.sub(r"[ \t\r\n]+", " ", text).strip(" ")


def stem(path: Path) -> str:
    """The name that a picture shares with its caption and its masks: without suffix, accents composed (archives of
    some systems have them apart)."""
    return unicodedata.normalize("NFC", path.stem)


def caption_beside(picture: Path) -> str:
    """The text of `cat.txt` beside `cat.png`, on one line; empty without one. The suffix's case does not matter."""
    stems = dict.fromkeys([picture.stem, *(unicodedata.normalize(form, picture.stem) for form in ("NFC", "NFD"))])
    places = (picture.with_name(f"{stem}{suffix}") for stem in stems for suffix in (".txt", ".TXT", ".Txt"))
    beside = next((place for place in places if place.exists()), None)
    return "" if beside is None else " ".join(read_text(beside).split())


def read_json(path: Path | str, expected: str) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: as in `read_text`, it is no JSON, or a key stands twice in one of its objects.
    """
    try:
        return json.loads(read_text(path, expected), object_pairs_hook=partial(once, "keys"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} cannot be read as JSON ({error}); expected {expected}") from error


def once(what: str, pairs: Collection[tuple[Any, Any]]) -> dict[Any, Any]:
    """The dictionary of pairs, of which no two have one key; `what` they are, for the message.

    Raises:
        ValueError: two have: one would be taken for the other, in silence.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"two {what} are called {twice!r}")
    return found
