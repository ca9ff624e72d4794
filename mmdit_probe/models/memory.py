"""Models that are larger than the memory of their GPU: weights that wait elsewhere, or are stored in fewer bits.

    model = load("black-forest-labs/FLUX.1-dev", offload="model", quantize="nf4")
    model = load("black-forest-labs/FLUX.1-dev", quantize="gguf:flux1-dev-Q4_K_S.gguf")

Both are diffusers' own, with its quantisers. Only the transformer is quantised: text encoders and autoencoder work once
per picture, and offloading does for them. Not here: their names (`models.names`), and what weights hash to and compute
in however they are stored (`models.weights`).
"""

from __future__ import annotations

from typing import Any

import torch

from mmdit_probe.errors import RunError


def quantizer(kind: str, dtype: torch.dtype) -> Any:
    """diffusers' configuration of a quantiser whose weights compute in `dtype`."""
    import diffusers

    if kind == "gguf":
        return diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    if kind == "nf4":
        return diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao import quantization

    made = quantization.Int8WeightOnlyConfig() if kind == "int8" else quantization.Float8WeightOnlyConfig()
    return diffusers.TorchAoConfig(made)


def mend_empty_rows(transformer: Any) -> None:
    """Give the rows of fp8 weights that are all 0 a scale: torchao's is 0 there, and it reads 0 / 0."""
    for weight in transformer.parameters():
        if hasattr(weight, "qdata") and hasattr(weight, "scale"):
            empty = weight.scale == 0  # [rows, 1]
            weight.qdata.view(torch.uint8).masked_fill_(empty, 0)
            weight.scale.masked_fill_(empty, 1.0)


def place(pipeline: Any, device: torch.device, offload: str | None) -> Any:
    """The pipeline on its device, or with its weights in the processor's memory until they are called for.

    Raises:
        RunError: diffusers cannot offload this pipeline here.
    """
    if offload is None:
        return pipeline.to(device)
    try:
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    except (RuntimeError, ValueError, ImportError) as error:
        raise RunError(f"cannot offload ({offload}) on {device}: {error}") from error
    return pipeline
