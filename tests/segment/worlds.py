"""Captures built by hand from exact masks: what a perfect model's attention would be, so that answers are known."""

from __future__ import annotations

import numpy as np
import torch

from mmdit_probe.data import Fit, SegClass
from mmdit_probe.models.tokens import Token, TokenTable
from mmdit_probe.segment.record import Capture, JointRecord, Pass
from mmdit_probe.segment.vocabulary import Prompt, Query

TOKEN = 8
"""Pixels per token in these pictures."""


def masks(h: int = 8, w: int = 8) -> torch.Tensor:
    """Three regions [3, h, w] that cover the grid: left half, upper right, lower right."""
    regions = torch.zeros(3, h, w)
    regions[0, :, : w // 2] = 1
    regions[1, : h // 2, w // 2 :] = 1
    regions[2, h // 2 :, w // 2 :] = 1
    return regions


def capture(
    regions: torch.Tensor, *, heads: int = 2, text: int = 8, sharp: float = 0.9, noise: float = 0.0, seed: int = 0,
    layers: tuple[int, ...] = (0, 1), empty: bool = False,
) -> Capture:  # fmt: skip
    """A capture whose class tokens attend to their region and whose I2I block stays inside regions.

    Args:
        regions: [C, h, w] 0/1, disjoint. text: text tokens T (BOS, one word per class, EOS, pads).
        sharp: share of the text mass that goes to the right word, and of the image mass that stays inside.
        noise: relative noise on every probability. empty: no names, one pad per region takes the words' place.
    """
    generator = torch.Generator().manual_seed(seed)
    count, h, w = regions.shape
    flat = regions.flatten(1)  # [C, I]
    tokens = h * w
    i2t = torch.full((heads, tokens, text), (1 - sharp) / text)
    i2t[:, :, 0] += 0.5  # BOS is a sink, as in the real ones
    for index in range(count):
        i2t[:, :, 1 + index] += sharp * flat[index]
    i2t = i2t * (1 + noise * torch.randn(i2t.shape, generator=generator)).clamp(min=0)
    i2t = 0.4 * i2t / i2t.sum(-1, keepdim=True)
    same = flat.T @ flat
    i2i = sharp * same / same.sum(1, keepdim=True) + (1 - sharp) / tokens
    i2i = i2i * (1 + noise * torch.rand(i2i.shape, generator=generator))
    i2i = 0.6 * i2i / i2i.sum(1, keepdim=True)
    basis = torch.linalg.qr(torch.randn(24, count, generator=generator))[0].T  # orthonormal [C, 24]
    features = flat.T @ basis + noise * 0.1 * torch.randn(tokens, 24, generator=generator)
    names = [f"thing{index}" for index in range(count)]
    kinds = ["bos", *(["pad" if empty else "word"] * count), *(["eos"] * (not empty))]
    kinds += ["pad"] * (text - len(kinds))
    table = TokenTable(
        "" if empty else " ".join(names),
        tuple(
            Token("clip", kind, names[i - 1] if kind == "word" else None, i - 1 if kind == "word" else -1)
            for i, kind in enumerate(kinds)
        ),
    )
    queries = () if empty else tuple(Query(name, i, {"clip": [1 + i]}) for i, name in enumerate(names))
    record = {
        layer: JointRecord(
            layer, i2t.clone(), i2i.clone(), i2i.clone(), features.clone(), features.clone(), basis.clone()
        )
        for layer in layers
    }
    rng = np.random.default_rng(seed)
    colours = rng.integers(30, 225, (count, 3))
    large = regions.repeat_interleave(TOKEN, 1).repeat_interleave(TOKEN, 2).argmax(0).numpy()
    image = colours[large].astype(np.uint8)
    fit = Fit.of(image.shape[:2], (h * TOKEN, w * TOKEN), TOKEN)
    classes = [] if empty else [SegClass((name,)) for name in names]
    return Capture(
        image, fit, (h, w), classes, [Pass(Prompt(table.prompt, table, queries), record)], (0.5,), (0,), layers
    )


def truth(regions: torch.Tensor) -> np.ndarray:
    """Labels at the picture's size."""
    return regions.repeat_interleave(TOKEN, 1).repeat_interleave(TOKEN, 2).argmax(0).numpy()


def without_information(one: Capture, seed: int = 1) -> Capture:
    """The negative control: the same numbers, each token's rows moved to another place."""
    order = torch.randperm(one.grid[0] * one.grid[1], generator=torch.Generator().manual_seed(seed))
    records = {}
    for layer, record in one.passes[0].records.items():
        assert record.i2t is not None and record.i2i is not None
        assert record.feat_out is not None and record.feat_proj is not None and record.i2i_walk is not None
        records[layer] = JointRecord(
            layer, record.i2t[:, order], record.i2i[order][:, order], record.i2i_walk[order][:, order],
            record.feat_out[order], record.feat_proj[order], record.concepts,
        )  # fmt: skip
    old = one.passes[0]
    return Capture(
        one.image, one.fit, one.grid, one.classes, [Pass(old.prompt, records)], one.sigmas, one.seeds, one.layers
    )
