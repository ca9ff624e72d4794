"""Interventions on joint attention, addressed by block, layer, head, step, guidance branch and span; guidance built on
them; operations on whole transformer blocks; controls of equal size."""

from mmdit_probe.edit.blocks import RemoveBlock, ScaleText
from mmdit_probe.edit.control import EqualBudget
from mmdit_probe.edit.edits import Blur, GridBlur, Mean, OtherText, Scale, Swap
from mmdit_probe.edit.guidance import perturbed_guidance

__all__ = [
    "Blur",
    "EqualBudget",
    "GridBlur",
    "Mean",
    "OtherText",
    "RemoveBlock",
    "Scale",
    "ScaleText",
    "Swap",
    "perturbed_guidance",
]
