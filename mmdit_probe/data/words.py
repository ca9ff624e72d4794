"""Words of a text, and where a phrase stands in it, by characters. No tokenizer is known here.

    >>> [text[first:last] for text in ("a café's red-hot ring",) for first, last in words(text)]
    ['a', "café's", 'red-hot', 'ring']
    >>> find("猫", "一只猫"), find("CAFE\u0301", "a café")
    ([(2, 3)], [(2, 6)])

A word is a run of letters, digits and the marks on them, with apostrophes and hyphens inside, or a single sign. A run
of a script without blanks (Chinese, Japanese, Thai, ...) is one word, or several where a tokenizer divides it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from functools import lru_cache

from mmdit_probe.errors import UserError

LONGEST = 20_000
"""Characters of the longest prompt that is read: no text encoder of these pipelines takes nearly as many."""


_WORD = re.compile(r"w[wmz]*(?:jw[wmz]*)*|b[bmz]*|[jomz][mz]*(?:(?<=z)o[mz]*)*")
"""A word in the classes of its characters: w letter or digit, b the same of a script without blanks, m mark, z joiner
(of letters, or of the signs that make one emoji), j apostrophe or hyphen, o other sign."""
_BLANKLESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]"
)
_ALIKE = dict.fromkeys("‘’‛ʼ＇´`", "'") | dict.fromkeys("“”„‟", '"') | dict.fromkeys("‐‑", "-")


def words(text: str, edges: Collection[int] = ()) -> list[tuple[int, int]]:
    """(start, stop) of every word of a text.

    Args:
        edges: characters before which a run without blanks is divided.
    """
    classes = "".join(map(_class_of, text))
    found = []
    for match in _WORD.finditer(classes):
        first, last = match.span()
        inside = [edge for edge in sorted(edges) if first < edge < last] if match[0][0] == "b" else []
        found += list(zip([first, *inside], [*inside, last], strict=True))
    return found


def blankless(text: str) -> bool:
    """Whether any part of a text is of a script without blanks."""
    return _BLANKLESS.search(text) is not None


def find(phrase: str, text: str, *, whole: bool = True, beside: Iterable[str] = ()) -> list[tuple[int, int]]:
    """(start, stop) of every occurrence of a phrase in a text, from left to right.

    Upper and lower case, composed and decomposed accents, straight and curly quotation marks, hyphens that may and may
    not break, and all blanks are alike.

    Args:
        whole: only where it begins and ends with a word (or anywhere in a script without blanks); else anywhere between
            two letters, marks included.
        beside: other phrases that are looked for; an occurrence within one of a longer of them is that one's.
    """
    wanted = folded(phrase)[0].strip()
    longer = [other for other in beside if len(folded(other)[0].strip()) > len(wanted)]
    taken = [span for other in longer for span in find(other, text)]
    letters, places = folded(text)
    places = (*places, len(text))
    edges = _edges(text)
    found: list[tuple[int, int]] = []
    at = letters.find(wanted) if wanted else -1
    while at >= 0:
        after = at + len(wanted)
        start, stop = min(places[at:after]), max(places[at:after]) + 1
        between = _starts_letter(letters, places, at) and _starts_letter(letters, places, after)
        own = not any(first <= start and stop <= last for first, last in taken)
        if own and between and (not whole or {start, stop} <= edges):
            found.append((start, stop))
            at = letters.find(wanted, after)
        else:
            at = letters.find(wanted, at + 1)
    return found


@lru_cache(4096)  # every word of a prompt is looked for in the same few texts
def folded(text: str) -> tuple[str, tuple[int, ...]]:
    """A text as it is compared, and the place in the original of each of its characters."""
    units: list[tuple[str, int]] = []
    for place, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", _ALIKE.get(character, character)):
            if part.isspace():
                units += [(" ", place)] if not units or units[-1][0] != " " else []
                continue
            units += [(letter, place) for letter in part.casefold()]
            # Marks on one letter have a canonical order.
            last = len(units) - 1
            while last > 0 and unicodedata.combining(units[last - 1][0]) > unicodedata.combining(units[last][0]) > 0:
                units[last - 1], units[last] = units[last], units[last - 1]
                last -= 1
    return "".join(letter for letter, _ in units), tuple(place for _, place in units)


@lru_cache(256)
def _edges(text: str) -> frozenset[int]:
    """Where a word begins or ends; in a script without blanks, anywhere."""
    return frozenset(edge for span in words(text, range(len(text))) for edge in span)


def _class_of(character: str) -> str:
    if character in "'’-‐‑":
        return "j"
    if character == "\u200d":
        return "z"
    if unicodedata.category(character).startswith("M") or character in "\u200c🏻🏼🏽🏾🏿":
        return "m"
    if character.isalnum():
        return "b" if _BLANKLESS.match(character) else "w"
    return " " if character.isspace() else "o"


def _starts_letter(letters: str, places: tuple[int, ...], at: int) -> bool:
    """Whether a letter of the original begins here, and no mark on the one before."""
    if at == 0 or at >= len(letters):
        return True
    return places[at] != places[at - 1] and not unicodedata.category(letters[at]).startswith("M")


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that no tokenizer reads: of more than `LONGEST` characters, or with half of one (a lone
    surrogate, as half an emoji's escape in JSON gives). Raises a UserError."""
    half = next((place for place, character in enumerate(prompt) if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        raise UserError(f"prompt {prompt[:40]!r} is no text: character {half} is half of one ({prompt[half]!r})")
    if len(prompt) > LONGEST:
        raise UserError(
            f"prompt {prompt[:40]!r}... has {len(prompt)} characters; at most {LONGEST} are read: shorten it"
        )
