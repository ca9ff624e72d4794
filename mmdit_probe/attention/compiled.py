"""Watched attention in a compiled graph: one opaque operator that runs the handlers eagerly.

A graph stays whole (`fullgraph=True`), and attaching or detaching recompiles. The operator is told which watcher to run
by a number in a tensor, so that the layers of a model share one graph, and so do probes. Handlers get no arguments of
the module, and the gradient is that of the stock call: a call that was changed refuses to have one.

    number = register(watcher)                     # anything with `run_compiled` and `changes`
    output = attention(call, number)

Not here: who watches what (`attention.intercept`).
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.errors import RunError


class Watcher(Protocol):
    """What stands behind a watched call."""

    @property
    def changes(self) -> bool:
        """Whether a handler may change the call."""
        ...

    def run_compiled(self, call: SDPACall) -> Tensor: ...


_NUMBERS = itertools.count()
_WATCHERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_CHANGED: set[int] = set()
"""Numbers of the watchers whose last compiled call was not the stock one."""


def register(watcher: Watcher) -> Tensor:
    """The number that stands for a watcher in a compiled graph. Its value is no constant of the graph."""
    number = next(_NUMBERS)
    _WATCHERS[number] = watcher
    return torch.tensor(number, device="cpu")


def attention(call: SDPACall, number: Tensor) -> Tensor:
    """The attention output [B, H, Nq, Dv] of a watched call."""
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
    (_CHANGED.add if watcher.changes else _CHANGED.discard)(int(number))
    output: Tensor = watcher.run_compiled(call)
    return output.contiguous()


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
        grads = torch.autograd.grad(SDPACall(query, key, value, attn_mask, *ctx.options).stock(), wanted, gradient)
    return (*grads, *[None] * (len(ctx.needs_input_grad) - len(grads)))


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
