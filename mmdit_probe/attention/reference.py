"""The explicit softmax of joint attention: the readable oracle that every fast path is tested against.

    >>> import torch
    >>> q = k = torch.randn(1, 2, 5, 4)
    >>> p = probabilities(q, k)
    >>> torch.allclose(p.sum(-1), torch.ones(1, 2, 5, dtype=p.dtype))
    True

Computed in float64 by default. It materialises the N x N matrix: for tests and benchmarks, never for the probe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def logits(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention logits with the mask applied.

    Args:
        query: [B, H, Nq, D]. key: [B, Hk, Nk, D] where Hk divides H (grouped heads).
        attn_mask: broadcastable to [B, H, Nq, Nk]; boolean (True is kept) or additive.
        is_causal: keep keys j <= i only.
        scale: factor on the dot product; D ** -0.5 if None.
        dtype: the precision to compute in.

    Returns: [B, H, Nq, Nk]; masked entries are -inf.
    """
    query, key = query.to(dtype), key.to(dtype)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * query @ key.transpose(-1, -2)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask.to(dtype)
    if is_causal:
        kept = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~kept, float("-inf"))
    return scores


def probabilities(query: Tensor, key: Tensor, *options: Any, **named: Any) -> Tensor:
    """Attention probabilities [B, H, Nq, Nk]; rows sum to 1, fully masked rows are zero. Arguments of `logits`."""
    return torch.nan_to_num(logits(query, key, *options, **named).softmax(-1))


def logsumexp(query: Tensor, key: Tensor, *options: Any, **named: Any) -> Tensor:
    """Row log-sum-exp [B, H, Nq] of the logits, natural logarithm. Arguments of `logits`."""
    return logits(query, key, *options, **named).logsumexp(-1)


def group_masses(attention: Tensor, groups: Tensor, count: int) -> Tensor:
    """Probability per query that falls on each group of keys.

    Args:
        attention: [B, H, Nq, Nk] probabilities.
        groups: [Nk] or [B, Nk] group index of every key, in 0..count-1.
        count: number of groups G.

    Returns: [B, H, Nq, G]; sums to 1 over G.
    """
    indicator = torch.nn.functional.one_hot(groups.long(), count).to(attention.dtype)  # [(B,) Nk, G]
    if indicator.ndim == 3:
        indicator = indicator[:, None]  # [B, 1, Nk, G]
    return attention @ indicator
