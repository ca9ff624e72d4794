"""LoRA on a transformer's joint attention: which modules, their start, and how they are saved.

    targets = target_modules(model.family, model.transformer, layers="all", streams="image")
    attach(model.transformer, targets, rank=16, alpha=16, seed=0)
    save_lora(model.transformer, "out/lora", {"layers": [9]})

Saved in diffusers' format, the scale alpha / rank folded into the up projections: `load_lora_weights` takes alpha to be
the rank where it is given a state dict (diffusers 0.42.1), so file, tensors and a merged copy are all the same adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from mmdit_probe.errors import RunError, UserError, check_known
from mmdit_probe.models.adapters import KEY
from mmdit_probe.models.families.registry import Family
from mmdit_probe.models.layout import find_layers, unwrap
from mmdit_probe.models.names import ADAPTER_FILE
from mmdit_probe.results.atomic import replacing
from mmdit_probe.specs import Spec, layer_indices

Streams = Literal["image", "joint"]
ADAPTER = "magnet"
_IMAGE = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def target_modules(
    family: Family, transformer: nn.Module, layers: Spec = "all", streams: Streams = "image"
) -> list[str]:
    """Paths of the linear modules to adapt.

    Args:
        family: whose facts apply. transformer: the model.
        layers: joint-attention layers.
        streams: "image" takes the projections of the image stream (the paper), "joint" those of both streams.

    The text queries of a last block whose text output is dropped are left out: they never get a gradient.
    """
    check_known("LoRA streams", streams, ("image", "joint"))
    inner = unwrap(transformer)
    every = find_layers(family, inner)
    wanted = _IMAGE + (_TEXT if streams == "joint" else ())
    paths = []
    for index in layer_indices(layers, len(every)):
        attention: Any = every[index].module
        dropped = ("add_q_proj", "to_add_out") if getattr(attention, "context_pre_only", False) else ()
        there = dict(attention.named_modules()).keys() - dropped
        paths += [f"{every[index].path}.{name}" for name in wanted if name in there]
    if not paths:
        raise UserError(f"{type(inner).__name__}: the attention has none of {', '.join(_IMAGE)}")
    return paths


def attach(transformer: Any, targets: Sequence[str], *, rank: int, alpha: float, seed: int = 0) -> None:
    """Add a LoRA adapter named `magnet`; everything else is frozen.

    The down projection is Gaussian from `seed` and the up projection zero (peft's "gaussian"), in float32.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian", lora_dropout=0.0
    )  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=ADAPTER)
    named_parameters(transformer)


def detach(transformer: nn.Module) -> None:
    """Take off what `attach` added: modules and names of weights are those of before."""
    inner: Any = unwrap(transformer)
    inner.unload_lora()


def named_parameters(transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters by name, sorted; made float32 (a bfloat16 weight swallows small updates)."""
    found = sorted((name, p) for name, p in unwrap(transformer).named_parameters() if p.requires_grad)
    for _, parameter in found:
        parameter.data = parameter.data.float()
    return found


def save_lora(transformer: Any, directory: str | Path, metadata: Mapping[str, Any]) -> Path:
    """Write an adapter in diffusers' format, atomically; its tensors carry the scale, alpha over rank.

    Args:
        transformer: holds the adapter. directory: the folder to write.
        metadata: our facts (layers, data, losses, seed, ...); JSON values.

    Returns: the weight file.

    Raises:
        RunError: the adapter is not finite.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import get_peft_model_state_dict

    inner = unwrap(transformer)
    config = inner.peft_config[ADAPTER]
    state = {}
    for name, tensor in get_peft_model_state_dict(inner, adapter_name=ADAPTER).items():
        scale = config.lora_alpha / config.r if ".lora_B." in name else 1.0
        state[f"transformer.{name}"] = (scale * tensor.detach().float()).cpu().contiguous()
        if not bool(state[f"transformer.{name}"].isfinite().all()):
            raise RunError(f"the adapter's {name} is not finite: it is not saved")
    facts = {f"transformer.{key}": value for key, value in _plain(config.to_dict()).items()}
    header = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(facts | {"transformer.lora_alpha": config.r}, sort_keys=True),
        KEY: json.dumps(dict(metadata), sort_keys=True, default=str),
    }
    with replacing(Path(directory) / ADAPTER_FILE) as temporary:
        save_file(state, temporary, metadata=header)
    return Path(directory) / ADAPTER_FILE


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A peft configuration as JSON values: sets sorted, enumerations by value."""
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.items()
    }
