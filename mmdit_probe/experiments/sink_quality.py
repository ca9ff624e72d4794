"""Do word maps get better when sinks are removed? Measured where exact masks exist.

    with probe(model, SinkFree()) as run:
        model.denoise(noised, 0.5, model.encode_prompt([describe(item)]))
    tokens = model.token_tables([describe(item)])[0]
    table = map_scores(run[SinkFree], item.classes, CLASSES, tokens, layers=range(8))
    improvement(table)                        # per layer: without sinks minus as they are, paired over images

Three ways to read the maps: as they are, with sinks other than words removed and the rest renormalised, and words only
(renormalised over the prompt's words). Within one head all three have the same winner at every pixel; they differ in
the mean over heads, after each map is stretched, and in how one word's map ranks the pixels. Not here: what a sink is
(`observe.sinks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError
from mmdit_probe.evaluate.scores import area_under_curve, map_quality, mean_iou
from mmdit_probe.observe.pca import token_classes
from mmdit_probe.observe.sinks import SinkFree, without_sinks
from mmdit_probe.results.statistics import HIGHER, LOWER, holm, interval, measured, p_value, two_sided

if TYPE_CHECKING:
    from mmdit_probe.models.tokens import TokenTable

PLAIN, CLEAN, WORDS = "as they are", "without sinks", "words only"
SCORES = ("miou", "miou_min_max", "auc")
MEAN = -1
"""Value of the column `head` for the mean over heads."""


def map_scores(
    seen: SinkFree, label: NDArray[np.integer[Any]], names: Sequence[str], tokens: TokenTable, layers: Iterable[int]
) -> pd.DataFrame:
    """Quality of the maps of the classes that the prompt names and the picture has.

    Args:
        seen: after one call of one picture. label: its class ids [H, W]. names: of the ids.
        tokens: of its prompt. layers: which.

    Returns: layer, head (-1: the mean over heads), maps (as they are | without sinks | words only), removed (share of
    attention on sinks), miou (argmax over the named classes, upsampled, within their pixels), miou_min_max (the same
    with every map stretched to 0..1 first), auc (mean over classes of the probability that a token inside the class
    has a higher value than one outside). NaN where fewer than two classes are named.
    """
    present = [int(index) for index in np.unique(label) if index < len(names)]
    spans = {index: span for index in present if (span := _span(tokens, names[index]))}
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
        row |= {"after": float(wide[CLEAN].mean())} | interval(added).named("difference", "")
        rows.append(row | {"p_holm": p_value(added)})
    columns = ["layer", "head", "score", "n", "before", "after", "difference", "low", "high", "p_holm"]
    found = pd.DataFrame(rows, columns=columns)
    found["p_holm"] = found.groupby("score")["p_holm"].transform(holm)
    return found.assign(verdict=two_sided(found).replace({HIGHER: "better", LOWER: "worse"}))


def _span(tokens: TokenTable, name: str) -> list[int]:
    """Positions of a class's name in the prompt; none if the prompt does not name it."""
    try:
        return [place for places in tokens.word_spans(name).values() for place in places]
    except UserError:
        return []


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
    inside = [(tokens == one).ravel() for one in ids]
    areas = [area_under_curve(words[:, k].flatten(1).numpy(), one) for k, one in enumerate(inside)]
    known = [one for one in areas if np.isfinite(one).all()]
    if known:
        found["auc"] = np.mean(known, axis=0)
    if len(ids) > 1:
        for name, stretch in (("miou", "none"), ("miou_min_max", "minmax")):
            found[name] = mean_iou(map_quality(words, pixels, ids, classes, stretch))
    return found
