"""What methods read of one picture: plain tensors, from a captured forward or one's own, and how they were read.

    capture = Capture.of(grid=(2, 3), i2t=torch.rand(6, 5).softmax(-1), spans={"cat": [1, 2], "sky": [3]})
    METHODS["seg4diff"](capture)                    # scores [C, h, w]: every method is a pure function of a capture

Records of several noise seeds or noise levels are averaged part by part before a method sees them. Not here: running a
model (`segment.capture`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.fit import Fit
from mmdit_probe.data.labels import region_ids
from mmdit_probe.errors import RunError, UserError, counted, first_line
from mmdit_probe.models.tokens import SPAN_KINDS, Token, TokenTable
from mmdit_probe.observe.maps import second_eigenvalue
from mmdit_probe.segment.vocabulary import Prompt, Query
from mmdit_probe.specs import Spec, named_of

OWN_PARTS = ("i2t", "i2t_logit", "i2i", "features", "concepts")
"""What `Capture.of` takes of one's own tensors."""
_GIVEN_AS = {"i2i_walk": "i2i", "i2i_attn2": "i2i", "feat_out": "features", "feat_proj": "features"}
"""Part of a record -> what it is made of, where that has another name."""
PAPER_SIGMA = 0.515
"""The paper's noise level: the 8th of 28 steps from the clean end of SD3's schedule."""


@dataclass(frozen=True)
class Reading:
    """What of a forward is read.

    Attributes:
        layers: layers to keep; the middle third if None. weights: layer -> weight in means over layers; equal if None.
        heads: heads in the mean of I2I; None takes all.
        sigmas: noise levels, seeds: noise seeds; records are averaged over all pairs.
        fit: how the picture is brought to the input size, see `data.fit`.
        size: (height, width) of the network's input; the model's own if None.
        reference: "beside" gives an editing model the picture as its reference too; "read" also reads its tokens there,
            in place of the noised picture's.

    Raises:
        UserError: no noise level, or no seed.
    """

    layers: Spec | None = None
    weights: Mapping[int, float] | None = None
    heads: Sequence[int] | None = None
    sigmas: Sequence[float] = (PAPER_SIGMA,)
    seeds: Sequence[int] = (0,)
    fit: str = "squash"
    size: tuple[int, int] | None = None
    reference: Literal["none", "beside", "read"] = "none"

    def __post_init__(self) -> None:
        if not self.seeds or not self.sigmas:
            raise UserError("a reading needs at least one noise seed and one noise level")


@dataclass
class JointRecord:
    """The joint attention of one layer for one picture and one prompt. Parts that were not asked for are None.

    Attributes:
        i2t: [H, I, T] probabilities of the text keys in the joint softmax. i2t_logit: the same before the softmax.
        i2i: [I, I] head mean of the image-image block, rows sum to 1 minus the text mass. i2i_walk: see `JointBlocks`.
        i2i_attn2: [I, I] head mean of the second, image-only attention (SD3.5), rows sum to 1.
        feat_out, feat_proj: [I, E] attention output before and after the output projection.
        concepts: [K, E] attention output of the concept stream, one row per name of the pass.
    """

    layer: int
    i2t: Tensor | None = None
    i2i: Tensor | None = None
    i2i_walk: Tensor | None = None
    feat_out: Tensor | None = None
    feat_proj: Tensor | None = None
    concepts: Tensor | None = None
    i2i_attn2: Tensor | None = None
    i2t_logit: Tensor | None = None

    PARTS = ("i2t", "i2i", "i2i_walk", "feat_out", "feat_proj", "concepts", "i2i_attn2", "i2t_logit")

    def part(self, name: str) -> Tensor:
        """A part that must be there.

        Raises:
            RunError: it was not captured. UserError: it is not among one's own tensors.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise self.without(name)
        return value

    def without(self, name: str) -> Exception:
        """What to say of a part that is not there."""
        return RunError(f"layer {self.layer}: {name} was not captured; pass keep={name!r} to capture")


class OwnRecord(JointRecord):
    """A record of one's own tensors (`Capture.of`), not of a captured forward."""

    def without(self, name: str) -> Exception:
        given = _GIVEN_AS.get(name, name)
        return UserError(f"this reads {given}, and the capture has none; pass {given}= to Capture.of")


@dataclass
class Pass:
    """One prompt of a capture and its records by layer."""

    prompt: Prompt
    records: dict[int, JointRecord]


@dataclass
class Capture:
    """Everything a method may read about one picture.

    Attributes:
        picture: uint8 [height, width, 3], the original one; None where only tensors are known.
        fit: how the picture lies in the network's input.
        grid: (h, w) of the image tokens, I = h * w, row-major.
        classes: what the prompts name; empty for the empty prompt.
        passes: one per prompt.
        sigmas, seeds: what was averaged over.
        layers: those that a method reads. weights: one per layer in means over layers, sum 1; () for equal ones.
        regions: ids [height, width] of another program's regions, 0 where there is none; None: methods make their own.
        family: of the model, whose rule ConceptAttention takes by default.
    """

    picture: NDArray[np.uint8] | None
    fit: Fit
    grid: tuple[int, int]
    classes: list[SegClass]
    passes: list[Pass]
    sigmas: tuple[float, ...]
    seeds: tuple[int, ...]
    layers: tuple[int, ...] = field(default=())
    weights: tuple[float, ...] = ()
    regions: NDArray[np.integer] | None = None
    family: str = ""
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, grid: tuple[int, int], *, spans: Mapping[str, Sequence[int]] | None = None,
        kinds: Sequence[str] | None = None, regions: Any = None, image: Any = None, family: str = "", **parts: Any,
    ) -> Capture:  # fmt: skip
        """A capture of one's own tensors or arrays, for any method and refinement; no model is needed.

        A part may also be a mapping, layer -> tensor; methods take the mean over the layers.

        >>> from mmdit_probe.segment.methods import METHODS
        >>> i2t = [[0.3, 0.1, 0.2], [0.3, 0.2, 0.1]]                # two tokens; text: BOS, cat, sky
        >>> capture = Capture.of((1, 2), i2t=i2t, spans={"cat": [1], "sky": [2]})
        >>> METHODS["seg4diff"](capture).argmax(0).tolist()
        [[1, 0]]

        Args:
            grid: (h, w) of the image tokens, I = h * w, row-major.
            spans: class -> its text positions, in the order of the classes; an empty list where only the name is read.
            kinds: span kind of each of the T positions; if None, "word" within spans and "pad" elsewhere.
            regions: whole ids [h, w], or of the picture's size, 0 where there is none.
            image: uint8 [height, width, 3], for what reads pixels; label maps are of its size (the grid's without it).
            family: model family, for ConceptAttention's default rule.
            parts: what was measured, by name: i2t, [I, T] or [H, I, T] probabilities of the text keys; i2t_logit, the
                same before the softmax; i2i, [I, I] or [H, I, I] image-image attention, query by key; features, [I, E]
                or [h, w, E]; concepts, [K, E], one row per name.

        Raises:
            UserError: an unknown part, something that is no array of real numbers, a shape that does not fit the grid,
                layers that differ, positions outside the text.
        """
        named_of("part of a capture", parts, OWN_PARTS)
        if not isinstance(grid, Sequence) or len(grid) != 2 or not all(_whole(side) and side > 0 for side in grid):
            raise UserError(f"grid is {grid!r}; expected (h, w), whole numbers of image tokens")
        by_part = {
            name: {layer: _numbers(name, one) for layer, one in _by_layer(value).items()}
            for name, value in parts.items()
            if value is not None
        }
        layers = sorted({layer for by_layer in by_part.values() for layer in by_layer} or {0})
        for name, by_layer in by_part.items():
            if sorted(by_layer) != layers:
                raise UserError(f"{name} has layers {sorted(by_layer)}, other parts {layers}; give the same to all")
        records = {
            layer: _record(layer, {name: by_layer[layer] for name, by_layer in by_part.items()}, grid)
            for layer in layers
        }
        first = records[layers[0]]
        if first.concepts is not None and len(first.concepts) != len(spans or {}):
            found = f"{counted(len(first.concepts), 'concept')} for {counted(len(spans or {}), 'name')} in spans"
            raise UserError(f"{found}; expected as many")
        texts = {one.shape[-1] for name in ("i2t", "i2t_logit") for one in by_part.get(name, {}).values()}
        if len(texts) > 1:
            raise UserError(f"i2t and i2t_logit of {sorted(texts)} text positions; expected as many in every layer")
        prompt = _prompt(spans or {}, kinds, texts.pop() if texts else None)
        picture = None if image is None else _pixels(image)
        size = grid if picture is None else (picture.shape[0], picture.shape[1])
        names = [SegClass((name,)) for name in spans or {}]
        return cls(
            picture, Fit.of(size, grid, 1), grid, names, [Pass(prompt, records)], (), (), tuple(layers),
            regions=None if regions is None else region_ids(regions, grid, size), family=family,
        )  # fmt: skip

    @property
    def image(self) -> NDArray[np.uint8]:
        """The picture, which must be there.

        Raises:
            UserError: only tensors are known.
        """
        if self.picture is None:
            raise UserError("this step reads the picture's pixels, and the capture has none; pass image= to Capture.of")
        return self.picture

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture in pixels."""
        return self.fit.picture

    @property
    def shares(self) -> tuple[float, ...]:
        """Weight of each of `layers` in a mean over layers."""
        return self.weights or (1.0 / len(self.layers),) * len(self.layers)

    @property
    def queries(self) -> list[tuple[int, Query]]:
        """(pass, name) of every name, in order."""
        return [(index, query) for index, one in enumerate(self.passes) for query in one.prompt.queries]

    def over_layers(self, read: Callable[[JointRecord], Tensor], of: int = 0) -> Tensor:
        """Weighted mean over layers of what `read` makes of the records of one pass."""
        records = self.passes[of].records
        parts = [share * read(records[layer]) for layer, share in zip(self.layers, self.shares, strict=True)]
        return torch.stack(parts).sum(0)

    def mean(self, part: str, of: int = 0) -> Tensor:
        """Weighted mean over layers of one part of one pass."""
        return self.over_layers(lambda record: record.part(part), of)

    def features(self, part: str) -> Tensor:
        """Unit features [I, E L] of the first pass: layers normalised and set side by side.

        A dot product of two rows is the weighted mean of the layers' cosines.
        """
        records = self.passes[0].records
        parts = [
            share**0.5 * F.normalize(records[layer].part(part), dim=-1)
            for layer, share in zip(self.layers, self.shares, strict=True)
        ]
        return F.normalize(torch.cat(parts, -1), dim=-1)

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave when it was called for this picture, these layers and weights before."""
        key = (name, self.layers, self.weights)
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


def on_cpu(record: JointRecord) -> JointRecord:
    """The record with its tensors on the CPU."""
    there = {name: part.cpu() for name in JointRecord.PARTS if (part := getattr(record, name)) is not None}
    return replace(record, **there)


def with_columns(one: Pass, kinds: Collection[str]) -> Pass:
    """The pass with the text columns of some span kinds, and one for all others together.

    The last column is the sum of the others' probabilities (the log-sum-exp of their logits), so that each row's text
    mass stays what it was; its token is of stream "rest" and kind "unknown".
    """
    tokens = one.prompt.table.tokens
    kept = [place for place, token in enumerate(tokens) if token.kind in kinds]
    rest = [place for place, token in enumerate(tokens) if token.kind not in kinds]
    if not rest:
        return one
    table = TokenTable(one.prompt.text, (*(tokens[place] for place in kept), Token("rest", "unknown")))
    to = {place: index for index, place in enumerate(kept)}
    queries = [
        replace(query, spans={stream: [to[place] for place in places] for stream, places in query.spans.items()})
        for query in one.prompt.queries
    ]
    records = {}
    for layer, record in one.records.items():
        parts: dict[str, Any] = {}
        for name in ("i2t", "i2t_logit"):
            part: Tensor | None = getattr(record, name)
            if part is not None:
                others = part[..., rest]
                last = others.sum(-1, keepdim=True) if name == "i2t" else others.logsumexp(-1, keepdim=True)
                parts[name] = torch.cat([part[..., kept], last], -1)
        records[layer] = replace(record, **parts)
    return Pass(replace(one.prompt, table=table, queries=tuple(queries)), records)


def _by_layer(value: Any) -> Mapping[int, Any]:
    return value if isinstance(value, Mapping) else {0: value}


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _numbers(name: str, value: Any) -> Tensor:
    """A part as a float tensor."""
    expected = "expected a dense array or tensor of real numbers"
    try:
        found = value if isinstance(value, Tensor) else torch.as_tensor(np.ascontiguousarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} cannot be read: {first_line(error)}; {expected}") from error
    if found.is_complex() or found.is_meta or found.layout != torch.strided:
        where = "without contents" if found.is_meta else f"of {found.dtype}, {found.layout}"
        raise UserError(f"{name} is a tensor {where}; {expected}")
    return found.detach().cpu().float()


def _pixels(image: Any) -> NDArray[np.uint8]:
    """One's own picture."""
    found: NDArray[np.uint8] = np.asarray(image)
    if found.ndim != 3 or found.shape[2] != 3 or found.dtype != np.uint8:
        raise UserError(f"image {found.dtype} {found.shape}: expected uint8 [height, width, 3]")
    return found


def _record(layer: int, parts: dict[str, Tensor], grid: tuple[int, int]) -> JointRecord:
    """One's own parts of a layer as a record, shapes checked."""
    found, tokens = OwnRecord(layer), grid[0] * grid[1]
    for name, value in parts.items():
        shape = tuple(value.shape)
        if name == "concepts":
            fits, wanted = value.ndim == 2, "[K, E]"
        elif name == "features":
            fits, wanted = shape[:-1] in ((tokens,), grid), f"[{tokens}, E] or [{grid[0]}, {grid[1]}, E]"
        elif name == "i2i":
            fits, wanted = value.ndim in (2, 3) and shape[-2:] == (tokens,) * 2, f"[{tokens}, {tokens}], heads before"
        else:
            fits, wanted = value.ndim in (2, 3) and shape[-2] == tokens, f"[{tokens}, T], heads before"
        if not fits or not value.isfinite().all():
            what = f"of shape {shape}" if not fits else "with numbers that are not finite"
            raise UserError(f"{name} {what}: expected {wanted} for a grid of {grid[0]} x {grid[1]} tokens")
        if name == "features":
            found.feat_out = found.feat_proj = value.reshape(tokens, -1)
        elif name == "i2i":
            heads = value.reshape(-1, tokens, tokens)
            found.i2i, found.i2i_walk = heads.mean(0), _walk_mean(heads)
            found.i2i_attn2 = found.i2i
        elif name == "concepts":
            found.concepts = value
        else:
            setattr(found, name, value.reshape(-1, tokens, shape[-1]))
    image, concepts = found.feat_out, found.concepts
    if image is not None and concepts is not None and image.shape[1] != concepts.shape[1]:
        raise UserError(f"features have {image.shape[1]} channels, concepts {concepts.shape[1]}; expected as many")
    return found


def _prompt(spans: Mapping[str, Sequence[int]], kinds: Sequence[str] | None, length: int | None) -> Prompt:
    """A prompt whose words are the spans."""
    fits = isinstance(spans, Mapping) and all(
        isinstance(name, str) and isinstance(places, Sequence | np.ndarray) and all(map(_whole, places))
        for name, places in spans.items()
    )
    if not fits:
        raise UserError('spans: expected class name -> its text positions, such as {"cat": [1, 2]}')
    named_of("span kind", () if kinds is None else kinds, SPAN_KINDS)
    owner = {place: (index, name) for index, (name, places) in enumerate(spans.items()) for place in places}
    total = length if length is not None else max([*owner, -1]) + 1
    if kinds is not None and len(kinds) != total:
        raise UserError(f"{len(kinds)} span kinds for {total} text positions")
    outside = [place for place in owner if not 0 <= place < total]
    if outside:
        raise UserError(f"span positions {outside} lie outside the text's 0..{total - 1}")
    tokens = []
    for place in range(total):
        index, name = owner.get(place, (-1, None))
        kind = kinds[place] if kinds is not None else "pad" if name is None else "word"
        tokens.append(Token("text", kind, name, index))
    text = " ".join(spans)
    queries = tuple(Query(name, index, {"text": list(places)}) for index, (name, places) in enumerate(spans.items()))
    return Prompt(text, TokenTable(text, tuple(tokens)), queries)


def _walk_mean(heads: Tensor) -> Tensor:
    """Rows [I, I] of renormalised blocks [H, I, I], heads weighted by how slowly their walk mixes (TokenRank)."""
    rows = heads / heads.sum(-1, keepdim=True).clamp(min=1e-12)
    if len(rows) == 1:
        return rows[0]
    weights = second_eigenvalue(rows)
    return (rows * weights[:, None, None]).sum(0) / weights.sum()
