"""The methods by name. Each is a pure function of one capture; see `base` for the contract."""

from __future__ import annotations

from mmdit_probe.errors import check_known
from mmdit_probe.segment.methods.affinity import DIFFSEGMENTER, ISEG, PER_CLASS, TOKENRANK
from mmdit_probe.segment.methods.base import Method
from mmdit_probe.segment.methods.clusters import DIFFCUT, DIFFSEG
from mmdit_probe.segment.methods.concepts import CONCEPTATTENTION
from mmdit_probe.segment.methods.dense_clip import CORRCLIP, PROXYCLIP
from mmdit_probe.segment.methods.seg4diff import SEG4DIFF, UNSUPERVISED

_ALL = (
    SEG4DIFF, DIFFSEGMENTER, PER_CLASS, ISEG, TOKENRANK, CONCEPTATTENTION, PROXYCLIP, CORRCLIP,
    UNSUPERVISED, DIFFSEG, DIFFCUT,
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def find(name: str) -> Method:
    """The method of this name.

    Raises:
        UserError: there is none; the message names the closest one.
    """
    check_known("method", name, METHODS)
    return METHODS[name]


__all__ = ["METHODS", "Method", "find"]
