"""Causal attribution of words to regions, and whether attention maps agree with it (captum).

    table = attribute(load("scenes-sd3"), scenes, method="ablation")
    agreement(table)                    # per layer: rank correlation of attention and attribution, with a control

For each scene, each of its class words and each class region, by how much does the word change a target?

    loss    the denoising loss inside the region: what the word is worth to the image there
    mass    the mass of the word's own I2T map inside the region, layer by layer: whether the map follows the word or
            would be there without it

Feature ablation replaces the word's embeddings by those of the empty prompt; integrated gradients go along the line
between the two. The attention is the I2T map of the word, averaged over the region. Only what attention reads is
changed: the pooled text embedding keeps its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.magnet.tap import TextMapTap
from mmdit_probe.models.mmdit import MMDiT, TextCondition
from mmdit_probe.observe.probe import probe
from mmdit_probe.results.statistics import (
    BEYOND,
    NOT_BEYOND,
    corrected,
    jackknifed,
    measured,
    spearman,
    verdicts,
)
from mmdit_probe.scenes.world import CLASSES, Scene
from mmdit_probe.specs import HeadSpec, Spec, layer_indices

Method = Literal["ablation", "gradients"]
METHODS: tuple[Method, ...] = ("ablation", "gradients")
Target = Literal["loss", "mass"]
TARGETS: tuple[Target, ...] = ("loss", "mass")


def attribute(
    model: MMDiT, items: Sequence[Scene], *, method: Method = "ablation", target: Target = "loss", sigma: float = 0.7,
    seed: int = 0, steps: int = 16, layers: Spec = "all", heads: HeadSpec = "all", edits: Sequence[Any] = (),
) -> pd.DataFrame:  # fmt: skip
    """Attribution and attention of every (word, region) of every scene.

    Args:
        model: an MM-DiT that knows the words of the world.
        items: scenes with two classes or more (others are left out: there is nothing to tell apart).
        method: "ablation" or "gradients" (integrated gradients with `steps` points).
        target: "loss" or "mass", see above.
        sigma: noise level, above 0. seed: noise of scene k is drawn from seed + k.
        layers, heads: whose maps. edits: attached to every call, such as those of a control.

    Returns: item, word, region, attribution (decrease of the region's mean squared velocity error, or increase of the
    word's mean map value in the region), layer, attention. The attribution to the loss is the same in every layer.

    Raises:
        UserError: unknown method or target, sigma out of range, or no scene with two classes.
    """
    check_known("method", method, METHODS)
    check_known("target", target, TARGETS)
    if not 0.0 < sigma <= 1.0:
        raise UserError(f"sigma {sigma}: expected a noise level above 0, up to 1")
    chosen = layer_indices(layers, len(model.layers))
    parts = []
    for index, item in enumerate(items):
        if len(item.class_names) > 1:
            scene = _SceneTargets(model, item, sigma, seed + index, chosen, heads, edits)
            parts.append(scene.table(method, target, steps).assign(item=index))
    if not parts:
        raise UserError("no scene has two classes; attribution compares words")
    return pd.concat(parts, ignore_index=True)


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Per layer: Spearman correlation over all (word, region) pairs, 95 % jackknife interval over scenes.

    Returns: layer, n (scenes), rho, low, high, control, control_low, control_high, difference, difference_low,
    difference_high, p_holm, verdict. The control pairs each word's attribution with the attention of the scene's next
    word; the difference is paired (the same scene left out of both), its p value corrected for the layers (Holm).
    "beyond control" if rho's interval and the difference's lie above 0 and p_holm is at most .05, "not beyond control"
    if not, "too few items" where p_holm is NaN.
    """
    rows = []
    for layer, part in measured(table).groupby("layer"):
        scenes = []
        for _, one in part.groupby("item"):
            causal, seen = _matrices(one)
            scenes.append((causal.ravel(), seen.ravel(), np.roll(seen, 1, axis=0).ravel()))
        row: dict[str, Any] = {"layer": layer, "n": len(scenes)}
        for name, places, most in (("rho", (1,), 1.0), ("control", (2,), 1.0), ("difference", (1, 2), 2.0)):
            prefix = "" if name == "rho" else f"{name}_"
            found = jackknifed(partial(_rho, scenes, places), len(scenes))
            low, high = np.clip([found.low, found.high], -most, most)
            row |= {name: found.value, f"{prefix}low": low, f"{prefix}high": high}
        rows.append(row | {"p_holm": found.p})
    result = corrected(pd.DataFrame(rows), ["p_holm"])
    beyond = (result["low"] > 0) & (result["difference_low"] > 0)
    return result.assign(verdict=verdicts(result["p_holm"], beyond, BEYOND, NOT_BEYOND))


def by_scene(table: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation within every scene, for `results.statistics.compare`: item, control, layer, value.

    Attention without differences (uniform) has no ranks: its correlation counts as 0.
    """
    rows = []
    for (control, item, layer), part in table.groupby(["control", "item", "layer"], observed=True):
        value = spearman(*(matrix.ravel() for matrix in _matrices(part)))
        rows.append({"control": control, "item": item, "layer": layer, "value": 0.0 if np.isnan(value) else value})
    return pd.DataFrame(rows)


def _matrices(part: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Attribution and attention of one scene and layer, words by row and regions by column."""
    causal, seen = (part.pivot(index="word", columns="region", values=v) for v in ("attribution", "attention"))
    return causal.to_numpy(), seen.to_numpy()


def _rho(scenes: Sequence[tuple[np.ndarray, ...]], places: tuple[int, ...], drawn: np.ndarray) -> float:
    """Rank correlation of attribution (place 0 of a scene) with the attention at a place; of two, the difference."""
    causal, *seen = (np.concatenate([scenes[k][place] for k in drawn]) for place in (0, *places))
    first, *second = (spearman(causal, one) for one in seen)
    return first - sum(second)


class _SceneTargets:
    """One noised scene with the bare list of its classes as prompt, and the two targets as functions of the text."""

    def __init__(
        self, model: MMDiT, item: Scene, sigma: float, seed: int, layers: Sequence[int], heads: HeadSpec,
        edits: Sequence[Any],
    ) -> None:  # fmt: skip
        self.model, self.names, self.sigma, self.layers = model, item.class_names, sigma, layers
        self.text, self.empty = model.encode_prompt(" ".join(self.names)), model.encode_prompt("")
        clean = model.encode_image(item.image)
        self.noised = model.noise(clean, sigma, seed)
        self.velocity = (self.noised - clean) / sigma  # n - x, from x_t = (1 - sigma) x + sigma n
        masks = [torch.from_numpy(item.classes == CLASSES.index(name)).float() for name in self.names]
        self.masks = torch.stack(masks).to(clean.device)
        tokens = self.text.tokens[0]
        self.spans = [[p for places in tokens.word_spans(name).values() for p in places] for name in self.names]
        groups = torch.zeros(1, len(tokens), len(self.names))
        for word, span in enumerate(self.spans):
            groups[0, span, word] = 1.0
        self.groups = groups.to(clean.device)
        self.tap = TextMapTap(layers, space="probability", heads=heads, reduce=True)
        self.edits = list(edits)

    def table(self, method: Method, target: Target, steps: int) -> pd.DataFrame:
        embeddings, baseline = self.text.prompt_embeds.float(), self.empty.prompt_embeds.float()
        words, layers = len(self.names), len(self.layers)
        with torch.no_grad():
            attention = self._masses(embeddings)[0].cpu().numpy()  # [L, W, R]
        gain, count = (self._gain, words) if target == "loss" else (self._flat_masses, attention.size)
        found = attributions(gain, embeddings, baseline, self.spans, count, method, steps)
        if target == "loss":
            causal = np.broadcast_to(found, (layers, words, words))  # [L, W, R]
        else:
            every = found.reshape(words, layers, words, words)  # by the word ablated, of the map of a word in a region
            causal = np.stack([every[word, :, word] for word in range(words)], 1)
        layer, word, region = (axis.ravel() for axis in np.indices(attention.shape))
        names = np.array(self.names, dtype=object)
        return pd.DataFrame(
            {"word": names[word], "region": names[region], "attribution": causal.ravel().astype(float),
             "layer": np.array(self.layers)[layer], "attention": attention.ravel().astype(float)}
        )  # fmt: skip

    def _denoise(self, embeddings: Tensor, *tap: TextMapTap) -> Tensor:
        count = len(embeddings)
        condition = TextCondition(embeddings, self.text.pooled.repeat(count, 1), self.text.tokens * count)
        with probe(self.model, edits=[*self.edits, *tap]):
            return self.model.denoise(self.noised.repeat(count, 1, 1, 1), self.sigma, condition, grad=True)

    def _gain(self, embeddings: Tensor) -> Tensor:
        """Negative loss [B, R] in each region for texts [B, T, C]."""
        error = (self._denoise(embeddings) - self.velocity).square().mean(1)  # [B, h, w]
        regions = torch.nn.functional.adaptive_avg_pool2d(self.masks, (error.shape[1], error.shape[2]))
        return -torch.einsum("bhw,rhw->br", error, regions) / regions.sum((1, 2))

    def _masses(self, embeddings: Tensor) -> Tensor:
        """Mean of every word's map in every region and layer [B, L, W, R] for texts [B, T, C]."""
        self.tap.begin(self.groups)
        self._denoise(embeddings, self.tap)
        maps = torch.stack(list(self.tap.take().values()), 1)  # [B, L, W, h, w]
        areas = torch.nn.functional.adaptive_avg_pool2d(self.masks, (maps.shape[3], maps.shape[4])).to(maps)
        return torch.einsum("rhw,blkhw->blkr", areas, maps) / areas.sum((1, 2))

    def _flat_masses(self, embeddings: Tensor) -> Tensor:
        return self._masses(embeddings).flatten(1)


def attributions(
    gain: Callable[[Tensor], Tensor], embeddings: Tensor, baseline: Tensor, spans: Sequence[Sequence[int]],
    outputs: int, method: Method, steps: int,
) -> np.ndarray:  # fmt: skip
    """Attribution [W, R] of each of W runs of text positions to each of R outputs of `gain`.

    Args:
        gain: texts [B, T, C] -> [B, R]. embeddings, baseline: [1, T, C].
        spans: W lists of positions. outputs: R. method, steps: see `attribute`.
    """
    from captum.attr import FeatureAblation, IntegratedGradients

    found = np.zeros((len(spans), outputs))
    if method == "ablation":
        groups = torch.full(embeddings.shape[1:2], len(spans), dtype=torch.long)
        for word, positions in enumerate(spans):
            groups[list(positions)] = word
        mask = groups[None, :, None].expand(embeddings.shape).to(embeddings.device)
        with torch.no_grad():
            # All outputs of one text are seen by one forward: captum then gives [R, T, C].
            values = FeatureAblation(lambda texts: gain(texts)[0]).attribute(
                embeddings, baseline, feature_mask=mask, perturbations_per_eval=1
            )
        for word, positions in enumerate(spans):
            found[word] = values[:, positions[0], 0].cpu().numpy()
        return found
    for output in range(outputs):
        values = IntegratedGradients(gain).attribute(
            embeddings, baseline, target=output, n_steps=steps, internal_batch_size=steps
        )
        found[:, output] = [float(values[0, list(positions)].sum()) for positions in spans]
    return found
