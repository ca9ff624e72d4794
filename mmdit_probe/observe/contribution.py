"""Contribution: what each kind of key, and each word, writes into the image tokens; after the norm-based analysis of
Kobayashi et al. (EMNLP 2020, arXiv:2004.10102), eq. 2, for the joint softmax.

A head h adds `W_h sum_j a_ij v_j` to image token i, W_h its columns of the output projection. A group G of keys writes
the part `c_i(G) = W_h sum_{j in G} a_ij v_j`; the parts of a partition add up to the whole update u_i, and so do the
parts of the heads. Mass says how much a token looks; this says what that look moves.

    with probe(model, Contribution(), layers="all") as run:
        model.generate("a red ring on grass")
    run[Contribution].table().query("head == -1 and span == 'word' and word == ''").groupby("layer").norm.mean()

Exact and without the N x N matrix: columns of the text keys times their values, over chunks of image queries; image
keys are the rest of the output. Before the block's gate, and without the projection's bias, which reads no key. Not
here: masses alone (`observe.mass`), which are cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_probe.attention import exact
from mmdit_probe.errors import UserError
from mmdit_probe.models.layout import KINDS, Layout
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.observer import Axis, DenoisingCall, LayerCall, RowBatch, RowObserver
from mmdit_probe.specs import ALL_HEADS

COLUMNS = (
    "prompt", "seed", "step", "sigma", "branch", "layer", "head", "key", "span", "stream", "word", "word_index", "norm",
    "cosine", "share", "mass", "n_key",
)  # fmt: skip

VALUES = ("norm", "cosine", "share", "mass")

Group = tuple[str, str, str, str, int]
"""(key, span, stream, word, word_index) of a row."""

WHOLE: Group = ("all", "all", "", "", -1)
_QUERIES = 512
"""Image queries per chunk."""

_LARGE = 2.0**10
"""A weight times this is much larger than a bias: added to a bias in 16 bits, a small weight would lose its digits."""


@dataclass(frozen=True, eq=False)
class _Others:
    """What the layers of one denoising call share: per sample, the positions of every group among the other keys.

    Attributes:
        columns: the K joint positions that are no image tokens. groups: per sample, group -> indices into them.
    """

    tables: Sequence[TokenTable]
    layout: Layout
    columns: Tensor
    groups: list[dict[Group, Tensor]]


class Contribution(RowObserver):
    """Observer of contributions to image tokens.

    Args:
        sink, heads, rows: as in `RowObserver`; rows of head -1 are of all heads together (the norm of the sum, not the
            mean of norms), and are always there.

    Columns: prompt, seed, step, sigma, branch, layer, head, key (image | text | reference | other | all), span and
    stream as in `AttentionMass`, where span "all" and stream "" stand for all of them; word and word_index: one word of
    the prompt in all its streams ("" and -1 in the other rows); norm: mean over image tokens of |c_i|; cosine: mean
    cosine of c_i with the whole update u_i of all heads; share: mean of <c_i, u_i> / |u_i|^2, which adds up to 1 over a
    partition of the keys and over heads; mass: attention that image tokens give to these keys; n_key. Key "all" is u_i
    itself.

    Raises:
        UserError: an attention module whose image tokens do not pass through an output projection of its own; an edit
            of the layer's attention output, after which its parts are not those of the attention call.
    """

    needs = "lse"
    reads = "the attention output"

    columns = COLUMNS

    _text: _Others | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refused: dict[int, UserError] = {}
        self._listening: list[Any] = []

    def measure(self, seen: LayerCall) -> tuple[_Others, list[Tensor]]:
        tables, layout = seen.tokens, seen.layout
        if seen.record.edited:
            raise _unreadable(seen, "is edited, and what an edited output consists of is not known")
        if self._text is None or self._text.tables is not tables or self._text.layout is not layout:
            columns = layout.indices(*KINDS[1:])
            groups = [_groups(layout, table, sample) for sample, table in enumerate(tables)]
            self._text = _Others(tables, layout, columns.to(seen.call.query.device), groups)
        projection = projection_of(seen)
        with seen.autocast():
            weight = linear_map(projection, seen.call.query)
        weight = weight.unflatten(0, (seen.call.query.shape[1], -1))  # [H, Dv, E]
        self._check(seen, projection)
        return self._text, contributions(seen, weight, self._text)

    def _check(self, seen: LayerCall, projection: nn.Module) -> None:
        """See to it that the layer's output reaches its projection as it is (some gate or normalise it before)."""
        rows = seen.output[-1].transpose(0, 1).flatten(1)[seen.layout.positions("image")]  # [I, H * Dv]
        rows = rows[:: -(-len(rows) // 4)].detach()

        def arrived(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            handle.remove()
            given = arguments[0].detach()[-1].to(rows.dtype)
            away = (given[None] - rows[:, None]).abs().amax(-1).amin(-1)
            if bool((away > 1e-3 * rows.abs().amax()).any()):
                self._refused[seen.layer.index] = _unreadable(seen, "changes its output before the projection")

        handle = projection.register_forward_pre_hook(arrived)
        self._listening.append(handle)

    def abandon_call(self) -> None:
        super().abandon_call()
        for handle in self._listening:  # of projections that were not reached
            handle.remove()
        self._listening.clear()

    def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
        if self._refused:
            raise self._refused[min(self._refused)]
        super().commit(denoising, measured)

    def add_rows(self, batch: RowBatch, measured: dict[int, Any]) -> None:
        for layer, (text, samples) in measured.items():
            for sample, found in enumerate(samples):
                values = found.cpu().numpy()  # [G, 1 + H, 4], all heads together first
                heads = () if self.rows == "layer" else self._heads(layer, values.shape[1] - 1)
                kept = values[:, [0, *(head + 1 for head in heads)]]
                groups = text.groups[sample]
                key, span, stream, word, index = zip(*groups, strict=True)
                counts = [_count(text.layout, group, positions, sample) for group, positions in groups.items()]
                named: dict[str, Any] = {"key": key, "span": span, "stream": stream, "word": word, "word_index": index}
                axes: list[Axis] = [{"layer": [layer]}, named | {"n_key": counts}, {"head": [ALL_HEADS, *heads]}]
                batch.add(sample, axes, **{name: kept[None, ..., at] for at, name in enumerate(VALUES)})


def projection_of(seen: LayerCall) -> nn.Module:
    """The output projection of a layer's image tokens.

    Raises:
        UserError: the attention module has none of its own (blocks that project attention and MLP together).
    """
    found = getattr(seen.layer.module, "to_out", None)
    found = found[0] if isinstance(found, nn.ModuleList | nn.Sequential) else found
    width = getattr(getattr(found, "base_layer", found), "in_features", 0)  # of an adapter: what it is on
    if not isinstance(found, nn.Module) or width != seen.output.shape[1] * seen.output.shape[-1]:
        raise _unreadable(seen, "has no output projection of its own (to_out)")
    return found


def _unreadable(seen: LayerCall, why: str) -> UserError:
    layer = seen.layer
    return UserError(
        f"layer {layer.index} ({layer.path}, {type(layer.module).__name__}) {why}: contributions cannot be read there;"
        " select other layers, or read masses"
    )


@torch.no_grad()
def linear_map(projection: nn.Module, like: Tensor) -> Tensor:
    """The matrix [in, out], float32, of an affine module with all that is on it (adapters, quantised weights)."""
    width: int = getattr(projection, "base_layer", projection).in_features  # type: ignore[assignment, union-attr]
    unit = _LARGE * torch.eye(width, device=like.device, dtype=like.dtype)
    nothing = torch.zeros_like(unit[:1])
    return (projection(unit).float() - projection(nothing).float()) / _LARGE


@torch.no_grad()
def contributions(seen: LayerCall, weight: Tensor, text: _Others) -> list[Tensor]:
    """Per sample [G, 1 + H, 4] float32: the values of `VALUES` of every group, all heads together first.

    Args:
        weight: [H, Dv, E] of the output projection.
    """
    image = seen.layout.indices("image").to(weight.device)
    values = seen.call.expanded_value()[:, :, text.columns].float()  # [B, H, K, Dv]
    value_of_output = seen.output.float()
    gram = weight @ weight.mT  # [H, Dv, Dv]
    counted = _counted(seen, image)  # [B, I]
    sums = [torch.zeros(len(groups), 1 + len(weight), len(VALUES), device=weight.device) for groups in text.groups]
    for queries in image.split(_QUERIES):
        p = exact.reduce(seen.call, seen.logsumexp, text.columns, queries)  # [B, H, q, K]
        for sample, groups in enumerate(text.groups):
            parts, masses = _parts(groups, p[sample], values[sample], value_of_output[sample][:, queries])
            found = _measures(parts, masses, weight, gram)  # [4, G, 1 + H, q]
            of = counted[sample, : len(queries)]
            sums[sample] += (found * of).sum(-1).permute(1, 2, 0)
        counted = counted[:, len(queries) :]
    total = _counted(seen, image).sum(1)
    return [of / count for of, count in zip(sums, total, strict=True)]


def _parts(groups: dict[Group, Tensor], p: Tensor, value: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """What every group adds before the projection [G, H, q, Dv], and its mass [G, H, q]."""
    parts, masses, rest, left = [], [], output, torch.ones_like(p[..., 0])
    for (key, span, *_), index in groups.items():
        parts.append(p[..., index] @ value[:, index])
        masses.append(p[..., index].sum(-1))
        if key in KINDS[1:] and span == "all":
            rest, left = rest - parts[-1], left - masses[-1]
    for place, (key, *_) in enumerate(groups):
        if key in ("all", "image"):
            parts[place], masses[place] = (output, torch.ones_like(left)) if key == "all" else (rest, left)
    return torch.stack(parts), torch.stack(masses)


def _measures(parts: Tensor, masses: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """`VALUES` [4, G, 1 + H, q] from parts [G, H, q, Dv]; group 0 is the whole update."""
    together = torch.einsum("ghqd,hde->gqe", parts, weight)
    back = torch.einsum("qe,hde->hqd", together[0], weight)
    along = torch.einsum("ghqd,hqd->ghq", parts, back)  # <c, u> by head
    norms = torch.einsum("ghqd,hdf,ghqf->ghq", parts, gram, parts).clamp(min=0).sqrt()
    norm = torch.cat([together.norm(dim=-1)[:, None], norms], 1)
    inner = torch.cat([along.sum(1, keepdim=True), along], 1)
    length = norm[0, 0]
    tiny = torch.finfo(norm.dtype).tiny
    mass = torch.cat([masses.mean(1, keepdim=True), masses], 1)
    return torch.stack([norm, inner / (norm * length).clamp(min=tiny), inner / length.square().clamp(min=tiny), mass])


def _counted(seen: LayerCall, image: Tensor) -> Tensor:
    """[B, I] which image tokens are averaged over: those that are there and see a key."""
    call, layout = seen.call, seen.layout
    there = torch.ones(call.query.shape[0], len(image), device=image.device)
    if layout.queries is not None:
        there = there * layout.queries.to(image.device)[:, image]
    live = exact.live_queries(call)
    return there if live is None else there * live.any(1).expand(call.query.shape[0], call.query.shape[-2])[:, image]


def _groups(layout: Layout, table: TokenTable, sample: int) -> dict[Group, Tensor]:
    """The groups of a sample and the indices of their keys among those that are no image tokens."""
    labels = layout.labels[layout.labels != 0]
    column = (layout.labels != 0).cumsum(0) - 1
    there = layout.present(sample)[layout.labels != 0]
    none, text = torch.zeros(0, dtype=torch.long), (labels == 1).nonzero()[:, 0]
    members: dict[Group, list[int]] = {}
    for place, token in zip(text.tolist(), table.tokens, strict=True):
        if not there[place]:
            continue
        of = [("all", "", "", -1), (token.kind, "", "", -1), (token.kind, token.stream, "", -1)]
        of += [("word", "", token.word, token.word_index)] if token.word else []
        for group in of:
            members.setdefault(("text", *group), []).append(place)
    for number, (_, positions) in enumerate(layout.references_of(sample)):
        for span in ("all", str(number)):
            places = [place for place in column[positions].tolist() if there[place]]
            members.setdefault(("reference", span, "", "", -1), []).extend(places)
    other = ((labels == 2) & there).nonzero()[:, 0]
    return {
        WHOLE: none, ("image", "all", "", "", -1): none, ("other", "all", "", "", -1): other,
        **{group: torch.tensor(places) for group, places in sorted(members.items())},
    }  # fmt: skip


def _count(layout: Layout, group: Group, positions: Tensor, sample: int) -> int:
    if group[0] == "all":
        return int(layout.present(sample).sum())
    return layout.key_count("image", sample) if group[0] == "image" else len(positions)
