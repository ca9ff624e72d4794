"""How good word maps are where exact masks exist: do words find their regions, and do maps get better without sinks?

``word_map_scores`` takes held-out scenes, their latents noised to one level, the bare list of their classes as the
prompt, and the I2T map of each class word as its score; argmax, upsampled, against the exact mask
(`evaluate.map_quality`).

    with probe(model, SinkFree()) as run:
        model.denoise(noised, 0.5, model.encode_prompt([describe(item)]))
    tokens = model.token_tables([describe(item)])[0]
    table = map_scores(run[SinkFree], item.classes, CLASSES, tokens, layers=range(8))
    improvement(table)                        # per layer: without sinks minus as they are, paired over images

Three ways to read the maps of ``map_scores``: as they are, with sinks other than words removed and the rest
renormalised, and words only (renormalised over the prompt's words). Within one head all three have the same winner at
every pixel; they differ in the mean over heads, after each map is stretched, and in how one map ranks the pixels. Not
here: what a sink is (`observe.sinks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.data.labels import IGNORE
from mmdit_probe.evaluate.scores import ImageCounts, area_under_curve, map_quality, mean_iou
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.maps import TextMaps
from mmdit_probe.observe.pca import token_classes
from mmdit_probe.observe.probe import probe
from mmdit_probe.observe.sinks import SinkFree, without_sinks
from mmdit_probe.results.statistics import HIGHER, LOWER, holm, interval, kind_of, measured, p_value, two_sided
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


PLAIN, CLEAN, WORDS = "as they are", "without sinks", "words only"
SCORES = ("miou", "miou_min_max", "auc")
MEAN = -1
"""Value of the column `head` for the mean over heads."""


def map_scores(
    seen: SinkFree, label: NDArray[np.integer[Any]], names: Sequence[str], tokens: TokenTable, layers: Iterable[int]
) -> pd.DataFrame:
    """Quality of the maps of the classes that the prompt names and the picture has.

    Args:
        seen: after one call of one picture. label: its class ids [H, W], `IGNORE` where unknown. names: of the ids.
        tokens: of its prompt. layers: which.

    Returns: layer, head (-1: the mean over heads), maps (as they are | without sinks | words only), removed (share of
    attention on sinks), miou (argmax over the named classes, upsampled, within their pixels), miou_min_max (the same
    with every map stretched to 0..1 first), auc (mean over classes of the probability that a token inside the class
    has a higher value than one outside). NaN where fewer than two classes are named.
    """
    present = [int(index) for index in np.unique(label) if index < len(names)]
    found = {index: tokens.word_spans(names[index], missing_ok=True, beside=names) for index in present}
    spans = {index: [place for places in of.values() for place in places] for index, of in found.items() if of}
    ids = list(spans)
    rows: list[dict[str, Any]] = []
    for layer in layers:
        plain, clean = (maps[0] for maps in seen.maps(layer))  # [H, h, w, T]
        words = tokens.positions(kind="word")
        only = torch.zeros_like(plain)
        only[..., words] = without_sinks(plain, words)
        labels = token_classes(label[None], (plain.shape[1], plain.shape[2]))[0]
        removed = [float(seen.removed(layer)[0].mean()), *seen.removed(layer)[0].tolist()]
        for name, maps in ((PLAIN, plain), (CLEAN, clean), (WORDS, only)):
            every = torch.cat([maps.mean(0, keepdim=True), maps])  # (1 + H, h, w, T), the mean over heads first
            scores = _scores(every, list(spans.values()), ids, labels, label, len(names))
            rows += [
                {"layer": layer, "head": place - 1, "maps": name, "removed": removed[place]}
                | {score: float(values[place]) for score, values in scores.items()}
                for place in range(len(every))
            ]
    return pd.DataFrame(rows)


def improvement(table: pd.DataFrame) -> pd.DataFrame:
    """What removing sinks adds: one row per layer, head and score, with both means and the difference paired over
    images.

    Args:
        table: from `map_scores`, with the column item.

    Returns: layer, head, score, n, before, after, difference, low, high (95 % over images), p_holm (corrected for all
    rows of a score), verdict: better, worse, "no difference shown", or "too few items".
    """
    table = measured(table)
    long = table.melt(["item", "layer", "head", "maps"], list(SCORES), "score").dropna(subset=["value"])
    rows = []
    for (layer, head, score), part in long.groupby(["layer", "head", "score"], sort=True, observed=True):
        wide = part.pivot(index="item", columns="maps", values="value")[[PLAIN, CLEAN]].dropna()
        added = wide[CLEAN] - wide[PLAIN]
        row = {"layer": layer, "head": head, "score": score, "n": len(wide), "before": float(wide[PLAIN].mean())}
        kind = kind_of(wide[CLEAN], wide[PLAIN])
        row |= {"after": float(wide[CLEAN].mean())} | interval(added, kind).named("difference", "")
        rows.append(row | {"p_holm": p_value(added, kind)})
    columns = ["layer", "head", "score", "n", "before", "after", "difference", "low", "high", "p_holm"]
    found = pd.DataFrame(rows, columns=columns)
    found["p_holm"] = found.groupby("score")["p_holm"].transform(holm)
    return found.assign(verdict=two_sided(found).replace({HIGHER: "better", LOWER: "worse"}))


def _scores(
    maps: Tensor,
    spans: list[list[int]],
    ids: list[int],
    tokens: NDArray[np.int64],
    pixels: NDArray[np.integer],
    classes: int,
) -> dict[str, NDArray[np.float64]]:
    """Every one of `SCORES` [M] of M sets of maps [M, h, w, T], against labels of tokens [h, w] and of pixels."""
    found = {name: np.full(len(maps), np.nan) for name in SCORES}
    if not spans:
        return found
    words = torch.stack([maps[..., span].sum(-1) for span in spans], 1)  # (M, K, h, w)
    labelled = tokens != IGNORE
    areas = [area_under_curve(words[:, k].numpy()[:, labelled], tokens[labelled] == one) for k, one in enumerate(ids)]
    known = [one for one in areas if np.isfinite(one).all()]
    if known:
        found["auc"] = np.mean(known, axis=0)
    if len(ids) > 1:
        for name, stretch in (("miou", "none"), ("miou_min_max", "minmax")):
            found[name] = mean_iou(map_quality(words, pixels, ids, classes, stretch))
    return found
