"""Uniform attention: every query gives every key it sees the same probability; what masses and norms are by count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import ModuleCall, Stage
from mmdit_probe.models.layout import Layer
from mmdit_probe.specs import Spec

FLAT = 1e-30
"""Scale of the logits under uniform attention: all probabilities equal in any precision. Not 0, which times the minus
infinity of a masked key is no number."""


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
