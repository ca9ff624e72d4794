"""AttentionMass: how much of its attention each kind of token gives to each kind of token (the paper's attention
budget, Fig. 2).

    with probe(model, AttentionMass(), layers="all") as run:
        model.generate("a red ring on grass")
    run[AttentionMass].table().query("query == 'image' and key == 'text'").groupby(["layer", "span"]).mass.mean()

Per (sample, step, branch, layer, head): the mean over image queries, over text queries, and over those of reference
pictures, of the probability on image keys, on other keys, on each reference, and on each text span kind of each encoder
stream; the rows of one query kind sum to 1. Of a video, the mass of image queries on image keys is two rows: keys of
the query's own frame, and of other frames. Not here: the mass of single keys (`observe.sinks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention import exact, gradients
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.models.layout import KINDS, MODALITIES, Layout
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.observer import Axis, Group, LayerCall, RowBatch, RowObserver, token_groups
from mmdit_probe.specs import ALL_HEADS

COLUMNS = (
    "prompt", "seed", "step", "sigma", "branch", "layer", "head", "query", "key", "span", "stream", "mass", "n_query",
    "n_key", "uniform",
)  # fmt: skip

SMALL = 1 << 18
"""Probabilities per call up to which layers are measured together, when all have been seen: what takes time is then no
longer the products but the number of operations. Queries and keys of larger ones are not kept that long."""

SAME_FRAME, OTHER_FRAMES = "same frame", "other frames"
"""Spans of the image keys of a video's image queries; they sum to I2I."""


@dataclass(frozen=True, eq=False)
class KeyGroups:
    """What the masses of calls with one layout and the same text have in common.

    Attributes:
        of_key: [B, N] group of every key. count: number of groups G.
        columns: the keys that are no image tokens. indicator: [B, K, G] 1 at their group, and -1 at group 0, whose mass
            is what the others leave of 1.
        queries: [B or 1, Q, N] 1 at the queries that are averaged over: image (0), text (1) and, where there are any,
            reference (2) ones.
        frames: positions of each frame's image tokens; none of a single picture.
    """

    of_key: Tensor
    count: int
    columns: exact.Columns
    indicator: Tensor
    queries: Tensor
    frames: Sequence[exact.Columns] = ()

    @cached_property
    def means(self) -> tuple[Tensor, Tensor]:
        """`_means` of the queries, where no mask leaves out any."""
        return _means(self.queries, len(self.of_key))

    def repeated(self, count: int) -> KeyGroups:
        """Of `count` such calls, one after the other in the batch, whose only keys are `columns`."""
        each = (count, 1, 1)
        queries = self.queries if len(self.queries) == 1 else self.queries.repeat(each)
        of_key, indicator = self.of_key.repeat(each[:2]), self.indicator.repeat(each)
        return replace(self, of_key=of_key, columns=slice(None), indicator=indicator, queries=queries)

    @classmethod
    def of(cls, layout: Layout, groups: list[list[int]], device: torch.device) -> KeyGroups:
        """Of a layout.

        Args:
            groups: per sample, the group 2, 3, ... of every text position; groups 0 and 1 are image and other keys. A
                sample's references come after its text groups.
        """
        first = [1 + max([1, *of]) for of in groups]
        count = max(start + len(layout.references_of(sample)) for sample, start in enumerate(first))
        of_key = torch.zeros(len(groups), layout.total, dtype=torch.long)
        of_key[:, layout.indices("other")] = 1
        of_key[:, layout.indices("text")] = torch.tensor(groups, dtype=torch.long).reshape(len(groups), -1)
        for sample, start in enumerate(first):
            for number, (_, positions) in enumerate(layout.references_of(sample)):
                of_key[sample, positions] = start + number
        queries = layout.query_masks(*layout.modalities)
        columns = layout.positions(*KINDS[1:])
        indicator = torch.nn.functional.one_hot(of_key[:, columns], count).float()
        indicator[..., 0] = -1.0
        columns, *frames = (of if isinstance(of, slice) else of.to(device) for of in (columns, *layout.frame_positions))
        return cls(of_key.to(device), count, columns, indicator.to(device), queries.to(device), frames)


@dataclass(frozen=True, eq=False)
class _Text:
    """What the layers of calls with one text share: token tables, layout, each sample's groups, and their tensors.

    Attributes:
        known: `axes` of samples and numbers of queries, and `keys` repeated, that were asked for.
    """

    tables: Sequence[TokenTable]
    layout: Layout
    groups: list[dict[Group, Tensor]]
    keys: KeyGroups
    known: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, seen: LayerCall) -> _Text:
        tables, layout = seen.tokens, seen.layout
        groups = [token_groups(layout, table, sample) for sample, table in enumerate(tables)]
        numbers = []
        for of, table in zip(groups, tables, strict=True):
            number = {group: n for n, group in enumerate(of)}
            numbers.append([number["text", token.kind, token.stream] for token in table.tokens])
        return cls(tables, layout, groups, KeyGroups.of(layout, numbers, seen.call.query.device))

    def axes(
        self, sample: int, n_query: np.ndarray, layers: Sequence[int], heads: Sequence[int]
    ) -> list[tuple[Any, list[Axis]]]:
        """The queries and groups that a sample has, as indices of [.., Q, G], and the axes of its rows."""
        wanted = (sample, n_query.tobytes(), *layers, -1, *heads)
        if wanted not in self.known:
            of = _axes(self, sample, n_query)
            self.known[wanted] = [(shown, [{"layer": layers}, {"head": heads}, *axes]) for shown, axes in of]
        return self.known[wanted]  # type: ignore[no-any-return]

    def repeated(self, count: int) -> KeyGroups:
        """`keys.repeated`."""
        if count not in self.known:
            self.known[count] = self.keys.repeated(count)
        return self.known[count]  # type: ignore[no-any-return]


class AttentionMass(RowObserver):
    """Observer of attention masses.

    Args:
        sink, heads, rows: as in `RowObserver`; rows are kept in memory without a sink.

    Columns: prompt, seed, step, sigma, branch (cond | uncond | unknown), layer, head (-1: mean over heads), query
    (image | text | reference), key (image | text | reference | other), span (bos | word | eos | pad | template | vision
    | null | unknown; of references the number, from 0; "all" for image and other keys, but "same frame" and "other
    frames" for the image keys of a video's image queries), stream (clip | t5 | ...; "" for keys that are no text), mass
    (mean over the query tokens), n_query, n_key, uniform (n_key / N, the mass that uniform attention would give). Spans
    that a prompt does not have get no row, nor do references that a call does not have; `other` always has one.
    """

    needs = "lse"

    columns = COLUMNS

    _text: _Text | None = None

    def observe(self, seen: LayerCall) -> None:
        text, call, lse = self._of(seen), seen.call, seen.lse
        plain = call.attn_mask is None and not call.is_causal and not text.keys.frames
        if lse is None or not plain or lse.numel() * text.keys.indicator.shape[1] > SMALL:
            super().observe(seen)
            return
        # Copies: what computes the model's next layers may use the memory again.
        query, key = call.query.clone(), call.key[:, :, text.keys.columns].clone()
        alike = (text, call.scale_factor, query.dtype, query.device, query.shape, key.shape)
        self._put_off.setdefault(alike, {})[seen.layer.index] = (query, key, lse)

    def settle(self) -> None:
        for (text, scale, dtype, *_), layers in self._put_off.items():
            query, key, lse = (torch.cat(of) for of in zip(*layers.values(), strict=True))
            call = SDPACall(query, key, key, scale=scale)  # the layers as samples of one batch
            masses, n_query = attention_masses(call, lse, text.repeated(len(layers)))
            each, n_query = masses.unflatten(0, (len(layers), -1)), n_query[: len(text.tables)]
            signs = each.flatten(1).sum(1) + lse.reshape(len(layers), -1).sum(1, dtype=torch.float32)
            for place, layer in enumerate(layers):
                self._pending[layer] = ((text, each[place], n_query), [signs[place]], dtype)
        self._put_off.clear()

    def abandon_call(self) -> None:
        super().abandon_call()
        self._put_off.clear()

    @cached_property
    def _put_off(self) -> dict[Any, dict[int, tuple[Tensor, Tensor, Tensor]]]:
        """What calls have in common -> layer -> query, key at the columns, log-sum-exp."""
        return {}

    def _of(self, seen: LayerCall) -> _Text:
        if self._text is None or self._text.layout is not seen.layout or self._text.tables != seen.tokens:
            self._text = _Text.of(seen)
        return self._text

    def measure(self, seen: LayerCall) -> tuple[_Text, Tensor, Tensor]:
        text = self._of(seen)
        return text, *attention_masses(seen.call, seen.lse, text.keys)

    def add_rows(self, batch: RowBatch, measured: dict[int, Any]) -> None:
        counts = torch.stack([n_query for _, _, n_query in measured.values()]).cpu().numpy()  # [L, B, Q]
        alike: dict[Any, list[int]] = {}
        for (layer, (text, masses, _)), count in zip(measured.items(), counts, strict=True):
            heads = self._heads(layer, masses.shape[1])
            alike.setdefault((text, masses.shape[1:], heads, count.tobytes()), []).append(layer)
        places = {layer: place for place, layer in enumerate(measured)}
        for (text, _, heads, _), layers in alike.items():
            kept = torch.stack([measured[layer][1] for layer in layers])[:, :, list(heads)]
            masses = kept.cpu().double().numpy()  # [L, B, H, Q, G]
            if self.rows == "layer":
                masses, heads = masses.mean(2, keepdims=True), (ALL_HEADS,)
            for sample, count in enumerate(counts[places[layers[0]]]):
                for shown, axes in text.axes(sample, count, layers, heads):
                    batch.add(sample, axes, mass=masses[:, sample][..., *shown])  # [L, H, queries, groups]
        self._before = batch


def _axes(text: _Text, sample: int, n_query: np.ndarray) -> Iterator[tuple[Any, list[Axis]]]:
    """The queries and groups that a sample has, as an index of [.., Q, G] and as columns along two axes; of a video for
    image queries, whose image keys are split, and for the others."""
    there, names = text.layout.present(sample), list(text.groups[sample])
    counts = [int(there[positions].sum()) for positions in text.groups[sample].values()]
    total = int(there.sum())
    # A span whose every position is missing or masked in this sample is none it has.
    groups = [(k, names[k], counts[k]) for k, (key, _, _) in enumerate(names) if key != "text" or counts[k] > 0]
    queries = [place for place in range(len(n_query)) if n_query[place] > 0]
    chosen = [(queries, groups)]
    if text.keys.frames:
        own = counts[0] // len(text.keys.frames)
        split = [(-2, ("image", SAME_FRAME, ""), own), (-1, ("image", OTHER_FRAMES, ""), counts[0] - own)]
        chosen = [([0], [*split, *groups[1:]]), ([place for place in queries if place > 0], groups)]
    for those, of in chosen:
        places, named, held = zip(*of, strict=True)
        key, span, stream = zip(*named, strict=True)
        if those:
            yield (
                np.ix_(those, places),
                [
                    {"query": [MODALITIES[place] for place in those], "n_query": n_query[those]},
                    {"key": key, "span": span, "stream": stream, "n_key": held, "uniform": np.array(held) / total},
                ],
            )


@torch.no_grad()
def attention_masses(call: SDPACall, lse: Tensor | None, keys: KeyGroups) -> tuple[Tensor, Tensor]:
    """Mean attention masses of one call, exact, without the N x N matrix.

    Args:
        call: query [B, H, N, D] and key over the same N joint tokens.
        lse: [B, H, N] row log-sum-exp of the call; None takes the indicator-values path.

    Returns: masses [B, H, Q, G] float32, mean over image (0), text (1) and reference (2) queries, sums to 1 over the G
    groups; and n_query [B, Q], the queries averaged over (queries with every key masked are left out). Of a video
    [B, H, Q, G + 2]: the last two are the parts of group 0 in the image query's own frame and in other frames.
    """
    batch, _, n_rows, _ = call.query.shape
    weights, n_query = keys.means
    live = exact.live_queries(call)
    if live is not None:
        # Masks of this family of calls are the same for all heads; a query is dropped if no head sees anything.
        weights, n_query = _means(keys.queries * live.any(1).expand(batch, n_rows)[:, None].float(), batch)
    if lse is None and keys.frames:  # which keys are of a query's own frame differs between queries
        lse = gradients.streamed_lse(call)
    if lse is None:
        each = exact.group_masses(call, None, keys.of_key, keys.count)  # [B, H, N, G]
        return torch.einsum("bqn,bhng->bhqg", weights.expand(batch, -1, n_rows), each), n_query
    masses = exact.reduce(call, lse, keys.columns, key_weights=keys.indicator, query_weights=weights)  # [B, H, Q, G]
    masses[..., 0].add_(1.0)
    if keys.frames:
        same = torch.zeros_like(masses[..., 0])
        same[..., 0] = exact.within(call, lse, keys.frames, weights[:, 0])
        masses = torch.cat([masses, torch.stack([same, masses[..., 0] - same], -1)], -1)
    return masses, n_query


def _means(queries: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Weights [B or 1, Q, N] that average over chosen queries (1 each, else 0), and how many they are, [B, Q]."""
    count = queries.sum(-1, keepdim=True)
    return queries / count.clamp(min=1), count[..., 0].expand(batch, -1).long()
