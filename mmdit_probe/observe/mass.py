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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention import exact, gradients
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.models.layout import KINDS, MODALITIES, Layout
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.observer import Group, LayerCall, RowBatch, RowObserver, token_groups
from mmdit_probe.specs import ALL_HEADS

COLUMNS = (
    "prompt", "seed", "step", "sigma", "branch", "layer", "head", "query", "key", "span", "stream", "mass", "n_query",
    "n_key", "uniform",
)  # fmt: skip

SAME_FRAME, OTHER_FRAMES = "same frame", "other frames"
"""Spans of the image keys of a video's image queries; they sum to I2I."""


@dataclass(frozen=True, eq=False)
class KeyGroups:
    """What the masses of calls with one layout and the same text have in common.

    Attributes:
        of_key: [B, N] group of every key. count: number of groups G.
        columns: the keys that are no image tokens. indicator: [B, K, G] their groups.
        weights: [B or 1, Q, N] which queries are averaged over: image (0), text (1) and, where there are any, reference
            (2) ones.
        frames: positions of each frame's image tokens; none of a single picture.
    """

    of_key: Tensor
    count: int
    columns: exact.Columns
    indicator: Tensor
    weights: Tensor
    frames: Sequence[exact.Columns] = ()

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
        weights = layout.query_masks(*layout.modalities)
        columns = layout.positions(*KINDS[1:])
        indicator = torch.nn.functional.one_hot(of_key[:, columns], count).float()
        columns, *frames = (of if isinstance(of, slice) else of.to(device) for of in (columns, *layout.frame_positions))
        return cls(of_key.to(device), count, columns, indicator.to(device), weights.to(device), frames)


@dataclass(frozen=True, eq=False)
class _Text:
    """What the layers of one denoising call share: token tables, layout, each sample's groups, and their tensors."""

    tables: Sequence[TokenTable]
    layout: Layout
    groups: list[dict[Group, Tensor]]
    keys: KeyGroups


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

    def measure(self, seen: LayerCall) -> tuple[_Text, Tensor, Tensor]:
        tables, layout = seen.tokens, seen.layout
        if self._text is None or self._text.tables is not tables or self._text.layout is not layout:
            groups = [token_groups(layout, table, sample) for sample, table in enumerate(tables)]
            numbers = []
            for of, table in zip(groups, tables, strict=True):
                number = {group: n for n, group in enumerate(of)}
                numbers.append([number["text", token.kind, token.stream] for token in table.tokens])
            self._text = _Text(tables, layout, groups, KeyGroups.of(layout, numbers, seen.call.query.device))
        return self._text, *attention_masses(seen.call, seen.lse, self._text.keys)

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
                for shown, axes in _axes(text, sample, count):
                    mass = masses[:, sample][..., *shown]  # [L, H, queries, groups]
                    batch.add(sample, [{"layer": layers}, {"head": heads}, *axes], mass=mass)


def _axes(text: _Text, sample: int, n_query: np.ndarray) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
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
    weights = keys.weights
    live = exact.live_queries(call)
    if live is not None:
        # Masks of this family of calls are the same for all heads; a query is dropped if no head sees anything.
        weights = weights * live.any(1).expand(batch, n_rows)[:, None].float()
    n_query = weights.sum(-1).expand(batch, -1)
    if lse is None and keys.frames:  # which keys are of a query's own frame differs between queries
        lse = gradients.streamed_lse(call)
    if lse is None:
        each = exact.group_masses(call, None, keys.of_key, keys.count)  # [B, H, N, G]
        sums = torch.einsum("bqn,bhng->bhqg", weights.expand(batch, -1, n_rows), each)
        return sums / n_query[:, None, :, None].clamp(min=1), n_query.long()
    sums = exact.reduce(call, lse, keys.columns, key_weights=keys.indicator, query_weights=weights)  # [B, H, Q, G]
    masses = sums / n_query[:, None, :, None].clamp(min=1)
    masses[..., 0] = 1.0 - masses[..., 1:].sum(-1)
    if keys.frames:
        same = torch.zeros_like(masses[..., 0])
        same[..., 0] = exact.within(call, lse, keys.frames, weights[:, 0]) / n_query[:, None, 0].clamp(min=1)
        masses = torch.cat([masses, torch.stack([same, masses[..., 0] - same], -1)], -1)
    return masses, n_query.long()
