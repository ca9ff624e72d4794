"""How good the embedded model's maps are: do its words find their regions?

``word_map_scores`` takes held-out scenes, their latents noised to one level, the bare list of their classes as the
prompt, and the I2T map of each class word as its score; argmax, upsampled, against the exact mask
(`evaluate.map_quality`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.evaluate import map_quality, mean_iou
from mmdit_probe.evaluate.scores import ImageCounts
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.maps import TextMaps
from mmdit_probe.observe.probe import probe
from mmdit_probe.scenes.world import CLASSES, Scene, scene

BATCH = 32
"""Pictures in a forward."""


def grid_ceiling(items: Sequence[Scene], grid: int) -> float:
    """Mean IoU when every token knows the share of each class inside it: what no token map of this grid can pass."""
    counts = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for item in items:
        ids = np.unique(item.classes).tolist()
        one_hot = torch.stack([torch.from_numpy(item.classes == i).float() for i in ids])
        counts += map_quality(F.adaptive_avg_pool2d(one_hot, grid), item.classes, ids, len(CLASSES))
    return float(mean_iou(counts))


def word_map_scores(
    model: MMDiT, items: Sequence[Scene], *, sigma: float = 0.5, seed: int = 0, streams: Sequence[str] = ("all",)
) -> pd.DataFrame:
    """Quality of the I2T maps of the classes present, by layer, for the head mean and for every head.

    Args:
        model: any MM-DiT that knows the words of the world.
        items: scenes of one size.
        sigma: noise level of the probed latents.
        seed: noise of scene k is drawn from seed + k.
        streams: which text tokens of a word count: "all", or those of one encoder stream ("clip", "t5").

    Returns:
        Columns layer, stream, head ("mean" or the index), min_max (whether each map was stretched to 0..1 over the
        image, as in the paper's Table 5: that takes away that some words draw more attention everywhere), sigma, n,
        miou with low and high (95 % interval over scenes, `ImageCounts`), and one column ``iou_<class>`` per class.
    """
    counted: dict[tuple[int, str, bool], list[NDArray[np.int64]]] = {}
    for start in range(0, len(items), BATCH):
        chunk = items[start : start + BATCH]
        text = model.encode_prompt([" ".join(item.class_names) for item in chunk])
        latents = model.noise(model.encode_image([item.image for item in chunk]), sigma, seed + start)
        with probe(model, TextMaps(heads="all")) as run:
            model.denoise(latents, sigma, text)
        for layer in range(len(model.layers)):
            for item, tokens, sample in zip(chunk, text.tokens, run[TextMaps].maps(layer), strict=True):
                ids = [CLASSES.index(name) for name in item.class_names]
                for stream in streams:
                    maps = class_scores(sample, tokens, item.class_names, stream)  # (H, K, h, w)
                    maps = torch.cat([maps.mean(0, keepdim=True), maps])
                    for stretched in (False, True):
                        stretch = "minmax" if stretched else "none"
                        counts = map_quality(maps, item.classes, ids, len(CLASSES), stretch)  # (1 + H, C, C)
                        counted.setdefault((layer, stream, stretched), []).append(counts)
    return pd.DataFrame(
        {"layer": layer, "stream": stream, "head": "mean" if head == 0 else str(head - 1), "min_max": stretched}
        | {"sigma": sigma, "n": len(items), **_scored(ImageCounts.of(of_head))}
        for (layer, stream, stretched), counts in counted.items()
        for head, of_head in enumerate(np.stack(counts, 1))
    )


def _scored(counts: ImageCounts) -> dict[str, float]:
    low, high = counts.interval("miou")
    by_class = {f"iou_{name}": float(value) for name, value in zip(CLASSES, counts.ious(), strict=True)}
    return {"miou": counts.miou(), "low": low, "high": high, **by_class}


def class_scores(maps: Tensor, tokens: TokenTable, names: Sequence[str], stream: str = "all") -> Tensor:
    """I2T maps of class words [H, K, h, w] from maps of all text tokens [H, h, w, T]: sums over a word's tokens.

    Args:
        stream: "all", or the encoder stream whose tokens count.
    """
    spans = [
        [p for name_of, positions in tokens.word_spans(name).items() if stream in ("all", name_of) for p in positions]
        for name in names
    ]
    return torch.stack([maps[..., span].sum(-1) for span in spans], dim=1)


def held_out(n: int, split: str = "val", **how: Any) -> list[Scene]:
    """The first ``n`` scenes of a split."""
    return [scene(split, index, **how) for index in range(n)]
