"""A transformer's weights however they are stored (quantised, cast layer by layer, offloaded): the dtype it computes
in, and one hash of them all. Nothing is loaded or changed.

    compute_dtype(transformer)          # torch.bfloat16, also where weights are stored as float8, nf4 or GGUF
    weight_hash(transformer)            # "4c1f...": names, dtypes, shapes and bytes
    weight_hash(text_encoder, drawn=True)   # of a few numbers of every weight: milliseconds, however large it is
    weight_state(transformer)           # changes when they do, and takes milliseconds where the hash takes seconds
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mmdit_probe.errors import UserError

_DRAWN = 32
"""Numbers of a weight that are looked at where not all are, or up to twice as many."""
_COMPUTED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def compute_dtype(transformer: nn.Module) -> torch.dtype:
    """The dtype that an unwrapped transformer takes its inputs in: its own `dtype`; where that is one of storage, what
    its quantisation states, or that of its first weight that is not packed.

    Raises:
        UserError: none of them is a dtype of computation.
    """
    own: torch.dtype | None = getattr(transformer, "dtype", None)  # type: ignore[assignment]
    if own in _COMPUTED:
        return own
    config: Any = getattr(getattr(transformer, "hf_quantizer", None), "quantization_config", None)
    stated = [getattr(config, name, None) for name in ("compute_dtype", "bnb_4bit_compute_dtype")]
    weights = [tensor.dtype for tensor in (*transformer.parameters(), *transformer.buffers())]
    for dtype in (*stated, *weights):
        if dtype in _COMPUTED:
            return dtype
    raise UserError(f"{type(transformer).__name__} holds no weight of a dtype that it could compute in: {set(weights)}")


def weight_hash(module: nn.Module, drawn: bool = False) -> str:
    """SHA-256 over the parameters and buffers of an unwrapped module: names, dtypes, shapes and bytes; and the scales
    of adapters that are switched off, or not as strong as they were made.

    The same for one set of weights wherever it lies (device, offloaded to memory or disk), another one for another
    storage (quantised, cast).

    Args:
        drawn: of every weight, 32 to 64 numbers at equal distances in place of all: what another training, an adapter
            or another dtype changes, in milliseconds.
    """
    digest = hashlib.sha256()
    offloaded = dict(_offloaded(module))
    for name, value in sorted(module.state_dict().items()):
        for part in _parts(name, offloaded.get(name, value), drawn):
            digest.update(part)
    for line in _changed_adapters(module):
        digest.update(line.encode())
    return digest.hexdigest()


def weight_state(module: nn.Module | None) -> tuple[Any, ...]:
    """What changes when a module's weights do: which they are, how often each was changed in place, and a few numbers
    of each, which tell of what is done to `weight.data` (fusing an adapter)."""
    tensors: list[Any] = [] if module is None else [*module.parameters(), *module.buffers()]
    # Weights that are offloaded one by one leave another placeholder after every forward.
    marks = [(0 if t.is_meta else id(t), t.dtype, None if t.is_inference() else t._version) for t in tensors]
    drawn: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if not (tensor.is_meta or tensor.is_quantized or is_traceable_wrapper_subclass(tensor)):
            flat = tensor.detach().as_subclass(Tensor).reshape(-1)
            some = flat[:: max(1, len(flat) // _DRAWN)].contiguous()
            drawn.setdefault(tensor.device, []).append(some.view(torch.uint8))
    # One transfer for all on a device.
    numbers = tuple(torch.cat(of).cpu().numpy().tobytes() for of in drawn.values())
    return id(module), tuple(marks), numbers, () if module is None else tuple(_changed_adapters(module))


def _changed_adapters(module: nn.Module) -> Iterator[str]:
    """The adapters (peft's) of every layer that do not work as they were made: no tensor tells of it."""
    for path, layer in module.named_modules():
        scales, active = getattr(layer, "scaling", None), getattr(layer, "active_adapters", None)
        if not isinstance(scales, Mapping) or active is None:
            continue
        alphas = getattr(layer, "lora_alpha", None) or getattr(layer, "alpha", {})
        for name, scale in sorted(scales.items()):
            on = name in active and not layer.disable_adapters
            made = (alphas[name] / rank for rank in (layer.r[name], layer.r[name] ** 0.5)) if name in alphas else ()
            if not (on and any(math.isclose(scale, one) for one in made)):
                yield f"{path} {name} {scale if on else 0}"


def _parts(name: str, value: Any, drawn: bool) -> Iterator[bytes]:
    """What a value of a state dict consists of."""
    if isinstance(value, Tensor):
        yield from _parts_of_tensor(name, value, drawn)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _parts(f"{name}.{number}", item, drawn)
    elif isinstance(value, Mapping):
        for key, item in sorted(value.items()):
            yield from _parts(f"{name}.{key}", item, drawn)
    elif isinstance(value, torch.ScriptObject):
        yield from _parts(name, value.__getstate__(), drawn)
    elif value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.Size | torch.device):
        yield f"{name} {value!r}".encode()
    else:
        yield f"{name} {type(value).__name__}".encode() + pickle.dumps(value, protocol=4)


def _parts_of_tensor(name: str, tensor: Tensor, drawn: bool) -> Iterator[bytes]:
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        names, about = wrapper.__tensor_flatten__()
        yield f"{name} {type(tensor).__name__} {tuple(tensor.shape)}".encode()
        for part in names:
            yield from _parts(f"{name}.{part}", getattr(tensor, part), drawn)
        yield from _parts(f"{name}.about", about, drawn)
        return
    if tensor.is_quantized:
        yield f"{name} {tensor.dtype} {tensor.qscheme()}".encode()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield from _parts(name, (tensor.q_scale(), tensor.q_zero_point(), tensor.int_repr()), drawn)
        else:
            scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
            yield from _parts(name, (scales, zeros, tensor.q_per_channel_axis(), tensor.int_repr()), drawn)
        return
    if tensor.is_meta:
        raise UserError(f"the weight {name!r} is not loaded (meta device), so the model's weights have no hash")
    yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    if hasattr(tensor, "quant_type"):  # GGUF: bytes of one of its own types
        yield f"{name} {tensor.quant_type}".encode()
    plain = tensor.detach().as_subclass(Tensor)
    flat = (plain if plain.layout == torch.strided else plain.to_dense()).reshape(-1)
    flat = flat[:: max(1, len(flat) // _DRAWN)] if drawn else flat
    yield flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _offloaded(transformer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights that are not in the modules: what accelerate keeps elsewhere, and what diffusers put on disk."""
    names = {id(tensor): name for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers())}
    for path, module in transformer.named_modules():
        hooks = getattr(module, "_hf_hook", None)
        for hook in getattr(hooks, "hooks", (hooks,)):
            kept: Any = getattr(hook, "weights_map", None) or {}
            for name in _empty(module) if kept else ():
                yield f"{path}.{name}".lstrip("."), kept[name]
        registry = getattr(module, "_diffusers_hook", None)
        group: Any = getattr(registry.get_hook("group_offloading") if registry is not None else None, "group", None)
        if group is not None and group._is_offloaded_to_disk:
            from safetensors.torch import load_file

            tensors = load_file(group.safetensors_file_path)
            yield from ((names[id(of)], tensors[key]) for of, key in group.tensor_to_key.items() if id(of) in names)


def _empty(module: nn.Module) -> list[str]:
    """Names of a module's own parameters and buffers that hold nothing."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [name for name, tensor in tensors if tensor.is_meta]
