"""Methods that spread a class map along the image-image attention: diffsegmenter, iseg, tokenrank.

All three come from other models (U-Nets, or attention chains in general); here they read one joint softmax, so their
image-image block is renormalised first: its rows lack the text mass. Sources and what differs from them is said in each
docstring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdit_probe.errors import UserError
from mmdit_probe.segment.methods.base import Heads, Method, by_class, i2i_part, pick_heads, renorm
from mmdit_probe.segment.methods.seg4diff import QueryMap, symmetric_kl, text_part, word_maps
from mmdit_probe.segment.record import Capture
from mmdit_probe.segment.tail import above_least, minmax


def diffsegmenter(
    capture: Capture, order: int = 1, heads: Heads = "mean", softmax: str = "auto", streams: str = "all",
    i2i: str = "attn",
) -> Tensor:  # fmt: skip
    """Scores [C, h, w]: the class map scaled to 0..1, spread by S^order, scaled again (arXiv:2309.02773).

    S is the head- and layer-mean I2I block. The original's pyramid of resolutions is one grid here, and its one prompt
    per class a joint prompt; `diffsegmenter-per-class` takes one forward per name as the original does.

    Args:
        order: how often S is applied. heads, softmax, streams: as in seg4diff.
        i2i: where S comes from: "attn", or "attn2" in models that have an image-only attention.
    """
    walks = [renorm(capture.mean(i2i_part(i2i), of=index)) for index in range(len(capture.passes))]
    maps = word_maps(capture, heads=heads, softmax=softmax, streams=streams)
    return _walked(capture, [one._replace(values=_unit(one.values)) for one in maps], walks, order)


def iseg(
    capture: Capture,
    ent: float = 0.015,
    rounds: int = 8,
    cluster: bool = True,
    heads: Heads = "mean",
    streams: str = "all",
    i2i: str = "attn",
) -> Tensor:
    """Scores [C, h, w]: clustered text maps, spread along entropy-sharpened affinity (iSeg, arXiv:2409.03209).

    Args:
        ent: weight of the entropy term that removes weak links; free of scale, because columns are divided by their
            largest entry. rounds: of spreading.
        cluster: average text maps over clusters of pixels with like text profiles first.
        heads, streams: as in seg4diff. i2i: as in diffsegmenter.
    """
    found = []
    for index, one in enumerate(capture.passes):
        maps = capture.over_layers(lambda record: pick_heads(record.part("i2t"), heads, record.layer), index)
        maps = maps / maps.sum(0, keepdim=True).clamp(min=1e-12)  # [I, T]
        if cluster:
            maps = _cluster(maps, capture.grid)
        walk = _sharpened(renorm(capture.mean(i2i_part(i2i), of=index)), ent)
        for query in one.prompt.queries:
            values = _share(maps[:, query.positions(streams)].mean(1))
            for _ in range(rounds):
                values = _share(walk @ values)
            found.append((query, _unit(values)))
    return by_class(capture, found)


def tokenrank(
    capture: Capture,
    bounces: int = 2,
    teleport: float = 0.01,
    heads: Heads = "mean",
    softmax: str = "auto",
    streams: str = "all",
) -> Tensor:
    """Scores [C, h, w]: where a walk along incoming attention is after some bounces (arXiv:2507.17657).

    The walk starts at the word: the first bounce is its I2T column, each further one a step along the columns of the
    image-image chain, whose heads are weighted by |lambda_2|. The chain is restricted to the image block.

    Args:
        bounces: at least 1; 1 is the scaled seg4diff map. teleport: share of uniform steps, so that every state is
            reached. heads, softmax, streams: of the start, as in seg4diff.

    Raises:
        UserError: a teleport that is no share.
    """
    if teleport > 1:
        raise UserError(f"tokenrank.teleport={teleport}: expected a share from 0 to 1")
    chains = []
    for index in range(len(capture.passes)):
        chain = renorm(capture.mean("i2i_walk", of=index))
        chain = (1 - teleport) * chain + teleport / len(chain)
        chains.append(chain / chain.sum(0, keepdim=True))
    return _walked(capture, word_maps(capture, heads=heads, softmax=softmax, streams=streams), chains, bounces - 1)


def _walked(capture: Capture, maps: Sequence[QueryMap], walks: Sequence[Tensor], steps: int) -> Tensor:
    """Scores [C, h, w] of maps after some steps by the matrix [I, I] of their pass, scaled to 0..1."""
    found = []
    for of_pass, query, values in maps:
        for _ in range(steps):
            values = walks[of_pass] @ values
        found.append((query, _unit(values)))
    return by_class(capture, found)


def _unit(values: Tensor) -> Tensor:
    return minmax(values[None])[0]


def _share(values: Tensor) -> Tensor:
    values = above_least(values[None])[0]
    return values / values.sum().clamp(min=1e-30)


def _sharpened(walk: Tensor, ent: float) -> Tensor:
    """Rows [I, I] after adding the entropy gradient ent * log10(e a) to the column-scaled links and cutting below 0."""
    scaled = walk / walk.amax(0, keepdim=True).clamp(min=1e-12)
    sharper = scaled + ent * torch.log10(torch.e * scaled.clamp(min=1e-30))
    return renorm(torch.where(scaled > 0, sharper, 0.0).clamp(min=0))


def _cluster(maps: Tensor, grid: tuple[int, int], seeds: int = 32, rounds: int = 20) -> Tensor:
    """Pixel profiles [I, T] replaced by their cluster's mean: symmetric KL, seeds on a grid, empty ones vanish."""
    values = maps.clamp(min=1e-6) + 1e-5
    h, w = grid
    step = max(1, int(min(h, w) // seeds**0.5))
    places = torch.arange(h * w).reshape(h, w)[::step, ::step].flatten()
    centres = values[places]
    members = torch.zeros(len(values), dtype=torch.long)
    for _ in range(rounds):
        members = symmetric_kl(values, centres).argmin(1)
        used, members = torch.unique(members, return_inverse=True)
        centres = torch.zeros(len(used), values.shape[1]).index_add_(0, members, values)
        centres = centres / torch.bincount(members, minlength=len(used))[:, None]
    return centres[members] - 1e-5


def _spread(options: Mapping[str, Any]) -> tuple[str, ...]:
    return text_part(options), i2i_part(options["i2i"])


DIFFSEGMENTER = Method("diffsegmenter", diffsegmenter, _spread, "arXiv:2309.02773")
PER_CLASS = Method("diffsegmenter-per-class", diffsegmenter, _spread, "arXiv:2309.02773", together=False)
ISEG = Method("iseg", iseg, lambda options: ("i2t", i2i_part(options["i2i"])), "arXiv:2409.03209", all_text=True)
TOKENRANK = Method("tokenrank", tokenrank, lambda options: (text_part(options), "i2i_walk"), "arXiv:2507.17657")
