"""Layers that are known to ground words, by model: what is read where no layers are named.

    known_layers("stabilityai/stable-diffusion-3-medium-diffusers", weight_hash).layers     # (9,)

By name for public checkpoints, from the literature; by weights for the embedded model, from its own selection
(`analyses/segmentation_choice.py`, on training images): other weights of the same name are another model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KnownLayers:
    """Layers, their weights in means over layers (none: equal), and who says so."""

    layers: tuple[int, ...]
    source: str
    weights: tuple[float, ...] = ()


_PAPER = "arXiv:2509.18096"
_BY_NAME = {
    "stable-diffusion-3-medium": KnownLayers((9,), f"{_PAPER}, section 3.3"),
    "stable-diffusion-3.5-medium": KnownLayers((9,), f"{_PAPER}, appendix"),
    "FLUX.1-dev": KnownLayers((12, 17), f"{_PAPER}, appendix"),
}
_BY_WEIGHTS = {
    "33c8d3b44c9b2505c401220210309f2eaf0592a49320df4a7dd3d8381f6349a3": KnownLayers(
        (3, 1, 5, 0), "its own selection on scenes:train", (0.25, 0.25, 0.25, 0.25)
    )
}


def known_layers(name: str, weight_hash: str) -> KnownLayers | None:
    """The layers known for a model, or None.

    Args:
        name: hub id or folder, perhaps with an adapter ("name+adapter"); `-diffusers` at its end does not count.
        weight_hash: of its transformer (`MMDiT.weight_hash`).
    """
    base = Path(name.partition("+")[0]).name.removesuffix("-diffusers")
    return _BY_WEIGHTS.get(weight_hash) or _BY_NAME.get(base)


def grounding_layers(names: Iterable[str], weight_hash: str, count: int) -> KnownLayers:
    """The layers that ground words in a model of `count` layers, best first: known ones, else the middle third.

    Args:
        names: what the model may be called, see `known_layers`.
    """
    from mmdit_probe.segment.capture import middle_layers

    for name in names:
        known = known_layers(name, weight_hash)
        if known is not None and max(known.layers) < count:
            return known
    return KnownLayers(middle_layers(count), "the middle third; none are known for this model")
