"""Exact attention probabilities without the N x N matrix.

The kernel that computes the output also computes each row's log-sum-exp, and with it any set of columns is

    A[:, keys] = exp(scale * q k_keys^T + bias - lse)

so masses and text maps cost O(N T) time and a few megabytes. q and k are upcast to float32 for those columns: a
bfloat16 matmul would round its *output* logits and lose two digits. Where a kernel gives no lse (MPS, unknown devices),
one more attention with indicator values gives the masses of key groups.

    >>> import torch
    >>> q = torch.randn(1, 2, 6, 16)
    >>> call = SDPACall(q, q, q)
    >>> output, lse = attend(call)
    >>> bool((output == call.stock()).all())
    True
    >>> column_sums(call, lse, slice(4, 6), torch.ones(1, 6)).shape    # summed over queries
    torch.Size([1, 2, 1, 2])

Nothing here is differentiable: torch's kernels give lse without a gradient, and treating it as a constant gives wrong
gradients without a warning. Every function therefore runs without gradients, except for `attend`'s output.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmdit_probe.attention.call import SDPACall

Columns = slice | Tensor
"""A set of token positions: a contiguous slice, or a LongTensor of indices."""

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Probabilities held at once, by device: on a CPU 1 MiB of float32, which stays in a core's second-level cache
(measured:
256 rows x 2 heads x 333 keys is twice as fast as 65 rows x 24 heads); on a GPU enough to fill it."""

_MATH, _FLASH, _EFFICIENT, _CUDNN = 0, 1, 2, 3  # torch's SDPBackend, as `torch._fused_sdp_choice` returns it


def kernel(call: SDPACall) -> str:
    """The kernel `scaled_dot_product_attention` takes for this call: "flash", "efficient", "cudnn" or "math".

    Masks and shapes matter, so the answer is per call, not per model.
    """
    choice = torch._fused_sdp_choice(
        call.query,
        call.key,
        call.value,
        call.attn_mask,
        call.dropout_p,
        call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )
    return {_FLASH: "flash", _EFFICIENT: "efficient", _CUDNN: "cudnn"}.get(int(choice), "math")


def attend(call: SDPACall) -> tuple[Tensor, Tensor | None]:
    """The stock attention output, and the row log-sum-exp where a kernel gives one.

    One kernel call gives both wherever it can; the output is bitwise that of `scaled_dot_product_attention`.

    Returns: output [B, H, Nq, Dv] in the call's dtype (differentiable as the stock output is), and lse [B, H, Nq] in
    float32, natural logarithm, or None.
    """
    if call.dropout_p == 0.0 and not call.enable_gqa and call.attn_mask is None:
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
    return call.stock(), logsumexp(call)


@torch.no_grad()
def logsumexp(call: SDPACall) -> Tensor | None:
    """Row log-sum-exp [B, H, Nq] of the masked logits, float32, or None where no kernel gives it.

    Source of the shapes: torch 2.13's kernels. The efficient kernel pads its rows to a multiple of 32, cuDNN's has a
    trailing axis of 1. A row with every key masked has no meaning here (the CPU kernel gives 0); see `live_rows`.
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
        mask = mask.expand(query.shape[0], query.shape[1], rows, key.shape[-2])
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


@torch.no_grad()
def live_rows(call: SDPACall) -> Tensor | None:
    """Which queries see at least one key, [B or 1, H or 1, Nq or 1] boolean; None if no mask is given (all do)."""
    if call.attn_mask is None:
        return None
    mask = call.attn_mask if call.attn_mask.dtype == torch.bool else call.attn_mask > float("-inf")
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    if call.is_causal:
        mask = mask & torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return mask.any(-1)


@torch.no_grad()
def columns(call: SDPACall, lse: Tensor, keys: Columns, rows: Columns = slice(None)) -> Tensor:
    """Attention probabilities of some keys for some queries, [B, H, R, K] float32.

    Args:
        call: the attention call.
        lse: [B, H, Nq] from `attend`.
        keys: the K key positions. rows: the R query positions.

    The result is as large as asked for; to reduce over queries use `column_sums`.
    """
    query = _take(call.query, rows).float()
    key = _take(call.expanded_key(), keys).float()
    batch, heads, n_rows, width = query.shape
    shift = _take(lse[..., None], rows).float().neg().reshape(batch * heads, n_rows, 1)
    scores = torch.baddbmm(
        shift.expand(-1, -1, key.shape[-2]),
        query.reshape(batch * heads, n_rows, width),
        key.reshape(batch * heads, -1, width).transpose(1, 2),
        alpha=call.scale_factor,
    ).view(batch, heads, n_rows, -1)
    bias = _bias(call, keys, rows)
    if bias is not None:
        scores += bias
    return scores.exp_()


@torch.no_grad()
def column_sums(call: SDPACall, lse: Tensor, keys: Columns, weights: Tensor) -> Tensor:
    """Weighted sums over queries of the attention probabilities of some keys, streamed over query chunks.

    Args:
        call: the attention call. lse: [B, H, Nq] from `attend`.
        keys: the K key positions.
        weights: [G, Nq] or [B, G, Nq], float32: the weight of every query in each of G sums.

    Returns: [B, H, G, K] float32, sum over queries of weight * probability. At most `CHUNK_ELEMENTS` probabilities
    are held at once.
    """
    batch, heads, n_rows, _ = call.query.shape
    key = _take(call.expanded_key(), keys).float().transpose(-1, -2)  # [B, H, D, K]
    n_keys = key.shape[-1]
    out = torch.zeros(batch, heads, weights.shape[-2], n_keys, device=key.device)
    rows_at_once, heads_at_once = _block_shape(call.query.device, n_rows, heads, n_keys)
    shift = lse[..., None].float().neg().contiguous()  # [B, H, Nq, 1]
    # One buffer for all blocks: a fresh allocation per block costs more in page faults than the exponentials.
    buffer = torch.empty(heads_at_once * rows_at_once * n_keys, device=key.device)
    for index in range(batch):
        weight = weights[index] if weights.ndim == 3 else weights
        for first in range(0, heads, heads_at_once):
            group = slice(first, min(first + heads_at_once, heads))
            for start in range(0, n_rows, rows_at_once):
                rows = slice(start, min(start + rows_at_once, n_rows))
                query = call.query[index, group, rows].float()
                scores = buffer[: query.shape[0] * query.shape[1] * n_keys].view(*query.shape[:2], n_keys)
                with _products_of(call.query):
                    torch.bmm(query, key[index, group], out=scores)
                torch.add(shift[index, group, rows], scores, alpha=call.scale_factor, out=scores)
                bias = _bias(call, keys, rows)
                if bias is not None:
                    bias = bias[index if bias.shape[0] > 1 else 0]
                    scores += bias[group] if bias.shape[0] > 1 else bias
                out[index, group] += torch.matmul(weight[:, rows], scores.exp_())
    return out


@torch.no_grad()
def column_maps(
    call: SDPACall, lse: Tensor, keys: Columns, rows: Columns, groups: Tensor | None = None, head_mean: bool = False
) -> Tensor:
    """Attention probabilities of some keys for some queries, summed over groups of keys, streamed over query chunks.

    Args:
        call: the attention call. lse: [B, H, Nq] from `attend`.
        keys: the K key positions. rows: the R query positions.
        groups: [B or 1, K, G] weight of every key in each group; None keeps the keys apart (G = K).
        head_mean: average over heads.

    Returns: [B, H, R, G] float32, or [B, R, G] with `head_mean`.
    """
    batch, heads = call.query.shape[:2]
    index = torch.arange(call.query.shape[-2], device=call.query.device)[rows]
    n_keys = torch.arange(call.key.shape[-2], device=call.query.device)[keys].numel()
    parts = []
    for start, stop in _chunks(call, len(index), batch * heads * n_keys):
        block = columns(call, lse, keys, index[start:stop])
        if groups is not None:
            block = block @ groups[:, None].to(block.device)
        parts.append(block.mean(1) if head_mean else block)
    return torch.cat(parts, -2)


@torch.no_grad()
def row_maps(
    call: SDPACall, lse: Tensor, keys: Columns, rows: Columns, weights: Tensor, head_mean: bool = False
) -> Tensor:
    """Attention probabilities of some keys, weighted sums over groups of queries, streamed over query chunks.

    Args:
        call: the attention call. lse: [B, H, Nq] from `attend`.
        keys: the K key positions. rows: the R query positions.
        weights: [B or 1, R, G] weight of every query in each sum.
        head_mean: average over heads.

    Returns: [B, H, K, G] float32, or [B, K, G] with `head_mean`: the transposed block, keys first.
    """
    index = torch.arange(call.query.shape[-2], device=call.query.device)[rows]
    n_keys = torch.arange(call.key.shape[-2], device=call.query.device)[keys].numel()
    batch, heads = call.query.shape[:2]
    shape = (batch, n_keys, weights.shape[-1]) if head_mean else (batch, heads, n_keys, weights.shape[-1])
    out = torch.zeros(shape, device=call.query.device)
    for start, stop in _chunks(call, len(index), batch * heads * n_keys):
        block = columns(call, lse, keys, index[start:stop]).transpose(-1, -2)  # [B, H, K, R]
        out += block.mean(1) @ weights[:, start:stop] if head_mean else block @ weights[:, None, start:stop]
    return out


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
    if lse is None:
        return _indicator_masses(call, shared, count)
    sizes = torch.bincount(shared.flatten(), minlength=count)
    rest = int(sizes.argmax())
    needed = (shared != rest).any(0).nonzero()[:, 0]
    batch, heads, n_rows, _ = call.query.shape
    indicator = torch.nn.functional.one_hot(shared[:, needed], count).float()  # [B or 1, K, G]
    indicator[..., rest] = 0.0
    out = torch.empty(batch, heads, n_rows, count, device=call.query.device)
    for start, stop in _chunks(call, n_rows, batch * heads * max(1, len(needed))):
        block = columns(call, lse, needed, slice(start, stop)) @ indicator[:, None]
        block[..., rest] = 1.0 - block.sum(-1)
        out[:, :, start:stop] = block
    live = live_rows(call)
    return out if live is None else out * live[..., None]


def _indicator_masses(call: SDPACall, groups: Tensor, count: int) -> Tensor:
    """Masses [B, H, Nq, G] by attention over one-hot values: any kernel, any mask, no lse. Computed in float32."""
    width = call.query.shape[-1]
    query, key = call.query.float(), call.expanded_key().float()
    mask = call.additive_mask(torch.float32)
    indicator = torch.nn.functional.one_hot(groups, count).float()  # [B or 1, Nk, G]
    parts = []
    for first in range(0, count, width):
        values = indicator[..., first : first + width]
        kept = values.shape[-1]
        values = torch.nn.functional.pad(values, (0, width - kept))[:, None].expand(*key.shape[:2], -1, -1)
        parts.append(SDPACall(query, key, values, mask, 0.0, call.is_causal, call.scale_factor).stock()[..., :kept])
    live = live_rows(call)
    masses = torch.cat(parts, -1)
    return masses if live is None else masses.nan_to_num() * live[..., None]


def _chunk_elements(device: torch.device) -> int:
    return CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"])


def _chunks(call: SDPACall, rows: int, row_elements: int) -> Iterator[tuple[int, int]]:
    size = max(16, _chunk_elements(call.query.device) // max(1, row_elements))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def _block_shape(device: torch.device, rows: int, heads: int, keys: int) -> tuple[int, int]:
    """Rows and heads per block of columns: few heads with many rows on a CPU, everything that fits on a GPU."""
    limit = max(1, _chunk_elements(device) // max(1, keys))
    at_once = min(rows, 256 if device.type == "cpu" else max(256, limit // heads))
    return at_once, min(heads, max(1, limit // at_once))


@contextmanager
def _products_of(tensor: Tensor) -> Iterator[None]:
    """Let float32 matmuls of upcast bfloat16 values run on bfloat16 units: the products are exact either way.

    Accumulation and result stay float32 (checked: closer to float64 than the plain float32 matmul), and it is three
    times faster on CPUs that have such units. The switch is process-wide, so it is left alone where another thread
    might be computing.
    """
    if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu" or threading.active_count() > 1:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _take(tensor: Tensor, positions: Columns) -> Tensor:
    return tensor[:, :, positions]


def _bias(call: SDPACall, keys: Columns, rows: Columns) -> Tensor | None:
    """The additive mask of some rows and keys, [B or 1, H or 1, R or 1, K or 1] float32, causal part included."""
    bias = call.additive_mask(torch.float32)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))
        bias = bias[:, :, rows] if bias.shape[2] > 1 else bias
        bias = bias[..., keys] if bias.shape[3] > 1 else bias
    if call.is_causal:
        device = call.query.device
        row = torch.arange(call.query.shape[-2], device=device)[rows]
        column = torch.arange(call.key.shape[-2], device=device)[keys]
        causal = torch.zeros(len(row), len(column), device=device)
        causal.masked_fill_(column[None] > row[:, None], float("-inf"))
        bias = causal[None, None] if bias is None else bias + causal
    return bias
