"""conceptattention: concept vectors and image vectors compared in the attention's output space (arXiv:2502.04320).

The concepts run through the text stream's own weights beside the plain forward (`observe.concepts`), so the class names
are not in competition for the prompt's length: every name of every prompt is one concept. The image vectors are the
true image stream's, unlike in the official SD3 port.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.errors import check_known
from mmdit_probe.segment.methods.base import Method, by_class
from mmdit_probe.segment.record import Capture, JointRecord


class Rule(NamedTuple):
    """How products of concept and image vectors become scores in one release of the official code."""

    softmax: str
    temperature: float
    normalise: str


FLUX = Rule("before", 1.0, "none")
RULES = {"sd3": Rule("before", 1.0, "concepts"), "flux": FLUX, "flux2": Rule("after", 1e-3, "none")}
"""Official rules by model family; families that have none take Flux's, the paper's own model."""


def conceptattention(
    capture: Capture, softmax: str = "auto", temperature: float | None = None, normalise: str = "auto"
) -> Tensor:
    """Scores [C, h, w]. "auto" and None take the official rule of the model's family, `RULES`.

    Args:
        softmax: over concepts, "before" the mean over layers, "after" it, or "none".
        temperature: factor on the dot products.
        normalise: "concepts" to unit length, "both" vectors (cosines), or "none".
    """
    check_known("softmax", softmax, ("auto", "before", "after", "none"))
    check_known("normalise", normalise, ("auto", "none", "concepts", "both"))
    rule = RULES.get(capture.family, FLUX)
    softmax = rule.softmax if softmax == "auto" else softmax
    normalise = rule.normalise if normalise == "auto" else normalise
    factor = rule.temperature if temperature is None else temperature

    def of_layer(record: JointRecord) -> Tensor:
        concepts, image = record.part("concepts"), record.part("feat_out")
        if normalise != "none":
            concepts = F.normalize(concepts, dim=-1)
        if normalise == "both":
            image = F.normalize(image, dim=-1)
        products = factor * concepts @ image.T  # (K, E) x (E, I) -> (K, I)
        return products.softmax(0) if softmax == "before" else products

    mean = capture.over_layers(of_layer)
    if softmax == "after":
        mean = mean.softmax(0)
    pairs = zip(capture.queries, mean, strict=True)
    return by_class(capture, [(query, values) for (_, query), values in pairs])


CONCEPTATTENTION = Method(
    "conceptattention", conceptattention, lambda options: ("feat_out", "concepts"), "arXiv:2502.04320"
)
