"""Class names: from what a user types, from a file, from a data set's own list, or shipped with the package.

    >>> [c.synonyms for c in parse_classes("cat; kitten, wet grass, sky")]
    [('cat', 'kitten'), ('wet grass',), ('sky',)]
    >>> len(class_list("voc20"))
    20

Not here: how names are packed into prompts (`segment.vocabulary`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mmdit_probe.data.text import STRUCTURED, lines, one_line, read_lines
from mmdit_probe.data.words import folded
from mmdit_probe.errors import UserError

LONGEST = 1000
"""Characters of the longest class name: a name that a text encoder cannot hold is refused by the model, a text that is
no name here, before a model loads."""


@dataclass(frozen=True)
class SegClass:
    """One class: the name that is printed (the first synonym) and all names that stand for it."""

    synonyms: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.synonyms[0]


def parse_classes(text: str | Path | Sequence[str | SegClass]) -> list[SegClass]:
    """Classes from "a, b; synonym, c", from a file of such lines (a path, or a text that ends in .txt or names a file
    that is there; lines starting with # are left out), or from a list of single entries or classes.

    Raises:
        UserError: no class, an empty name, one that is given twice or is no name by its length, or a file that is not
            there or no text.
    """
    if isinstance(text, str) and len(text) < 4096 and "\n" not in text:
        text = Path(text) if text.lower().endswith((".txt", *STRUCTURED)) or os.path.isfile(text) else text
    if isinstance(text, Path):
        given = read_lines(text, "a text file with class names", "class file")
        kept = [line for line in given if line.strip() and line.lstrip()[0] != "#"]
        entries: list[str | SegClass] = [name for line in kept for name in line.rstrip(", \t").split(",")]
    else:
        entries = list(text.split(",") if isinstance(text, str) else text)
    return _classes(entries, repr(str(text) if isinstance(text, Path) else text))


def read_classes(path: Path) -> list[SegClass]:
    """The class list of a data set: a line is an id, with all its commas; synonyms by semicolon.

    Raises:
        UserError: as `parse_classes`, or an empty line or a comment among names, which would shift the ids after it.
    """
    return _whole(read_lines(path, "one class per line in the order of the ids"), str(path))


def class_list(name: str) -> list[SegClass]:
    """A shipped class list, by the name of its data set."""
    file = resources.files("mmdit_probe.data") / "classes" / f"{name}.txt"
    return _whole(lines(file.read_text(encoding="utf-8")), name)


def _whole(found: list[str], source: str) -> list[SegClass]:
    while found and not found[-1].strip():
        found = found[:-1]
    for number, line in enumerate(found):
        if not line.strip() or line.lstrip()[0] == "#":
            what = "a comment" if line.strip() else "empty"
            raise UserError(f"{source!r}: line {number + 1} is {what}; a line is the class of its number, name each")
    return _classes(found, repr(source))


def _classes(entries: Sequence[str | SegClass], source: str) -> list[SegClass]:
    classes = [
        entry if isinstance(entry, SegClass) else SegClass(tuple(one_line(name) for name in entry.split(";")))
        for entry in entries
    ]
    names = [name for one in classes for name in one.synonyms]
    if not names or not all(name.strip() for name in names):
        raise UserError(
            f"classes {source}: expected names separated by commas, synonyms by semicolons: 'cat; kitten, sky'"
        )
    for name in names:
        if len(name) > LONGEST:
            raise UserError(f"class name {name[:40]!r}... has {len(name)} characters; expected at most {LONGEST}")
    plain = [folded(name)[0] for name in names]  # text encoders do not tell Cat from cat
    double = [name for place, name in enumerate(names) if plain[place] in plain[:place]]
    if double:
        raise UserError(f"class name {double[0]!r} is given twice; name each class once")
    return classes
