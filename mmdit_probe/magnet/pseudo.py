"""MAGNET without annotations: the masks are the model's own, made before the training starts.

    data = SelfLabelled.make(model, ScenesData("train", 500), source="maps", layers=(4,))
    train(model, data, MagnetOptions(layers=(4,)))

"maps" labels every pixel with the word of the prompt whose refined I2T map is strongest there (named masks,
token-level); "segments" takes the unsupervised segments of the empty prompt (unnamed, head-level). The teacher's maps
are averaged over noise draws and refined, which one training forward is not: that gap is what is learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.data.masks import largest, stack
from mmdit_probe.data.sample import Sample
from mmdit_probe.data.training import Data
from mmdit_probe.errors import check_known
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.segment.record import Reading
from mmdit_probe.segment.run import discover, segment

REFINE = "affinity"


@dataclass(frozen=True)
class SelfLabelled:
    """Data whose masks were made by the model. Use `SelfLabelled.make`.

    Attributes:
        data: where pictures and prompts come from. labels: [n, H, W] index into the words of each sample's prompt (or
            segment number). named: whether labels are words. settings: what made them.
    """

    data: Data
    labels: NDArray[np.unsignedinteger]
    named: bool
    settings: dict[str, Any]

    @classmethod
    def make(
        cls,
        model: MMDiT,
        data: Data,
        *,
        source: Literal["maps", "segments"] = "maps",
        layers: Sequence[int],
        refine: str = REFINE,
        sigmas: Sequence[float] = (0.515,),
        seeds: Sequence[int] = (0, 1),
        advance: Callable[[], None] = lambda: None,
    ) -> SelfLabelled:
        """Label every sample of `data` with the model as it is (no adapter attached).

        Args:
            source: "maps" or "segments". layers: whose maps are read, averaged.
            refine: steps of `segment.refine`. sigmas, seeds: noise levels and draws that are averaged.
            advance: called after every sample.

        Raises:
            UserError: unknown source or step.
        """
        check_known("source", source, ("maps", "segments"))
        how: dict[str, Any] = {"layers": list(layers), "sigmas": list(sigmas), "seeds": list(seeds)}
        reading = Reading(**how)
        labels = []
        for index in range(len(data)):
            sample = data[index]
            if source == "segments":
                found = discover(model, sample.image, reading, refine=refine).labels
            elif sample.names:
                found = segment(model, sample.image, list(sample.names), reading, refine=refine).labels
            else:
                found = np.zeros(sample.image.shape[:2], np.uint16)
            labels.append(found.astype(np.min_scalar_type(found.max())))  # of many pictures, in a byte where that holds
            advance()
        return cls(data, np.stack(labels), source == "maps", {"source": source, **how, "refine": refine})

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        sample, labels = self.data[index], self.labels[index]
        key = f"{sample.name} (own labels)"
        if not self.named:
            return Sample(key, sample.image, sample.prompt, largest([labels == i for i in np.unique(labels)]))
        present = [i for i in range(len(sample.names)) if (labels == i).any()]
        masks = stack([labels == i for i in present], labels.shape)
        return Sample(key, sample.image, sample.prompt, masks, tuple(sample.names[i] for i in present))

    def describe(self) -> dict[str, Any]:
        return {"annotations": "the model's own", **self.settings, "of": self.data.describe()}
