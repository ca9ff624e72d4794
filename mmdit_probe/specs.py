"""Layer, step and head specifications, seeds and other numbers: what a user types, checked and as plain values.

One grammar for the command line and the library, so that `--layers 0,7-9` and `probe(..., layers="0,7-9")` mean the
same.

    >>> layer_indices("7-9,0", 12)
    (0, 7, 8, 9)
    >>> step_indices("last-8", 28)      # the paper's "t = 8 of 28": the 8th step from the clean end
    (20,)

Indices are 0-based; layers are the joint-attention layers in forward order, steps the sampling steps from noise to
image. This module knows no model: counts are passed in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, SupportsIndex

from mmdit_probe.errors import UserError, brief, check_known, counted

Spec = str | int | Iterable[int]
"""`"all"`, `9`, `"9"`, `"7-11"`, `"0,9"`, `[0, 9]`; for steps also `"last"` and `"last-8"`."""

HeadSpec = Spec | Mapping[int, Spec]
"""One specification for all layers, or layer -> specification; a layer that is absent uses all its heads."""

ALL_HEADS = -1
"""Head index, in tables, of rows about all heads of a layer together."""

_ANY = 1_000_000
"""More layers, heads or steps than any model has."""
MOST_SIDE = 8192
"""Pixels a side, above what any model makes."""
_RANGE = re.compile(r"(\d+)-(\d+)")
_LAST = re.compile(r"last(?:-(\d+))?")


def layer_indices(spec: Spec, count: int) -> tuple[int, ...]:
    """Joint-attention layers named by `spec`, sorted, without repetition.

    Args:
        spec: see `Spec`.
        count: number of joint-attention layers L of the model.

    Raises:
        UserError: malformed, empty or out of range; the message names the layers that exist.
    """
    return _indices(spec, count, "layer", "all, 9, 7-11 or 0,9")


def head_indices(spec: Spec, count: int) -> tuple[int, ...]:
    """Attention heads named by `spec` (`count` = H), as `layer_indices`."""
    return _indices(spec, count, "head", "all, 3, 0-3 or 0,5")


def heads_at(spec: HeadSpec, layer: int, count: int) -> tuple[int, ...]:
    """Attention heads that `spec` names in one layer, as `head_indices`.

    Raises:
        UserError: as there, or a layer is no whole number: all heads of the one that was meant would count.
    """
    if not isinstance(spec, Mapping):
        return head_indices(spec, count)
    for key in spec:
        if isinstance(key, bool) or not isinstance(key, Integral):
            raise UserError(f"heads of layer {key!r}: expected a whole number, such as {{4: [0, 2]}}")
    return head_indices(spec.get(layer, "all"), count)


def step_indices(spec: Spec, count: int) -> tuple[int, ...]:
    """Sampling steps named by `spec` (`count` = number of steps), sorted, without repetition.

    `last-k` is the k-th step from the clean end, `timesteps[-k]`: with 28 steps, `last-8` is step 20. `last` is
    `last-1`.
    """
    return _indices(spec, count, "step", "all, last-8, 20, 0-4 or 0,20")


def reread(spec: Any) -> Any:
    """A specification that can be read more than once and compared: what an iterator gives, or an array, tensor or
    series holds, as a list."""
    if isinstance(spec, Mapping):
        return {layer: reread(of_layer) for layer, of_layer in spec.items()}
    if hasattr(spec, "tolist"):
        return spec.tolist()
    return list(spec) if isinstance(spec, Iterator) else spec


def check_spec(spec: Spec, indices: Callable[[Spec, int], tuple[int, ...]]) -> None:
    """Hold a specification to its grammar while no model says how many there are.

    Args:
        indices: what reads it: `layer_indices`, `head_indices` or `step_indices`.

    Raises:
        UserError: malformed or empty.
    """
    if str(spec).strip().lower() != "all":
        indices(spec, _ANY)


def parse_size(text: str | None, what: str = "size") -> tuple[int, int] | None:
    """(height, width) from "512x768"; None from None. `what` stands in the message.

    Raises:
        UserError: another form, or more pixels than anything here makes or reads.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if not match or max(int(match[1]), int(match[2])) > MOST_SIDE:
        raise UserError(
            f"{what} {text!r}: expected height x width in pixels, such as 480x720, at most {MOST_SIDE} a side"
        )
    return int(match[1]), int(match[2])


def seed_values(seed: int | Sequence[int], count: int, what: str = "image") -> list[int]:
    """`count` seeds: those given, or seed, seed + 1, ...

    Args:
        what: what has one seed each, for the message.

    Raises:
        UserError: not whole numbers, below 0 or above 2^63 - 1 (what a table holds), or another number of them.
    """
    seed = seed.tolist() if hasattr(seed, "tolist") else seed  # of numpy or torch
    if isinstance(seed, Iterable):
        seeds: list[Any] = list(seed)
    else:
        seeds = [seed + offset if isinstance(seed, SupportsIndex) else seed for offset in range(count)]
    if len(seeds) != count:
        found = f"{counted(len(seeds), 'seed')} for {counted(count, what)}"
        raise UserError(f"{found}; give one each, or one number to count up from")
    for one in seeds:
        if not isinstance(one, SupportsIndex) or not 0 <= int(one) < 1 << 63:
            raise UserError(f"seed {one!r}: expected whole numbers from 0 to 2^63 - 1 = {(1 << 63) - 1}")
    return [int(one) for one in seeds]


def listed(text: str | Iterable[object]) -> list[str]:
    """What is named by comma, or in a list: without blanks around, each once, in order."""
    parts = text.split(",") if isinstance(text, str) else map(str, text)
    return list(dict.fromkeys(part.strip() for part in parts))


def named_of(kind: str, text: str | Iterable[object], known: Collection[object]) -> list[str]:
    """What is `listed`, each a name that there is; `kind` says in the message what it is of.

    Raises:
        UserError: one is unknown; the message names the closest.
    """
    names = listed(text)
    for name in names:
        check_known(kind, name, known)
    return names


def numbers(asked: str | float | Iterable[object], low: float, high: float, refusal: str) -> list[float]:
    """Different numbers in their order, from "0.3,0.5", a number or several: those of six equal digits are one.

    Args:
        low, high: bounds of each, both included. refusal: what is said of anything else.

    Raises:
        UserError: none is given, or one is no number or out of bounds.
    """
    parts = asked.split(",") if isinstance(asked, str) else [asked] if isinstance(asked, Real) else asked
    try:
        found = list({f"{float(part):g}": float(part) for part in parts}.values())  # type: ignore[arg-type, union-attr]
    except ValueError:
        found = []
    if not found or not all(low <= one <= high for one in found):
        raise UserError(refusal)
    return found


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from `low` to `high`, both included; `name` stands in the message.

    Raises:
        UserError: it is not.
    """
    try:
        fine = math.isfinite(value) and low <= value <= high
    except (TypeError, ValueError, RuntimeError):  # a text, several numbers (of numpy, of torch)
        fine = False
    if not fine:
        bounds = [f"from {low:g}"] * math.isfinite(low) + [f"to {high:g}"] * math.isfinite(high)
        raise UserError(f"{name} {brief(value)}: expected {' '.join(['a finite number', *bounds])}")
    return float(value)


def whole(name: str, value: float, low: int) -> int:
    """A whole number of at least `low`; errors as in `number`."""
    if number(name, value, low) % 1:
        raise UserError(f"{name} {value}: expected a whole number")
    return int(value)


def _indices(spec: Spec, count: int, kind: str, forms: str) -> tuple[int, ...]:
    spec = spec.tolist() if hasattr(spec, "tolist") else spec  # of numpy or torch
    if isinstance(spec, Iterable) and not isinstance(spec, str | bytes | Mapping):  # {4: [0, 2]} names heads
        parts = [str(index) for index in spec]
    elif str(spec).strip().lower() == "all":
        return tuple(range(count))
    else:
        parts = [part.strip() for part in str(spec).split(",")]
    found: set[int] = set()
    for part in parts:
        found.update(_one(part, count, kind, forms))
    if not found:
        raise UserError(f"no {kind} is named; expected {forms}")
    return tuple(sorted(found))


def _one(part: str, count: int, kind: str, forms: str) -> Iterable[int]:
    if re.fullmatch(r"-?\d+", part):
        return (_existing(int(part), count, kind),)
    if match := _RANGE.fullmatch(part):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise UserError(f"{kind} range {part!r} runs backwards; write {last}-{first}")
        return range(_existing(first, count, kind), _existing(last, count, kind) + 1)
    if kind == "step" and (match := _LAST.fullmatch(part)):
        back = int(match[1] or 1)
        if not 1 <= back <= count:
            raise UserError(f"step {part!r} does not exist: there are {count} steps, last-1 (or last) to last-{count}")
        return (count - back,)
    raise UserError(f"cannot read {part!r} as a {kind}; expected {forms}")


def _existing(index: int, count: int, kind: str) -> int:
    if not 0 <= index < count:
        if count < _ANY:
            raise UserError(f"{kind} {index} does not exist: there are {count} {kind}s, 0 to {count - 1}")
        most = f" and no model has {count:,}" if index > 0 else ""  # no model has said how many there are
        raise UserError(f"{kind} {index} does not exist: they count from 0{most}")
    return index
