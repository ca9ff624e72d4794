"""Text maps and masses with gradients, without the N x N matrix: torch's kernels return a log-sum-exp without a
gradient, so every map here is a function of the attention call alone.

    >>> import torch
    >>> q = torch.randn(1, 2, 6, 16, requires_grad=True)
    >>> call = SDPACall(q, q, q)
    >>> maps = text_maps(call, slice(4, 6), slice(0, 4))       # image queries 0..3, text keys 4..5
    >>> maps.shape, maps.requires_grad
    (torch.Size([1, 2, 4, 2]), True)

Two ways, both exact, chosen by `text_maps`:

    values     attention over indicator values: one more attention call, any kernel and mask; memory O(N D)
    columns    exp(scale q k_text^T + bias - lse) with `row_lse`, the differentiable log-sum-exp; memory O(N T)

Gradient checkpointing recomputes them like any other part of the forward (use_reentrant=False).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdit_probe.attention import exact
from mmdit_probe.attention.call import SDPACall, without_autocast
from mmdit_probe.attention.exact import weighted
from mmdit_probe.attention.tiles import Columns, bias_of

Space = Literal["logit", "probability"]
"""Maps before the softmax (scale q k^T + bias) or after it."""

_ROWS_AT_ONCE = 128


@torch.library.custom_op("mmdit_probe::row_lse", mutates_args=())
def _row_lse(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    call = SDPACall(query, key, key, mask, 0.0, is_causal, scale)
    lse = exact.logsumexp(call)
    # A fresh tensor in one memory order: a compiled graph is told nothing else.
    return (streamed_lse(call) if lse is None else lse.float()).clone(memory_format=torch.contiguous_format)


@_row_lse.register_fake
def _(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    return query.new_empty(query.shape[:-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, mask)


@once_differentiable
def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """With p the attention probabilities: d lse_i / d q_i = scale sum_j p_ij k_j, the attention output for values k;
    and d lse_i / d k_j = scale p_ij q_i, so the gradient of k is what the same attention gives its values for an output
    gradient of g scale q. One attention call, forward and backward, gives both, in O(N D) memory."""
    query, key, mask = ctx.saved_tensors
    weight = (gradient[..., None] * ctx.scale).to(query.dtype)
    with torch.enable_grad():
        values = key.detach().requires_grad_()
        call = SDPACall(query.detach(), key.detach(), values, mask, 0.0, ctx.is_causal, ctx.scale)
        output = call.stock()
        (of_key,) = torch.autograd.grad(output, values, weight * query)
    return weight * output.detach(), of_key, None, None, None


_row_lse.register_autograd(_backward, setup_context=_save)


def row_lse(call: SDPACall) -> Tensor:
    """Row log-sum-exp [B, H, Nq] of a call's masked logits, float32, natural logarithm, differentiable in q and k.

    Torch's kernels compute it without a gradient; here it has one, in a compiled graph too. A mask with a gradient (a
    learned bias) gets its own as well, in O(N^2) memory, which is what such a mask has anyway.
    """
    if call.attn_mask is not None and call.attn_mask.requires_grad:
        return streamed_lse(call)
    lse: Tensor = torch.ops.mmdit_probe.row_lse(
        call.query, call.expanded_key(), call.additive_mask(call.query.dtype), call.is_causal, call.scale_factor
    )
    return lse


def columns(call: SDPACall, keys: Columns, rows: Columns = slice(None)) -> Tensor:
    """Attention probabilities [B, H, R, K] float32 of some keys for some queries, differentiable in q and k.

    Args:
        call: the attention call. keys: the K key positions. rows: the R query positions.
    """
    with without_autocast(call.query.device.type):
        return (logits(call, keys, rows) - row_lse(call)[:, :, rows, None]).exp()


def logits(call: SDPACall, keys: Columns, rows: Columns = slice(None)) -> Tensor:
    """scale q k^T + bias, [B, H, R, K] float32, of some keys for some queries, differentiable in q and k."""
    with without_autocast(call.query.device.type):
        query, key = call.query[:, :, rows].float(), call.expanded_key()[:, :, keys].float()
        scores = call.scale_factor * query @ key.transpose(-1, -2)
        bias = bias_of(call, keys, rows)
        return scores if bias is None else scores + bias


def text_maps(
    call: SDPACall,
    text: Columns,
    image: Columns,
    groups: Tensor | None = None,
    *,
    heads: Literal["all", "mean"] = "all",
    space: Space = "probability",
) -> Tensor:
    """I2T maps with gradients: what each image query gives to each text key, or to each group of text keys.

    Args:
        call: the attention call.
        text: the T key positions. image: the I query positions.
        groups: [B or 1, T, G] weight of every text position in each map; None keeps every position (G = T). Logits are
            weighted the same way, so for a mean over a word's positions let its weights sum to 1.
        heads: "mean" averages over heads, of logits or probabilities as `space` says.
        space: "probability" after the softmax over all keys, "logit" before it.

    Returns: [B, H, I, G] float32, or [B, I, G] with heads="mean".
    """
    width = call.query.shape[-1]
    if space == "probability" and groups is not None and groups.shape[-1] <= width:
        weights = torch.zeros(len(groups), call.key.shape[-2], groups.shape[-1], device=call.query.device)
        weights[:, text] = groups.to(weights)
        maps = weighted(call, weights, image)
    else:
        maps = columns(call, text, image) if space == "probability" else logits(call, text, image)
        if groups is not None:
            with without_autocast(call.query.device.type):
                maps = maps @ groups[:, None].to(maps)
    return maps.mean(1) if heads == "mean" else maps


def streamed_lse(call: SDPACall) -> Tensor:
    """Row log-sum-exp [B, H, Nq] by blocks of rows, for devices whose kernels give none; 0 where no key is seen."""
    parts = []
    for start in range(0, call.query.shape[-2], _ROWS_AT_ONCE):
        parts.append(logits(call, slice(None), slice(start, start + _ROWS_AT_ONCE)).logsumexp(-1))
    lse = torch.cat(parts, -1)
    return lse.masked_fill(lse == float("-inf"), 0.0)
