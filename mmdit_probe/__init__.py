"""mmdit_probe: exact attention probing of multi-modal diffusion transformers.

    from mmdit_probe import load, probe, AttentionMass
    model = load("scenes-sd3")
    with probe(model, AttentionMass(), layers="all") as run:
        model.generate("a red ring and a blue house on grass", steps=28, guidance=7.5, seed=0)
    run[AttentionMass].table()

Names are resolved on first use: importing the package imports neither torch nor diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.exports import first_use

if TYPE_CHECKING:
    from mmdit_probe.edit import Blur as Blur, EqualBudget as EqualBudget, perturbed_guidance as perturbed_guidance
    from mmdit_probe.errors import ProbeError as ProbeError, RunError as RunError, UserError as UserError
    from mmdit_probe.experiments.word_maps import word_maps as word_maps
    from mmdit_probe.models.load import load as load
    from mmdit_probe.models.mmdit import MMDiT as MMDiT, TextCondition as TextCondition
    from mmdit_probe.models.tokens import TokenTable as TokenTable
    from mmdit_probe.observe.maps import TextMaps as TextMaps
    from mmdit_probe.observe.mass import AttentionMass as AttentionMass
    from mmdit_probe.observe.norms import ValueNorm as ValueNorm
    from mmdit_probe.observe.probe import Run as Run, probe as probe
    from mmdit_probe.observe.reference_maps import ReferenceMaps as ReferenceMaps

__version__ = "0.1.0"

_ROOMS = {
    "edit": ("Blur", "EqualBudget", "perturbed_guidance"),
    "errors": ("ProbeError", "RunError", "UserError"),
    "experiments.word_maps": ("word_maps",),
    "models.load": ("load",),
    "models.mmdit": ("MMDiT", "TextCondition"),
    "models.tokens": ("TokenTable",),
    "observe.maps": ("TextMaps",),
    "observe.mass": ("AttentionMass",),
    "observe.norms": ("ValueNorm",),
    "observe.probe": ("Run", "probe"),
    "observe.reference_maps": ("ReferenceMaps",),
}

__all__ = ["__version__", *(name for names in _ROOMS.values() for name in names)]
__getattr__, __dir__ = first_use(__name__, _ROOMS)
