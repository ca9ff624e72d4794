"""Evaluation: label maps scored against labels, alone or over a data set.

from mmdit_probe.evaluate import segmentation_score
segmentation_score(prediction, label, classes=15).miou            # ids [H, W], or lists of them
"""

from mmdit_probe.evaluate.scores import (
    accuracy,
    confusion,
    ious,
    map_quality,
    mean_iou,
    segmentation_score,
)

__all__ = ["accuracy", "confusion", "ious", "map_quality", "mean_iou", "segmentation_score"]
