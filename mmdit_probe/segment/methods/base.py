"""What a method is: a name, what it reads, and a pure function of a capture.

    method = METHODS["seg4diff"].configure({"softmax": "text"})
    method.needs, method(capture).shape             # ("i2t",), (C, h, w)

Open-vocabulary methods return scores [C, h, w], one map per class; unsupervised ones proposals [P, h, w]. Both are on
the token grid (or a coarser one) and go through the shared tail.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from mmdit_probe.errors import UserError, check_known
from mmdit_probe.options import MOST
from mmdit_probe.segment.record import Capture
from mmdit_probe.segment.settings import value_of
from mmdit_probe.segment.vocabulary import Query
from mmdit_probe.specs import HeadSpec, check_spec, head_indices, heads_at, listed

Heads = HeadSpec
"""Which heads count: "mean" or "all", one or some for every layer, or some per layer."""


PER_HEAD = ("text", "words", "image-odds")
"""Softmaxes of which the heads' mean is not that of the mean; so is "auto" where the names fill several prompts."""


@dataclass(frozen=True)
class Method:
    """One segmentation method.

    Attributes:
        name: as in the command line.
        run: (capture, **options) -> [C or P, h, w] float32.
        reads: values of all options -> parts of `JointRecord` that it reads with them.
        source: paper and section of the description that was implemented.
        unsupervised: it reads the empty prompt and returns proposals.
        together: names share a prompt where they fit.
        all_text: it reads the columns of all text tokens, not the names' alone.
        options: values that differ from the defaults.
    """

    name: str
    run: Callable[..., Tensor]
    reads: Callable[[Mapping[str, Any]], tuple[str, ...]]
    source: str
    unsupervised: bool = False
    together: bool = True
    all_text: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Every option and its value."""
        parameters = list(inspect.signature(self.run).parameters.values())[1:]
        return {p.name: p.default for p in parameters} | dict(self.options)

    @property
    def needs(self) -> tuple[str, ...]:
        """Parts of `JointRecord` it reads with its options."""
        return self.reads(self.defaults)

    @property
    def reads_heads(self) -> bool:
        """Whether it reads I2T head by head: some heads only, or a softmax that is not the mean of the heads'."""
        options = self.defaults
        return options.get("heads", "mean") != "mean" or options.get("softmax") in PER_HEAD

    @property
    def text_kinds(self) -> tuple[str, ...] | None:
        """Span kinds of the text tokens whose columns it reads one by one; None for all."""
        if not self.unsupervised:
            return None if self.all_text else ("word",)
        kinds = self.defaults.get("kinds", "")
        return None if kinds == "all" else tuple(listed(kinds))

    def configure(self, options: Mapping[str, Any]) -> Method:
        """The method with other option values, or what their texts mean by the options' own types.

        Raises:
            UserError: it has no such option, or the value is of another kind than the option's.
        """
        kinds = get_type_hints(self.run)
        read = {}
        for name, value in options.items():
            check_known(f"option of {self.name}", name, self.defaults)
            read[name] = value_of(value, kinds[name]) if isinstance(value, str) else value
            _check(self.name, name, kinds[name], read[name])
        return replace(self, options={**self.options, **read})

    def said(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Every option and its value, from the record of a run; earlier ones have null for a written "none"."""
        kinds = get_type_hints(self.run)
        return self.defaults | {
            name: "none" if value is None and kinds.get(name) is str else value for name, value in options.items()
        }

    def __call__(self, capture: Capture) -> Tensor:
        """Maps of one capture; see `run`.

        Raises:
            UserError: it needs class names, and the capture has none; or it reads what the capture does not hold.
        """
        if not self.unsupervised and not capture.classes:
            raise UserError(f"{self.name} needs class names, and the capture has none (spans= of Capture.of)")
        return self.run(capture, **self.options)


def _check(method: str, name: str, kind: Any, value: Any) -> None:
    """Refuse a value that is not of an option's kind: heads, whole numbers from 1 to `MOST`, other numbers from 0, on
    or off, words, or an object of a class that the option names."""
    if kind == Heads:
        if value != "mean" and not isinstance(value, Mapping):
            check_spec(value, head_indices)
        return
    allowed = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits: dict[Any, tuple[bool, str]] = {
        int: (number and isinstance(value, int) and 1 <= value <= MOST, f"a whole number from 1 to {MOST}"),
        float: (number and 0 <= value < float("inf"), "a number of 0 or more"),
        bool: (isinstance(value, bool), "true or false"),
        str: (isinstance(value, str), "a word"),
        type(None): (value is None, "none"),
        Sequence[float]: (
            isinstance(value, list | tuple) and all(isinstance(one, int | float) and one >= 0 for one in value),
            "several by comma",
        ),
    }
    wanted = [fits[one] for one in allowed if one in fits]
    classes = tuple(one for one in allowed if isinstance(one, type) and one not in fits)
    if not any(fit for fit, _ in wanted) and not isinstance(value, classes):
        raise UserError(f"{method}.{name}={value}: expected {' or '.join(text for _, text in wanted)}")


def i2i_part(source: str) -> str:
    """Part of the record that holds the image-image attention of a source.

    Args:
        source: "attn" for the image-image block of the joint softmax, "attn2" for the second, image-only attention.
    """
    parts = {"attn": "i2i", "attn2": "i2i_attn2"}
    check_known("image-image attention", source, parts)
    return parts[source]


def renorm(rows: Tensor) -> Tensor:
    """Rows that sum to 1: a block of a joint softmax lacks the mass of the other block."""
    return rows / rows.sum(-1, keepdim=True).clamp(min=1e-12)


def pick_heads(maps: Tensor, heads: Heads, layer: int) -> Tensor:
    """Mean [I, ...] over the chosen heads of maps [H, I, ...].

    Raises:
        UserError: a head that the model does not have.
    """
    return maps[list(heads_at("all" if heads == "mean" else heads, layer, len(maps)))].mean(0)


def by_class(capture: Capture, per_query: Sequence[tuple[Query, Tensor]]) -> Tensor:
    """Class maps [C, h, w]: the pixelwise maximum over the names of a class, from maps [I], or [h, w] of any size, per
    name."""
    maps: list[list[Tensor]] = [[] for _ in capture.classes]
    for query, values in per_query:
        maps[query.of_class].append(values)
    found = torch.stack([torch.stack(of_class).amax(0) for of_class in maps])
    return found if found.ndim == 3 else found.reshape(-1, *capture.grid)
