"""What each text position is: encoder stream, span kind, word. From the tokenizers, by character offsets.

Text positions follow the joint text order (SD3: CLIP's positions, then T5's). A text mass that is not split by span
kind cannot be compared between models: much of it may sit on BOS, EOS or pads, which SD3 attends like words. Where the
pipeline puts the prompt into a template (a chat, a system prompt), the template's tokens are a kind of their own.

    table = token_tables(pipeline, family, ["a red ring"], length=256)[0]
    table.positions(kind="word", stream="t5")
    table.word_spans("red ring")            # {"clip": [2, 3], "t5": [78, 79, 80]}

Words are the prompt's own (runs of letters and digits, or single signs), so CLIP's and T5's pieces of one word have the
same word index. How one tokenizer reads one prompt is the business of `models.reading`. Not here: what the pooled
embedding carries outside attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.models.families.facts import Part
from mmdit_probe.models.families.registry import Family, TextStream
from mmdit_probe.models.reading import Token as Token
from mmdit_probe.models.reading import read, words

KINDS = ("bos", "word", "eos", "pad", "template", "null", "unknown")


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
        return [word for _, _, word in words(self.prompt)]

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
        wanted = [word.lower() for _, _, word in words(phrase)]
        own = [word.lower() for word in self.words]
        starts = [i for i in range(len(own) - len(wanted) + 1) if wanted and own[i : i + len(wanted)] == wanted]
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

    Pads are added at the end where prompts are as long as they are, and cut off where the pipeline or the transformer
    does so. Tables that do not make up T are no tables of this call: None.
    """
    longest = max((len(table) for table in tables if table is not None), default=0)
    if any(not stream.padded for stream in family.streams):
        if longest != length:
            return [None] * len(tables)
        pad = Token(family.streams[-1].name, "pad")
        return [None if t is None else replace(t, tokens=(*t.tokens, *(pad,) * (length - len(t)))) for t in tables]
    cut = [None if table is None or set(table.kinds[length:]) - {"pad"} else table for table in tables]
    return [None if table is None else replace(table, tokens=table.tokens[:length]) for table in cut]


def token_tables(
    pipeline: Any,
    family: Family,
    prompts: Sequence[str] | Sequence[Sequence[str]],
    length: int | None = None,
    negative: bool = False,
) -> list[TokenTable]:
    """The token tables of prompts as this pipeline encodes them in one call.

    Pads that come afterwards, where the pipeline makes encoded prompts equally long, are not in it: see `fitted`.

    Args:
        pipeline: a diffusers pipeline of the family: its tokenizers and encoders are read.
        family: whose streams apply.
        prompts: one text per sample, or one text per sample and tokenizer (in the order of the family's streams), for
            pipelines that were given different prompts for different encoders.
        length: value of the family's length argument (SD3: `max_sequence_length`); the family's default if None.
        negative: whether they are negative prompts, which some pipelines put into another template.
    """
    count = sum(len(stream.tokenizers) for stream in family.streams)
    texts = [[prompt] * count if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    tables = [_table(pipeline, family, text, length, negative) for text in texts]
    stream = family.streams[-1]
    if not stream.together:
        return tables
    size = max((len(table) for table in tables), default=0)
    size = -(-size // stream.multiple) * stream.multiple
    side = _side(stream, _tokenizer(pipeline, stream.tokenizers[-1]))
    kinds = [stream.blank if stream.blank and not table.prompt else "pad" for table in tables]
    filled = [
        _filled(table.tokens, size, side, Token(stream.name, kind)) for table, kind in zip(tables, kinds, strict=True)
    ]
    return [replace(table, tokens=tokens) for table, tokens in zip(tables, filled, strict=True)]


def stream_length(pipeline: Any, family: Family, stream: TextStream, length: int | None) -> int:
    """Number of text positions of one stream, at most where prompts are not padded. `length` as in `token_tables`."""
    if stream.length == family.length_argument and (length or family.default_length):
        return length or family.default_length
    if stream.length in ("tokenizer", family.length_argument):
        return int(_tokenizer(pipeline, stream.tokenizers[0]).model_max_length)
    return int(getattr(pipeline, stream.length))


def _table(pipeline: Any, family: Family, prompts: list[str], length: int | None, negative: bool) -> TokenTable:
    tokens: list[Token] = []
    truncated: dict[str, tuple[str, ...]] = {}
    position = 0
    for stream in family.streams:
        size = stream_length(pipeline, family, stream, length)
        readings = []
        for component, encoder in zip(stream.tokenizers, stream.encoders, strict=True):
            if getattr(pipeline, encoder, None) is not None:
                tokenizer = _tokenizer(pipeline, component)
                readings.append(_reading(pipeline, tokenizer, stream, prompts[position], size, negative))
            position += 1
        if not readings:
            tokens += [Token(stream.name, "null")] * size
            continue
        tokens += [_agreed(at_position) for at_position in zip(*(reading[0] for reading in readings), strict=True)]
        lost = readings[0][1]
        if lost:
            truncated[stream.name] = tuple(lost)
    return TokenTable(prompts[0], tuple(tokens), truncated)


def _reading(
    pipeline: Any, tokenizer: Any, stream: TextStream, prompt: str, size: int, negative: bool
) -> tuple[Sequence[Token], list[str]]:
    """The tokens of one prompt in one tokenizer as the pipeline uses it, and the words that were cut off."""
    if stream.blank and not prompt:
        return [Token(stream.name, stream.blank)], []
    texts: list[list[Part]] = [[(prompt, 0)]]
    if stream.texts is not None:
        texts = stream.texts(pipeline, prompt)
        if not texts:
            return [Token(stream.name, "null")] * size, []
    if stream.wrap is not None:
        before, after = stream.wrap(pipeline, negative)
        texts = [[part for part in ((before, -1), *parts, (after, -1)) if part[0]] for parts in texts]
    cut = 0 if stream.cut is None else stream.cut(pipeline)
    tail, left = ("", 0) if stream.tail is None else stream.tail(pipeline)
    tokens, lost = read(tokenizer, stream, prompt, texts, size + cut - left)
    if stream.padded:
        side = _side(stream, tokenizer)
        tokens = [*_filled(tokens, size + cut - left, side, Token(stream.name, "pad"))]
    if tail:
        tokens += read(tokenizer, stream, "", [[(tail, -1)]], size)[0]
    return tokens[cut:], lost


def _tokenizer(pipeline: Any, component: str) -> Any:
    found = getattr(pipeline, component)
    return getattr(found, "tokenizer", found)  # a processor's


def _side(stream: TextStream, tokenizer: Any) -> str:
    return stream.side or str(tokenizer.padding_side)


def _filled(tokens: Sequence[Token], size: int, side: str, pad: Token) -> tuple[Token, ...]:
    pads = (pad,) * (size - len(tokens))
    return (*pads, *tokens) if side == "left" else (*tokens, *pads)


def _agreed(tokens: tuple[Token, ...]) -> Token:
    """One token for a position that carries several encoders: what they agree on."""
    first = tokens[0]
    if all(token == first for token in tokens):
        return first
    kind = first.kind if all(token.kind == first.kind for token in tokens) else "unknown"
    return Token(first.stream, kind)
