"""ConceptStream: a text stream of concepts that reads the image and is read by nobody (arXiv:2502.04320).

    stream = ConceptStream(model, embeddings)                         # [K, C], one vector per concept
    with probe(model, stream), stream.listening():                    # or a bare transformer
        model.denoise(latents, 0.5, text)
    stream.outputs[3]                                                 # [B, K, E] attention output of the concepts

Each joint block runs the concepts through its own text-stream weights and modulation; their queries attend to concepts
and image tokens. The forward stays bitwise the stock one. Cost K (I + K) per block. Needs blocks with the parts of
diffusers' `JointTransformerBlock` (SD3, SD3.5); others are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit_probe.errors import UserError
from mmdit_probe.models.families.registry import family_of
from mmdit_probe.models.layout import find_layers, unwrap
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, Observer

_BLOCK_PARTS = ("norm1_context", "attn")


class ConceptStream(Observer):
    """Observer that carries K concept vectors through every joint block.

    Args:
        target: the `MMDiT` or bare transformer that will be probed; all layers up to the last one of interest must be
            observed.
        embeddings: [K, C] in the space of the text encoders (before the transformer's own projection).

    Attributes:
        outputs: layer -> [B, K, E] float32 on the CPU, of the last denoising call.
    """

    def __init__(self, target: MMDiT | nn.Module, embeddings: Tensor) -> None:
        self.transformer = unwrap(target.transformer if isinstance(target, MMDiT) else target)
        self.embeddings = embeddings
        self.blocks: dict[int, Any] = {}
        for layer in find_layers(family_of(self.transformer), self.transformer):
            block = self.transformer.get_submodule(layer.path.rpartition(".")[0])
            if not all(hasattr(block, part) for part in _BLOCK_PARTS) or not hasattr(layer.module, "add_q_proj"):
                raise UserError(
                    f"layer {layer.index} ({type(block).__name__}) has no text stream of its own that concepts could "
                    "run through; conceptattention needs joint blocks as in SD3"
                )
            self.blocks[layer.index] = block
        self.outputs: dict[int, Tensor] = {}
        self._modulation: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[ConceptStream]:
        """Listen to the transformer's modulation vector for as long as the block runs."""

        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            self._modulation = output

        handle = self.transformer.time_text_embed.register_forward_hook(keep)
        try:
            yield self
        finally:
            handle.remove()
            self._modulation = None

    def measure(self, seen: LayerCall) -> tuple[Tensor, Tensor]:
        """Output [B, K, E] of the concepts in this layer, and their state [B, K, C] after it."""
        with seen.autocast():
            return self._carried(seen)

    def _carried(self, seen: LayerCall) -> tuple[Tensor, Tensor]:
        if self._modulation is None:
            raise UserError("ConceptStream heard no modulation vector: run the model inside `stream.listening()`")
        layer, temb, image = seen.layer.index, self._modulation, seen.layout.positions("image")
        if layer == 0:
            state = self.transformer.context_embedder(self.embeddings.to(temb))[None].expand(len(temb), -1, -1)
        elif layer - 1 in self._pending:
            state = self._pending[layer - 1][0][1]
        else:
            raise UserError(f"ConceptStream needs every layer from 0; it saw layer {layer} too early")
        block = self.blocks[layer]
        attention = block.attn
        if block.context_pre_only:
            normed, gates = block.norm1_context(state, temb), None
        else:
            normed, *gates = block.norm1_context(state, emb=temb)
        query, key, value = (
            getattr(attention, name)(normed).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for name in ("add_q_proj", "add_k_proj", "add_v_proj")
        )
        if getattr(attention, "norm_added_q", None) is not None:
            query, key = attention.norm_added_q(query), attention.norm_added_k(key)
        out = F.scaled_dot_product_attention(
            query,
            torch.cat([key, seen.call.expanded_key()[:, :, image]], 2),
            torch.cat([value, seen.call.expanded_value()[:, :, image]], 2),
            scale=seen.call.scale_factor,
        )
        out = out.transpose(1, 2).flatten(2)  # [B, K, E]
        if gates is not None:
            gate, shift_mlp, scale_mlp, gate_mlp = gates
            state = state + gate[:, None] * attention.to_add_out(out)
            inner = block.norm2_context(state) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
            state = state + gate_mlp[:, None] * block.ff_context(inner)
        return out.float(), state

    def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
        self.outputs = {layer: out.cpu() for layer, (out, _) in measured.items()}
