"""Figures: tidy table in, matplotlib figure out. Knows no model."""

from mmdit_probe.plots.budget import attention_budget
from mmdit_probe.plots.style import save

__all__ = ["attention_budget", "save"]
