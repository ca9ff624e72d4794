"""Differentiable text maps of chosen layers, out of one forward of the stock transformer.

    with TextMapTap(transformer, layers=[4, 5], space="logit", heads="mean") as tap:
        tap.begin(groups, grid)                          # [B, T, G] weights of text positions in each map
        velocity = transformer(...)[0]
        maps = tap.take()[4]                             # [B, G, h, w], with gradients
        loss(velocity, maps).backward()

The transformer is the stock one, with LoRA, checkpointing or data parallelism around it or not; its output is bitwise
what it is without the tap. Memory is O(N T) per layer (O(N D) where a word map suffices), never N x N.
Observers (`observe.maps.TextMaps`) give the same maps without gradients.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdit_probe.attention import gradients
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.gradients import Space
from mmdit_probe.attention.intercept import ModuleCall, watch
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.discover_layout import bind
from mmdit_probe.models.families.registry import family_of
from mmdit_probe.models.layout import Layer, Layout, arranged, find_layers, unwrap
from mmdit_probe.observe.backend import refuse_sharded
from mmdit_probe.specs import Spec, layer_indices


class TextMapTap:
    """A context that takes I2T maps, with gradients, out of a transformer's forwards.

    Args:
        transformer: the stock diffusers transformer; wrappers (data parallel) are looked through. Not a
            compiled one: its attention is one operator, out of which no map has a gradient.
        layers: joint-attention layers, e.g. [4, 5] or "4-5".
        space: "logit" before the softmax, "probability" after it.
        heads: "mean" or "all".
    """

    def __init__(
        self, transformer: Any, layers: Spec, *, space: Space = "logit", heads: Literal["mean", "all"] = "mean"
    ) -> None:
        self.transformer = unwrap(transformer)
        self.family = family_of(self.transformer)
        every = find_layers(self.family, self.transformer)
        self.layers = [every[index] for index in layer_indices(layers, len(every))]
        self.space, self.heads = space, heads
        self._groups: Tensor | None = None
        self._grid = (0, 0)
        self._layout: Layout | None = None
        self._open = False
        self._maps: dict[int, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TextMapTap:
        refuse_sharded(self.transformer)
        with ExitStack() as stack:
            stack.callback(self.transformer.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            for layer in self.layers:
                stack.callback(watch(layer.module, _Handler(self, layer), "input"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._maps, self._groups, self._open = {}, None, False

    def begin(self, groups: Tensor | None, grid: tuple[int, int]) -> None:
        """The next forward is to be tapped.

        Args:
            groups: [B or 1, T, G] weight of every text position in each map; None keeps every position (G = T).
            grid: (h, w) of the image tokens.
        """
        self._groups, self._grid, self._open, self._maps = groups, grid, True, {}

    def take(self) -> dict[int, Tensor]:
        """Maps of the forward since `begin`, by layer: [B, G, h, w] float32, or [B, H, G, h, w] with heads="all".

        Raises:
            RunError: a layer made no attention call that could be seen.
        """
        self._open = False
        missing = [layer.index for layer in self.layers if layer.index not in self._maps]
        if missing:
            raise RunError(
                f"layers {missing} made no scaled_dot_product_attention call in this forward; set the model's default"
                " attention processor and a native backend, and call the transformer between begin and take"
            )
        maps, self._maps = self._maps, {}
        return maps

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layout, places = arranged(self.family.arrangement(bind(module, args, kwargs), module.config))
        if places is not None:
            raise UserError(f"the samples of this {self.family.name} call differ in their order of tokens: no maps")
        self._layout = layout

    def _see(self, layer: Layer, call: SDPACall) -> None:
        # Gradient checkpointing runs the layer again in the backward pass, after `take`: what it then needs recomputed
        # has to be computed in the same order, but is nobody's result. Forwards without gradients are not ours.
        if not self._open and not torch.is_grad_enabled():
            return
        layout, (h, w) = self._layout, self._grid
        if layout is None:
            raise RunError(f"layer {layer.index} ran outside the transformer's own call; call the transformer itself")
        if h * w != layout.counts["image"] or layout.total != call.key.shape[-2]:
            raise RunError(
                f"layer {layer.index} attends to {call.key.shape[-2]} tokens; expected {h} x {w} image and"
                f" {layout.counts['text']} text tokens"
            )
        maps = gradients.text_maps(
            call, layout.positions("text"), layout.positions("image"), self._groups, heads=self.heads, space=self.space
        )
        if self._open:
            self._maps[layer.index] = maps.transpose(-1, -2).unflatten(-1, (h, w))


class _Handler:
    """The input stage of one layer: looks, changes nothing."""

    def __init__(self, tap: TextMapTap, layer: Layer) -> None:
        self.tap, self.layer = tap, layer

    def __call__(self, call: SDPACall, module_call: ModuleCall) -> SDPACall:
        if not module_call.compiled:
            self.tap._see(self.layer, call)
        elif self.tap._open:
            raise RunError(
                f"layer {self.layer.index} is compiled, and a compiled layer gives maps without a gradient: train the"
                " uncompiled transformer"
            )
        return call
