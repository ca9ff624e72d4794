"""The equal-budget control: the same amount of change, in a random direction.

    control = EqualBudget(Blur("image", "text", layers=[9]), seed=0)
    with probe(model, edits=control): ...

Each token's attention output moves by exactly as much as under the edit (L2 norm per sample, head and token), but into
a random direction. A layer whose edit does no more harm than this is only sensitive, not special.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import ModuleCall, Stage
from mmdit_probe.edit.edit import Edit, Handler, Proceed
from mmdit_probe.models.layout import Layer
from mmdit_probe.specs import Spec


@dataclass(frozen=True)
class EqualBudget:
    """An edit's random control.

    Args:
        edit: whose change is matched in size, where and when it acts.
        seed: of the directions; they differ by layer and denoising call.
    """

    edit: Edit
    seed: int = 0

    stage: ClassVar[Stage] = "output"

    @property
    def layers(self) -> Spec:
        return self.edit.layers

    def handler(self, layer: Layer, run: Any) -> RandomHandler:
        """The handler of one layer, for `probe(edits=...)`."""
        return RandomHandler(self.edit.handler(layer, run), self.seed)

    def at(self, **changes: Any) -> EqualBudget:
        """The same control with another address or setting of its edit."""
        return EqualBudget(self.edit.at(**changes), self.seed)

    def record(self) -> Mapping[str, Any]:
        """What it is, as JSON values, for a run record."""
        return {"edit": "EqualBudget", "seed": self.seed, "of": self.edit.record()}


class RandomHandler:
    """The control at work in one layer of one run."""

    def __init__(self, inner: Handler, seed: int) -> None:
        self.inner, self.seed = inner, seed

    def __call__(self, call: SDPACall, module_call: ModuleCall, proceed: Proceed) -> Tensor:
        stock = proceed(call)
        if self.inner.edit.neutral:
            return stock
        change = (self.inner(call, module_call, proceed) - stock).float().norm(dim=-1, keepdim=True)
        number = 0 if self.inner.run.current is None else self.inner.run.current.number
        # Drawn on the CPU per sample: the same on every device, and for a sample alone or in a batch.
        generator = torch.Generator().manual_seed(hash((self.seed, self.inner.layer.index, number)) % (1 << 62))
        draw = torch.randn(stock.shape[1:], generator=generator).to(stock.device)
        direction = draw / draw.norm(dim=-1, keepdim=True)
        return torch.where(change > 0, (stock.float() + change * direction).to(stock.dtype), stock)
