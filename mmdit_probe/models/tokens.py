"""What each text position is: encoder stream, span kind, word. From the tokenizers, by character offsets.

    table = token_tables(pipeline, family, ["a red ring"], length=256)[0]
    table.positions(kind="word", stream="t5")
    table.word_spans("red ring")            # {"clip": [2, 3], "t5": [78, 79, 80]}

Text positions follow the joint text order (SD3: CLIP's positions, then T5's). A text mass that is not split by span
kind cannot be compared between models: much of it may sit on BOS, EOS, pads or a template. What counts as a word, and
as the same letters, is the business of `data.words`.
"""

from __future__ import annotations

import bisect
import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmdit_probe.data.words import blankless, check_prompt, find, folded, words
from mmdit_probe.errors import ProbeWarning, UserError, check_known, counted, unknown
from mmdit_probe.models.families.facts import Family, Part, TextStream

_ALL = 1 << 30
"""More tokens than any prompt has."""
SPAN_KINDS = ("bos", "word", "eos", "pad", "template", "vision", "null", "unknown")


@dataclass(frozen=True)
class Token:
    """One text position. `start` and `stop` are character offsets in the stream's text; -1 where there is no text."""

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
        texts: stream -> its text, for streams that were given another one than `prompt` (SD3's `prompt_3`).
        disputed: stream -> the words that have no position there, because the tokenizers that share its positions place
            them differently.
    """

    prompt: str
    tokens: tuple[Token, ...]
    truncated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    disputed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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
        """The prompt's words in order, then those of other texts; `Token.word_index` counts them."""
        return [text[start:stop] for text, start, stop in _words_of(self)]

    @property
    def unread(self) -> list[str]:
        """The words that no encoder reads: cut off by all of them, or without a position that they agree on."""
        read = {
            (text, place)
            for token in self.tokens
            if token.start >= 0
            for text in (self.text(token.stream),)
            for place in range(*_extent(token, text))
        }
        words_here = _words_of(self)
        return [text[a:b] for text, a, b in words_here if not any((text, place) in read for place in range(a, b))]

    def text(self, stream: str) -> str:
        """The text that a stream was given."""
        return self.texts.get(stream, self.prompt)

    def positions(self, kind: str | None = None, stream: str | None = None, word: str | int | None = None) -> list[int]:
        """Text positions (0..T-1) that match every given condition.

        Args:
            kind: a span kind. stream: an encoder stream.
            word: a word or phrase (all its occurrences, as `word_spans` finds them) or a word index.
        """
        if kind is not None:
            check_known("span kind", kind, SPAN_KINDS)
        spans = self.word_spans(word, missing_ok=True) if isinstance(word, str) else {}
        named = {position for span in spans.values() for position in span}
        return [
            position
            for position, token in enumerate(self.tokens)
            if (kind is None or token.kind == kind)
            and (stream is None or token.stream == stream)
            and (word is None or (token.word_index == word if isinstance(word, int) else position in named))
        ]

    def spans(self, start: int, stop: int, text: str | None = None) -> dict[str, list[int]]:
        """Text positions of the tokens that stand for any of the characters [start, stop), per encoder stream.

        Args:
            start, stop: character offsets in the text.
            text: which streams' text; the prompt if None.

        Returns: stream -> positions; streams that were given another text, or read none of these characters, are
        absent. A bare mark of a word's start counts with the character that follows it.
        """
        found: dict[str, list[int]] = {}
        for position, token in enumerate(self.tokens):
            own = self.text(token.stream)
            if token.start < 0 or own != (self.prompt if text is None else text):
                continue
            first, last = _extent(token, own)
            if first < stop and start < last:
                found.setdefault(token.stream, []).append(position)
        return found

    def word_spans(
        self, phrase: str, occurrence: int | None = None, *, missing_ok: bool = False, beside: Iterable[str] = ()
    ) -> dict[str, list[int]]:
        """Text positions of a word, of a run of words or of any other part of the prompt, per encoder stream.

        Args:
            phrase: e.g. "ring", "red ring" or "猫", compared as `data.words.find` does. Where it is no whole word of
                a text, its letters within words are taken, with a warning.
            occurrence: which one if the phrase is repeated (0-based, in every text by itself); None takes all.
            missing_ok: no positions, instead of an error, if no encoder reads the phrase.
            beside: other phrases that are looked for: "bear" within "teddy bear" is the longer one's.

        Returns: stream -> positions, each stream by its own text; a stream whose encoder was not given the phrase, cut
        it off, or is switched off, is absent.

        Raises:
            UserError: the phrase is in no text, was cut off in every stream, or the tokenizers disagree on its place.
        """
        places = self._places(phrase, list(beside))
        if occurrence is not None:
            counts = {len(found) for found in places.values()} or {0}
            if places and not 0 <= occurrence < max(counts):
                raise UserError(
                    f"{phrase!r} occurs {counted(max(counts), 'time')} in {self.prompt!r}; got occurrence {occurrence}"
                )
            places = {text: found[occurrence : occurrence + 1] for text, found in places.items()}
        positions: dict[str, set[int]] = {}
        for text, found in places.items():
            for start, stop in found:
                for stream, span in self.spans(start, stop, text).items():
                    positions.setdefault(stream, set()).update(span)
        disputing = [stream for stream in self.disputed if stream not in positions and self.text(stream) in places]
        if disputing and positions:
            warnings.warn(
                f"the tokenizers of {disputing[0]!r} place {phrase!r} differently in {self.prompt!r}, so it has no"
                f" position there; {', '.join(positions)} alone is read",
                ProbeWarning,
                stacklevel=2,
            )
        if not positions and not missing_ok:
            raise self._missing(phrase, places, disputing)
        return {stream: sorted(span) for stream, span in positions.items()}

    def _places(self, phrase: str, beside: Sequence[str] = ()) -> dict[str, list[tuple[int, int]]]:
        """text -> (start, stop) of every occurrence, for the texts that have the phrase."""
        texts = dict.fromkeys([self.prompt, *self.texts.values()])
        places = {text: found for text in texts if (found := find(phrase, text, beside=beside))}
        if not places:
            places = {text: found for text in texts if (found := find(phrase, text, whole=False, beside=beside))}
            if places:
                warnings.warn(
                    f"{phrase!r} is no word of {next(iter(places))!r}: its letters within a word are taken",
                    ProbeWarning,
                    stacklevel=3,
                )
        return places

    def _missing(self, phrase: str, places: Mapping[str, Any], disputing: Sequence[str]) -> UserError:
        if not places and any(find(phrase, text) for text in (self.prompt, *self.texts.values())):
            return UserError(f"{phrase!r} stands only within longer names in {self.prompt!r}; leave it out")
        if not places:
            return unknown("word", phrase, dict.fromkeys(self.words))
        if disputing:
            return UserError(
                f"the tokenizers of {disputing[0]!r} place {phrase!r} differently in {self.prompt!r}, and no other text"
                " encoder reads it; write the prompt without runs of '!', and with one text for all of them"
            )
        if not self.truncated:
            return UserError(f"{phrase!r} has no text token: no text encoder reads it in the prompt {self.prompt!r}")
        return UserError(
            f"{phrase!r} fell off the end of every text encoder for the prompt {self.prompt!r}; shorten it"
        )


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
    # Longer ones: other pipelines of the family put more than the prompt into the text (HunyuanVideo's picture).
    fit = [t is not None and len(t) >= length and not set(t.kinds[length:]) - {"pad"} for t in tables]
    cut = [table if fits else None for table, fits in zip(tables, fit, strict=True)]
    return [None if table is None else replace(table, tokens=table.tokens[:length]) for table in cut]


def token_tables(
    pipeline: Any,
    family: Family,
    prompts: Sequence[str] | Sequence[Sequence[str]],
    length: int | None = None,
    negative: bool = False,
    pictures: Sequence[int] = (),
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
        pictures: how many positions each of the pictures takes that the text encoder is shown, those of all prompts.

    Raises:
        UserError: a prompt that is none, or of more than `words.LONGEST` characters.
    """
    count = sum(len(stream.tokenizers) for stream in family.streams)
    texts = [[prompt] * count if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    for text in (one for of_sample in texts for one in of_sample):
        check_prompt(text)
    shown = len(pictures) // max(1, len(texts))
    tables = [
        _table(pipeline, family, text, length, negative, pictures[k * shown : (k + 1) * shown])
        for k, text in enumerate(texts)
    ]
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


def picture_positions(pipeline: Any, pictures: Any) -> list[int]:
    """How many text positions each picture takes that the pipeline's `encode_prompt` was given; none without any."""
    if pictures is None or getattr(pipeline, "processor", None) is None:
        return []
    processor = pipeline.processor.image_processor
    grids = processor(images=pictures, return_tensors="pt")["image_grid_thw"]  # frames, rows and columns of patches
    return [int(grid.prod()) // processor.merge_size**2 for grid in grids]


def stream_length(pipeline: Any, family: Family, stream: TextStream, length: int | None) -> int:
    """Number of text positions of one stream, at most where prompts are not padded. `length` as in `token_tables`."""
    if stream.length not in ("tokenizer", family.length_argument):
        return int(getattr(pipeline, stream.length))
    asked = (length or family.default_length) if stream.length == family.length_argument else 0
    if asked and not stream.limited:
        return asked
    limit = int(_tokenizer(pipeline, stream.tokenizers[0]).model_max_length)
    return min(asked, limit) if asked else limit


def _table(
    pipeline: Any, family: Family, prompts: list[str], length: int | None, negative: bool, pictures: Sequence[int]
) -> TokenTable:
    tokens: list[Token] = []
    texts: dict[str, str] = {}
    unread: dict[str, list[tuple[int, int]]] = {}
    unplaced: dict[str, list[tuple[int, int]]] = {}
    left = iter(prompts)
    for stream in family.streams:
        size = stream_length(pipeline, family, stream, length)
        given = [(*names, next(left)) for names in zip(stream.tokenizers, stream.encoders, strict=True)]
        read = [
            (prompt, *_reading(pipeline, _tokenizer(pipeline, component), stream, prompt, size, negative, pictures))
            for component, encoder, prompt in given
            if getattr(pipeline, encoder, None) is not None
        ]
        if not read:
            tokens += [Token(stream.name, "null")] * size
            continue
        of_stream = [
            _agreed(at_position, [prompt for prompt, *_ in read])
            for at_position in zip(*(found for _, found, _ in read), strict=True)
        ]
        tokens += of_stream
        texts[stream.name], _, unread[stream.name] = read[0]
        placed = {(token.start, token.stop) for token in of_stream}
        unplaced[stream.name] = [
            (t.start, t.stop) for t in read[0][1] if t.kind == "word" and (t.start, t.stop) not in placed
        ]
    others = {name: text for name, text in texts.items() if text != prompts[0]}
    table = TokenTable(prompts[0], tuple(tokens), texts=others)
    return _with_words(table, unread, unplaced)


def _with_words(
    table: TokenTable,
    unread: Mapping[str, Sequence[tuple[int, int]]],
    unplaced: Mapping[str, Sequence[tuple[int, int]]],
) -> TokenTable:
    """The table with the word of every token, given the characters that each stream cut off, or has no place for."""
    known = _words_of(table)
    numbers: dict[str, list[int]] = {}
    for number, (text, *_) in enumerate(known):
        numbers.setdefault(text, []).append(number)
    stops = {text: [known[n][2] for n in of] for text, of in numbers.items()}

    def overlapping(stream: str, start: int, stop: int) -> list[int]:
        own = table.text(stream)
        after = numbers.get(own, [])[bisect.bisect_right(stops.get(own, []), start) :]
        return list(itertools.takewhile(lambda n: known[n][1] < stop, after))

    def named(token: Token) -> Token:
        index = next(iter(overlapping(token.stream, *_extent(token, table.text(token.stream)))), -1)
        text, start, stop = known[index] if index >= 0 else ("", 0, 0)
        return replace(token, word=text[start:stop] or None, word_index=index)

    def listed(ranges: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, tuple[str, ...]]:
        found = {
            stream: sorted({n for start, stop in of for n in overlapping(stream, start, stop)})
            for stream, of in ranges.items()
        }
        return {stream: tuple(known[n][0][known[n][1] : known[n][2]] for n in of) for stream, of in found.items() if of}

    tokens = tuple(named(token) if token.start >= 0 else token for token in table.tokens)
    return replace(table, tokens=tokens, truncated=listed(unread), disputed=listed(unplaced))


def _words_of(table: TokenTable) -> list[tuple[str, int, int]]:
    """(text, start, stop) of every word of every text. Runs without blanks are divided where no token straddles."""
    found = []
    for text in dict.fromkeys([table.prompt, *table.texts.values()]):
        edges: set[int] = set()
        if blankless(text):
            read = [token for token in table.tokens if token.start >= 0 and table.text(token.stream) == text]
            edges = {edge for token in read for edge in (token.start, token.stop)}
            edges -= {edge for token in read for edge in range(token.start + 1, token.stop)}
        found += [(text, start, stop) for start, stop in words(text, edges)]
    return found


def _extent(token: Token, text: str) -> tuple[int, int]:
    """The characters that a token of a text stands for. A bare mark of a word's start belongs to what follows it."""
    if text[token.start : token.stop].strip():
        return token.start, token.stop
    first = token.start + len(text[token.start :]) - len(text[token.start :].lstrip())
    return first, first + 1


def _reading(
    pipeline: Any,
    tokenizer: Any,
    stream: TextStream,
    prompt: str,
    size: int,
    negative: bool,
    pictures: Sequence[int],
) -> tuple[Sequence[Token], list[tuple[int, int]]]:
    """The tokens of one prompt in one tokenizer as the pipeline uses it, and the characters that were cut off."""
    if stream.blank and not prompt:
        return [Token(stream.name, stream.blank)], []
    texts: list[list[Part]] = [[(prompt, 0)]]
    if stream.texts is not None:
        texts = stream.texts(pipeline, prompt)
        if not texts:
            return [Token(stream.name, "null")] * size, []
    if stream.wrap is not None:
        before, after = stream.wrap(pipeline, negative)
        before += stream.pictures(pipeline, len(pictures)) if stream.pictures is not None else ""
        texts = [[part for part in ((before, -1), *parts, (after, -1)) if part[0]] for parts in texts]
    cut = 0 if stream.cut is None else stream.cut(pipeline)
    tail, left = ("", 0) if stream.tail is None else stream.tail(pipeline)
    tokens: list[Token] = []
    unread: list[tuple[int, int]] = []
    for parts in texts:
        room = _ALL if pictures else size + cut - left
        found, reach = _read(tokenizer, stream, parts, room - len(tokens) if stream.padded else room)
        tokens += found
        unread += _beyond(parts, reach)
    if stream.padded:
        side = _side(stream, tokenizer)
        tokens = [*_filled(tokens, size + cut - left, side, Token(stream.name, "pad"))]
    if tail:
        tokens += _read(tokenizer, stream, [(tail, -1)], size)[0]
    if pictures:
        counts = iter(pictures)
        tokens = [token for token in tokens for _ in range(next(counts) if token.kind == "vision" else 1)]
    return tokens[cut:], unread


def _read(tokenizer: Any, stream: TextStream, parts: Sequence[Part], limit: int) -> tuple[list[Token], int]:
    """The tokens of one text, `limit` at most, and up to which of its characters they go."""
    if limit <= 0:
        return [], 0
    text = "".join(part for part, _ in parts)
    tokens: list[Token] = []
    seen_text = False
    reach = 0
    picture = tokenizer.convert_tokens_to_ids(stream.picture) if stream.picture in text and stream.picture else None
    for token_id, special, first, last in _encoded(tokenizer, text, limit, stream.special_tokens):
        place = _place(parts, first, last)
        if token_id == picture:
            tokens.append(Token(stream.name, "vision"))
            continue
        if special:
            is_start = not seen_text and (token_id == tokenizer.bos_token_id or token_id != tokenizer.eos_token_id)
            # CLIP's end token is its pad too; other pads are read only where a pipeline puts them into the text.
            is_pad = token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
            tokens.append(Token(stream.name, "pad" if is_pad else "bos" if is_start else "eos"))
            seen_text = seen_text or token_id == tokenizer.bos_token_id
            continue
        seen_text, reach = True, max(reach, last)
        start, stop = place or (-1, -1)
        tokens.append(Token(stream.name, "template" if place is None else "word", start=start, stop=stop))
    return tokens, reach if len(tokens) >= limit else len(text)


def _encoded(tokenizer: Any, text: str, limit: int, special_tokens: bool) -> list[tuple[int, bool, int, int]]:
    """(id, whether it is special, first and last character) of every token of a text."""
    options = {"truncation": True, "max_length": limit, "add_special_tokens": special_tokens}
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **options)
        rows = zip(found["input_ids"], found["special_tokens_mask"], found["offset_mapping"], strict=True)
        return [(token_id, bool(special), *offsets) for token_id, special, offsets in rows]
    own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(own) if hasattr(tokenizer, "convert_ids_to_tokens") else []
    places = [] if any("▁" in piece for piece in pieces) else _byte_places(tokenizer, text, len(own))
    places = places or _piece_places(pieces, text, tokenizer.unk_token if pieces else "")
    if len(places) != len(own):
        raise UserError(f"{type(tokenizer).__name__} does not say which characters a token stands for; load a fast one")
    ids = tokenizer(text, **options)["input_ids"]
    specials = set(tokenizer.all_special_ids)
    # What the tokenizer adds comes last, but for a start token.
    places = ([(0, 0)] if ids[:1] == [tokenizer.bos_token_id] != own[:1] else []) + places
    places += [(len(text), len(text))] * (len(ids) - len(places))
    return [(token_id, token_id in specials, *place) for token_id, place in zip(ids, places, strict=False)]


def _byte_places(tokenizer: Any, text: str, count: int) -> list[tuple[int, int]]:
    """First and last character of every token of a text where these are its bytes, and special tokens that are spelled
    out; nothing if they are not `count`."""
    specials = sorted(map(re.escape, tokenizer.all_special_tokens), key=len, reverse=True)
    found: list[tuple[int, int]] = []
    for match in re.finditer("|".join([*specials, "."]), text, re.DOTALL):
        found += [match.span()] * (1 if len(match[0]) > 1 else len(match[0].encode()))
    return found if len(found) == count else []


def _piece_places(pieces: Sequence[str], text: str, unknown_piece: str) -> list[tuple[int, int]]:
    """First and last character of every token of a text where these are its pieces, in order (SentencePiece); nothing
    if they are not. Unknown pieces and bytes stand for what lies between the others."""
    letters, origins = folded(text)
    letters, origins = f"{letters} ", (*origins, len(text), len(text))
    found: list[tuple[int, int]] = []
    at = waiting = 0
    for piece in [*pieces, ""]:
        if piece == unknown_piece or re.fullmatch("<0x..>", piece):
            waiting += 1
            continue
        body = folded(piece.replace("▁", " "))[0].strip()
        first = len(letters) - 1 if piece == "" else letters.find(body or " ", at) if body or waiting else at
        between = letters[at:first].strip()
        if first < 0 or bool(between) != bool(waiting):
            return []
        if waiting:
            start = origins[letters.find(between, at)]
            run = text[start : origins[letters.find(between, at) + len(between) - 1] + 1]
            of_bytes = [(start + n, start + n + 1) for n, letter in enumerate(run) for _ in letter.encode()]
            found += of_bytes if len(of_bytes) == waiting else [(start, start + len(run))] * waiting
            waiting = 0
        at = first + len(body)
        found.append((origins[first], origins[at - 1] + 1 if body else origins[first]))
    return found[:-1]


def _place(parts: Sequence[Part], first: int, last: int) -> tuple[int, int] | None:
    """Where in the prompt the characters [first, last) of a text come from, blanks only if nothing else is there; None
    if they are none of the prompt's."""
    begin = 0
    place: tuple[int, int] | None = None
    for part, start in parts:
        end = begin + len(part)
        # Where a pipeline adds nothing, bare marks at the ends of the text are the prompt's too.
        if start >= 0 and ((begin < last and first < end) or len(parts) == 1):
            inside = slice(max(first, begin) - begin, min(last, end) - begin)
            if place is None or part[inside].strip():
                place = start + inside.start, start + inside.stop
            if part[inside].strip():
                break
        begin = end
    return place


def _beyond(parts: Sequence[Part], reach: int) -> list[tuple[int, int]]:
    """The characters of the prompt that lie beyond the first `reach` of a text of these parts."""
    found = []
    begin = 0
    for part, start in parts:
        if start >= 0 and begin + len(part) > reach:
            found.append((start + max(0, reach - begin), start + len(part)))
        begin += len(part)
    return found


def _tokenizer(pipeline: Any, component: str) -> Any:
    found = getattr(pipeline, component)
    return getattr(found, "tokenizer", found)  # a processor's


def _side(stream: TextStream, tokenizer: Any) -> str:
    return stream.side or str(tokenizer.padding_side)


def _filled(tokens: Sequence[Token], size: int, side: str, pad: Token) -> tuple[Token, ...]:
    pads = (pad,) * (size - len(tokens))
    return (*pads, *tokens) if side == "left" else (*tokens, *pads)


def _agreed(tokens: Sequence[Token], prompts: Sequence[str]) -> Token:
    """One token for a position that carries several encoders, given the texts they read: what they agree on."""
    first = tokens[0]
    spelled = {(token, prompt[max(0, token.start) : token.stop]) for token, prompt in zip(tokens, prompts, strict=True)}
    if len(spelled) == 1:
        return first
    kind = first.kind if all(token.kind == first.kind for token in tokens) else "unknown"
    return Token(first.stream, kind)
