"""Segmentation from one captured forward: capture, methods, the shared tail, refinement.

from mmdit_probe import load
from mmdit_probe.segment import Capture, METHODS, Reading, segment
result = segment(load("scenes-sd3"), picture, "ring, house; cottage, grass", Reading(layers=[2, 3]))
result.labels                                   # [height, width] class ids of the picture
METHODS["iseg"](Capture.of(grid=(16, 16), i2t=i2t, i2i=i2i, spans={"cat": [3, 4]}))      # one's own tensors, no model
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdit_probe.segment.capture import capture
    from mmdit_probe.segment.methods import METHODS
    from mmdit_probe.segment.record import Capture, Reading
    from mmdit_probe.segment.run import discover, name_segments, segment

_EXPORTS = {
    "Capture": "mmdit_probe.segment.record",
    "METHODS": "mmdit_probe.segment.methods",
    "capture": "mmdit_probe.segment.capture",
    "Reading": "mmdit_probe.segment.record",
    "discover": "mmdit_probe.segment.run",
    "name_segments": "mmdit_probe.segment.run",
    "segment": "mmdit_probe.segment.run",
}

__all__ = ["METHODS", "Capture", "Reading", "capture", "discover", "name_segments", "segment"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
