"""Which token is which, found mechanically: no knowledge of the family is needed.

    sites = taint(transformer, inputs)               # inputs: keyword arguments of one forward
    sites["transformer_blocks.0.attn"].labels        # per sample [N], index into KINDS

With attention replaced by the identity nothing mixes tokens, so a change of an input reaches its own rows only: a value
row that moves with the latents is an image token, one that moves with the text a text token (where both move it, image
wins), one that moves with neither is another (registers, pads). Cost: three forwards without attention, uncompiled.
Zero-initialised paths hide what passes through them. Not for experts with a capacity, which couple tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import suspended
from mmdit_probe.errors import UserError
from mmdit_probe.models.layout import KINDS

IMAGE_NAMES = ("hidden_states", "x", "sample", "latents", "img")
TEXT_NAMES = (
    "encoder_hidden_states", "input_ids", "cap_feats", "text_bth", "text_encoder_layers", "txt", "context", "caption",
    "text_embeds",
)  # fmt: skip
_THRESHOLD = 1e-5
"""Of a value row's largest change, relative to the largest value of the call."""


@dataclass(frozen=True)
class Site:
    """The attention of one module, as the inputs reach it.

    Attributes:
        path: of the module whose forward makes the call.
        labels: per sample, kind of every key [N], index into `KINDS`.
        queries: per sample, number of queries.
        regular: whether the module makes one attention call per forward, or one per sample.
    """

    path: str
    labels: list[Tensor]
    queries: list[int]
    regular: bool = True

    @property
    def joint(self) -> bool:
        """Whether image and text keys share a softmax."""
        return all({0, 1} <= set(labels.tolist()) for labels in self.labels)

    def order(self, sample: int = 0) -> list[tuple[str, int]]:
        """Runs of (kind, number of keys) of one sample, in order."""
        kinds, counts = torch.unique_consecutive(self.labels[sample], return_counts=True)
        return [(KINDS[kind], count) for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True)]


@torch.no_grad()
def taint(transformer: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Site]:
    """The attention sites of one forward and the kinds of their keys, in forward order.

    Args:
        transformer: an unwrapped, uncompiled model; its weights are not changed.
        inputs: keyword arguments of its forward; those that hold latents and text are known by their names.

    Raises:
        UserError: no latents or no text among the arguments, or no attention call was seen.
    """
    image, text = input_names(inputs)
    plain = _values(transformer, inputs)
    moved = [_values(transformer, _other(inputs, names)) for names in (image, text)]
    if not plain:
        raise UserError(
            f"{type(transformer).__name__} made no scaled_dot_product_attention call: its attention is linear, or runs"
            " in a kernel that hides it"
        )
    return {path: _site(path, calls, *(run[path] for run in moved)) for path, calls in plain.items()}


def input_names(inputs: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the arguments that hold latents, and of those that hold text.

    Raises:
        UserError: there are none of either.
    """
    given = [name for name, value in inputs.items() if _tensors(value)]
    image = [name for name in IMAGE_NAMES if name in given][:1]
    text = [name for name in given if name.startswith(TEXT_NAMES) and "mask" not in name and "image" not in name]
    for what, found, known in (("latents", image, IMAGE_NAMES), ("text", text, TEXT_NAMES)):
        if not found:
            raise UserError(f"no argument holds {what}: got {', '.join(given)}; known names: {', '.join(known)}")
    return image, text


def joint_sites(transformer: nn.Module, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The sites, in forward order, at which image and text keys share a softmax: the joint-attention layers.

    Raises:
        UserError: there are none.
    """
    joint = {path: site for path, site in sites.items() if site.joint and site.regular}
    if not joint:
        raise UserError(
            f"{type(transformer).__name__} is not an MM-DiT: at none of its attention calls do image and text keys"
            " share one softmax (cross-attention models have no joint attention to probe)"
        )
    return joint


@dataclass(frozen=True)
class _Values:
    value: Tensor  # [B, H, Nk, Dv]
    queries: int


def _site(path: str, plain: list[_Values], image: list[_Values], text: list[_Values]) -> Site:
    labels, queries = [], []
    for before, with_image, with_text in zip(plain, image, text, strict=True):
        by_image, by_text = (_moved(before.value, run.value) for run in (with_image, with_text))
        kinds = torch.where(by_image, 0, torch.where(by_text, 1, 2)).cpu()
        labels += list(kinds)
        queries += [before.queries] * len(kinds)
    regular = len(plain) == 1 or all(len(call.value) == 1 for call in plain)
    return Site(path, labels, queries, regular)


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """[B, N]: which tokens' values differ."""
    if before.shape != after.shape:
        raise UserError(f"values of shape {tuple(before.shape)} became {tuple(after.shape)}: the layout is not fixed")
    change = (after.float() - before.float()).abs().amax((1, 3))
    return change > _THRESHOLD * before.float().abs().max().clamp(min=1e-12)


def _values(transformer: nn.Module, inputs: Mapping[str, Any]) -> dict[str, list[_Values]]:
    seen: dict[str, list[_Values]] = {}
    device = next(transformer.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(0)
        stack.enter_context(suspended())
        stack.enter_context(_evaluating(transformer))
        where = stack.enter_context(_innermost(transformer))
        stack.enter_context(_Identity(where, seen))
        transformer.forward(**_copied(inputs))
    return seen


class _Identity(TorchFunctionMode):
    """Replaces attention by the identity and writes the values down."""

    def __init__(self, where: list[str], seen: dict[str, list[_Values]]) -> None:
        super().__init__()
        self.where, self.seen = where, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        call = SDPACall.bind(args, kwargs or {})
        value, count = call.expanded_value(), call.query.shape[-2]
        self.seen.setdefault(self.where[-1] if self.where else "", []).append(_Values(value.detach().clone(), count))
        # From other tokens to these nothing is passed on: a query's own row is what its value would be.
        return value if count == value.shape[-2] else value.new_zeros(*call.query.shape[:-1], value.shape[-1])


@contextmanager
def _innermost(transformer: nn.Module) -> Iterator[list[str]]:
    """The stack of paths of the modules that are running; the last is the innermost."""
    running: list[str] = []
    with ExitStack() as stack:
        for path, module in transformer.named_modules():
            if path:
                enter = module.register_forward_pre_hook(lambda *_, path=path: running.append(path))
                leave = module.register_forward_hook(lambda *_: _drop(running), always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        yield running


def _drop(running: list[str]) -> None:
    running.pop()


@contextmanager
def _evaluating(transformer: nn.Module) -> Iterator[None]:
    """Evaluation mode: dropout would move every row."""
    training = [module for module in transformer.modules() if module.training]
    transformer.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of numbers, or of token ids, of an argument that is one or a list of them."""
    if isinstance(value, Tensor):
        return [value] if value.dtype != torch.bool else []
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _other(inputs: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The inputs with other values in some arguments, of the same size and spread."""
    # An unlikely seed: noise that repeats the caller's own draw would only rescale it, and norms undo that.
    generator = torch.Generator().manual_seed(0x7A147)

    def change(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(change(item) for item in value)
        if not value.is_floating_point():
            return torch.where(value > 0, value - 1, value + 1)  # token ids: the neighbours'
        spread = value.detach().float().std(correction=0).cpu().clamp(min=0.1)
        noise = spread * torch.randn(value.shape, generator=generator)
        return value + noise.to(value.device, value.dtype)

    return {name: change(value) if name in names else value for name, value in inputs.items()}


def _copied(value: Any) -> Any:
    """Containers copied, tensors shared: some models take arguments out of a dict as they go."""
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    return value
