"""mmdit_probe: exact attention probing of multi-modal diffusion transformers.

    from mmdit_probe import load, probe, AttentionMass
    model = load("scenes-sd3")
    with probe(model, AttentionMass(), layers="all") as run:
        model.generate("a red ring and a blue house on grass", steps=28, guidance=7.5, seed=0)
    run[AttentionMass].table()

Names are resolved on first use: importing the package imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmdit_probe.edit import Blur as Blur
    from mmdit_probe.edit import EqualBudget as EqualBudget
    from mmdit_probe.edit import perturbed_guidance as perturbed_guidance
    from mmdit_probe.errors import ProbeError as ProbeError
    from mmdit_probe.errors import RunError as RunError
    from mmdit_probe.errors import UserError as UserError
    from mmdit_probe.experiments.word_maps import word_maps as word_maps
    from mmdit_probe.models.load import load as load
    from mmdit_probe.models.mmdit import MMDiT as MMDiT
    from mmdit_probe.models.mmdit import TextCondition as TextCondition
    from mmdit_probe.models.tokens import TokenTable as TokenTable
    from mmdit_probe.observe.maps import TextMaps as TextMaps
    from mmdit_probe.observe.mass import AttentionMass as AttentionMass
    from mmdit_probe.observe.norms import ValueNorm as ValueNorm
    from mmdit_probe.observe.probe import Run as Run
    from mmdit_probe.observe.probe import probe as probe
    from mmdit_probe.observe.reference_maps import ReferenceMaps as ReferenceMaps

__version__ = "0.1.0"

_EXPORTS = {
    "ProbeError": "mmdit_probe.errors",
    "RunError": "mmdit_probe.errors",
    "UserError": "mmdit_probe.errors",
    "load": "mmdit_probe.models.load",
    "MMDiT": "mmdit_probe.models.mmdit",
    "TextCondition": "mmdit_probe.models.mmdit",
    "TokenTable": "mmdit_probe.models.tokens",
    "probe": "mmdit_probe.observe.probe",
    "Run": "mmdit_probe.observe.probe",
    "AttentionMass": "mmdit_probe.observe.mass",
    "TextMaps": "mmdit_probe.observe.maps",
    "ReferenceMaps": "mmdit_probe.observe.reference_maps",
    "Blur": "mmdit_probe.edit",
    "EqualBudget": "mmdit_probe.edit",
    "perturbed_guidance": "mmdit_probe.edit",
    "ValueNorm": "mmdit_probe.observe.norms",
    "word_maps": "mmdit_probe.experiments.word_maps",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
