"""Validation on the way: do the words of held-out pictures own their regions, and what do samples look like?

    scores = validate(model, samples, layers=[4], sigma=0.515)
    scores.miou()
    readouts(model, samples, [4], [("logit", "none"), ("probability", "minmax")])    # Table 5 of the paper, one forward

The maps are those of evaluation (after the softmax, mean over heads and layers), not those of the loss; the protocol is
"present": the names of the picture's own masks compete. Noise is a function of the seed and the picture's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdit_probe.attention.gradients import Space
from mmdit_probe.data.masks import paint
from mmdit_probe.data.sample import Sample
from mmdit_probe.evaluate.scores import ImageCounts, map_quality
from mmdit_probe.magnet.tap import TextMapTap
from mmdit_probe.models.mmdit import MMDiT, TextCondition
from mmdit_probe.observe.probe import probe

Readout = tuple[Space, Literal["none", "minmax", "centre"]]
"""How a map is read: before ("logit") or after ("probability") the softmax; as it is, stretched to 0..1 over space,
or divided by its mean over space (probabilities): `segment.tail.STRETCHES`."""


def validate(
    model: MMDiT, samples: Sequence[Sample], layers: Sequence[int], *, sigma: float = 0.515, seed: int = 0,
) -> ImageCounts:  # fmt: skip
    """Score the I2T maps (probabilities as they are) of the names of each picture's masks; arguments of `readouts`."""
    plain: Readout = ("probability", "none")
    return readouts(model, samples, layers, [plain], sigma=sigma, seed=seed)[plain]


def prompted(sample: Sample) -> Sample:
    """A sample with the prompt that it is validated with: the names of its masks."""
    return Sample(sample.name, sample.image, " ".join(sample.names), sample.masks, sample.names)


@torch.no_grad()
def readouts(
    model: MMDiT, samples: Sequence[Sample], layers: Sequence[int], kinds: Sequence[Readout], *, sigma: float = 0.515,
    seed: int = 0, batch: int = 16,
) -> dict[Readout, ImageCounts]:  # fmt: skip
    """Score the maps of the names of each picture's masks, read in several ways, at full resolution on labelled pixels.

    Args:
        samples: with named masks; the prompt is that of `prompted`. Pictures without names are left out.
        layers: joint-attention layers, averaged. A name's map is the mean over its positions in all text streams.
        kinds: readouts, all from one forward.
        sigma: noise level. seed: picture k is noised from seed + k.
    """
    kept = [(place, s) for place, s in enumerate(samples) if s.names]
    names = tuple(sorted({name for _, s in kept for name in s.names}))
    counts = {kind: np.zeros((len(kept), len(names), len(names)), np.int64) for kind in kinds}
    spaces = sorted({space for space, _ in kinds})
    for start in range(0, len(kept), batch):
        chunk = kept[start : start + batch]
        text = model.encode_prompt([prompted(s).prompt for _, s in chunk])
        latents = model.noise(model.encode_image([s.image for _, s in chunk]), sigma, [seed + p for p, _ in chunk])
        maps = _maps(model, latents, sigma, text, layers, spaces)
        for row, (_, sample) in enumerate(chunk):
            table, of = text.tokens[row], sample.names
            spans = [[p for places in table.word_spans(name, beside=of).values() for p in places] for name in of]
            ids = [names.index(name) for name in sample.names]
            label = paint(sample.masks, ids, bare=-1)
            for space, stretch in kinds:
                words = torch.stack([maps[space][row, span].mean(0) for span in spans])  # (K, h, w)
                counts[space, stretch][start + row] = map_quality(words, label, ids, len(names), stretch)
    return {kind: ImageCounts.of(found) for kind, found in counts.items()}


def _maps(
    model: MMDiT, latents: Tensor, sigma: float, text: TextCondition, layers: Sequence[int], spaces: Sequence[Space]
) -> dict[Space, Tensor]:
    """Maps [B, T, h, w] of every text position by space, mean over layers and heads, from one forward."""
    taps = {space: TextMapTap(list(layers), space=space, reduce=True) for space in spaces}
    with probe(model.transformer, edits=taps.values()):
        for tap in taps.values():
            tap.begin()
        model.denoise(latents, sigma, text)
    return {space: torch.stack(list(tap.take().values())).mean(0).cpu() for space, tap in taps.items()}


def sample_grid(model: MMDiT, prompts: str | Sequence[str], *, steps: int, guidance: float, seed: int) -> Any:
    """One picture per prompt, side by side, as a PIL image."""
    from diffusers.utils import make_image_grid

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    images = model.generate(texts, steps=steps, guidance=guidance, seed=seed)
    columns = min(8, len(images))
    missing = -len(images) % columns
    black = Image.new("RGB", images[0].size)
    return make_image_grid([*images, *[black] * missing], (len(images) + missing) // columns, columns)
