"""Evaluation: confusion matrices and the scores read from them."""

from mmdit_probe.evaluate.counts import accuracy, confusion, ious, mean_iou

__all__ = ["accuracy", "confusion", "ious", "mean_iou"]
