"""How good the embedded model is: do its words find their regions, and do its images show what was asked for?

``map_quality`` takes held-out scenes,
their latents noised to one level, the bare list of their classes as the prompt, and the
I2T map of each class word as its score; argmax, upsampled, against the exact mask. ``alignment_of`` takes captions:
images generated with guidance, read back by the parser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.evaluate import confusion, ious, mean_iou
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.maps import TextMaps
from mmdit_probe.observe.probe import probe
from mmdit_probe.scenes.parser import SceneParser, aligned, alignment, grounds_right, things_right
from mmdit_probe.scenes.world import CLASSES, Scene, scene
from mmdit_probe.segment.tail import minmax


def argmax_labels(scores: Tensor, ids: Sequence[int], side: int) -> np.ndarray[Any, Any]:
    """Label maps [M, S, S] of M sets of class scores [M, K, h, w]: bilinear to ``side``, argmax, class ids."""
    large = F.interpolate(scores.float(), (side, side), mode="bilinear", align_corners=False)
    return np.asarray(ids)[large.argmax(1).numpy()]


def grid_ceiling(items: Sequence[Scene], grid: int) -> float:
    """Mean IoU when every token knows the share of each class inside it: what no token map of this grid can pass."""
    matrix = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for item in items:
        ids = np.unique(item.classes).tolist()
        one_hot = torch.stack([torch.from_numpy(item.classes == i).float() for i in ids])
        shares = F.adaptive_avg_pool2d(one_hot, grid)
        matrix += confusion(item.classes, argmax_labels(shares[None], ids, item.classes.shape[0])[0], len(CLASSES))
    return mean_iou(matrix)


def map_quality(
    model: MMDiT,
    items: Sequence[Scene],
    *,
    sigma: float = 0.5,
    seed: int = 0,
    batch: int = 32,
    streams: Sequence[str] = ("all",),
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
        miou, and one column ``iou_<class>`` per class.
    """
    side = items[0].classes.shape[0]
    nothing = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    matrices: dict[tuple[int, str, str, bool], np.ndarray[Any, Any]] = {}
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        text = model.encode_prompt([" ".join(item.class_names) for item in chunk])
        latents = model.noise(model.encode_image([item.image for item in chunk]), sigma, seed + start)
        with probe(model, TextMaps(heads="all")) as run:
            model.denoise(latents, sigma, text)
        for layer in range(len(model.layers)):
            for item, tokens, sample in zip(chunk, text.tokens, run[TextMaps].maps(layer), strict=True):
                ids = [CLASSES.index(name) for name in item.class_names]
                for stream in streams:
                    scores = class_scores(sample, tokens, item.class_names, stream)  # [H, K, h, w]
                    raw = torch.cat([scores.mean(0, keepdim=True), scores])
                    for stretched in (False, True):
                        labels = argmax_labels(minmax(raw) if stretched else raw, ids, side)
                        for head, label in zip(("mean", *map(str, range(len(scores)))), labels, strict=True):
                            key = (layer, stream, head, stretched)
                            found = confusion(item.classes, label, len(CLASSES))
                            matrices[key] = matrices.get(key, nothing) + found
    return pd.DataFrame(
        {"layer": layer, "stream": stream, "head": head, "min_max": stretched, "sigma": sigma, "n": len(items)}
        | {"miou": mean_iou(matrix)}
        | {f"iou_{name}": value for name, value in zip(CLASSES, ious(matrix), strict=True)}
        for (layer, stream, head, stretched), matrix in matrices.items()
    )


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


def alignment_of(
    model: MMDiT,
    parser: SceneParser,
    prompts: Sequence[str],
    *,
    steps: int = 28,
    guidance: float = 7.5,
    seed: int = 0,
    batch: int = 32,
    size: int | None = None,
) -> pd.DataFrame:
    """Generate one image per prompt and read it back, one row per image.

    Args:
        seed: image k is drawn from seed + k.
        size: side in pixels; the model's own if None.

    Returns:
        Columns caption, seed, facts (share of facts that hold), all_right, things_right, grounds_right.
    """
    rows: list[dict[str, Any]] = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        seeds = list(range(seed + start, seed + start + len(chunk)))
        images = model.generate(chunk, steps=steps, guidance=guidance, seed=seeds, height=size, width=size)
        for text, number, reading in zip(chunk, seeds, parser.read(images), strict=True):
            rows.append(
                {
                    "caption": text,
                    "seed": number,
                    "facts": alignment(text, reading),
                    "all_right": aligned(text, reading),
                    "things_right": things_right(text, reading),
                    "grounds_right": grounds_right(text, reading),
                }
            )
    return pd.DataFrame(rows)


def held_out(n: int, split: str = "val", **how: Any) -> list[Scene]:
    """The first ``n`` scenes of a split."""
    return [scene(split, index, **how) for index in range(n)]
