"""Attention calls whose samples differ, brought into one order that observers can read: image, text, other.

    seen = canonical(record, places)                  # places from `models.layout.arranged`

Some families pack every sample's text without a gap, call attention once per sample, or let text be keys and not
queries. Softmax does not depend on the order of keys, so a copy in one order, with what is not there masked, has the
same probabilities. Observers see that copy; what an edit changed in it is put back into the model's own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import Record
from mmdit_probe.errors import RunError
from mmdit_probe.models.layout import Places


def canonical(record: Record, places: Places) -> Record:
    """The record with the tokens of every sample in canonical order; queries that are not there are zeros.

    Args:
        record: an attention call of B samples. places: of the N canonical tokens.
    """
    queries = places.queries
    lse = None if record.lse is None else gathered(record.lse[..., None], queries)[..., 0]
    output = gathered(record.output, queries)
    return Record(canonical_call(record.call, places), output, record.module_call, lse, True, record.edited)


def canonical_call(call: SDPACall, places: Places) -> SDPACall:
    """The call with the tokens of every sample in canonical order, what is not there masked."""
    keys, queries = places.keys.to(call.query.device), places.queries.to(call.query.device)
    mask = _mask(call, keys, queries)
    return SDPACall(
        gathered(call.query, queries), gathered(call.key, keys), gathered(call.value, keys), mask, 0.0, False,
        call.scale_factor, call.enable_gqa,
    )  # fmt: skip


def restored(changed: SDPACall, call: SDPACall, places: Places) -> SDPACall:
    """The call in its own order, with queries, keys and values of a changed canonical call; its own mask."""
    return replace(
        call, query=scattered(changed.query, call.query, places.queries),
        key=scattered(changed.key, call.key, places.keys), value=scattered(changed.value, call.value, places.keys),
        scale=changed.scale,
    )  # fmt: skip


def scattered(tokens: Tensor, onto: Tensor, places: Tensor) -> Tensor:
    """Canonical tokens [B, H, N, D] put to their places [B, N] among those of a call [B, H, N', *].

    Tokens of the call that no canonical one stands for stay as they are, or are 0 if the width D is another.
    """
    places = places.to(tokens.device)
    spare = onto.shape[2]  # one more row takes what has no place
    result = tokens.new_zeros(*onto.shape[:2], spare + 1, tokens.shape[-1])
    if tokens.shape[-1] == onto.shape[-1]:
        result[:, :, :spare] = onto
    index = torch.where(places < 0, spare, places)[:, None, :, None].expand_as(tokens)
    return result.scatter(2, index, tokens)[:, :, :spare]


def canonical_hidden(hidden: Tensor, places: Places) -> Tensor:
    """Which canonical tokens a mask hides, [B, N], from which keys of the call it hides, [B or 1, Nk]."""
    every = hidden.cpu().expand(len(places.keys), -1)
    return every.gather(1, places.keys.clamp(min=0)) | (places.keys < 0)


def joined(records: Sequence[Record]) -> Record:
    """One record of B samples from records of some samples each; shorter ones are padded with zeros at the end.

    Raises:
        RunError: the calls are causal, or have masks and differ in length.
    """
    calls = [record.call for record in records]
    call = SDPACall(
        _stacked([c.query for c in calls]), _stacked([c.key for c in calls]), _stacked([c.value for c in calls]),
        _joined_masks(calls), 0.0, False, calls[0].scale_factor, calls[0].enable_gqa,
    )  # fmt: skip
    known = [record.lse[..., None] for record in records if record.lse is not None]
    lse = _stacked(known)[..., 0] if len(known) == len(records) else None
    edited = any(record.edited for record in records)
    return Record(call, _stacked([record.output for record in records]), records[0].module_call, lse, True, edited)


def _joined_masks(calls: Sequence[SDPACall]) -> Tensor | None:
    """The masks of calls one after the other, [B, H or 1, Nq or 1, Nk]; calls without one keep every key."""
    masks = [call.mask for call in calls if call.mask is not None]
    lengths = {(call.query.shape[2], call.key.shape[2]) for call in calls}
    if any(call.is_causal for call in calls) or (masks and len(lengths) > 1):
        raise RunError("attention is called once per sample, causal or with a mask and of several lengths")
    if not masks:
        return None
    boolean = all(mask.dtype == torch.bool for mask in masks)
    shape = (*(max(mask.shape[axis] for mask in masks) for axis in (1, 2)), calls[0].key.shape[2])
    parts = []
    for call in calls:
        mask = call.mask if boolean else call.additive_mask(torch.float32)
        if mask is None:
            mask = torch.full((1, 1, 1, 1), boolean, device=call.query.device, dtype=None if boolean else torch.float32)
        parts.append(mask.expand(len(call.query), *shape))
    return torch.cat(parts)


def hidden_keys(call: SDPACall) -> Tensor | None:
    """Keys that the mask hides from every query, boolean [B or 1, Nk]; None if there are none for sure."""
    kept = call.kept()
    return None if kept is None else (~kept.any(2).any(1)).expand(-1, call.key.shape[-2])


def _mask(call: SDPACall, keys: Tensor, queries: Tensor) -> Tensor:
    """The call's mask in canonical order, with absent keys masked: [B, H or 1, N or 1, N]."""
    batch, count = keys.shape
    absent = (keys < 0)[:, None, None]
    if call.is_causal:
        raise RunError("causal joint attention whose samples differ is not supported")
    if call.mask is None:
        return ~absent
    mask = call.mask.expand(batch, -1, -1, call.key.shape[-2])
    index = keys.clamp(min=0)[:, None, None].expand(batch, mask.shape[1], mask.shape[2], count)
    mask = mask.gather(3, index)
    if mask.shape[2] > 1:
        index = queries.clamp(min=0)[:, None, :, None].expand(batch, mask.shape[1], count, count)
        mask = mask.gather(2, index)
    return mask & ~absent if mask.dtype == torch.bool else mask.masked_fill(absent, float("-inf"))


def gathered(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens of a call [B, H, N', D] in canonical order [B, H, N, D]; zeros where a place is -1."""
    batch, heads, _, width = tokens.shape
    places = places.to(tokens.device)
    index = places.clamp(min=0)[:, None, :, None].expand(batch, heads, places.shape[1], width)
    return tokens.gather(2, index) * (places >= 0)[:, None, :, None]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    longest = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])
