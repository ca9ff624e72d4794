"""Segmentation from one captured forward: capture, methods, the shared tail, refinement.

from mmdit_probe import load
from mmdit_probe.segment import Capture, METHODS, Reading, segment
result = segment(load("scenes-sd3"), picture, "ring, house; cottage, grass", Reading(layers=[2, 3]))
result.labels                                   # [height, width] class ids of the picture
METHODS["iseg"](Capture.of(grid=(16, 16), i2t=i2t, i2i=i2i, spans={"cat": [3, 4]}))      # one's own tensors, no model
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.exports import first_use

if TYPE_CHECKING:
    from mmdit_probe.segment.capture import capture as capture
    from mmdit_probe.segment.methods import METHODS as METHODS
    from mmdit_probe.segment.record import Capture as Capture, Reading as Reading
    from mmdit_probe.segment.run import discover as discover, name_segments as name_segments, segment as segment

_ROOMS = {
    "capture": ("capture",),
    "methods": ("METHODS",),
    "record": ("Capture", "Reading"),
    "run": ("discover", "name_segments", "segment"),
}

__all__ = [name for names in _ROOMS.values() for name in names]
__getattr__, __dir__ = first_use(__name__, _ROOMS)
