"""The second, image-only attention of dual-attention blocks (SD3.5-medium, layers 0-12): its head-mean map.

    with second_attention(model, layers=[3, 4]) as kept, probe(model, ...):
        model.denoise(latents, 0.5, text)
    kept[3].shape                                   # [B, I, I], rows sum to 1

A pure self-attention of the image tokens that text does not enter: an alternative to the image-image block of the joint
softmax wherever a method spreads maps over the image. Queries and keys are computed again from the module's input, so
the forward stays bitwise the stock one. Memory: 4 I^2 bytes a layer and one chunk of one head. Not here: any method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmdit_probe.errors import UserError
from mmdit_probe.models.layout import unwrap
from mmdit_probe.models.mmdit import MMDiT

_ROWS = 512
"""Queries per chunk."""


@contextmanager
def second_attention(model: MMDiT, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Fills a dict, layer -> [B, I, I] float32 on the CPU, of the last call in the context.

    Raises:
        UserError: a layer has no second attention; the message names those that have one.
    """
    transformer = unwrap(model.transformer)
    modules: dict[int, Any] = {
        layer.index: getattr(transformer.get_submodule(layer.path.rpartition(".")[0]), "attn2", None)
        for layer in model.layers
    }
    lost = [layer for layer in layers if modules[layer] is None]
    if lost:
        there = [index for index, module in modules.items() if module is not None]
        raise UserError(
            f"layers {lost} have no second, image-only attention (attn2); "
            + (f"those that have one: {there}" if there else f"{model.name} has none, its blocks are not dual")
        )
    kept: dict[int, Tensor] = {}
    handles = [
        modules[layer].register_forward_pre_hook(partial(_keep, kept, layer), with_kwargs=True) for layer in layers
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _keep(kept: dict[int, Tensor], layer: int, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
    query, key = (
        getattr(module, name)(hidden).unflatten(-1, (module.heads, -1)).transpose(1, 2) for name in ("to_q", "to_k")
    )
    if getattr(module, "norm_q", None) is not None:
        query, key = module.norm_q(query), module.norm_k(key)
    batch, heads, tokens, width = query.shape
    total = torch.zeros(batch, tokens, tokens, device=query.device)
    for head in range(heads):
        keys = key[:, head].float().mT * width**-0.5
        for start in range(0, tokens, _ROWS):
            rows = slice(start, start + _ROWS)
            total[:, rows] += (query[:, head, rows].float() @ keys).softmax(-1)
    kept[layer] = (total / heads).cpu()
