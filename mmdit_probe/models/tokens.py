"""What each text position is: encoder stream, span kind, word. From the tokenizers, by character offsets.

Text positions follow the joint text order (SD3: CLIP's positions, then T5's). A text mass that is not split by span
kind cannot be compared between models: much of it may sit on BOS, EOS or pads, which SD3 attends like words. Where the
pipeline puts the prompt into a template (a chat, a system prompt), the template's tokens are a kind of their own.

    table = token_tables(pipeline, family, ["a red ring"], max_sequence_length=256)[0]
    table.positions(kind="word", stream="t5")
    table.word_spans("red ring")            # {"clip": [2, 3], "t5": [78, 79, 80]}

Words are the prompt's own (runs of letters and digits, or single signs), so CLIP's and T5's pieces of one word have the
same word index. Not here: what the pooled embedding carries outside attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.models.families import Family, TextStream

KINDS = ("bos", "word", "eos", "pad", "template", "null", "unknown")

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


@dataclass(frozen=True)
class TokenTable:
    """The text positions of one prompt, in joint text order.

    Attributes:
        prompt: the text.
        tokens: one `Token` per text position, T in all.
        truncated: stream -> the words that did not fit into the encoder.
    """

    prompt: str
    tokens: tuple[Token, ...]
    truncated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def kinds(self) -> list[str]:
        """Span kind per text position."""
        return [token.kind for token in self.tokens]

    @property
    def streams(self) -> list[str]:
        """Encoder stream per text position."""
        return [token.stream for token in self.tokens]

    @property
    def words(self) -> list[str]:
        """The prompt's words in order."""
        return [match.group() for match in _WORD.finditer(self.prompt)]

    def positions(self, kind: str | None = None, stream: str | None = None, word: str | int | None = None) -> list[int]:
        """Text positions (0..T-1) that match every given condition.

        Args:
            kind: a span kind. stream: an encoder stream.
            word: a word (any of its occurrences, upper and lower case alike) or a word index.
        """
        if kind is not None and kind not in KINDS:
            raise unknown("span kind", kind, KINDS)
        return [
            position
            for position, token in enumerate(self.tokens)
            if (kind is None or token.kind == kind)
            and (stream is None or token.stream == stream)
            and (
                word is None
                or (token.word_index == word if isinstance(word, int) else (token.word or "").lower() == word.lower())
            )
        ]

    def word_spans(self, phrase: str, occurrence: int | None = None) -> dict[str, list[int]]:
        """Text positions of a word or a run of words, per encoder stream.

        Args:
            phrase: e.g. "ring" or "red ring"; upper and lower case alike.
            occurrence: which one if the phrase is repeated (0-based); None takes all.

        Returns: stream -> positions; a stream whose encoder cut the words off, or is switched off, is absent.

        Raises:
            UserError: the phrase is not in the prompt, or was cut off in every stream.
        """
        wanted = [match.group().lower() for match in _WORD.finditer(phrase)]
        words = [word.lower() for word in self.words]
        starts = [i for i in range(len(words) - len(wanted) + 1) if wanted and words[i : i + len(wanted)] == wanted]
        if not starts:
            raise unknown("word", phrase, dict.fromkeys(self.words))
        if occurrence is not None:
            if not 0 <= occurrence < len(starts):
                raise UserError(
                    f"{phrase!r} occurs {len(starts)} times in {self.prompt!r}; got occurrence {occurrence}"
                )
            starts = [starts[occurrence]]
        indices = {start + offset for start in starts for offset in range(len(wanted))}
        spans: dict[str, list[int]] = {}
        for position, token in enumerate(self.tokens):
            if token.word_index in indices:
                spans.setdefault(token.stream, []).append(position)
        if not spans:
            raise UserError(
                f"{phrase!r} fell off the end of every text encoder for the prompt {self.prompt!r}; shorten it"
            )
        return spans


def unknown_table(length: int, prompt: str = "") -> TokenTable:
    """A table of `length` positions of which nothing is known: the text came as embeddings."""
    return TokenTable(prompt, (Token("unknown", "unknown"),) * length)


def fitted(family: Family, tables: Sequence[TokenTable | None], length: int) -> list[TokenTable | None]:
    """The tables of one call in which T = `length` text positions take part.

    Pads are added where prompts are as long as they are, and cut off where the pipeline or the transformer does so.
    Tables that do not make up T are no tables of this call: None.
    """
    longest = max((len(table) for table in tables if table is not None), default=0)
    if any(not stream.padded for stream in family.streams):
        stream = family.streams[-1]
        if -(-longest // stream.multiple) * stream.multiple != length:
            return [None] * len(tables)
        return [None if table is None else _filled(table, length, stream) for table in tables]
    cut = [None if table is None or set(table.kinds[length:]) - {"pad"} else table for table in tables]
    return [None if table is None else replace(table, tokens=table.tokens[:length]) for table in cut]


def _filled(table: TokenTable, length: int, stream: TextStream) -> TokenTable:
    pads = (Token(stream.name, "pad"),) * (length - len(table))
    return replace(table, tokens=(*pads, *table.tokens) if stream.multiple > 1 else (*table.tokens, *pads))


def token_tables(
    pipeline: Any,
    family: Family,
    prompts: Sequence[str] | Sequence[Sequence[str]],
    length: int | None = None,
    negative: bool = False,
) -> list[TokenTable]:
    """The token table of each prompt as this pipeline encodes it, alone: without the pads of a longer neighbour.

    Args:
        pipeline: a diffusers pipeline of the family: its tokenizers and encoders are read.
        family: whose streams apply.
        prompts: one text per sample, or one text per sample and tokenizer (in the order of the family's streams), for
            pipelines that were given different prompts for different encoders.
        length: value of the family's length argument (SD3: `max_sequence_length`); the family's default if None.
        negative: whether they are negative prompts, which some pipelines put into another template.
    """
    count = sum(len(stream.tokenizers) for stream in family.streams)
    return [_table(pipeline, family, [p] * count if isinstance(p, str) else list(p), length, negative) for p in prompts]


def stream_length(pipeline: Any, family: Family, stream: TextStream, length: int | None) -> int:
    """Number of text positions of one stream, at most where prompts are not padded. `length` as in `token_tables`."""
    if stream.length == "tokenizer":
        return int(getattr(pipeline, stream.tokenizers[0]).model_max_length)
    return family.default_length if length is None else length


def _table(pipeline: Any, family: Family, texts: list[str], length: int | None, negative: bool) -> TokenTable:
    tokens: list[Token] = []
    truncated: dict[str, tuple[str, ...]] = {}
    position = 0
    for stream in family.streams:
        size = stream_length(pipeline, family, stream, length)
        readings = []
        for component, encoder in zip(stream.tokenizers, stream.encoders, strict=True):
            if getattr(pipeline, encoder, None) is not None:
                around = ("", "") if stream.wrap is None else stream.wrap(pipeline, negative)
                cut = 0 if stream.cut is None else stream.cut(pipeline)
                readings.append(_read(getattr(pipeline, component), texts[position], size, stream, around, cut))
            position += 1
        if not readings:
            tokens += [Token(stream.name, "null")] * size
            continue
        tokens += [_agreed(at_position) for at_position in zip(*(reading[0] for reading in readings), strict=True)]
        lost = readings[0][1]
        if lost:
            truncated[stream.name] = lost
    return TokenTable(texts[0], tuple(tokens), truncated)


def _agreed(tokens: tuple[Token, ...]) -> Token:
    """One token for a position that carries several encoders: what they agree on."""
    first = tokens[0]
    if all(token == first for token in tokens):
        return first
    kind = first.kind if all(token.kind == first.kind for token in tokens) else "unknown"
    return Token(first.stream, kind)


def _read(
    tokenizer: Any, text: str, size: int, stream: TextStream, around: tuple[str, str], cut: int
) -> tuple[list[Token], tuple[str, ...]]:
    """The tokens of one text in one tokenizer, and the words that were cut off.

    Args:
        text: the prompt; `around` it is what the tokenizer reads before and after it.
        size: number of positions, at most if the stream is not padded. cut: first tokens that the pipeline drops.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    before = len(around[0])
    encoding = tokenizer(
        around[0] + text + around[1], padding="max_length" if stream.padded else False, max_length=size + cut,
        truncation=True, add_special_tokens=stream.special_tokens, return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )  # fmt: skip
    spans = [(match.start(), match.end(), match.group()) for match in _WORD.finditer(text)]
    tokens: list[Token] = []
    covered = 0
    seen_text = False
    rows = zip(
        encoding["input_ids"],
        encoding["attention_mask"],
        encoding["special_tokens_mask"],
        encoding["offset_mapping"],
        strict=True,
    )
    for token_id, attended, special, (first, last) in rows:
        start, stop = first - before, last - before
        if not attended:
            # CLIP-L pads with its end token: only the attention mask tells the two apart.
            tokens.append(Token(stream.name, "pad"))
        elif special:
            is_start = not seen_text and (token_id == tokenizer.bos_token_id or token_id != tokenizer.eos_token_id)
            tokens.append(Token(stream.name, "bos" if is_start else "eos"))
            seen_text = seen_text or token_id == tokenizer.bos_token_id
        elif around != ("", "") and (stop <= 0 or start >= len(text)):
            seen_text = True
            tokens.append(Token(stream.name, "template"))
        else:
            seen_text = True
            start, stop = max(0, start), min(len(text), stop)
            covered = max(covered, stop)
            index = _word_at(spans, start, stop)
            word = spans[index][2] if index >= 0 else None
            tokens.append(Token(stream.name, "word", word, index, start, stop))
    return tokens[cut:], tuple(word for _, end, word in spans if end > covered)


def _word_at(spans: list[tuple[int, int, str]], start: int, stop: int) -> int:
    """The word that overlaps [start, stop), else the first one after it: a bare word-start mark belongs to what
    follows."""
    for index, (first, last, _) in enumerate(spans):
        if (first < stop and start < last) or start <= first:
            return index
    return -1
