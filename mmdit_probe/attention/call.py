"""One call of `scaled_dot_product_attention`, with its arguments by name.

    >>> import torch
    >>> q = torch.randn(1, 2, 5, 4)
    >>> call = SDPACall.bind((q, q, q), {"is_causal": True})
    >>> call.scale_factor, tuple(call.stock().shape)
    (0.5, (1, 2, 5, 4))

q and k come after norm and rotary embedding, v is raw: what every model family agrees on (ENGINE.md 1.3 and 2.1 of the
design notes). Nothing is computed here but the stock output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

STOCK = torch._C._nn.scaled_dot_product_attention
"""Torch's own function, also where `torch.nn.functional.scaled_dot_product_attention` was replaced by another."""

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class SDPACall:
    """Arguments of one attention call: query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv].

    `attn_mask` is boolean (True is kept) or additive and broadcasts to [B, H, Nq, Nk].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @classmethod
    def bind(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> SDPACall:
        """From the positional and keyword arguments of `torch.nn.functional.scaled_dot_product_attention`, in the
        precision that its kernels get them: under `torch.autocast` that of autocast."""
        call = cls(**dict(zip(_NAMES, args, strict=False)), **kwargs)
        device = call.query.device.type
        if not _autocast(device):
            return call
        dtype = torch.get_autocast_dtype(device)

        def cast(tensor: Tensor) -> Tensor:
            eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device
            return tensor.to(dtype) if eligible else tensor

        mask = None if call.attn_mask is None else cast(call.attn_mask)
        return replace(call, query=cast(call.query), key=cast(call.key), value=cast(call.value), attn_mask=mask)

    @property
    def scale_factor(self) -> float:
        """The factor on q k^T: `scale`, or D ** -0.5."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else float(self.scale)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As torch's functions of attention take them: by position, and by name."""
        return tuple(getattr(self, name) for name in _NAMES), {"scale": self.scale, "enable_gqa": self.enable_gqa}

    def stock(self) -> Tensor:
        """The attention output [B, H, Nq, Dv] as torch computes it."""
        given, named = self.arguments
        output: Tensor = STOCK(*given, **named)
        return output

    def broadcast(self) -> SDPACall:
        """The call with the batch axes of query, key and value made equal, as views."""
        lengths = {len(self.query), len(self.key), len(self.value)}
        if len(lengths) == 1:
            return self
        batch = max(lengths)
        query, key, value = (
            t if len(t) == batch else t.expand(batch, -1, -1, -1) for t in (self.query, self.key, self.value)
        )
        return replace(self, query=query, key=key, value=value)

    def expanded_key(self) -> Tensor:
        """The key with grouped heads repeated, [B, H, Nk, D]."""
        return _repeat_heads(self.key, self.query.shape[1])

    def expanded_value(self) -> Tensor:
        """The value with grouped heads repeated, [B, H, Nk, Dv]."""
        return _repeat_heads(self.value, self.query.shape[1])

    @property
    def mask(self) -> Tensor | None:
        """`attn_mask` with its four axes, [B or 1, H or 1, Nq or 1, Nk or 1], not expanded; the causal mask is not in
        it. Torch takes any mask that broadcasts, its kernels only four axes."""
        if self.attn_mask is None:
            return None
        return self.attn_mask.reshape((1,) * (4 - self.attn_mask.ndim) + tuple(self.attn_mask.shape))

    def additive_mask(self, dtype: torch.dtype) -> Tensor | None:
        """`mask` as an additive bias: 0 and -inf for a boolean one."""
        if self.mask is None or self.mask.dtype != torch.bool:
            return None if self.mask is None else self.mask.to(dtype)
        return torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device).masked_fill_(~self.mask, -torch.inf)

    def kept(self) -> Tensor | None:
        """`mask` as a boolean one, True where a key is kept: some write the smallest number for minus infinity."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return self.mask
        return self.mask > torch.finfo(self.mask.dtype).min / 2


def autocast_of(device: str) -> torch.dtype | None:
    """What `torch.autocast` casts to on a type of device; None where it is off."""
    return torch.get_autocast_dtype(device) if _autocast(device) else None


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """No autocast on a type of device: it would round float32 products, and cast what a call was given."""
    return torch.autocast(device, enabled=False) if _autocast(device) else nullcontext()


def _autocast(device: str) -> bool:
    # Whether a type of device has autocast at all cannot be asked inside a graph of torch 2.11.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    groups = heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)
