"""CLIPScore of pictures and prompts, with any CLIP model that transformers loads.

    scorer = ClipScorer.load("scenes-clip")            # or a folder, or a hub id such as openai/clip-vit-large-patch14
    scorer(images, prompts)                            # one number per pair, 0..100

CLIPScore here is 100 max(cos(image, text), 0) per pair (arXiv:2104.08718 has 2.5 instead of 100), and its mean over
pairs; a score means something only beside the name of the CLIP model, so the name is part of the metric's. Known
libraries clamp the mean instead of the pairs, and fail on transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmdit_probe.errors import check_pairs
from mmdit_probe.segment.clip import CLIP


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP model as a scorer; `metric` names the score."""

    clip: CLIP

    @property
    def metric(self) -> str:
        """E.g. "clipscore[scenes-clip]"."""
        return f"clipscore[{self.clip.name}]"

    @property
    def cosine_metric(self) -> str:
        """Name of the plain cosine, T2I-CompBench's CLIP similarity if the model is ViT-B/32."""
        return f"clip_similarity[{self.clip.name}]"

    @classmethod
    def load(cls, name: str, device: str | torch.device = "cpu") -> ClipScorer:
        """Load a CLIP model: an embedded one, a folder, or a hub id.

        Raises:
            UserError: there is none of that name, or it is no CLIP model.
        """
        return cls(CLIP.open(name, device))

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], batch: int = 64) -> NDArray[np.float64]:
        """CLIPScore per pair [n] of PIL images and prompts. Prompts are cut at the text encoder's length."""
        return 100 * self.cosines(images, prompts, batch).clip(min=0)

    def cosines(self, images: Sequence[Any], prompts: Sequence[str], batch: int = 64) -> NDArray[np.float64]:
        """cos(image, text) per pair [n], -1..1."""
        check_pairs(images, prompts)
        scores = [np.zeros(0)]
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            vectors = self.clip.vectors(self.clip.pixels(images[part]))
            scores.append(cosine(vectors, self.clip.sentences(prompts[part])))
        return np.concatenate(scores)


def cosine(first: torch.Tensor, second: torch.Tensor) -> NDArray[np.float64]:
    """Cosine of rows [n] of [n, P] and [n, P]."""
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1).cpu().numpy()
