"""Perturbed I2T guidance (arXiv:2509.18096, Eq. 7): away from what the model says when one layer reads blurred text.

    eps~ = eps_uncond + g (eps_cond - eps_uncond) + s (eps_cond - eps_perturbed)

    with perturbed_guidance(model, Blur("image", "text", layers=[9])) as guided:
        images = guided.generate("a red ring on grass", guidance=7.5, scale=2.0)

The stock SD3 pipeline's extra conditional forward for skip-layer guidance skips nothing here: the layers' I2T block is
edited instead. Both scales act on the velocity; the paper states neither the value of s nor how it combines.
`guided_calls` does the same from outside for pipelines without such a forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mmdit_probe.attention.intercept import interpose
from mmdit_probe.edit.blocks import BlockEdit
from mmdit_probe.edit.control import EqualBudget
from mmdit_probe.edit.edit import Edit
from mmdit_probe.errors import UserError
from mmdit_probe.models.layout import Layer, unwrap
from mmdit_probe.observe.pipeline_labels import PERTURBED
from mmdit_probe.observe.probe import probe
from mmdit_probe.specs import Spec, layer_indices

if TYPE_CHECKING:
    from mmdit_probe.models.mmdit import MMDiT

Guide = Edit | EqualBudget | BlockEdit
"""What the perturbed forward does: an edit of attention, its control, or an operation on blocks."""

BARELY_GUIDED = 1.0 + 1e-6
"""The stock pipeline makes the extra forward only if its guidance scale exceeds 1; this is c + 1e-6 (c - u)."""


class Guided:
    """A model whose `generate` takes a perturbation scale; made by `perturbed_guidance`."""

    def __init__(self, model: MMDiT, layers: tuple[int, ...]) -> None:
        self.model, self.layers = model, layers

    def generate(
        self,
        prompts: Any,
        *,
        scale: float,
        guidance: float = 7.5,
        start: float = 0.0,
        stop: float = 1.0,
        **options: Any,
    ) -> Any:
        """`MMDiT.generate` with perturbed guidance.

        Args:
            prompts: one or several.
            scale: s above; 0 is stock sampling, bit for bit.
            guidance: g above; at most 1 runs without classifier-free guidance: c + s (c - p).
            start, stop: part of the sampling steps to guide, 0 to 1, both ends included.
            options: those of `MMDiT.generate`.
        """
        if scale == 0:
            return self.model.generate(prompts, guidance=guidance, **options)
        return self.model.generate(
            prompts,
            guidance=max(guidance, BARELY_GUIDED),
            skip_guidance_layers=list(self.layers),
            skip_layer_guidance_scale=scale,
            # The pipeline's range test is strict at both ends; these bounds include the first and the last step.
            skip_layer_guidance_start=start if start > 0 else -1.0,
            skip_layer_guidance_stop=stop if stop < 1 else 2.0,
            **options,
        )


@contextmanager
def perturbed_guidance(model: MMDiT, edit: Guide) -> Iterator[Guided]:
    """Guide by an edit of some layers while the context lasts.

    Args:
        model: whose pipeline makes the extra forward of skip-layer guidance (Stable Diffusion 3).
        edit: what the perturbed forward does, in its `layers`; its branches are set to that forward alone.

    Raises:
        UserError: the pipeline has no skip-layer guidance.
    """
    if "skip_guidance_layers" not in inspect.signature(type(model.pipeline).__call__).parameters:
        raise UserError(
            f"{type(model.pipeline).__name__} makes no extra forward for guidance; use guided_calls around its sampling"
        )
    layers = layer_indices(edit.layers, len(model.layers))
    with ExitStack() as stack:
        # The probe sees the argument first (a hook on the call) and labels the forward; then it is taken out.
        stack.enter_context(probe(model, edits=edit.at(branches=(PERTURBED,))))
        stack.callback(interpose(unwrap(model.transformer), "forward", _without(model.family.skip_input)))
        yield Guided(model, layers)


@contextmanager
def guided_calls(target: Any, edit: Guide, scale: float, guidance: float) -> Iterator[None]:
    """Perturbed guidance as a wrapper of the transformer, for pipelines that only know classifier-free guidance.

    Every call returns, in its conditional rows, c + (s / g) (c - p), so that the pipeline's own u + g (c' - u) is the
    wanted sum. The perturbed forward takes the whole batch: twice the time of sampling without it. Other probes see the
    forward without the edit.

    Args:
        target: an `MMDiT`, a stock pipeline or a transformer that is called with `return_dict=False`. Conditional rows
            are those that a probe labels so; all rows where branches are unknown.
        edit: what the perturbed forward does, in its `layers`.
        scale, guidance: s and g; for guidance-distilled models and sampling without guidance, g = 1.
    """
    switched = _Switched(edit)
    with ExitStack() as stack:
        run = stack.enter_context(probe(target, edits=switched))

        def forward(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            switched.on = True
            try:
                perturbed = proceed(*args, **kwargs)
            finally:
                switched.on = False
            clean = proceed(*args, **kwargs)  # the last one: what other probes keep of the two
            if not isinstance(clean, tuple):
                raise UserError("the transformer was called without return_dict=False; its output cannot be guided")
            branches = run.current.branches if run.current is not None else []
            guided = torch.tensor([branch != "uncond" for branch in branches], device=clean[0].device)
            guided = guided.reshape(-1, *[1] * (clean[0].ndim - 1))
            moved = clean[0] + scale / guidance * (clean[0] - perturbed[0])
            return (torch.where(guided, moved, clean[0]), *clean[1:])

        stack.callback(interpose(run.transformer, "forward", forward))
        yield


class _Switched:
    """An edit that acts only while it is on."""

    def __init__(self, edit: Guide) -> None:
        self.edit, self.on = edit, False
        self.layers: Spec = edit.layers
        self.stage = edit.stage

    def handler(self, layer: Layer, run: Any) -> Callable[..., Any]:
        inner: Callable[..., Any] = self.edit.handler(layer, run)
        if self.stage == "block":
            return lambda proceed, *args, **kwargs: (inner if self.on else _stock)(proceed, *args, **kwargs)
        return lambda call, module_call, proceed: inner(call, module_call, proceed) if self.on else proceed(call)


def _stock(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return proceed(*args, **kwargs)


def _without(name: str) -> Callable[..., Any]:
    """A forward without one argument, to which nothing is done instead."""

    def forward(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(name, None)
        return proceed(*args, **kwargs)

    return forward
