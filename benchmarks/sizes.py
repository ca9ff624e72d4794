"""Transformers of the real models' widths, with random weights and fewer layers, built in their dtype.

transformer, forward = build("flux", 4096, "bfloat16", "cuda")      # one double and one single block
transformer, forward = build("sd3-medium", 16, "float32", "cpu", heads=1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

TEXT = {"sd3-medium": 333, "sd35-large": 333, "flux": 512, "qwen-image": 256}
_SD3 = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3-medium": ("SD3Transformer2DModel", {**_SD3, "num_attention_heads": 24}),
    "sd35-large": ("SD3Transformer2DModel", {**_SD3, "num_attention_heads": 38, "qk_norm": "rms_norm"}),
    "flux": (
        "FluxTransformer2DModel",
        {"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
         "pooled_projection_dim": 768, "guidance_embeds": True},
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584},
    ),
}  # fmt: skip
"""Class and configuration of the real models' blocks, as their public configs state them."""


def build(
    blocks: str,
    tokens: int,
    dtype: str,
    device: str,
    heads: int | None = None,
    layers: int = 2,
    text: int | None = None,
) -> tuple[Any, Callable[[], Any]]:
    """The transformer, made in its dtype, and the forward to measure, for a square image of `tokens` tokens.

    Args:
        blocks: one of `SIZES`. heads: fewer than the real model's, to try it in small.
        layers: half of them double and half single where a family has both kinds.
        text: text tokens; the real model's if None.
    """
    import torch

    torch.manual_seed(0)
    kind, side, text = getattr(torch, dtype), math.isqrt(tokens), text or TEXT[blocks]
    make = {"dtype": kind, "device": device}
    transformer = of_size(blocks, dtype, device, heads, layers, side)
    inputs: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(1, text, transformer.config.joint_attention_dim, **make),
        "timestep": torch.full((1,), 500.0 if blocks.startswith("sd3") else 0.5, device=device),
    }
    if "pooled_projection_dim" in transformer.config:
        inputs["pooled_projections"] = torch.randn(1, transformer.config.pooled_projection_dim, **make)
    if blocks.startswith("sd3"):
        inputs["hidden_states"] = torch.randn(1, 16, 2 * side, 2 * side, **make)
    else:
        inputs["hidden_states"] = torch.randn(1, side * side, 64, **make)
    if blocks == "flux":
        ids = torch.zeros(side, side, 3, device=device)
        ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
        inputs |= {"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(text, 3, device=device)}
        inputs["guidance"] = torch.full((1,), 3.5, device=device)
    if blocks == "qwen-image":
        inputs["img_shapes"] = [[(1, side, side)]]

    @torch.no_grad()
    def forward() -> Any:
        return transformer(**inputs, return_dict=False)[0]

    return transformer, forward


def of_size(blocks: str, dtype: str, device: str, heads: int | None, layers: int, side: int) -> Any:
    """A transformer of a real model's width with random weights; it never holds them in another dtype."""
    import diffusers
    import torch

    from mmdit_probe.quiet import quiet

    name, config = SIZES[blocks]
    config = dict(config)
    config["num_attention_heads"] = heads = heads or config["num_attention_heads"]
    if blocks.startswith("sd3"):
        config |= {"num_layers": layers, "sample_size": 2 * side, "caption_projection_dim": 64 * heads}
    elif blocks == "flux":
        config |= {"num_layers": layers - layers // 2, "num_single_layers": layers // 2}
    else:
        config |= {"num_layers": layers}
    before, kind = torch.get_default_dtype(), getattr(torch, dtype)
    torch.set_default_dtype(kind)
    try:
        with torch.device(device), quiet():  # of what casting could do to weights that are float32 on purpose
            return getattr(diffusers, name)(**config).to(device, kind).eval()
    finally:
        torch.set_default_dtype(before)
