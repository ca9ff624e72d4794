"""The one gradient tap: differentiable I2T maps of chosen layers, out of one forward of the stock transformer.

    tap = TextMapTap([4, 5], space="logit", reduce=True)
    with probe(transformer, edits=tap):
        tap.begin(groups)                                # [B, T, G] weights of text positions in each map
        velocity = transformer(...)[0]
        maps = tap.take()[4]                             # [B, G, h, w], with gradients
        loss(velocity, maps).backward()

A handler of the probe that changes nothing. Memory is O(N T) per layer (O(N D) where a word map suffices). Not here:
maps without gradients (`observe.maps.TextMaps`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mmdit_probe.attention import gradients
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.gradients import Space
from mmdit_probe.attention.intercept import InputHandler, ModuleCall, Stage
from mmdit_probe.errors import RunError
from mmdit_probe.models.layout import Layer, Layout
from mmdit_probe.specs import HeadSpec, Spec, heads_at

if TYPE_CHECKING:
    from mmdit_probe.observe.probe import Run


class TextMapTap:
    """Takes I2T maps, with gradients, out of a probed transformer's forwards: `probe(..., edits=tap)`.

    Not out of a compiled one: its attention is one operator, out of which no map has a gradient.

    Args:
        layers: joint-attention layers, e.g. [4, 5] or "4-5".
        space: "logit" before the softmax, "probability" after it.
        heads: which heads' maps. reduce: their mean instead of each.
    """

    stage: ClassVar[Stage] = "input"

    def __init__(self, layers: Spec, *, space: Space = "logit", heads: HeadSpec = "all", reduce: bool = False) -> None:
        self.layers, self.space, self.heads, self.reduce = layers, space, heads, reduce
        self._groups: Tensor | None = None
        self._open = False
        self._layouts: dict[int, Layout | None] = {}
        self._maps: dict[int, Tensor] = {}

    def begin(self, groups: Tensor | None = None) -> None:
        """The next forward is to be tapped.

        Args:
            groups: [B or 1, T, G] weight of every text position in each map; None keeps every position (G = T).
        """
        self._groups, self._open, self._maps = groups, True, {}

    def take(self) -> dict[int, Tensor]:
        """Maps of the forward since `begin`, by layer: [B, H, G, h, w] float32, or [B, G, h, w] of the heads' mean.

        With gradient checkpointing, the backward pass through them comes before the next forward.

        Raises:
            RunError: a layer made no attention call that could be seen.
        """
        self._open = False
        missing = sorted(self._layouts.keys() - self._maps.keys())
        if missing or not self._maps:
            raise RunError(
                f"layers {missing} made no scaled_dot_product_attention call in this forward; set the model's default"
                " attention processor and a native backend, and call the probed transformer between begin and take"
            )
        maps, self._maps = self._maps, {}
        return {layer: maps[layer] for layer in sorted(maps)}

    def handler(self, layer: Layer, run: Run) -> InputHandler:
        """The handler of one layer, for `probe(edits=...)`."""
        self._layouts[layer.index] = None

        def see(call: SDPACall, module_call: ModuleCall) -> SDPACall:
            # Gradient checkpointing runs the layer again in the backward pass, after `take`: what it then needs
            # recomputed has to be computed in the same order, but is nobody's result. Other forwards are not ours.
            if self._open and module_call.compiled:
                raise RunError(
                    f"layer {layer.index} is compiled, and a compiled layer gives maps without a gradient: train the"
                    " uncompiled transformer"
                )
            if self._open:
                self._layouts[layer.index] = run.layout(layer)
                self._maps[layer.index] = self._seen(call, layer)
            elif torch._C._current_graph_task_id() != -1 and not module_call.compiled:
                self._seen(call, layer)
            return call

        return see

    def _seen(self, call: SDPACall, layer: Layer) -> Tensor:
        layout = self._layouts[layer.index]
        if layout is None or layout.grid is None or layout.total != call.key.shape[-2]:
            expected = "a known grid" if layout is None else f"{layout.total}, of which {layout.grid} image tokens"
            raise RunError(f"layer {layer.index} attends to {call.key.shape[-2]} tokens; expected {expected}")
        positions = layout.positions("text"), layout.positions("image")
        maps = gradients.text_maps(call, *positions, self._groups, space=self.space)  # (B, H, I, G)
        chosen = list(heads_at(self.heads, layer.index, maps.shape[1]))
        maps = maps if len(chosen) == maps.shape[1] else maps[:, chosen]
        maps = maps.transpose(-1, -2).unflatten(-1, layout.grid)  # (B, H, G, h, w)
        return maps.mean(1) if self.reduce else maps
