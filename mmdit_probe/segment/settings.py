"""What users type for segmentation, as values: names of methods, refinements, background rules, sizes, noise levels.

    parse_steps("affinity+pamr:5")                  # (("affinity", 2), ("pamr", 5))
    Background.parse("threshold:0.5")

No torch here: requests are read, offered and refused before any of it is imported. What the names do:
`segment.methods`, `segment.refine`, `segment.tail`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from mmdit_probe.errors import UserError, check_known, unknown
from mmdit_probe.options import choices_of
from mmdit_probe.specs import MOST_SIDE, numbers, parse_size

NAMED = (
    "seg4diff", "diffsegmenter", "diffsegmenter-per-class", "iseg", "tokenrank", "conceptattention", "proxyclip",
    "corrclip",
)  # fmt: skip
"""Methods that read class names."""
BLIND = ("seg4diff-unsup", "diffseg", "diffcut")
"""Methods that read none: they find segments."""

STEPS = {"minmax": 1, "centre": 1, "affinity": 2, "walk": 2, "nosink": 2, "regions": 1, "pamr": 10, "vote": 1}
"""Steps of a refinement and the number of rounds each takes when none is given."""

MOST_ROUNDS = 1000
PIXELS = ("pamr", "vote")
"""Steps at the picture's size."""

RULES = ("none", "threshold:T", "probability:T", "power:A", "class:NAME")
"""Background rules."""

_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


def parse_sigmas(text: str) -> list[float]:
    """Noise levels from "0.515" or "0.3,0.5", each once.

    Raises:
        UserError: no number in 0..1.
    """
    return numbers(text, 0, 1, f"sigma {text!r}: expected numbers in 0..1 separated by commas, e.g. 0.515")


def parse_batch(value: str | int) -> int | None:
    """Rows of a forward; None for "auto".

    Raises:
        UserError: neither "auto" nor a whole number from 1.
    """
    if value == "auto":
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise UserError(f"--batch is {value!r}; expected auto, or a whole number of at least 1")
    return int(value)


def scoring_size(text: str, shown: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which labels are compared, of a picture part of size `shown`: "128x128", or "short:640" (the
    shorter side, aspect kept, the longer one at most four times as long: detectron2's loader).

    Raises:
        UserError: another form.
    """
    if not text.startswith("short:"):
        size = parse_size(text)
        assert size is not None
        return size
    side = text.removeprefix("short:")
    if not (side.isdecimal() and 0 < int(side) <= MOST_SIDE):
        raise UserError(f"scoring size {text!r}: expected HEIGHTxWIDTH or short:SIDE in pixels, e.g. short:640")
    scale = min(int(side) / min(shown), 4 * int(side) / max(shown))
    height, width = (max(1, int(length * scale + 0.5)) for length in shown)
    return height, width


def check_method(name: str, unsupervised: bool | None = None) -> None:
    """A method of this name exists, and is of the wanted kind.

    Raises:
        UserError: it does not, or is not; the message names the closest one, or those of the kind.
    """
    check_known("method", name, (*NAMED, *BLIND))
    if unsupervised is not None and (name in BLIND) != unsupervised:
        raise wrong_kind(name, unsupervised)


def wrong_kind(name: str, unsupervised: bool) -> UserError:
    """The refusal of a method that reads class names where one that does not is wanted, or the other way round."""
    kind = "needs class names" if unsupervised else "takes no class names"
    return UserError(f"method {name} {kind}; here: {', '.join(BLIND if unsupervised else NAMED)}")


def parse_steps(text: str) -> tuple[tuple[str, int], ...]:
    """Steps of a refinement with their rounds, from "none", "affinity", "affinity:3+pamr".

    Raises:
        UserError: an unknown step or number, a pixel step before a grid step, or a step after the vote.
    """
    steps = []
    for part in [] if text == "none" else text.split("+"):
        name, _, rounds = part.strip().partition(":")
        if name not in STEPS:
            raise unknown("refinement", name, ("none", *STEPS))
        if rounds and not (rounds.isdecimal() and 0 < int(rounds) <= MOST_ROUNDS):
            raise UserError(f"refinement {part!r}: expected {name} or {name}:ROUNDS with 1 to {MOST_ROUNDS} rounds")
        steps.append((name, int(rounds) if rounds else STEPS[name]))
    kinds = [name in PIXELS for name, _ in steps]
    if kinds != sorted(kinds):
        raise UserError(f"refinement {text!r}: steps on pixels ({', '.join(PIXELS)}) come after those on tokens")
    if any(name == "vote" for name, _ in steps[:-1]):
        raise UserError(f"refinement {text!r}: vote is of labels, so it is the last step")
    return tuple(steps)


def split_option(text: str) -> tuple[str, str]:
    """Name and text of `name=value`.

    Raises:
        UserError: no `=`.
    """
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UserError(f"option {text!r}: expected name=value, e.g. tau=0.1")
    return name.strip(), value


def value_of(text: str, kind: Any, known: Collection[str] = ()) -> Any:
    """What a text means for an option of this type: none, true or false, a number, or several by comma, where the type
    has such; else the text, which may then be none of its values.

    Args:
        known: words of the option that mean themselves, as do the choices of its type.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    word = text.lower()
    if word in _WORDS and type(_WORDS[word]) in kinds and text not in {*known, *choices_of(kind)}:
        return _WORDS[word]
    try:
        found = [_number(part) for part in text.split(",")]
    except ValueError:
        return text
    if len(found) == 1 and (int in kinds or float in kinds):
        return found[0]
    return tuple(found) if any(get_args(one) in ((int,), (float,)) for one in kinds) else text


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


@dataclass(frozen=True)
class Background:
    """A parsed background rule."""

    kind: str = "none"
    value: float = 0.0
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Background:
        """From "none", "threshold:0.5", "probability:0.2", "power:2" or "class:sky".

        Raises:
            UserError: not one of these.
        """
        kind, _, rest = text.partition(":")
        if kind == "none" and not rest:
            return cls()
        if kind == "class" and rest.strip():
            return cls("class", name=rest.strip())
        if kind in ("threshold", "probability", "power"):
            try:
                value = float(rest)
            except ValueError:
                raise unknown("background rule", text, RULES) from None
            if kind != "power" and not 0.0 <= value <= 1.0:
                raise UserError(f"background rule {text!r}: the threshold is a share, expected 0 to 1")
            if kind == "power" and not 0.0 < value < float("inf"):
                raise UserError(f"background rule {text!r}: expected a power above 0, e.g. power:2")
            return cls(kind, value)
        raise unknown("background rule", text, RULES)
