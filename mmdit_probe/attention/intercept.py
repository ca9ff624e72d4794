"""Where attention calls are seen and replaced: one hook per attention module, with an ordered list of handlers.

    detach = watch(block.attn, recorder, "record")
    detach()

A `TorchFunctionMode` turns `torch.nn.functional.scaled_dot_product_attention` into a callback for exactly as long as
one module's forward runs. No processor is rewritten and no global is patched. Handlers have a stage, which orders them
however they were attached:

    input    changes the call (q, k, v, mask); everything later sees the changed call
    record   sees one full call with its output, also when an edit after it splits the call; returns nothing
    output   computes the output instead of the kernel (`proceed` is the next one, at last the kernel)

Other function modes (a guider's layer skip, torch's default device) come first, and handlers see what they leave of the
call, as autocast casts it; they themselves run without modes and without autocast. Removal works in any order, which
diffusers' `HookRegistry` cannot, and a deep copy or a pickle of a watched module is a plain one. Under torch.compile:
`attention.compiled`.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode, _push_mode

from mmdit_probe.attention import compiled, exact
from mmdit_probe.attention.call import STOCK, SDPACall, autocast_of, without_autocast

Stage = Literal["input", "record", "output"]
_STAGES: tuple[Stage, ...] = ("input", "record", "output")
Proceed = Callable[..., Any]
Detach = Callable[[], None]


@dataclass
class ModuleCall:
    """One forward of a watched attention module: its arguments, and how many attention calls it has made so far.

    In a compiled graph there are no arguments, and what a handler computes has no gradient. `autocast` is the dtype of
    the model's autocast, which is off while handlers run; None if there is none.
    """

    module: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    calls: int = 0
    compiled: bool = False
    autocast: torch.dtype | None = None

    def argument(self, name: str, position: int) -> Any:
        """The module's argument of this name, or else the one at this position; None if neither is there."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[position] if position < len(self.args) else None


@dataclass
class Record:
    """One attention call as a recorder sees it: the call before edits, the output the model goes on with; `edited` says
    whether an edit had a part in that."""

    call: SDPACall
    output: Tensor
    module_call: ModuleCall
    _lse: Tensor | None = field(default=None, repr=False)
    _lse_known: bool = field(default=False, repr=False)
    edited: bool = False

    @property
    def lse(self) -> Tensor | None:
        """Row log-sum-exp [B, H, Nq] of `call`, float32, or None where no kernel gives it. Computed once."""
        if not self._lse_known:
            self._lse, self._lse_known = exact.logsumexp(self.call), True
        return self._lse


class InputHandler(Protocol):
    """A handler of stage "input"."""

    def __call__(self, call: SDPACall, module_call: ModuleCall) -> SDPACall: ...


class Recorder(Protocol):
    """A handler of stage "record"."""

    def wants(self, module_call: ModuleCall) -> Literal["nothing", "call", "lse"]:
        """What this recorder needs of the call that is about to run; with "nothing", `record` is not called."""
        ...

    def record(self, record: Record) -> None: ...


class OutputHandler(Protocol):
    """A handler of stage "output"."""

    def __call__(self, call: SDPACall, module_call: ModuleCall, proceed: Callable[[SDPACall], Tensor]) -> Tensor: ...


def watch(module: nn.Module, handler: InputHandler | Recorder | OutputHandler, stage: Stage) -> Detach:
    """Let `handler` see (and, by its stage, change) every attention call that `module`'s forward makes.

    Args:
        module: an attention module; any module whose forward calls `scaled_dot_product_attention`.
        handler: see `InputHandler`, `Recorder` and `OutputHandler`.
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
            del module.__dict__[_Watcher.ATTRIBUTE]
            watcher.detach_forward()

    return detach


def attached(module: nn.Module) -> bool:
    """Whether calls of a watched module still come to its handlers: someone may have given it another `forward`."""
    wrapped = module.__dict__.get(f"{_MARK}_forward")
    return wrapped is not None and wrapped.reachable(module.forward)


def sole_output(module: nn.Module) -> bool:
    """Whether one handler at most computes this module's attention output, so that what follows it is the kernel."""
    watcher = module.__dict__.get(_Watcher.ATTRIBUTE)
    return watcher is None or len(watcher.handlers["output"]) <= 1


_SUSPENDED: list[bool] = []
_MARK = "_mmdit_probe"
"""Begins the name of everything that is put on an instance."""


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

    ATTRIBUTE = f"{_MARK}_watcher"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.handlers: dict[Stage, list[Any]] = {stage: [] for stage in _STAGES}
        self.detach_forward: Detach = lambda: None
        self.number = compiled.register(self)

    @property
    def changes(self) -> bool:
        """Whether a handler may change the call."""
        return bool(self.handlers["input"] or self.handlers["output"])

    def run_compiled(self, call: SDPACall) -> Tensor:
        return self.run(call, ModuleCall(self.module, (), {}, compiled=True))

    def forward(self, proceed: Proceed, *args: Any, **kwargs: Any) -> Any:
        if _SUSPENDED:
            return proceed(*args, **kwargs)
        with _beneath(_CatchSDPA(self, ModuleCall(self.module, args, kwargs))):
            return proceed(*args, **kwargs)

    def run(self, call: SDPACall, module_call: ModuleCall) -> Tensor:
        """The output of one call, with all handlers."""
        device = call.query.device.type
        module_call.autocast = autocast_of(device)
        with without_autocast(device):
            return self._run(call, module_call)

    def _run(self, call: SDPACall, module_call: ModuleCall) -> Tensor:
        for transform in self.handlers["input"]:
            call = transform(call, module_call)
        wanted = [(recorder, recorder.wants(module_call)) for recorder in self.handlers["record"]]
        module_call.calls += 1
        lse, lse_known = None, False
        made: list[Tensor] = []
        if self.handlers["output"]:
            output = self._edited(call, module_call, 0, made)
        elif any(want == "lse" for _, want in wanted):
            (output, lse), lse_known = exact.attend(call), True
        else:
            output = call.stock()
        if any(want != "nothing" for _, want in wanted):
            edited = bool(self.handlers["output"]) and (len(made) != 1 or output is not made[0])
            record = Record(call.broadcast(), output, module_call, lse, lse_known, edited)
            with torch.no_grad():
                for recorder, want in wanted:
                    if want != "nothing":
                        recorder.record(record)
        return output

    def _edited(self, call: SDPACall, module_call: ModuleCall, position: int, made: list[Tensor]) -> Tensor:
        """The output after the edits from a position on; `made` takes what the kernel gives."""
        edits = self.handlers["output"]
        if position == len(edits):
            made.append(call.stock())
            return made[-1]
        return edits[position](call, module_call, lambda inner: self._edited(inner, module_call, position + 1, made))


_UNFLATTEN = torch.Tensor.unflatten


class _CatchSDPA(TorchFunctionMode):
    def __init__(self, watcher: _Watcher, module_call: ModuleCall) -> None:
        super().__init__()
        self.watcher, self.module_call = watcher, module_call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inside this method the mode itself is off, so the handlers' own attention calls do not recurse.
        if func is STOCK:
            if torch.compiler.is_compiling():
                return compiled.attention(SDPACall.bind(args, kwargs or {}), self.watcher.number)
            return self.watcher.run(SDPACall.bind(args, kwargs or {}), self.module_call)
        if func is _UNFLATTEN and torch.compiler.is_compiling():
            return torch.unflatten(*args, **(kwargs or {}))  # the method is a Python wrapper that a trace cannot enter
        return func(*args, **kwargs) if kwargs else func(*args)  # dozens of times in every forward


@contextmanager
def _beneath(mode: TorchFunctionMode) -> Iterator[None]:
    """With a function mode below all others that are on: it gets what they leave of a call."""
    others = _taken_off()
    _put_on([mode, *others])
    try:
        yield
    finally:
        _put_on(_taken_off()[1:])


def _taken_off() -> list[TorchFunctionMode]:
    return [_pop_mode() for _ in range(_len_torch_function_stack())][::-1]


def _put_on(modes: Sequence[TorchFunctionMode]) -> None:
    for mode in modes:
        _push_mode(mode)


def interpose(owner: Any, name: str, handler: Callable[..., Any]) -> Detach:
    """Put `handler(proceed, *args, **kwargs)` around one method of one object, reversibly and in any order of removal.

    Only the instance is touched. The first handler attached is the outermost. When the last one goes, the instance is
    as it was before; if someone else has wrapped the method meanwhile, the wrapper stays and passes calls through
    untouched. A deep copy or a pickle of the instance has no handlers.

    Returns: a function that takes the handler off.
    """
    slot = f"{_MARK}_{name}"
    wrapped: _Wrapped | None = owner.__dict__.get(slot)
    if wrapped is None or not wrapped.reachable(getattr(owner, name)):
        wrapped = owner.__dict__[slot] = _Wrapped(owner, name)
        _copy_plainly(owner)
    wrapped.handlers.append(handler)

    def detach() -> None:
        if handler in wrapped.handlers:
            wrapped.handlers.remove(handler)
        if wrapped.handlers or owner.__dict__.get(name) is not wrapped.wrapper or owner.__dict__[slot] is not wrapped:
            return
        del owner.__dict__[slot]
        wrapped.restore(owner.__dict__)
        _copy_as_before(owner)

    return detach


def hook(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Detach:
    """Call `before` and, after an error too, `after` around every call of a module, with keyword arguments.

    Torch's own hooks: they outlive a replaced `forward` (model offload wraps it anew after every pipeline call). A deep
    copy of the module has none of them.
    """
    handles = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True, always_call=True),
    )
    slot = f"{_MARK}_hook_{handles[0].id}"
    module.__dict__[slot] = {handle.id for handle in handles}
    _copy_plainly(module)

    def detach() -> None:
        for handle in handles:
            handle.remove()
        module.__dict__.pop(slot, None)
        _copy_as_before(module)

    return detach


class _Wrapped:
    """One method of one instance under handlers."""

    def __init__(self, owner: Any, name: str) -> None:
        self.name, self.own, self.handlers = name, owner.__dict__.get(name), list[Callable[..., Any]]()
        original, handlers = getattr(owner, name), self.handlers

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            proceed = original
            for handler in reversed(handlers):
                proceed = functools.partial(handler, proceed)
            return proceed(*args, **kwargs)

        self.wrapper = owner.__dict__[name] = wrapper

    def reachable(self, method: Any) -> bool:
        """Whether calls of the method still come here, through wrappers that say what they wrap."""
        while method is not None and method is not self.wrapper:
            method = getattr(method, "__wrapped__", None)
        return method is not None

    def restore(self, attributes: dict[str, Any]) -> None:
        """Put the method back that was there before."""
        del attributes[self.name]
        if self.own is not None:
            attributes[self.name] = self.own


def _copy_plainly(owner: Any) -> None:
    for name, copier in _COPIERS.items():
        owner.__dict__.setdefault(name, functools.partial(copier, owner))


def _copy_as_before(owner: Any) -> None:
    if any(name.startswith(_MARK) for name in owner.__dict__):
        return
    for name, copier in _COPIERS.items():
        if getattr(owner.__dict__.get(name), "func", None) is copier:
            del owner.__dict__[name]


def _plain_copy(owner: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of the instance as it is without handlers and hooks."""
    with _plainly(owner):
        return copy.deepcopy(owner, memo)


def _plain_reduction(owner: Any, protocol: Any) -> Any:
    """What pickle writes: the instance without handlers and hooks. A shallow copy, which shares modules, has them."""
    if sys._getframe(1).f_globals.get("__name__") == "copy":
        reduce: Any = type(owner).__reduce_ex__
        return reduce(owner, protocol)
    with _plainly(owner):
        made = owner.__reduce_ex__(protocol)
        return tuple(dict(part) if part is owner.__dict__ else part for part in made)


_COPIERS: dict[str, Callable[..., Any]] = {"__deepcopy__": _plain_copy, "__reduce_ex__": _plain_reduction}


@contextmanager
def _plainly(owner: Any) -> Iterator[None]:
    """The instance as it is without handlers and hooks."""
    before, own = dict(owner.__dict__), owner.__dict__
    ours = {name: own.pop(name) for name in before if name.startswith(_MARK) or name in _COPIERS}
    hooks = set().union(*(value for value in ours.values() if isinstance(value, set)))
    for value in ours.values():
        if isinstance(value, _Wrapped) and own.get(value.name) is value.wrapper:
            value.restore(own)
    for name in [name for name in own if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]:
        own[name] = type(own[name])((key, value) for key, value in own[name].items() if key not in hooks)
    try:
        yield
    finally:
        own.clear()
        own.update(before)
