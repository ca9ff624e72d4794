"""How class names become prompts.

    prompts = pack(parse_classes("cat; kitten, wet grass"), lambda text: model.token_tables(text)[0])
    prompts[0].queries[2].spans                     # {"clip": [3, 4], "t5": [77, 78, 79]}: "wet grass"

A prompt is the names one after the other, without a template; names that do not fit go to further prompts. A name is
found by its place in the prompt, not by its letters, so that "grass" does not answer for "wet grass".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.errors import UserError
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.specs import listed


@dataclass(frozen=True)
class Query:
    """One name in one prompt: index of its class, text positions per encoder stream."""

    text: str
    of_class: int
    spans: dict[str, list[int]]

    def positions(self, streams: str = "all") -> list[int]:
        """Text positions in some streams (by comma), or in all.

        Raises:
            UserError: it has none in one of them, which does not exist, is left out, or cut the name off.
        """
        wanted = self.spans if streams == "all" else listed(streams)
        for stream in wanted:
            if streams != "all" and not self.spans.get(stream):
                there = ", ".join(self.spans)
                raise UserError(f"{self.text!r} has no tokens in the text stream {stream!r}; take {there}")
        found = [p for name, positions in self.spans.items() if name in wanted for p in positions]
        if not found:
            raise UserError(f"{self.text!r} has no text positions; name at least one in spans")
        return found


@dataclass(frozen=True)
class Prompt:
    """One prompt and the names in it, in order."""

    text: str
    table: TokenTable
    queries: tuple[Query, ...]


def pack(classes: Iterable[SegClass], tables: Callable[[str], TokenTable], together: bool = True) -> list[Prompt]:
    """Prompts that hold every name of every class, as few as fit, in order.

    Args:
        classes: what to look for.
        tables: prompt -> its token table, as `MMDiT.token_tables`.
        together: False gives one prompt per name.

    Raises:
        UserError: a single name is longer than the text encoders.
    """
    names = [(index, name) for index, one in enumerate(classes) for name in one.synonyms]

    def truncated(count: int) -> Mapping[str, tuple[str, ...]]:
        return tables(" ".join(name for _, name in names[:count])).truncated

    prompts = []
    while names:
        most = len(names) if together else 1
        if truncated(most):  # as a rule all fit
            most = bisect_left(range(1, most), True, key=lambda count: bool(truncated(count)))
        if not most:
            _refuse(names[0][1], truncated(1))
        prompts.append(_prompt(names[:most], tables))
        names = names[most:]
    return prompts


def _refuse(name: str, cut: Mapping[str, tuple[str, ...]]) -> NoReturn:
    lost = ", ".join(sorted({word for words in cut.values() for word in words}))
    name = name if len(name) <= 60 else f"{name[:57]}..."
    raise UserError(f"class name {name!r} is longer than a text encoder: {lost} fell off; shorten it")


def _prompt(group: Sequence[tuple[int, str]], tables: Callable[[str], TokenTable]) -> Prompt:
    text = " ".join(name for _, name in group)
    table = tables(text)
    queries, start = [], 0
    for of_class, name in group:
        spans = table.spans(start, start + len(name))
        if not spans:
            raise UserError(f"class name {name!r} has no letters that the text encoders know; rename it")
        queries.append(Query(name, of_class, spans))
        start += len(name) + 1
    return Prompt(text, table, tuple(queries))
