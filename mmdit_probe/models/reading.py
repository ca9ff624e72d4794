"""How one tokenizer reads one prompt: the kind and the word of every position, by character offsets.

    tokens, lost = read(tokenizer, stream, "a red ring", [[("a red ring", 0)]], limit=77)
    tokens[1]                                # Token("clip", "word", "a", 0, 0, 1)

A tokenizer reads texts made of parts: the prompt's own words, and what the pipeline puts around them or in their place.
Words are the prompt's own (runs of letters and digits, or single signs).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdit_probe.errors import UserError
from mmdit_probe.models.families.facts import Part, TextStream

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*|[^\w\s]|_")


@dataclass(frozen=True)
class Token:
    """One text position. `start` and `stop` are character offsets in the prompt; -1 where there is no text."""

    stream: str
    kind: str
    word: str | None = None
    word_index: int = -1
    start: int = -1
    stop: int = -1


def words(text: str) -> list[tuple[int, int, str]]:
    """(start, stop, word) of every word of a text."""
    return [(match.start(), match.end(), match.group()) for match in _WORD.finditer(text)]


def read(
    tokenizer: Any, stream: TextStream, prompt: str, texts: Sequence[Sequence[Part]], limit: int
) -> tuple[list[Token], list[str]]:
    """The tokens of a prompt in one tokenizer, without padding, and the words of it that were cut off.

    Args:
        tokenizer: of `transformers`; one without character offsets must be one of bytes (ByT5).
        texts: what it reads, text by text, in parts.
        limit: number of positions at most, of all texts where prompts are padded to their full number, else of each.

    Raises:
        UserError: a tokenizer that does not say which characters a token stands for.
    """
    tokens: list[Token] = []
    lost: list[str] = []
    spans = words(prompt)
    for parts in texts:
        room = limit - len(tokens) if stream.padded else limit
        found, reach = _read_text(tokenizer, stream, parts, spans, room)
        tokens += found
        lost += _beyond(parts, spans, reach)
    return tokens, lost


def traced(text: str, prompt: str) -> list[Part]:
    """A text that a pipeline made of a prompt, in parts: what it took from the prompt, upper and lower case alike."""
    # One character each: lower() makes two of some characters.
    asked, made = ([character.lower() for character in of] for of in (prompt, text))
    parts = []
    for tag, start, stop, first, last in difflib.SequenceMatcher(None, asked, made, autojunk=False).get_opcodes():
        if first < last:
            kept = tag == "equal" or (tag == "replace" and stop - start == last - first)
            parts.append((text[first:last], start if kept else -1))
    return parts


def _read_text(
    tokenizer: Any, stream: TextStream, parts: Sequence[Part], spans: list[tuple[int, int, str]], limit: int
) -> tuple[list[Token], int]:
    """The tokens of one text, and up to which of its characters they go."""
    if limit <= 0:
        return [], 0
    text = "".join(part for part, _ in parts)
    tokens: list[Token] = []
    seen_text = False
    reach = 0
    for token_id, special, first, last in _encoded(tokenizer, text, limit, stream.special_tokens):
        place = _place(parts, first, last)
        if special:
            is_start = not seen_text and (token_id == tokenizer.bos_token_id or token_id != tokenizer.eos_token_id)
            # CLIP's end token is its pad too; other pads are read only where a pipeline puts them into the text.
            is_pad = token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
            tokens.append(Token(stream.name, "pad" if is_pad else "bos" if is_start else "eos"))
            seen_text = seen_text or token_id == tokenizer.bos_token_id
            continue
        seen_text, reach = True, max(reach, last)
        if place is None:
            tokens.append(Token(stream.name, "template"))
        else:
            index = _word_at(spans, *place)
            tokens.append(Token(stream.name, "word", spans[index][2] if index >= 0 else None, index, *place))
    return tokens, reach


def _encoded(tokenizer: Any, text: str, limit: int, special_tokens: bool) -> list[tuple[int, bool, int, int]]:
    """(id, whether it is special, first and last character) of every token of a text."""
    options = {"truncation": True, "max_length": limit, "add_special_tokens": special_tokens}
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **options)
        rows = zip(found["input_ids"], found["special_tokens_mask"], found["offset_mapping"], strict=True)
        return [(token_id, bool(special), *offsets) for token_id, special, offsets in rows]
    places = _byte_places(tokenizer, text)
    ids = tokenizer(text, **options)["input_ids"]
    specials = set(tokenizer.all_special_ids)
    # What the tokenizer adds comes last.
    places += [(len(text), len(text))] * (len(ids) - len(places))
    return [(token_id, token_id in specials, *place) for token_id, place in zip(ids, places, strict=False)]


def _byte_places(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """First and last character of every token of a text: of every byte, and of special tokens that are spelled out."""
    specials = sorted(map(re.escape, tokenizer.all_special_tokens), key=len, reverse=True)
    found: list[tuple[int, int]] = []
    for match in re.finditer("|".join([*specials, "."]), text, re.DOTALL):
        found += [match.span()] * (1 if len(match[0]) > 1 else len(match[0].encode()))
    if len(tokenizer(text, add_special_tokens=False)["input_ids"]) != len(found):
        raise UserError(f"{type(tokenizer).__name__} does not say which characters a token stands for; load a fast one")
    return found


def _place(parts: Sequence[Part], first: int, last: int) -> tuple[int, int] | None:
    """Where in the prompt the characters [first, last) of a text come from; None if they are none of the prompt's."""
    begin = 0
    for part, start in parts:
        end = begin + len(part)
        # Where a pipeline adds nothing, bare marks at the ends of the text are the prompt's too.
        if start >= 0 and ((begin < last and first < end) or len(parts) == 1):
            return start + max(first, begin) - begin, start + min(last, end) - begin
        begin = end
    return None


def _beyond(parts: Sequence[Part], spans: list[tuple[int, int, str]], reach: int) -> list[str]:
    """The words of the prompt whose end in a text of these parts lies beyond what was read of it."""
    found = []
    begin = 0
    for part, start in parts:
        if start >= 0:
            ends = [(min(stop, start + len(part)), word) for first, stop, word in spans if first < start + len(part)]
            found += [word for stop, word in ends if stop > start and begin + stop - start > reach]
        begin += len(part)
    return found


def _word_at(spans: list[tuple[int, int, str]], start: int, stop: int) -> int:
    """The word that overlaps [start, stop), else the first one after it: a bare word-start mark belongs to what
    follows."""
    for index, (first, last, _) in enumerate(spans):
        if (first < stop and start < last) or start <= first:
            return index
    return -1
