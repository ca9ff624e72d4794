"""Where attention calls are seen and replaced: one hook per attention module, with an ordered list of handlers.

A `TorchFunctionMode` turns `torch.nn.functional.scaled_dot_product_attention` into a callback for exactly as long as
one module's forward runs. No processor is rewritten and no global is patched. Handlers have a stage, which orders them
however they were attached:

    input    changes the call (q, k, v, mask); everything later sees the changed call
    record   sees one full call with its output; returns nothing
    output   computes the output instead of the kernel (`proceed` is the next one, at last the kernel)

so a recorder sees one full call even when an edit after it splits the call or changes the values.

    detach = watch(block.attn, recorder, "record")
    ...
    detach()

Under torch.compile a watched call is one opaque operator that runs the handlers eagerly, so a graph stays whole
(`fullgraph=True`) and attaching or detaching recompiles. Its handlers get no arguments of the module, and its gradient
is that of the stock call, so a call that was changed refuses to have one.

Removal works in any order: a module's hook goes when its last handler goes, and the module's own `forward` comes back.
Not `diffusers.hooks.HookRegistry`, whose removal is right only last-in first-out.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdit_probe.attention import exact
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.errors import RunError

Stage = Literal["input", "record", "output"]
_STAGES: tuple[Stage, ...] = ("input", "record", "output")
Proceed = Callable[..., Any]
Detach = Callable[[], None]


@dataclass
class ModuleCall:
    """One forward of a watched attention module: its arguments, and how many attention calls it has made so far.

    In a compiled graph there are no arguments, and what a handler computes has no gradient.
    """

    module: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    calls: int = 0
    compiled: bool = False

    def argument(self, name: str, position: int) -> Any:
        """The module's argument of this name, or else the one at this position; None if neither is there."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[position] if position < len(self.args) else None


@dataclass
class Record:
    """One attention call as a recorder sees it: the call before edits, the output the model goes on with."""

    call: SDPACall
    output: Tensor
    module_call: ModuleCall
    _lse: Tensor | None = field(default=None, repr=False)
    _lse_known: bool = field(default=False, repr=False)

    @property
    def lse(self) -> Tensor | None:
        """Row log-sum-exp [B, H, Nq] of `call`, float32, or None where no kernel gives it. Computed once."""
        if not self._lse_known:
            self._lse, self._lse_known = exact.logsumexp(self.call), True
        return self._lse


class Transform(Protocol):
    """A handler of stage "input"."""

    def __call__(self, call: SDPACall, module_call: ModuleCall) -> SDPACall: ...


class Recorder(Protocol):
    """A handler of stage "record"."""

    def wants(self, module_call: ModuleCall) -> Literal["nothing", "call", "lse"]:
        """What this recorder needs of the call that is about to run; with "nothing", `record` is not called."""
        ...

    def record(self, record: Record) -> None: ...


class Edit(Protocol):
    """A handler of stage "output"."""

    def __call__(self, call: SDPACall, module_call: ModuleCall, proceed: Callable[[SDPACall], Tensor]) -> Tensor: ...


def watch(module: nn.Module, handler: Transform | Recorder | Edit, stage: Stage) -> Detach:
    """Let `handler` see (and, by its stage, change) every attention call that `module`'s forward makes.

    Args:
        module: an attention module; any module whose forward calls `scaled_dot_product_attention`.
        handler: see `Transform`, `Recorder` and `Edit`.
        stage: where the handler comes; within a stage, in the order of attachment.

    Returns: a function that takes the handler off again; calling it twice does nothing more.
    """
    watcher: _Watcher
    if _Watcher.ATTRIBUTE in module.__dict__:
        watcher = module.__dict__[_Watcher.ATTRIBUTE]
    else:
        watcher = _Watcher(module)
        module.__dict__[_Watcher.ATTRIBUTE] = watcher
        watcher.detach_forward = interpose(module, "forward", watcher.forward)
    watcher.handlers[stage].append(handler)

    def detach() -> None:
        current = watcher.handlers[stage]
        watcher.handlers[stage] = [other for other in current if other is not handler]
        if not any(watcher.handlers.values()) and module.__dict__.get(_Watcher.ATTRIBUTE) is watcher:
            watcher.detach_forward()
            del module.__dict__[_Watcher.ATTRIBUTE]

    return detach


def sole_output(module: nn.Module) -> bool:
    """Whether one handler at most computes this module's attention output, so that what follows it is the kernel."""
    watcher = module.__dict__.get(_Watcher.ATTRIBUTE)
    return watcher is None or len(watcher.handlers["output"]) <= 1


_SUSPENDED: list[bool] = []


@contextmanager
def suspended() -> Iterator[None]:
    """No watcher sees a call while this runs: for forwards that calibrate a model and are no denoising calls."""
    _SUSPENDED.append(True)
    try:
        yield
    finally:
        _SUSPENDED.pop()


class _Watcher:
    """The handlers of one attention module, and the forward wrapper that runs them."""

    ATTRIBUTE = "_mmdit_probe_watcher"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.handlers: dict[Stage, list[Any]] = {stage: [] for stage in _STAGES}
        self.detach_forward: Detach = lambda: None
        # A tensor: its value is no constant of a compiled graph, so layers share one, and so do probes.
        self.number = torch.tensor(next(_NUMBERS), device="cpu")
        _WATCHERS[int(self.number)] = self

    def forward(self, proceed: Proceed, *args: Any, **kwargs: Any) -> Any:
        if _SUSPENDED:
            return proceed(*args, **kwargs)
        with _CatchSDPA(self, ModuleCall(self.module, args, kwargs)):
            return proceed(*args, **kwargs)

    def run(self, call: SDPACall, module_call: ModuleCall) -> Tensor:
        for transform in self.handlers["input"]:
            call = transform(call, module_call)
        wanted = [(recorder, recorder.wants(module_call)) for recorder in self.handlers["record"]]
        module_call.calls += 1
        lse, lse_known = None, False
        if self.handlers["output"]:
            output = self._edited(call, module_call, 0)
        elif any(want == "lse" for _, want in wanted):
            (output, lse), lse_known = exact.attend(call), True
        else:
            output = call.stock()
        if any(want != "nothing" for _, want in wanted):
            record = Record(call, output, module_call, lse, lse_known)
            with torch.no_grad():
                for recorder, want in wanted:
                    if want != "nothing":
                        recorder.record(record)
        return output

    def _edited(self, call: SDPACall, module_call: ModuleCall, position: int) -> Tensor:
        edits = self.handlers["output"]
        if position == len(edits):
            return call.stock()
        return edits[position](call, module_call, lambda inner: self._edited(inner, module_call, position + 1))


_NUMBERS = itertools.count()
_WATCHERS: weakref.WeakValueDictionary[int, _Watcher] = weakref.WeakValueDictionary()
"""Watchers by the number that stands for them in a compiled graph."""
_CHANGED: set[int] = set()
"""Numbers of those whose last compiled call was not the stock one."""


def _operator(call: SDPACall, number: Tensor) -> Tensor:
    output: Tensor = torch.ops.mmdit_probe.watched_attention(
        call.query, call.key, call.value, call.attn_mask, call.dropout_p, call.is_causal, call.scale, call.enable_gqa,
        number,
    )  # fmt: skip
    return output


@torch.library.custom_op("mmdit_probe::watched_attention", mutates_args=())
def _watched_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, number: Tensor,
) -> Tensor:  # fmt: skip
    call = SDPACall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    watcher = _WATCHERS.get(int(number))
    if watcher is None:
        return call.stock().contiguous()
    changed = bool(watcher.handlers["input"] or watcher.handlers["output"])
    (_CHANGED.add if changed else _CHANGED.discard)(int(number))
    return watcher.run(call, ModuleCall(watcher.module, (), {}, compiled=True)).contiguous()


@_watched_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, attn_mask, *ctx.options, number = inputs
    ctx.save_for_backward(query, key, value, attn_mask, number)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, key, value, attn_mask, number = ctx.saved_tensors
    gradient = torch.ops.mmdit_probe.gradient_of_stock(gradient, number)
    with torch.enable_grad():
        query, key, value = wanted = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        if ctx.needs_input_grad[3]:  # a learned bias
            attn_mask = attn_mask.detach().requires_grad_()
            wanted.append(attn_mask)
        found = torch.autograd.grad(SDPACall(query, key, value, attn_mask, *ctx.options).stock(), wanted, gradient)
    return (*found, *[None] * (len(ctx.needs_input_grad) - len(found)))


_watched_attention.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("mmdit_probe::gradient_of_stock", mutates_args=())
def _gradient_of_stock(gradient: Tensor, number: Tensor) -> Tensor:
    if int(number) in _CHANGED:
        raise RunError(
            "the compiled attention was edited, and its gradient is known for the stock call only: take the gradient of"
            " the uncompiled model"
        )
    return gradient.clone()


@_gradient_of_stock.register_fake
def _(gradient: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(gradient)


class _CatchSDPA(TorchFunctionMode):
    def __init__(self, watcher: _Watcher, module_call: ModuleCall) -> None:
        super().__init__()
        self.watcher, self.module_call = watcher, module_call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inside this method the mode itself is off, so the handlers' own attention calls do not recurse.
        if func is torch.nn.functional.scaled_dot_product_attention:
            if torch.compiler.is_compiling():
                return _operator(SDPACall.bind(args, kwargs or {}), self.watcher.number)
            return self.watcher.run(SDPACall.bind(args, kwargs or {}), self.module_call)
        if func is torch.Tensor.unflatten and torch.compiler.is_compiling():
            return torch.unflatten(*args, **(kwargs or {}))  # the method is a Python wrapper that a trace cannot enter
        return func(*args, **(kwargs or {}))


def interpose(owner: object, name: str, handler: Callable[..., Any]) -> Detach:
    """Put `handler(proceed, *args, **kwargs)` around one method of one object, reversibly and in any order of removal.

    Only the instance is touched. The first handler attached is the outermost. When the last one goes, the instance is
    as it was before; if someone else has wrapped the method meanwhile, the wrapper stays and passes calls through
    untouched.

    Returns: a function that takes the handler off.
    """
    slot = f"_mmdit_probe_{name}"
    chain: list[Callable[..., Any]] | None = owner.__dict__.get(slot)
    if chain is None:
        chain = _install(owner, name, slot)
    chain.append(handler)

    def detach() -> None:
        if handler in chain:
            chain.remove(handler)
        wrapper: Any = owner.__dict__.get(name)
        if chain or getattr(wrapper, "_mmdit_probe_chain", None) is not chain:
            return
        del owner.__dict__[slot], owner.__dict__[name]
        if wrapper._mmdit_probe_own is not None:
            owner.__dict__[name] = wrapper._mmdit_probe_own

    return detach


def _install(owner: object, name: str, slot: str) -> list[Callable[..., Any]]:
    own, original = owner.__dict__.get(name), getattr(owner, name)
    chain: list[Callable[..., Any]] = []

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        proceed = original
        for handler in reversed(chain):
            proceed = functools.partial(handler, proceed)
        return proceed(*args, **kwargs)

    marks: Any = wrapper
    marks._mmdit_probe_chain, marks._mmdit_probe_own = chain, own
    owner.__dict__[slot] = chain
    owner.__dict__[name] = wrapper
    return chain
