"""What is measured of the transformer while it trains, on held-out scenes, with its averaged weights.

* Text gain by noise level: how much worse the flow loss is with another's caption, with none, and with the opposite of
  what a caption states (left for right, two for three). A transformer that draws relations must lose from that.
* Maps by layer: whether words find their regions (`experiments.scenes_quality`, one map quality for all).
* Alignment: what samples show of their captions, read by the parser, the opposite beside it.

Curves are named `flow@s`, `relation@s`, `count@s` (losses at sigma s), `shuffled@s`, `empty@s`, `relation_wrong@s`,
`count_wrong@s` (relative increase in percent), `miou@s/layerK`, `miou@s/head` (the best single head), and the scores of
`scenes.parser.judge`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.experiments.scenes_quality import held_out, word_map_scores
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.scenes.captions import KINDS, opposites
from mmdit_probe.scenes.parser import SceneParser, judge
from training.assemble import assemble
from training.loop import low_precision
from training.parser import load_trained_parser
from training.session import Session
from training.transformer import POOLS, AlignedTransformer, Encoded, TextEncoders, build_transformer

SIGMAS = (0.95, 0.85, 0.7, 0.5, 0.3)
MAP_SIGMAS = (0.5, 0.75)
DRAWN = 32
"""Pictures sampled at once."""
TURNED = {"relation": ("2d-spatial", "opposite_relation"), "count": ("numeracy", "wrong_count")}
"""Curve -> the kind of caption that states it, and its opposite."""


@dataclass(frozen=True)
class Measurements:
    """All numbers at one point of the training.

    Attributes:
        encoded: name of a pool -> its held-out scenes.
    """

    session: Session
    encode: TextEncoders
    encoded: Callable[[str], Encoded]

    def __call__(self, model: AlignedTransformer, pool: str) -> dict[str, float]:
        """Measure an averaged model on the held-out scenes of a pool."""
        data, where = self.encoded(pool), self.session.where
        numbers = text_gain(model, data, self.encode, where, self.session.held_out)
        stock = build_transformer()
        stock.load_state_dict(model.transformer.state_dict())
        probed = MMDiT(assemble(self.session, stock.eval()).to(where), name="training")
        return numbers | self.maps(probed, pool) | self.samples(probed, data)

    def maps(self, model: MMDiT, pool: str) -> dict[str, float]:
        """mIoU of the I2T maps by layer, head mean, raw, and of the best single head."""
        items = held_out(self.session.held_out // 2, **POOLS[pool])
        numbers: dict[str, float] = {}
        for sigma in MAP_SIGMAS:
            table = word_map_scores(model, items, sigma=sigma)
            table = table[~table["min_max"]]
            means = table[table["head"] == "mean"]
            numbers |= {
                f"miou@{sigma}/layer{layer}": float(value)
                for layer, value in zip(means["layer"], means["miou"], strict=True)
            }
            numbers[f"miou@{sigma}/head"] = float(table["miou"].max())
        return numbers

    def samples(self, model: MMDiT, data: Encoded) -> dict[str, float]:
        """What samples show: objects and grounds on captions of colour, relations and counts on those that state one.

        A score that no caption of the pool defines is left out.
        """
        n, size = self.session.held_out // 2, data.data.images.shape[1]
        texts = [row[KINDS.index("colour")] for row in data.data.captions[:n]]
        parts = {"": texts} | {name: [stated for _, stated, _ in turned(data, name, n)] for name in TURNED}
        parser = load_trained_parser(self.session.workdir)
        numbers: dict[str, float] = {}
        for name, captions in parts.items():
            if captions:
                scored = alignment_of(model, parser, captions, steps=16, guidance=4.0, size=size)
                wanted = (name, TURNED[name][1]) if name else ("facts", "things_right", "grounds_right", "colours")
                wanted = wanted if name else (*wanted, "swapped_colours")
                numbers |= {column: float(scored[column].mean()) for column in wanted}
        return {name: value for name, value in numbers.items() if np.isfinite(value)}


def turned(data: Encoded, name: str, n: int) -> list[tuple[int, str, str]]:
    """(row, caption, opposite) of the first n scenes whose caption states a relation or a count."""
    kind, opposite = TURNED[name]
    stated = [(row, captions[KINDS.index(kind)]) for row, captions in enumerate(data.data.captions)]
    found = ((row, text, opposites(text).get(opposite)) for row, text in stated)
    return [(row, text, wrong) for row, text, wrong in found if wrong is not None][:n]


@torch.no_grad()
def text_gain(
    model: AlignedTransformer, data: Encoded, encode: TextEncoders, device: torch.device, n: int
) -> dict[str, float]:
    """Held-out flow loss at fixed noise levels, and how much worse a wrong caption makes it.

    Returns: ``flow@s``, ``relation@s``, ``count@s``: losses at sigma s with captions of colour, and with those that
    state a relation or a count (where the pool has such); ``shuffled@s``, ``empty@s``, ``relation_wrong@s``,
    ``count_wrong@s``: the relative increase in percent with another's caption, with none, with the opposite.
    """
    right = [captions[KINDS.index("colour")] for captions in data.data.captions[:n]]
    half = len(right) // 2
    shuffled, empty = right[half:] + right[:half], [""] * len(right)
    sets = [(list(range(len(right))), {"flow": right, "shuffled": shuffled, "empty": empty})]
    for name in TURNED:
        found = turned(data, name, n)
        if found:
            rows, stated, wrong = (list(part) for part in zip(*found, strict=True))
            sets.append((rows, {name: stated, f"{name}_wrong": wrong}))
    numbers: dict[str, float] = {}
    for rows, texts in sets:
        clean = data.clean(torch.tensor(rows), device)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(device)
        losses = {name: _losses(model, clean, noise, encode(captions)) for name, captions in texts.items()}
        base, *others = losses
        for sigma, loss in losses[base].items():
            numbers[f"{base}@{sigma}"] = loss
            numbers |= {f"{name}@{sigma}": 100 * (losses[name][sigma] / loss - 1) for name in others}
    return numbers


def _losses(model: AlignedTransformer, clean: Tensor, noise: Tensor, text: Tensor) -> dict[float, float]:
    """Flow loss by noise level."""
    found = {}
    for sigma in SIGMAS:
        with low_precision(clean.device):
            times = torch.full((len(clean),), 1000 * sigma, device=clean.device)
            velocity, _ = model(torch.lerp(clean, noise, sigma), text, times)
        found[sigma] = float(F.mse_loss(velocity.float(), noise - clean))
    return found


def alignment_of(
    model: MMDiT, parser: SceneParser, prompts: Sequence[str], *, steps: int, guidance: float, size: int | None = None
) -> pd.DataFrame:
    """Generate one image per prompt and read it back, one row per image; image k is drawn from seed k.

    Args:
        size: side in pixels; the model's own if None.

    Returns:
        Columns caption, seed, and the scores of `scenes.parser.judge`.
    """
    rows: list[dict[str, Any]] = []
    for start in range(0, len(prompts), DRAWN):
        chunk = list(prompts[start : start + DRAWN])
        seeds = list(range(start, start + len(chunk)))
        images = model.generate(chunk, steps=steps, guidance=guidance, seed=seeds, height=size, width=size)
        for text, number, reading in zip(chunk, seeds, parser.read(images), strict=True):
            rows.append({"caption": text, "seed": number, **judge(text, reading)})
    return pd.DataFrame(rows)
