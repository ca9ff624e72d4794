"""Validation on the way: do the words of held-out pictures own their regions, and what do samples look like?

    scores = validate(model, samples, layers=[4], sigma=0.515)
    scores.miou

The maps are those of evaluation (after the softmax, mean over heads and layers), not those of the loss; the protocol is
"present": the names of the picture's own masks compete. Noise is a function of the seed and the picture's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mmdit_probe.evaluate.counts import mean_iou
from mmdit_probe.magnet.data import Sample
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.maps import TextMaps
from mmdit_probe.observe.probe import probe


@dataclass(frozen=True)
class PresentScores:
    """Counts per picture [n, C, C] (truth by row) over the names that occur, in the order of `names`."""

    counts: NDArray[np.int64]
    names: tuple[str, ...]

    @property
    def miou(self) -> float:
        """Mean IoU of the summed counts."""
        return mean_iou(self.counts.sum(0))


def validate(
    model: MMDiT, samples: Sequence[Sample], layers: Sequence[int], *, sigma: float = 0.515, seed: int = 0,
    normalised: bool = False, batch: int = 16,
) -> PresentScores:  # fmt: skip
    """Score the I2T maps of the names of each picture's masks, at full resolution, on labelled pixels.

    Args:
        samples: with named masks; the prompt is the names, joined by blanks. Pictures without names are left out.
        layers: joint-attention layers, averaged.
        sigma: noise level. seed: picture k is noised from seed + k.
        normalised: divide each map by its mean over the picture.
    """
    kept = [(place, s) for place, s in enumerate(samples) if s.names]
    names = tuple(sorted({name for _, s in kept for name in s.names}))
    counts = np.zeros((len(kept), len(names), len(names)), np.int64)
    for start in range(0, len(kept), batch):
        chunk = kept[start : start + batch]
        text = model.encode_prompt([" ".join(s.names) for _, s in chunk])
        latents = model.noise(model.encode_image([s.image for _, s in chunk]), sigma, [seed + p for p, _ in chunk])
        with probe(model, TextMaps(), layers=list(layers)) as run:
            model.denoise(latents, sigma, text)
        maps = torch.stack([run[TextMaps].maps(layer) for layer in layers]).mean(0)  # [B, h, w, T]
        for row, (_, sample) in enumerate(chunk):
            spans = [[p for of in text.tokens[row].word_spans(name).values() for p in of] for name in sample.names]
            scores = torch.stack([maps[row, ..., span].sum(-1) for span in spans])
            if normalised:
                scores = scores / scores.mean((1, 2), keepdim=True)
            counts[start + row] = _counts(scores, sample, [names.index(name) for name in sample.names], len(names))
    return PresentScores(counts, names)


def sample_grid(model: MMDiT, prompts: Sequence[str], *, steps: int, guidance: float, seed: int) -> Any:
    """One picture per prompt, side by side, as a PIL image."""
    from PIL import Image

    images = model.generate(list(prompts), steps=steps, guidance=guidance, seed=seed)
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * width, place // columns * height))
    return sheet


def _counts(scores: torch.Tensor, sample: Sample, ids: Sequence[int], total: int) -> NDArray[np.int64]:
    size = sample.masks.shape[1:]
    large = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
    found = np.asarray(ids)[large.argmax(0).numpy()]
    truth = np.full(size, -1)
    for index, mask in zip(ids, sample.masks, strict=True):
        truth[mask] = index
    labelled = truth >= 0
    flat = truth[labelled] * total + found[labelled]
    return np.bincount(flat, minlength=total * total).reshape(total, total)
