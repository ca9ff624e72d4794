"""Options stated once: the fields of a frozen dataclass carry their help, range and flag, and `check` holds them to it.

    @dataclass(frozen=True)
    class Recipe:
        steps: Annotated[int, Option("Optimiser steps.", min=1)] = 400
        space: Annotated[Literal["logit", "probability"], Option("Maps before or after the softmax.")] = "logit"

    check(Recipe(steps=0))      # UserError: --steps is 0; expected a whole number from 1 to 10000000

Reading options from a command line is the business of cli; this module knows types, choices and ranges only.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from mmdit_probe.errors import UserError, brief, unknown
from mmdit_probe.specs import reread

MOST = 10_000_000
"""Largest whole number where an option states none: more pictures, prompts or steps than anybody means."""

LAST_SEED = 2**62
"""Largest first seed: item k uses seed + k, and tables hold whole numbers below 2^63."""

METHOD = "Method"
"""Heading of the options in `--help` that decide how something is done: most of them."""


@dataclass(frozen=True)
class Option:
    """What is said about an option once, as metadata of its field: `steps: Annotated[int, Option("...", min=1)]`.

    Args:
        help: one sentence for `--help` and the docs.
        min, max: inclusive bounds of a number, or of each number in a sequence; a whole number is at most `MOST` where
            no other is stated. above: exclusive lower bound.
        flag: its name on the command line; by default `--` and the field's name with hyphens. also: further names.
        shown_default: what `--help` shows instead of the field's default; "{0.name}" is an attribute of the dataclass.
        panel: heading in `--help`.
        argument: on the command line it is given by its place, without a flag.
        values: what a shell may complete, or a function that says so, where it takes a moment to know.
        command: whether the command line has it, or the library alone.
    """

    help: str
    min: float | None = None
    max: float | None = None
    above: float | None = None
    flag: str | None = None
    also: tuple[str, ...] = ()
    shown_default: str | None = None
    panel: str = METHOD
    argument: bool = False
    values: Sequence[str] | Callable[[], Sequence[str]] = ()
    command: bool = True


class Described(NamedTuple):
    """A field of an options dataclass: its name, its type without annotations, and what is said about it."""

    name: str
    type: Any
    option: Option

    @property
    def flag(self) -> str:
        if self.option.argument:
            return self.name.upper()
        if not self.option.command:
            return self.name
        return self.option.flag or "--" + self.name.replace("_", "-")


def described(options: Any) -> Iterator[Described]:
    """The fields of an options dataclass (or an instance), in order; a field without `Option` has no bounds."""
    cls = options if isinstance(options, type) else type(options)
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, said = hints[field.name], Option("")
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            said = next((note for note in notes if isinstance(note, Option)), said)
        yield Described(field.name, hint, said)


def changed(options: Any, *names: str) -> str | None:
    """The flag of the first of these options that has another value than its default: what nothing would read."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    told = ((one, getattr(options, one.name), defaults[one.name]) for one in described(options) if one.name in names)
    return next((one.flag for one, value, default in told if value != default and str(value) != str(default)), None)


def check(options: object) -> None:
    """Hold every field of an options dataclass to its type, choices and range; nested dataclasses too. A text becomes a
    path where the option is one: so it is written in Python, and read from a record. Numbers and lists of numpy, torch
    and pandas become Python's, which a record can hold, and an iterator where one may stand a list.

    Raises:
        UserError: names the flag, the value, and what was expected.
    """
    for field in described(options):
        value = given = getattr(options, field.name)
        if field.type is not Any and getattr(value, "ndim", None) in (0, 1) and hasattr(value, "tolist"):
            value = value.tolist()
        if any(get_origin(inner) is collections.abc.Iterable for inner in get_args(field.type)):
            value = reread(value)
        if isinstance(value, str) and _mentions(field.type, Path) and not _mentions(field.type, str):
            value = Path(value)
        elif isinstance(value, Real) and type(value) not in (bool, int, float):
            value = int(value) if isinstance(value, Integral) else float(value)
        if value is not given:
            object.__setattr__(options, field.name, value)
        _check(value, field)
        if dataclasses.is_dataclass(field.type):
            check(value)


def _check(value: Any, field: Described) -> None:
    choices = tuple(choices_of(field.type))
    if not _fits(value, field.type):
        if choices and isinstance(value, str):
            raise unknown(field.flag, value, choices)
        raise UserError(f"{field.flag} is {brief(value)}; expected {_expected(field)}")
    for number in _numbers(value):
        if not _within(number, field.option):
            raise UserError(f"{field.flag} is {brief(value)}; expected {_expected(field)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; types that are not told apart at run time fit everything."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if isinstance(value, str) and kind in (collections.abc.Sequence, collections.abc.Iterable):
        return False  # a text is no list of texts
    return isinstance(value, kind) and all(_fits(*pair) for pair in _elements(value, origin, inner))


def _elements(value: Any, origin: Any, inner: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """Elements of a container with their types."""
    if origin is tuple and Ellipsis not in inner:
        if len(value) != len(inner):
            yield value, Literal[()]
        yield from zip(value, inner, strict=False)
    elif isinstance(value, collections.abc.Sequence | collections.abc.Set) and inner:  # bytes and ranges, too
        yield from ((each, inner[0]) for each in value)


def choices_of(hint: Any) -> Iterator[Any]:
    """The values of the `Literal`s in a type."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) is not None:
        for inner in get_args(hint):
            yield from choices_of(inner)


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        return
    if isinstance(value, Real):
        yield value  # a whole number stays whole: it may be beyond the largest float
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _numbers(each)


def _most(option: Option, whole: bool) -> float | None:
    return MOST if option.max is None and whole else option.max


def _within(number: Any, option: Option) -> bool:
    whole = isinstance(number, Integral)
    most = _most(option, whole)
    return (
        (whole or math.isfinite(number))
        and (option.min is None or number >= option.min)
        and (most is None or number <= most)
        and (option.above is None or number > option.above)
    )


def _expected(field: Described) -> str:
    """What an option may be, in words."""
    choices, option = tuple(choices_of(field.type)), field.option
    kinds = [] if not choices else ["one of " + ", ".join(map(str, choices))]
    kinds += [words for kind, words in _WORDS.items() if _mentions(field.type, kind)]
    most = _most(option, {kind for kind in _WORDS if _mentions(field.type, kind)} == {int})
    if option.min is not None and most is not None:
        bounds = f" from {plain(option.min)} to {plain(most)}"
    else:
        low = f" above {plain(option.above)}" if option.above is not None else ""
        low += f" of at least {plain(option.min)}" if option.min is not None else ""
        bounds = low + (f"{' and' if low else ''} at most {plain(most)}" if most is not None else "")
    one = (" or ".join(kinds) or str(field.type)) + bounds
    held = [kind for kind in map(get_origin, (field.type, *get_args(field.type))) if kind in _LISTS]
    if not held:
        return one
    return f"a list, each {one}" if get_origin(field.type) in _LISTS else f"{one}, or a list of them"


_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)


def plain(number: float) -> str:
    """A number in words for people: whole ones in all their digits."""
    return str(int(number)) if number == int(number) else f"{number:g}"


_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", Path: "a path"}


def _mentions(hint: Any, kind: type) -> bool:
    if get_origin(hint) is Literal:
        return False
    return hint is kind or any(_mentions(inner, kind) for inner in get_args(hint))
