"""What edits, and attention itself, are compared with: the equal-budget control, the edit's own change in a direction
that means nothing; and uniform attention, under which masses and norms are what they are by count.

    control = EqualBudget(Blur("image", "text", layers=[9]), seed=0)
    with probe(model, edits=control): ...

Each token's attention output moves exactly as far as under the edit (L2 norm per sample, head and token). Two kinds:

    rotation    the edit's change, turned by one random orthogonal matrix per layer and head, the same for every token,
                sample and step: as coherent over picture and sampling as the edit, so it moves the picture as far
    noise       a direction of its own for every token and denoising call; such changes cancel out: the weaker control

One matrix is one direction out of many: with `directions=5` the images take five in turn, so that a mean over them is
one over directions too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import ModuleCall, Stage
from mmdit_probe.edit.edit import Edit, Handler, Proceed
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.models.layout import Layer
from mmdit_probe.specs import Spec

Kind = Literal["rotation", "noise"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FLAT = 1e-30
"""Scale of the logits under uniform attention: all probabilities equal in any precision. Not 0, which times the minus
infinity of a masked key is no number."""


@dataclass(frozen=True)
class EqualBudget:
    """An edit's control of equal size.

    Args:
        edit: whose change is matched in size, where and when it acts.
        seed: of the direction.
        kind: "rotation" or "noise", see above.
        directions: number of rotations; a sample takes the one of its image's seed modulo this number, whatever batch
            it is in.
    """

    edit: Edit
    seed: int = 0
    kind: Kind = "rotation"
    directions: int = 1

    stage: ClassVar[Stage] = "output"

    def __post_init__(self) -> None:
        if not isinstance(self.edit, Edit):
            raise UserError(f"no equal-budget control of {type(self.edit).__name__}: expected an edit of attention")
        check_known("kind of control", self.kind, KINDS)
        if self.directions < 1:
            raise UserError(f"{self.directions} directions of a control: expected one or more")

    @property
    def layers(self) -> Spec:
        return self.edit.layers

    def handler(self, layer: Layer, run: Any) -> ControlHandler:
        """The handler of one layer, for `probe(edits=...)`."""
        return ControlHandler(self, self.edit.handler(layer, run))

    def at(self, **changes: Any) -> EqualBudget:
        """The same control with another address or setting of its edit."""
        return replace(self, edit=self.edit.at(**changes))

    def record(self) -> Mapping[str, Any]:
        """What it is, as JSON values, for a run record."""
        own = {"kind": self.kind, "seed": self.seed, "directions": self.directions}
        return {"edit": "EqualBudget", **own, "of": self.edit.record()}


class ControlHandler:
    """The control at work in one layer of one run."""

    def __init__(self, control: EqualBudget, inner: Handler) -> None:
        self.control, self.inner = control, inner
        self._turns: Tensor | None = None

    def __call__(self, call: SDPACall, module_call: ModuleCall, proceed: Proceed) -> Tensor:
        stock = proceed(call)
        if self.inner.edit.neutral:
            return stock
        change = self.inner(call, module_call, proceed).float() - stock.float()  # (B, H, N, D)
        if self.control.kind == "rotation":
            moved = stock.float() + self._turned(change, self.inner._samples(call, module_call))
        else:
            moved = stock.float() + self._noise(change)
        return torch.where((change != 0).any(-1, keepdim=True), moved.to(stock.dtype), stock)

    def _turned(self, change: Tensor, samples: slice) -> Tensor:
        run, count = self.inner.run, self.control.directions
        if self._turns is None or self._turns.shape[1] != change.shape[1]:
            generators = (_generator(self.control.seed + k, self.inner.layer.index) for k in range(count))
            turns = torch.stack([rotations(change.shape[1], change.shape[-1], one) for one in generators])
            self._turns = turns.to(change.device, torch.float32)  # [directions, H, D, D]
        seeds = [0] * len(change) if run.current is None else run.current.seeds[samples]
        with torch.autocast(change.device.type, enabled=False):
            return change @ self._turns[[seed % count for seed in seeds]]  # (B, H, N, D) x (B, H, D, D)

    def _noise(self, change: Tensor) -> Tensor:
        run = self.inner.run
        number = 0 if run.current is None else run.current.number
        # One draw for all samples: the same for a sample alone and in a batch.
        generator = _generator(self.control.seed, self.inner.layer.index, number)
        draw = torch.randn(change.shape[1:], generator=generator).to(change.device)
        return change.norm(dim=-1, keepdim=True) * draw / draw.norm(dim=-1, keepdim=True)


def rotations(heads: int, width: int, generator: torch.Generator) -> Tensor:
    """Orthogonal matrices [H, D, D] float64, uniform (Haar): QR of Gaussian matrices with the signs of R taken out.

    Source: Mezzadri, "How to generate random matrices from the classical compact groups", arXiv:math-ph/0609050.
    """
    q, r = torch.linalg.qr(torch.randn(heads, width, width, dtype=torch.float64, generator=generator))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


def _generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU for a tuple of numbers: the same draws on every device."""
    seed = np.random.SeedSequence([number % (1 << 64) for number in numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


@dataclass(frozen=True)
class Uniform:
    """An edit after which every query gives every key it sees the same probability. Observers see it too."""

    layers: Spec = "all"

    stage: ClassVar[Stage] = "input"

    def handler(self, layer: Layer, run: object) -> Uniform:
        """The handler of one layer, for `probe(edits=...)`."""
        return self

    def __call__(self, call: SDPACall, module_call: ModuleCall) -> SDPACall:
        return replace(call, scale=FLAT)
