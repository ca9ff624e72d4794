"""A GPU that is not there: its tensors have their numbers in the processor's memory and mix with no others.

with simulated_device() as device:
    model.to(device)                                # every operation is computed by the processor
    model.weight + torch.ones(3)                    # RuntimeError, as on a GPU: operands of two devices

So a machine without a GPU finds what fails on one for lying on the wrong device: operands of two devices, numpy arrays
and indices of device tensors, generators of the processor, an optimiser's state. Kernels, precision, memory and speed
are not simulated, nor is the name: the device is `simulated:0`, for which there are no special ways as there are for
"cuda". For a process of its own: torch can register one such device, and keeps it (`tests/on_simulated_device.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
NAME = "simulated"
CROSSING = {aten._to_copy.default, aten.copy_.default}
"""Operations between devices."""
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Operations whose indices may lie in the processor's memory."""
MATH = 0
"""No fused kernel of `scaled_dot_product_attention`, as `torch._fused_sdp_choice` says it."""


class _Backend(backend_registration._DummyBackendModule):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class OnDevice(Tensor):
    """A tensor of the simulated device; `inner` has the numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0), requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.inner.detach().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Creation(TorchDispatchMode):
    """Tensors that are made on the device, which no operand shows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, computed by the processor; refused where a GPU refuses its operands."""
    if func is aten._fused_sdp_choice.default:
        return MATH
    leaves = tree_leaves((args, kwargs))
    theirs = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    ours = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) and leaf.ndim]
    indexed = func in INDEXED and isinstance(args[0], OnDevice)
    if theirs and ours and func not in CROSSING and not indexed:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu, in {func}")
    asked = kwargs.get("device")
    there = bool(theirs) if asked is None else torch.device(asked).type == NAME
    if func is aten.copy_.default:
        there = isinstance(args[0], OnDevice)
    if there and any(isinstance(leaf, torch.Generator) and leaf.device.type == "cpu" for leaf in leaves):
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu'")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    known = {id(tensor.inner): tensor for tensor in theirs}

    def theirs_again(leaf: Any) -> Any:
        if isinstance(leaf, OnDevice) or not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in known:  # changed in place
            return known[id(leaf)]
        return OnDevice(leaf) if there else leaf

    return tree_map(theirs_again, func(*args, **kwargs))


def _keeps_its_class(before: Tensor, after: Tensor) -> bool:
    """Whether a module that moves may keep its parameter: the data of a tensor cannot change its class."""
    if isinstance(before, OnDevice) or isinstance(after, OnDevice):
        return before is after
    return _COMPATIBLE(before, after)


_COMPATIBLE = torch._has_compatible_shallow_copy_type


@contextmanager
def simulated_device() -> Iterator[torch.device]:
    """The device, for the time of the block; once per process."""
    import_module("torch._dynamo")  # torch does at the first dispatch, where its tables would meet what is patched here
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "_has_compatible_shallow_copy_type", _keeps_its_class))
        # Numbers of Python become tensors of the processor first.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(_Creation())
        yield torch.device(NAME, 0)
