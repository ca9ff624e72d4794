"""Readers of segmentation data sets."""

from mmdit_probe.evaluate.datasets.base import READERS, Sample, SegDataset, load_dataset

__all__ = ["READERS", "Sample", "SegDataset", "load_dataset"]
