"""Readers of segmentation data sets."""

from mmdit_probe.evaluate.datasets.base import READERS, Sample, SegDataset, load_dataset
from mmdit_probe.evaluate.datasets.sa1b import decode_rle, sa1b_masks, sa1b_pairs

__all__ = ["READERS", "Sample", "SegDataset", "decode_rle", "load_dataset", "sa1b_masks", "sa1b_pairs"]
