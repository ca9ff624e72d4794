"""Why a layer's attention was not seen, and what a probe cannot look into.

    refuse_sharded(transformer)
    skipping(transformer, "transformer_blocks.3.attn")       # "FirstBlockCache (FBCBlockHook)"

Backends that call `scaled_dot_product_attention` are seen; others (flash-attn, sage, xformers, flex, hub kernels) hide
attention, as do hooks that skip or reuse a layer, function modes that answer for it, and processors of one's own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from mmdit_probe.attention.call import STOCK, SDPACall
from mmdit_probe.attention.intercept import ModuleCall
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.layout import Layer, Layout

_ALIKE = 0.02
"""Of the largest number of a value, below which two are the same in bfloat16."""


def refuse_sharded(transformer: nn.Module) -> None:
    """Refuse a transformer whose attention runs on shards, where no call shows all keys.

    Raises:
        UserError: context parallelism is on.
    """
    processors: list[Any] = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    if any(getattr(holder, "_parallel_config", None) is not None for holder in (transformer, *processors)):
        raise UserError("attention is split over devices (context parallelism); probe on one device instead")


def backend_of(module: nn.Module) -> str:
    """Name of the diffusers backend that an attention module's calls go to now, e.g. "native" or "flex"."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    own = getattr(getattr(module, "processor", None), "_attention_backend", None)
    chosen = own or _AttentionBackendRegistry._active_backend
    return str(getattr(chosen, "value", chosen))


def processor_of(module: nn.Module) -> str:
    """Class name of an attention module's processor, or of the module."""
    return type(getattr(module, "processor", module)).__name__


def skipping(transformer: nn.Module, path: str) -> str:
    """What may answer for the module at `path` instead of its own forward: hooks on it, around it or in it, and
    function modes that are on; empty if there is nothing of the kind."""
    around = ["", *(path[:end] for end, letter in enumerate(path) if letter == "."), path]
    inside = [name for name, _ in transformer.get_submodule(path).named_modules(prefix=path) if name != path]
    hooks: dict[str, None] = {}
    for name in (*around, *inside):
        registry = getattr(transformer.get_submodule(name), "_diffusers_hook", None)
        found = () if registry is None else registry.hooks.values()
        hooks |= dict.fromkeys(type(hook).__name__ for hook in found if hasattr(hook, "new_forward"))
    modes = (type(mode) for mode in _get_current_function_mode_stack())
    hooks |= dict.fromkeys(mode.__name__ for mode in modes if mode.__module__.split(".")[0] != "torch")
    cache = getattr(transformer, "_cache_config", None)
    named = ", ".join(hooks)
    return f"{type(cache).__name__.removesuffix('Config')} ({named})" if cache is not None and hooks else named


def drops_unconditional(transformer: nn.Module) -> bool:
    """Whether a hook may run the second half of a batch alone: FasterCache, which takes the first one for the
    unconditional samples (diffusers `hooks/faster_cache.py`, `_get_cond_input`)."""
    registry = getattr(transformer, "_diffusers_hook", None)
    hooks = () if registry is None else registry.hooks.values()
    return any(type(hook).__name__ == "FasterCacheDenoiserHook" for hook in hooks)


@torch.no_grad()
def refuse_reordered(layer: Layer, layout: Layout, call: SDPACall, module_call: ModuleCall) -> None:
    """Refuse a processor of one's own that is given image and text apart, and joins them in another order.

    Args:
        layout: the order of the family. call: in that order.

    Raises:
        RunError: the value of the image's first token is at another place than it has in the layout, and not there.
    """
    module: Any = layer.module
    hidden, project = module_call.argument("hidden_states", 0), getattr(module, "to_v", None)
    own = type(getattr(module, "processor", nn.Identity())).__module__.split(".")[0] not in ("diffusers", "torch")
    if not own or project is None or not isinstance(hidden, Tensor) or hidden.ndim != 3:
        return
    place = layout.indices("image", "reference")
    if hidden.shape[1] != len(place) or len(hidden) != len(call.value):
        return
    dtype, device = module_call.autocast, call.value.device.type
    with nullcontext() if dtype is None else torch.autocast(device, dtype):
        value = project(hidden[:, :1])  # [B, 1, H D]
    found = call.value.transpose(1, 2).flatten(2)  # [B, N, H D]
    if found.shape[2] != value.shape[2]:
        return
    same = ((found - value).abs().amax(2) < _ALIKE * value.abs().amax(2)).any(0)
    if bool(same.any()) and not bool(same[place[0]]):
        raise RunError(
            f"layer {layer.index} ({layer.path}, {processor_of(module)}): the processor joins image and text in another"
            " order than the model's own; join them as that does"
        )


def hiding(module: nn.Module) -> str:
    """What an attention module runs in, for a message: its processor, its backend, a replaced torch function."""
    found = f"{processor_of(module)}, backend {backend_of(module)!r}"
    current = torch.nn.functional.scaled_dot_product_attention
    if current is not STOCK:
        found += f", scaled_dot_product_attention replaced by {getattr(current, '__qualname__', current)!r}"
    return found
