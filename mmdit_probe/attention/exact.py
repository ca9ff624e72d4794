"""Exact attention probabilities without the N x N matrix, as columns from the kernel's row log-sum-exp:

    A[:, keys] = exp(scale * q k_keys^T + bias - lse)

so masses and text maps cost O(N T) time and a few megabytes. q and k are upcast to float32: a bfloat16 matmul would
round its *output* logits and lose two digits. Where a kernel gives no lse (MPS, unknown devices), one more attention
with indicator values gives the masses of key groups.

    >>> import torch
    >>> q = torch.randn(1, 2, 6, 16)
    >>> call = SDPACall(q, q, q)
    >>> output, lse = attend(call)
    >>> bool((output == call.stock()).all())
    True
    >>> reduce(call, lse, slice(4, 6), query_weights=torch.ones(1, 1, 6)).shape    # summed over queries
    torch.Size([1, 2, 1, 2])

Nothing here is differentiable but `weighted` and `attend`'s output: see `attention.gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from mmdit_probe.attention.call import SDPACall, without_autocast
from mmdit_probe.attention.tiles import Columns, bias_of, blocks, padded, size

_MATH, _FLASH, _EFFICIENT, _CUDNN = 0, 1, 2, 3  # torch's SDPBackend, as `torch._fused_sdp_choice` returns it


def kernel(call: SDPACall) -> str:
    """The kernel `scaled_dot_product_attention` takes for this call: "flash", "efficient", "cudnn" or "math".

    Masks and shapes matter, so the answer is per call, not per model.
    """
    given, named = call.arguments
    choice = torch._fused_sdp_choice(*given, **named)
    return {_FLASH: "flash", _EFFICIENT: "efficient", _CUDNN: "cudnn"}.get(int(choice), "math")


def attend(call: SDPACall) -> tuple[Tensor, Tensor | None]:
    """The stock attention output, and the row log-sum-exp where a kernel gives one.

    One kernel call gives both wherever it can; the output is bitwise that of `scaled_dot_product_attention`. Under a
    `TorchFunctionMode` the output is what that mode makes of the stock call.

    Returns: output [B, H, Nq, Dv] in the call's dtype (differentiable as the stock output is), and lse [B, H, Nq] in
    float32 (float64 for float64 calls), natural logarithm, or None.
    """
    plain = call.dropout_p == 0.0 and not call.enable_gqa and call.attn_mask is None
    if plain and len(call.query) == len(call.key) == len(call.value) and not _get_current_function_mode_stack():
        name, device = kernel(call), call.query.device.type
        query, key, value = call.query, call.key, call.value
        if device == "cpu" and name == "flash":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, call.is_causal, scale=call.scale
            )
        if device == "cuda" and name == "flash" and query.shape[-1] % 8 == 0:
            result = torch.ops.aten._scaled_dot_product_flash_attention.default(
                query, key, value, 0.0, call.is_causal, False, scale=call.scale
            )
            return result[0], result[1]
    return call.stock(), logsumexp(call.broadcast())


@torch.no_grad()
def logsumexp(call: SDPACall) -> Tensor | None:
    """Row log-sum-exp [B, H, Nq] of the masked logits, float32, or None where no kernel gives it.

    Source of the shapes: torch 2.13's kernels. The efficient kernel pads its rows to a multiple of 32, cuDNN's has a
    trailing axis of 1. A row with every key masked has no meaning here (the CPU kernel gives 0); see `live_queries`.
    """
    query, key, value = call.query, call.expanded_key(), call.expanded_value()
    if key.shape[-1] != value.shape[-1]:
        value = key  # lse does not depend on the values, and fused kernels want equal widths
    rows, mask = query.shape[-2], call.additive_mask(query.dtype)
    if query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, call.is_causal, attn_mask=mask, scale=call.scale
        )[1]
    if query.device.type != "cuda":
        return None
    bare = SDPACall(query, key, value, mask, 0.0, call.is_causal, call.scale)
    name = kernel(bare)
    if name == "flash" and query.shape[-1] % 8 == 0:
        return torch.ops.aten._scaled_dot_product_flash_attention.default(
            query, key, value, 0.0, call.is_causal, False, scale=call.scale
        )[1]
    if mask is not None:
        mask = _aligned(mask, key.shape[-2]).expand(query.shape[0], query.shape[1], rows, -1)
    if name == "cudnn":
        # cuDNN gives wrong results for inputs that are not contiguous (diffusers warns of it).
        lse = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
            query.contiguous(), key.contiguous(), value.contiguous(), mask, True, 0.0, call.is_causal, scale=call.scale
        )[1]
        return lse.squeeze(-1) if lse.ndim == 4 else lse
    if name == "efficient":
        lse = torch.ops.aten._scaled_dot_product_efficient_attention.default(
            query, key, value, mask, True, 0.0, call.is_causal, scale=call.scale
        )[1]
        return lse[..., :rows]
    return None


def _aligned(mask: Tensor, keys: int) -> Tensor:
    """The mask with every row at a multiple of 16 numbers: torch pads masks so before it calls the efficient kernel,
    which refuses others."""
    mask = mask.expand(*mask.shape[:-1], keys)
    return torch.nn.functional.pad(mask, (0, -keys % 16))[..., :keys]


@torch.no_grad()
def live_queries(call: SDPACall) -> Tensor | None:
    """Which queries see at least one key, [B or 1, H or 1, Nq or 1] boolean; None if no mask is given (all do)."""
    mask = call.kept()
    if mask is None:
        return None
    if call.is_causal:
        mask = mask & torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return mask.any(-1)


@torch.no_grad()
def reduce(
    call: SDPACall,
    lse: Tensor,
    keys: Columns,
    queries: Columns = slice(None),
    *,
    key_weights: Tensor | None = None,
    query_weights: Tensor | None = None,
    head_mean: bool = False,
) -> Tensor:
    """Attention probabilities of some keys for some queries, reduced block by block: sum_qk v_q p_qk w_k.

    Args:
        call: the attention call. lse: [B, H, Nq] from `attend`.
        keys: the K key positions. queries: the Q query positions.
        key_weights: [B or 1, K, G] weight w of every key in each group; None keeps the keys apart (G = K).
        query_weights: [B or 1, M, Q] weight v of every query in each sum; None keeps the queries apart (M = Q).
        head_mean: average over heads.

    Returns: [B, H, M, G] float32, or [B, M, G] with `head_mean`.
    """
    key_weights = None if key_weights is None else key_weights.to(call.query.device)
    if query_weights is None:
        return _maps(call, lse, keys, queries, key_weights, head_mean)
    (batch, heads), count = call.query.shape[:2], size(call, keys)
    weights = query_weights.to(call.query.device)[:, None].expand(batch, heads, -1, -1).flatten(0, 1)
    sums = torch.zeros(batch * heads, weights.shape[1], padded(count), device=call.query.device)
    for block in blocks(call, lse, keys, queries):
        sums[block.pairs].baddbmm_(weights[block.pairs, :, block.queries], block.flat)
    out = sums.unflatten(0, (batch, heads))[..., :count]  # [B, H, M, K]
    if key_weights is not None:
        out = (out.flatten(1, 2) @ key_weights).unflatten(1, (heads, -1))  # fewer operations than with an axis of 1
    return out.mean(1) if head_mean else out


def _maps(
    call: SDPACall, lse: Tensor, keys: Columns, queries: Columns, key_weights: Tensor | None, head_mean: bool
) -> Tensor:
    """`reduce` over keys and heads alone: [B, H, Q, G] or [B, Q, G]."""
    batch, heads = call.query.shape[:2]
    count, device = size(call, keys), call.query.device
    shape = (size(call, queries, keys=False), count if key_weights is None else key_weights.shape[-1])
    out = torch.zeros(batch, *shape, device=device) if head_mean else torch.empty(batch, heads, *shape, device=device)
    key_weights = None if key_weights is None else key_weights.expand(batch, -1, -1)
    for block in blocks(call, lse, keys, queries):
        values = block.values[..., :count]
        if key_weights is not None:
            values = values @ key_weights[block.samples, None]
        if head_mean:
            total = out[block.samples, block.queries]
            # One by one in a processor's cache; on a GPU in one operation.
            for part in (values.sum(1),) if values.is_cuda else values.unbind(1):
                total += part
        else:
            out[block.samples, block.heads, block.queries] = values
    return out.div_(heads) if head_mean else out


@torch.no_grad()
def within(call: SDPACall, lse: Tensor, parts: Sequence[Columns], query_weights: Tensor) -> Tensor:
    """Probability that the queries of each part give to keys of the same part, summed over parts and queries.

    Args:
        call: the attention call, of which queries and keys are the same tokens. lse: [B, H, N] from `attend`.
        parts: positions of each of P parts: of n tokens in all, n^2 / P probabilities are computed, block by block.
        query_weights: [B or 1, N] weight of every query.

    Returns: [B, H] float32.
    """
    total = torch.zeros(call.query.shape[:2], device=call.query.device)
    for part in parts:
        weights = query_weights[:, None, part]
        total += reduce(call, lse, part, part, query_weights=weights).sum((-2, -1))
    return total


@torch.no_grad()
def group_masses(call: SDPACall, lse: Tensor | None, groups: Tensor, count: int) -> Tensor:
    """Probability per query that falls on each group of keys, [B, H, Nq, G] float32; sums to 1 over G.

    Args:
        call: the attention call.
        lse: [B, H, Nq] from `attend`; None takes the indicator-values path.
        groups: [Nk] or [B, Nk] group index of every key, 0..count-1. count: number of groups G.

    One group, the largest, is the complement of the others and costs nothing; the rest are columns.
    """
    groups = groups.to(call.query.device).long()
    shared = groups if groups.ndim == 2 else groups[None]
    live = live_queries(call)
    if lse is None:
        masses = weighted(call, torch.nn.functional.one_hot(shared, count).float())
        return masses if live is None else masses.masked_fill(~live[..., None], 0.0)
    sizes = torch.bincount(shared.flatten(), minlength=count)
    rest = int(sizes.argmax())
    needed = (shared != rest).any(0).nonzero()[:, 0]
    indicator = torch.nn.functional.one_hot(shared[:, needed], count).float()  # [B or 1, K, G]
    indicator[..., rest] = 0.0
    out = reduce(call, lse, needed, key_weights=indicator)
    out[..., rest] = 1.0 - out.sum(-1)
    return out if live is None else out * live[..., None]


def weighted(call: SDPACall, weights: Tensor, rows: Columns = slice(None)) -> Tensor:
    """sum_j p_ij w_jg, [B, H, R, G] float32: attention over indicator values, differentiable in q and k.

    Args:
        call: the attention call.
        weights: [B or 1, Nk, G] weight of every key in each group (zeros and ones: the mass on the group).
        rows: the R query positions.

    One attention call per D groups, on whatever kernel takes it, with any mask.
    """
    query, key = call.query[:, :, rows], call.expanded_key()
    batch, heads, _, width = query.shape
    mask = bias_of(call, slice(None), rows) if call.attn_mask is not None or call.is_causal else None
    parts = []
    with without_autocast(call.query.device.type):
        for first in range(0, weights.shape[-1], width):
            values = weights[..., first : first + width].to(query.device, torch.float32)
            kept = values.shape[-1]
            # Fused kernels want values as wide as the keys.
            values = torch.nn.functional.pad(values, (0, width - kept))[:, None].expand(batch, heads, -1, -1)
            inner = SDPACall(query.float(), key.float(), values, mask, 0.0, False, call.scale_factor)
            parts.append(inner.stock()[..., :kept])
    return torch.cat(parts, -1)
