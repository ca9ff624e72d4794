"""capture: pictures, a few noised forwards, everything that methods read.

    found = capture(model, picture, parse_classes("ring, house, grass"), Reading(layers=(2, 3)), keep=("i2t", "i2i"))
    read = PictureReader(model)                            # of many pictures: remembers texts, and fills its forwards
    read([Request(one, classes), Request(other, [], keep=("feat_proj",))])              # a capture of each

One stock forward (arXiv:2509.18096 section 3.4: encode, noise to sigma, one conditional call) per prompt, noise level
and seed; there is one prompt unless the names overflow the text encoders. A forward ends behind the last layer that is
read, and takes rows of several pictures and prompts at once.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.fit import Fit
from mmdit_probe.errors import UserError
from mmdit_probe.models.mmdit import MMDiT, TextCondition
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.concepts import ConceptStream
from mmdit_probe.observe.maps import PARTS, JointBlocks, second_attention
from mmdit_probe.observe.observer import Observer
from mmdit_probe.observe.probe import ForwardEnded, probe
from mmdit_probe.segment.record import Capture, JointRecord, Pass, Reading, on_cpu, with_columns
from mmdit_probe.segment.rows import RowLimit
from mmdit_probe.segment.vocabulary import Prompt, pack
from mmdit_probe.specs import Spec, layer_indices

DEFAULT = Reading()
"""Middle layers at the paper's noise level."""
_TEXT_BYTES = 1 << 30
"""Of the encodings that a reader remembers: 200 prompts of SD3 with T5."""
_TEXTS = 16
"""Prompts that are encoded at once."""
_PACKED = 512
"""Vocabularies whose prompts, and whose class vectors, a reader remembers."""
_PIXELS = 1 << 22
"""Of the pictures that are encoded at once: 4 of 1024 x 1024."""


def middle_layers(count: int) -> tuple[int, ...]:
    """The middle third of the layers: where the layers that ground words lie in the models looked at so far."""
    return tuple(range(count // 3, max(count // 3 + 1, (2 * count) // 3)))


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be read of one picture.

    Attributes:
        image: uint8 [height, width, 3], any size.
        classes: what to name in the prompt; none for the empty prompt.
        reading: layers, heads, noise levels and seeds, and how the picture is fitted.
        keep: parts of `JointRecord` ("concepts" runs a concept stream of the class names beside the forward).
        together: names share a prompt where they fit; False gives every name its own.
        heads_apart: keep I2T of every head; False keeps the mean over heads where one prompt holds all names (what
            methods read unless `Method.reads_heads`): [1, I, T].
        text_kinds: span kinds whose text columns are kept one by one, the others as their sum; None keeps all.
        concept_stream: text encoder stream that concept vectors are read from; see `concept_embeddings`.
    """

    image: NDArray[np.uint8]
    classes: Sequence[SegClass]
    reading: Reading = DEFAULT
    keep: Iterable[str] = ("i2t",)
    together: bool = True
    heads_apart: bool = True
    text_kinds: Collection[str] | None = None
    concept_stream: str | None = None


def capture(
    model: MMDiT, image: NDArray[np.uint8], classes: Sequence[SegClass], reading: Reading = DEFAULT, **how: Any
) -> Capture:
    """Run the model on one picture and keep what methods need.

    Args:
        model: the model. image, classes, reading, how: as in `Request`.
    """
    return PictureReader(model)([Request(image, classes, reading, **how)])[0]


class PictureReader:
    """Reads pictures with one model.

    Texts and class vectors are encoded once for all pictures that have them.

    Args:
        model: the model. rows: of one forward at most; None: what is fastest, see `RowLimit`.
    """

    def __init__(self, model: MMDiT, rows: int | None = None) -> None:
        self.model, self.limit = model, RowLimit(model, rows)
        self._texts: dict[str, TextCondition] = {}
        self._prompts = lru_cache(_PACKED)(partial(_prompts, model))
        self._vectors = lru_cache(_PACKED)(partial(concept_embeddings, model))

    def __call__(self, requests: Sequence[Request]) -> list[Capture]:
        """A capture of every request; those that share an image object share its latents."""
        plain = [request for request in requests if request.reading.reference == "none"]
        found = iter(self._read(plain))
        return [next(found) if request.reading.reference == "none" else self._beside(request) for request in requests]

    def _beside(self, request: Request) -> Capture:
        """A capture of a model that is given the picture as a reference: its encoder may be shown it, too."""
        if request.reading.reference == "read" and {"concepts", "i2i_attn2"} & {*request.keep}:
            raise UserError("concepts and a second attention have no tokens of a reference; read the picture itself")
        shown = self._fit(request).apply(request.image)
        return PictureReader(self.model.given([shown]), self.limit.rows)._read([request])[0]

    def _fit(self, request: Request) -> Fit:
        model, reading = self.model, request.reading
        size = reading.size or model.default_size
        return Fit.of(
            request.image.shape[:2], size, model.size_multiple, reading.fit, most_tokens(model)  # type: ignore[arg-type]
        )  # fmt: skip

    def _read(self, requests: Sequence[Request]) -> list[Capture]:
        count = len(self.model.layers)
        asked = [self._asked(request, count) for request in requests]
        self._encode({part.prompt.text for one in asked for part in one.parts})
        latents = self._latents(asked)
        rows: dict[Hashable, list[_Row]] = {}
        for one in asked:
            shown = latents[one.picture]
            for part in one.parts:
                kind = part.kind(tuple(shown.shape), self.model.family.fixed_length)
                rows.setdefault(kind, []).extend(_Row(part, shown, sigma, seed) for sigma, seed in part.drawn)
        for kind, group in rows.items():
            size, multiple = group[0].latents.shape[-2:], self.model.size_multiple // self.model.latent_side
            tokens = size.numel() // multiple**2 + self.model.text_length
            self.limit.run(group, self._forward, kind, tokens)
        return [self._capture(one) for one in asked]

    def _asked(self, request: Request, count: int) -> _Asked:
        """What a request means for this model of `count` layers, checked."""
        reading, fit = request.reading, self._fit(request)
        layers = layer_indices(middle_layers(count) if reading.layers is None else reading.layers, count)
        keep = tuple(dict.fromkeys(request.keep))
        if not request.classes and "concepts" in keep:
            raise UserError("conceptattention needs class names")
        prompts = self._prompts(tuple(request.classes), request.together)
        names = tuple(query.text for prompt in prompts for query in prompt.queries)
        apart = request.heads_apart or len(prompts) > 1
        heads = None if reading.heads is None else tuple(reading.heads)
        parts = []
        for number, prompt in enumerate(prompts):
            concepts = (names, request.concept_stream) if number == 0 and "concepts" in keep else None
            drawn = tuple(product(reading.sigmas, reading.seeds))
            reference = 0 if reading.reference == "read" else None
            parts.append(_Part(prompt, layers, keep, heads, apart, concepts, request.text_kinds, reference, drawn))
        return _Asked(request, fit, layers, parts)

    def _encode(self, texts: Collection[str]) -> None:
        """Encode those texts that are not remembered."""
        fresh = [text for text in sorted(texts) if text not in self._texts]
        size = sum(map(_bytes, self._texts.values()))
        at_once = _TEXTS if self.model.family.fixed_length else 1  # a longer neighbour would add positions
        for start in range(0, len(fresh), at_once):
            some = fresh[start : start + at_once]
            found = self.model.encode_prompt(some)
            for place, text in enumerate(some):
                own = slice(place, place + 1)
                self._texts[text] = one = TextCondition(
                    found.prompt_embeds[own].cpu().clone(), found.pooled[own].cpu().clone(), found.tokens[own]
                )
                size += _bytes(one)
        for text in [text for text in self._texts if text not in texts]:
            if size <= _TEXT_BYTES:
                break
            size -= _bytes(self._texts.pop(text))

    def _latents(self, asked: Sequence[_Asked]) -> dict[Hashable, Tensor]:
        """The latents [1, C, h, w] of every picture, encoded several at once."""
        pictures = {one.picture: one for one in asked}
        by_size: dict[tuple[int, int], list[_Asked]] = {}
        for one in pictures.values():
            by_size.setdefault(one.fit.size, []).append(one)
        found: dict[Hashable, Tensor] = {}
        for (height, width), group in by_size.items():
            at_once = max(1, _PIXELS // (height * width))
            for start in range(0, len(group), at_once):
                some = group[start : start + at_once]
                latents = self.model.encode_image([one.fit.apply(one.request.image) for one in some])
                found |= {one.picture: latents[place : place + 1] for place, one in enumerate(some)}
        return found

    @torch.no_grad()
    def _forward(self, rows: Sequence[_Row]) -> None:
        """One forward of rows of one kind, added to what their parts have."""
        part, model = rows[0].part, self.model
        kept = [one for one in part.keep if one in PARTS]
        blocks = JointBlocks(part.layers, kept, part.heads, part.heads_apart, part.reference)
        observers: list[Observer] = [blocks]
        stream = ConceptStream(model, self._vectors(*part.concepts)) if part.concepts is not None else None
        watched: Spec = list(part.layers)
        sigmas, seeds = [row.sigma for row in rows], [row.seed for row in rows]
        noised = model.noise(torch.cat([row.latents for row in rows]), sigmas, seeds)
        text = _joined([self._texts[row.part.prompt.text] for row in rows])
        with ExitStack() as stack:
            second_of = part.layers if "i2i_attn2" in part.keep else ()
            second = stack.enter_context(second_attention(model, second_of))
            if stream is not None:
                observers.append(stream)
                watched = list(range(max(part.layers) + 1))
                stack.enter_context(stream.listening())
            # A second attention comes after the joint one of its block.
            stack.enter_context(probe(model, *observers, layers=watched, to_end=bool(second_of)))
            stack.enter_context(suppress(ForwardEnded))
            model.denoise(noised, sigmas, text)
        # Copies, so that no row keeps the others alive; all of them before any is added up: memory may run out here.
        values: list[_Values] = [
            {layer: {name: _row(value, place) for name, value in parts.items()} for layer, parts in blocks.kept.items()}
            for place in range(len(rows))
        ]
        for beside, outputs in (("concepts", stream.outputs if stream is not None else {}), ("i2i_attn2", second)):
            for place, layer in product(range(len(rows)), part.layers if outputs else ()):
                values[place][layer][beside] = _row(outputs[layer], place)
        for row, found in zip(rows, values, strict=True):
            row.part.add(found, blocks.grid)

    def _capture(self, one: _Asked) -> Capture:
        request, reading = one.request, one.request.reading
        passes = [Pass(part.prompt, part.records) for part in one.parts]
        return Capture(
            request.image, one.fit, one.parts[0].grid, list(request.classes), passes, tuple(reading.sigmas),
            tuple(reading.seeds), one.layers, layer_weights(one.layers, reading.weights), family=self.model.family.name,
        )  # fmt: skip


_Values = dict[int, dict[str, Tensor]]
"""Layer -> part of `JointRecord` -> tensor."""


@dataclass(eq=False)
class _Part:
    """One prompt of one picture, and what is read of its forwards.

    Attributes:
        keep: parts of `JointRecord`. concepts: names and text stream of its concept stream.
        reference: number of the reference picture that is read; None reads the image.
        drawn: noise level and seed of every forward. done: forwards so far, `sums` of theirs on the model's device.
        records: the means when all are done, on the CPU, with the columns of `text_kinds`; `prompt` says which.
        grid: (h, w) of the tokens that were read.
    """

    prompt: Prompt
    layers: tuple[int, ...]
    keep: tuple[str, ...]
    heads: tuple[int, ...] | None
    heads_apart: bool
    concepts: tuple[tuple[str, ...], str | None] | None
    text_kinds: Collection[str] | None
    reference: int | None
    drawn: tuple[tuple[float, int], ...]
    done: int = 0
    sums: _Values = field(default_factory=dict)
    records: dict[int, JointRecord] = field(default_factory=dict)
    grid: tuple[int, int] = (0, 0)

    def kind(self, shape: tuple[int, ...], fixed_length: bool) -> Hashable:
        """Rows of equal kinds may share a forward: one size, one thing to read, texts of one length."""
        read = (self.layers, frozenset(self.keep), self.heads, self.heads_apart, self.concepts)
        return shape, read, None if fixed_length else self.prompt.text

    def add(self, values: _Values, grid: tuple[int, int] | None) -> None:
        """Add what one forward gave; the last one makes the records."""
        assert grid is not None
        self.grid = grid
        for layer, name in ((layer, name) for layer, parts in values.items() for name in parts):
            sums = self.sums.setdefault(layer, {})
            sums[name] = sums[name].add_(values[layer][name]) if name in sums else values[layer][name]
        self.done += 1
        if self.done == len(self.drawn):
            means = {
                layer: JointRecord(layer, **{name: value.div_(self.done) for name, value in sums.items()})
                for layer, sums in self.sums.items()
            }
            kept = Pass(self.prompt, means)
            kept = kept if self.text_kinds is None else with_columns(kept, self.text_kinds)
            self.prompt, self.sums = kept.prompt, {}
            self.records = {layer: on_cpu(record) for layer, record in kept.records.items()}


@dataclass(eq=False)
class _Asked:
    """A request as the model sees it."""

    request: Request
    fit: Fit
    layers: tuple[int, ...]
    parts: list[_Part]

    @property
    def picture(self) -> Hashable:
        """The same for requests of one picture that lies in the network's input in one way."""
        return id(self.request.image), self.fit


@dataclass(frozen=True, eq=False)
class _Row:
    """One row of a forward."""

    part: _Part
    latents: Tensor
    sigma: float
    seed: int


def most_tokens(model: MMDiT) -> int | None:
    """Tokens along a side that the transformer has positions for; None where positions are computed (RoPE)."""
    most = getattr(model.transformer.config, "pos_embed_max_size", None)
    return None if most is None else int(most)


def layer_weights(layers: Sequence[int], weights: Mapping[int, float] | None) -> tuple[float, ...]:
    """Weights in the order of `layers`, summing to 1; () for equal ones.

    Raises:
        UserError: a layer has no weight, or all weights are 0.
    """
    if weights is None:
        return ()
    lost = [layer for layer in layers if layer not in weights]
    total = sum(weights.get(layer, 0.0) for layer in layers)
    if lost or not total > 0:
        raise UserError(f"weights {dict(weights)}: expected one for each of the layers {list(layers)}, not all 0")
    return tuple(weights[layer] / total for layer in layers)


def concept_embeddings(model: MMDiT, names: Sequence[str], stream: str | None = None) -> Tensor:
    """One vector [K, C] per name: each name encoded alone, mean over its word tokens.

    Args:
        stream: text encoder stream to read; the last one that has words if None (SD3: T5 where it is on, else CLIP).
            Means over several streams would mix channels that belong to different encoders.
    """
    text = model.encode_prompt(list(names))
    vectors = []
    for row, table in zip(text.prompt_embeds, text.tokens, strict=True):
        streams = [token.stream for token in table.tokens if token.kind == "word"]
        if not streams:
            raise UserError(f"class name {table.prompt!r} has no word tokens")
        vectors.append(row[table.positions("word", stream or streams[-1])].mean(0))
    return torch.stack(vectors)


def _joined(texts: Sequence[TextCondition]) -> TextCondition:
    """One condition of several texts; of one where all are the same."""
    if all(text is texts[0] for text in texts):
        return texts[0]
    return TextCondition(
        torch.cat([text.prompt_embeds for text in texts]), torch.cat([text.pooled for text in texts]),
        [table for text in texts for table in text.tokens],
    )  # fmt: skip


def _row(values: Tensor, place: int) -> Tensor:
    return values[place].clone() if len(values) > 1 else values[0]


def _bytes(text: TextCondition) -> int:
    return text.prompt_embeds.nbytes + text.pooled.nbytes


def _prompts(model: MMDiT, classes: tuple[SegClass, ...], together: bool) -> list[Prompt]:
    """The prompts of classes; the empty one without any."""

    @lru_cache(None)
    def table(text: str) -> TokenTable:
        return model.token_tables(text)[0]

    return pack(classes, table, together) or [Prompt("", table(""), ())]
