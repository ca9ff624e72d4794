"""The world outside, read in one place: pictures, texts, label maps, data sets, prompts, the paper's numbers.

    from mmdit_probe.data import dataset, prompts, samples
    samples("scenes:val", 8)[0].open((64, 64))          # a picture file, a folder, scenes:SPLIT, NAME:ROOT
    dataset("voc20:VOCdevkit/VOC2012")[0].label()       # class ids [H, W]
    prompts("everyday", 3)                              # a set, a file, or the prompt itself

Importing this package imports neither torch nor pandas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.exports import first_use

if TYPE_CHECKING:
    from mmdit_probe.data.class_names import SegClass as SegClass, parse_classes as parse_classes
    from mmdit_probe.data.fit import Fit as Fit
    from mmdit_probe.data.labels import IGNORE as IGNORE, read_label_map as read_label_map
    from mmdit_probe.data.paper import paper_table as paper_table, paper_tables as paper_tables
    from mmdit_probe.data.picture import Picture as Picture, open_picture as open_picture
    from mmdit_probe.data.prompt_sets import prompts as prompts
    from mmdit_probe.data.sample import Dataset as Dataset, Sample as Sample, fingerprint as fingerprint
    from mmdit_probe.data.scenes import ScenesData as ScenesData
    from mmdit_probe.data.sources import (
        DATASETS as DATASETS,
        dataset as dataset,
        samples as samples,
        single as single,
        training_data as training_data,
    )
    from mmdit_probe.data.text import read_json as read_json, read_lines as read_lines, read_text as read_text
    from mmdit_probe.data.training import Data as Data, PictureData as PictureData

_ROOMS = {
    "class_names": ("SegClass", "parse_classes"),
    "fit": ("Fit",),
    "labels": ("IGNORE", "read_label_map"),
    "paper": ("paper_table", "paper_tables"),
    "picture": ("Picture", "open_picture"),
    "prompt_sets": ("prompts",),
    "sample": ("Dataset", "Sample", "fingerprint"),
    "scenes": ("ScenesData",),
    "sources": ("DATASETS", "dataset", "samples", "single", "training_data"),
    "text": ("read_json", "read_lines", "read_text"),
    "training": ("Data", "PictureData"),
}

__all__ = [name for names in _ROOMS.values() for name in names]
__getattr__, __dir__ = first_use(__name__, _ROOMS)
