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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        """From the positional and keyword arguments of `torch.nn.functional.scaled_dot_product_attention`."""
        return cls(**dict(zip(_NAMES, args, strict=False)), **kwargs)

    @property
    def scale_factor(self) -> float:
        """The factor on q k^T: `scale`, or D ** -0.5."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else float(self.scale)

    def stock(self) -> Tensor:
        """The attention output [B, H, Nq, Dv] as torch computes it."""
        return torch.nn.functional.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def expanded_key(self) -> Tensor:
        """The key with grouped heads repeated, [B, H, Nk, D]."""
        return _repeat_heads(self.key, self.query.shape[1])

    def expanded_value(self) -> Tensor:
        """The value with grouped heads repeated, [B, H, Nk, Dv]."""
        return _repeat_heads(self.value, self.query.shape[1])

    def additive_mask(self, dtype: torch.dtype) -> Tensor | None:
        """`attn_mask` as an additive bias (0 and -inf for a boolean one) [B or 1, H or 1, Nq or 1, Nk or 1], not
        expanded; the causal mask is not in it. Torch takes any mask that broadcasts, its kernels only four axes."""
        if self.attn_mask is None:
            return None
        if self.attn_mask.dtype != torch.bool:
            bias = self.attn_mask.to(dtype)
        else:
            zeros = torch.zeros(self.attn_mask.shape, dtype=dtype, device=self.attn_mask.device)
            bias = zeros.masked_fill_(~self.attn_mask, float("-inf"))
        return bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    groups = heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)
