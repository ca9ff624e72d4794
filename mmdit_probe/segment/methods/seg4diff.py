"""seg4diff: the image queries' attention to the words of each class, argmax (arXiv:2509.18096, section 3.4).

    score_c = mean over the word tokens of c of the head-mean I2T columns, mean over layers

and seg4diff-unsup: the columns of the empty prompt's padding tokens as mask proposals (section 3.5). Columns of
different prompts are not on one scale, because each joint softmax holds its own words' mass: when the names fill
several prompts, "auto" reads odds against the image mass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit_probe.errors import UserError, check_known
from mmdit_probe.models.tokens import SPAN_KINDS
from mmdit_probe.segment.methods.base import Heads, Method, by_class, pick_heads
from mmdit_probe.segment.record import Capture, JointRecord
from mmdit_probe.segment.tail import minmax as over_space
from mmdit_probe.segment.vocabulary import Query
from mmdit_probe.specs import listed, named_of

SOFTMAX = ("auto", "joint", "text", "image-odds", "words", "logit")
REDUCE = ("mean", "sum", "max")


class QueryMap(NamedTuple):
    """The map [I] of one name, and the number of the pass that it was read from."""

    of_pass: int
    query: Query
    values: Tensor


def word_maps(
    capture: Capture,
    *,
    heads: Heads = "mean",
    softmax: str = "auto",
    reduce: str = "mean",
    streams: str = "all",
) -> list[QueryMap]:
    """The map of every name of every pass, mean over the capture's layers.

    Args:
        heads: see `Heads`.
        softmax: "joint" over all keys (the paper), "text" over text keys, "words" over word tokens only (sinks such as
            BOS taken out), "image-odds" against the image mass, "logit" before the softmax, "auto": joint for one
            prompt, image-odds for several.
        reduce: over the tokens of a name. streams: encoder streams to read, by comma, or "all".
    """
    check_known("softmax", softmax, SOFTMAX)
    check_known("token reduction", reduce, REDUCE)
    mode = ("joint" if len(capture.passes) == 1 else "image-odds") if softmax == "auto" else softmax
    found = []
    for index, one in enumerate(capture.passes):
        maps = capture.over_layers(_columns(mode, one.prompt.table.positions("word"), heads), index)  # (I, T)
        for query in one.prompt.queries:
            tokens = maps[:, query.positions(streams)]
            values = {"mean": tokens.mean(1), "sum": tokens.sum(1), "max": tokens.amax(1)}[reduce]
            found.append(QueryMap(index, query, values))
    return found


def text_part(options: Mapping[str, Any]) -> str:
    """Part of the record that the option `softmax` reads."""
    return "i2t_logit" if options["softmax"] == "logit" else "i2t"


def _columns(mode: str, words: list[int], heads: Heads) -> Callable[[JointRecord], Tensor]:
    """Record -> I2T columns [I, T] of the chosen heads in the chosen softmax."""

    def read(record: JointRecord) -> Tensor:
        maps = record.part(text_part({"softmax": mode}))
        if mode == "image-odds":
            maps = maps / (1.0 - maps.sum(-1, keepdim=True)).clamp(min=1e-6)
        elif mode in ("text", "words"):
            among = maps if mode == "text" else maps[..., words]
            maps = maps / among.sum(-1, keepdim=True).clamp(min=1e-12)
        return pick_heads(maps, heads, record.layer)

    return read


def seg4diff(
    capture: Capture,
    heads: Heads = "mean",
    softmax: str = "auto",
    reduce: str = "mean",
    streams: str = "all",
    minmax: bool = False,
) -> Tensor:
    """Scores [C, h, w].

    Args:
        heads, softmax, reduce, streams: as in `word_maps`; the paper's Table 5 is softmax "joint" or "logit".
        minmax: scale each class map to 0..1 over space, its other column.
    """
    found = word_maps(capture, heads=heads, softmax=softmax, reduce=reduce, streams=streams)
    maps = by_class(capture, [(one.query, one.values) for one in found])
    return over_space(maps) if minmax else maps


def symmetric_kl(left: Tensor, right: Tensor) -> Tensor:
    """Symmetric Kullback-Leibler divergence of distributions [A, I] and [B, I], [A, B]: half the sum of both ways.

    As matrix products, so that no [A, B, I] tensor is formed.
    """
    log_left, log_right = left.clamp(min=1e-12).log(), right.clamp(min=1e-12).log()
    own = (left * log_left).sum(1)[:, None] + (right * log_right).sum(1)[None]
    return 0.5 * (own - left @ log_right.T - log_left @ right.T)


def greedy_merge(maps: Tensor, tau: float) -> Tensor:
    """Proposals [P, I]: each of maps [A, I] not yet taken, in order, is averaged with all nearer than tau (DiffSeg)."""
    apart = symmetric_kl(maps, maps)
    taken = torch.zeros(len(maps), dtype=torch.bool)
    proposals = []
    for index in range(len(maps)):
        if not taken[index]:
            group = apart[index] < tau
            group[index] = True
            taken |= group
            proposals.append(maps[group].mean(0))
    return torch.stack(proposals)


def unsupervised(
    capture: Capture,
    tau: float = 0.01,
    axis: str = "space",
    kinds: str = "pad,eos",
    streams: str = "all",
    heads: Heads = "mean",
    softmax: str = "auto",
) -> Tensor:
    """Proposals [P, h, w] from the token maps of the empty prompt.

    Args:
        tau: threshold of the symmetric KL below which maps merge. The official code fixes 0.1, at which distinct small
            objects merge; the default was chosen on scenes:train, scan it for other models.
        axis: min-max over "space" per token (as meant), over "token" per pixel (as the official code does), or "none".
        kinds: span kinds whose tokens propose, comma-separated; "all" takes every one, BOS too, as the official code.
        streams: text streams whose tokens propose, or "all".
        heads, softmax: as in `word_maps`.
    """
    check_known("min-max axis", axis, ("space", "token", "none"))
    first = capture.passes[0]
    table = first.prompt.table
    mode = "joint" if softmax == "auto" else softmax
    maps = capture.over_layers(_columns(mode, table.positions("word"), heads))  # [I, T]
    wanted = None if kinds == "all" else named_of("span kind", kinds, SPAN_KINDS)
    places = [
        place
        for place, token in enumerate(table.tokens)
        if (wanted is None or token.kind in wanted) and (streams == "all" or token.stream in listed(streams))
    ]
    if not places:
        raise UserError(
            f"the prompt has no tokens of kind {kinds} in stream {streams}; it has {sorted(set(table.kinds))}"
        )
    maps = maps[:, places].T  # [A, I]
    if axis == "space":
        maps = over_space(maps.reshape(-1, *capture.grid)).flatten(1)
    elif axis == "token":
        low, high = maps.amin(0), maps.amax(0)
        maps = (maps - low) / (high - low + 1e-6)
    return greedy_merge(maps.softmax(1), tau).reshape(-1, *capture.grid)


def _reads(options: Mapping[str, Any]) -> tuple[str, ...]:
    return (text_part(options),)


SEG4DIFF = Method("seg4diff", seg4diff, _reads, "arXiv:2509.18096 section 3.4")
UNSUPERVISED = Method("seg4diff-unsup", unsupervised, _reads, "arXiv:2509.18096 section 3.5", unsupervised=True)
