"""The attention backend while probing: diffusers' native one, restored afterwards.

Other backends (flash-attn, sage, xformers, flex, hub kernels) bypass `scaled_dot_product_attention` and hide attention
from the probe. Both the processors' own setting and diffusers' process-wide one are switched and put back, after an
error too.

    with native_attention(transformer):
        ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mmdit_probe.errors import UserError


@contextmanager
def native_attention(transformer: nn.Module) -> Iterator[None]:
    """Run with torch's own attention in every module of `transformer` that has a processor.

    Raises:
        UserError: context parallelism is on: attention runs on shards, and no call shows all keys.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    processors: list[Any] = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    if any(getattr(holder, "_parallel_config", None) is not None for holder in (transformer, *processors)):
        raise UserError("attention is split over devices (context parallelism); probe on one device instead")
    before = [(processor, processor._attention_backend) for processor in processors if _is_set(processor)]
    process_wide = _AttentionBackendRegistry._active_backend
    try:
        for processor, _ in before:
            processor._attention_backend = None
        _AttentionBackendRegistry._active_backend = AttentionBackendName.NATIVE
        yield
    finally:
        _AttentionBackendRegistry._active_backend = process_wide
        for processor, backend in before:
            processor._attention_backend = backend


def backend_of(module: nn.Module) -> str:
    """Name of the diffusers backend that an attention module's calls go to now, e.g. "native" or "flex"."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    own = getattr(getattr(module, "processor", None), "_attention_backend", None)
    chosen = own or _AttentionBackendRegistry._active_backend
    return str(getattr(chosen, "value", chosen))


def _is_set(processor: object) -> bool:
    return getattr(processor, "_attention_backend", None) is not None
