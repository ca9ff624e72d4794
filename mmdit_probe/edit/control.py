"""What edits, and attention itself, are compared with: the equal-budget control, the edit's own change in a direction
that means nothing; and uniform attention, under which masses and norms are what they are by count.

    control = EqualBudget(Blur("image", "text", layers=[9]), seed=0)
    with probe(model, edits=control): ...

Each token's attention output moves exactly as far as under the edit (L2 norm per sample, head and token). Two kinds:

    rotation    the edit's change, turned by one random orthogonal matrix per image, layer and head, the same for every
                token and step: as coherent over picture and sampling as the edit, so it moves the picture as far
    noise       a direction of its own for every image, token and sampling step; such changes cancel out: the weaker
                control

One matrix is one direction out of many. Every image has its own, drawn from its seed: were a few shared by all, a mean
over n images would be one over those few, and an interval over images would not know of it
(benchmarks/results/interval_coverage.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import ModuleCall, Stage
from mmdit_probe.edit.edit import Edit, Handler, Proceed
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.models.layout import Layer
from mmdit_probe.specs import Spec

if TYPE_CHECKING:
    from mmdit_probe.observe.observer import DenoisingCall

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
        seed: of the directions, which are functions of it and of the image's seed, whatever batch the image is in
            (images of one seed, or of unknown ones, share theirs).
        kind: "rotation" or "noise", see above.
    """

    edit: Edit
    seed: int = 0
    kind: Kind = "rotation"

    stage: ClassVar[Stage] = "output"

    def __post_init__(self) -> None:
        if not isinstance(self.edit, Edit):
            raise UserError(f"no equal-budget control of {type(self.edit).__name__}: expected an edit of attention")
        check_known("kind of control", self.kind, KINDS)

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
        own = {"kind": self.kind, "seed": self.seed, "directions": "one per image"}
        return {"edit": "EqualBudget", **own, "of": self.edit.record()}


class ControlHandler:
    """The control at work in one layer of one run."""

    def __init__(self, control: EqualBudget, inner: Handler) -> None:
        self.control, self.inner = control, inner
        self._turns: dict[int, Tensor] = {}  # image's seed -> [H, D, D]

    @property
    def missed(self) -> str:
        """As of the edit itself."""
        return self.inner.missed

    def __call__(self, call: SDPACall, module_call: ModuleCall, proceed: Proceed) -> Tensor:
        stock = proceed(call)
        if self.inner.edit.neutral:
            return stock
        change = self.inner(call, module_call, proceed).float() - stock.float()  # (B, H, N, D)
        current, samples = self.inner.run.current, self.inner._samples(call, module_call)
        assert current is not None  # else the edit has refused the call
        elsewhere = self._turned if self.control.kind == "rotation" else self._noise
        moved = (stock.float() + elsewhere(change, current, samples)).to(stock.dtype)
        return torch.where((change != 0).any(-1, keepdim=True), moved, stock)

    def _turned(self, change: Tensor, current: DenoisingCall, samples: slice) -> Tensor:
        seeds = current.seeds
        # Of all images at work, also where each has an attention call of its own: a matrix is made once.
        self._turns = {seed: self._turns[seed] if seed in self._turns else self._turn(seed, change) for seed in seeds}
        with torch.autocast(change.device.type, enabled=False):
            return change @ torch.stack([self._turns[seed] for seed in seeds[samples]])  # (B, H, N, D) x (B, H, D, D)

    def _turn(self, seed: int, change: Tensor) -> Tensor:
        generator = _generator(self.control.seed, self.inner.layer.index, seed)
        return rotations(change.shape[1], change.shape[-1], generator).to(change)

    def _noise(self, change: Tensor, current: DenoisingCall, samples: slice) -> Tensor:
        seeds, place = current.seeds[samples], (self.inner.layer.index, current.step)
        draws = {
            seed: torch.randn(change.shape[1:], generator=_generator(self.control.seed, *place, seed))
            for seed in dict.fromkeys(seeds)
        }
        draw = torch.stack([draws[seed] for seed in seeds]).to(change.device)
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
