"""conceptattention: concept vectors and image vectors compared in the attention's output space (arXiv:2502.04320).

The concepts run through the text stream's own weights beside the plain forward (`observe.concepts`), so the class names
are not in competition for the prompt's length: every name of every prompt is one concept. The image vectors are the
true image stream's, unlike in the official SD3 port.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.errors import unknown
from mmdit_probe.segment.methods.base import Method, by_class
from mmdit_probe.segment.record import Capture, JointRecord


def conceptattention(
    capture: Capture, softmax: str = "before", temperature: float = 1.0, normalise: str = "none"
) -> Tensor:
    """Scores [C, h, w].

    Args:
        softmax: over concepts, "before" the mean over layers (the official Flux code), "after" it (Flux.2), or "none".
        temperature: factor on the dot products.
        normalise: "concepts" to unit length (the official SD3 code), "both" vectors (cosines), or "none".
    """
    if softmax not in ("before", "after", "none"):
        raise unknown("softmax", softmax, ("before", "after", "none"))
    if normalise not in ("none", "concepts", "both"):
        raise unknown("normalise", normalise, ("none", "concepts", "both"))

    def of_layer(record: JointRecord) -> Tensor:
        concepts, image = record.part("concepts"), record.part("feat_out")
        if normalise != "none":
            concepts = F.normalize(concepts, dim=-1)
        if normalise == "both":
            image = F.normalize(image, dim=-1)
        products = temperature * concepts @ image.T  # [K, I]
        return products.softmax(0) if softmax == "before" else products

    mean = capture.over_layers(of_layer)
    if softmax == "after":
        mean = mean.softmax(0)
    queries = [query for one in capture.passes for query in one.prompt.queries]
    return by_class(capture, list(zip(queries, mean, strict=True)))


CONCEPTATTENTION = Method("conceptattention", conceptattention, ("feat_out", "concepts"), "arXiv:2502.04320")
