"""Transformers whose linear layers are stored in fewer bits by the packages that people use, each an extra.

    package, quantise = STORAGES["torchao int8 weights"]
    quantise(pipe.transformer)                       # in place, as the package does it

Tiny random layers in the packages' own formats; what diffusers reads from files is tested in `tests/models`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


def torchao(config: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)())

    return quantise


def quanto(weights: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        from optimum import quanto

        quanto.quantize(model, weights=getattr(quanto, weights))
        quanto.freeze(model)

    return quantise


def gguf(kind: str) -> Callable[[nn.Module], None]:
    """As diffusers stores what it reads from a GGUF file."""

    def layer(linear: nn.Linear) -> nn.Module:
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
        from gguf import GGMLQuantizationType, quants

        made = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        kinds = GGMLQuantizationType[kind]
        packed = quants.quantize(linear.weight.detach().cpu().numpy(), kinds)
        made.weight = GGUFParameter(torch.from_numpy(packed).to(linear.weight.device), quant_type=kinds)
        made.bias = linear.bias
        return made

    return lambda model: _replace(model, layer, multiple=32)


def bitsandbytes(kind: str, **options: Any) -> Callable[[nn.Module], None]:
    def layer(linear: nn.Linear) -> nn.Module:
        import bitsandbytes

        made = getattr(bitsandbytes.nn, kind)(
            linear.in_features, linear.out_features, linear.bias is not None, **options
        )
        made.load_state_dict(linear.state_dict())
        return made.to(linear.weight.device)  # which packs the weights

    return lambda model: _replace(model, layer)


def _replace(model: nn.Module, layer: Callable[[nn.Linear], nn.Module], multiple: int = 1) -> None:
    """Put a layer in the place of every linear one whose input can be cut into blocks of a size."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.in_features % multiple == 0:
                setattr(module, name, layer(child))


STORAGES: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "torchao int8 weights": ("torchao", torchao("Int8WeightOnlyConfig")),
    "torchao float8 weights": ("torchao", torchao("Float8WeightOnlyConfig")),
    "torchao int8 weights and activations": ("torchao", torchao("Int8DynamicActivationInt8WeightConfig")),
    "optimum-quanto int8": ("optimum.quanto", quanto("qint8")),
    "optimum-quanto float8": ("optimum.quanto", quanto("qfloat8")),
    "optimum-quanto int4": ("optimum.quanto", quanto("qint4")),
    "GGUF Q8_0": ("gguf", gguf("Q8_0")),
    "GGUF Q4_0": ("gguf", gguf("Q4_0")),
    "bitsandbytes nf4": ("bitsandbytes", bitsandbytes("Linear4bit", compute_dtype=torch.float32, quant_type="nf4")),
    "bitsandbytes int8": ("bitsandbytes", bitsandbytes("Linear8bitLt", has_fp16_weights=False)),
}
"""Way of storing -> the package that does it, and a function that does it to a model."""


def missing(package: str) -> bool:
    """Whether a package (or a part of one, "optimum.quanto") is not installed."""
    return find_spec(package.partition(".")[0]) is None or find_spec(package) is None
