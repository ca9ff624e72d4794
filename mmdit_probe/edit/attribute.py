"""Causal attribution of words to regions, and whether attention maps agree with it (captum).

    table = attribute(load("scenes-sd3"), scenes, method="ablation")
    agreement(table)                    # per layer: rank correlation of attention and attribution, with a control

For each scene, each of its class words and each class region: by how much does the word lower the denoising loss inside
the region? Feature ablation replaces the word's embeddings by those of the empty prompt; integrated gradients go along
the line between the two. The attention is the I2T map of the word, averaged over the region. Only what attention reads
is changed: the pooled text embedding keeps its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.models.mmdit import MMDiT, TextCondition
from mmdit_probe.observe.maps import TextMaps
from mmdit_probe.observe.probe import probe

if TYPE_CHECKING:
    import pandas as pd

    from mmdit_probe.scenes.world import Scene

Method = Literal["ablation", "gradients"]
METHODS: tuple[Method, ...] = ("ablation", "gradients")


def attribute(
    model: MMDiT, items: Sequence[Scene], *, method: Method = "ablation", sigma: float = 0.7, seed: int = 0,
    steps: int = 16, advance: Callable[[], None] = lambda: None,
) -> pd.DataFrame:  # fmt: skip
    """Attribution and attention of every (word, region) of every scene.

    Args:
        model: an MM-DiT that knows the words of the world.
        items: scenes with two classes or more (others are left out: there is nothing to tell apart).
        method: "ablation" or "gradients" (integrated gradients with `steps` points).
        sigma: noise level, above 0. seed: noise of scene k is drawn from seed + k.

    Returns: item, word, region, attribution (decrease of the region's mean squared velocity error), layer, attention.

    Raises:
        UserError: unknown method, sigma out of range, or no scene with two classes.
    """
    import pandas as pd

    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if not 0.0 < sigma <= 1.0:
        raise UserError(f"sigma {sigma}: expected a noise level above 0, up to 1")
    parts = []
    for index, item in enumerate(items):
        if len(item.class_names) > 1:
            parts.append(_of_scene(model, item, method, sigma, seed + index, steps).assign(item=index))
        advance()
    if not parts:
        raise UserError("no scene has two classes; attribution compares words")
    return pd.concat(parts, ignore_index=True)


def agreement(table: pd.DataFrame, draws: int = 500) -> pd.DataFrame:
    """Per layer: Spearman correlation over all (word, region) pairs, 95 % bootstrap interval over scenes.

    Returns: layer, n (scenes), rho, low, high, control, control_low, control_high, verdict. The control pairs each
    word's attribution with the attention of the scene's next word; "as control" if the intervals overlap.
    """
    import pandas as pd

    rng = np.random.default_rng(0)
    rows = []
    for layer, part in table.groupby("layer"):
        scenes = []
        for _, one in part.groupby("item"):
            causal, seen = (one.pivot(index="word", columns="region", values=v) for v in ("attribution", "attention"))
            scenes.append((causal.to_numpy(), seen.to_numpy(), np.roll(seen.to_numpy(), 1, axis=0)))
        row: dict[str, Any] = {"layer": layer, "n": len(scenes)}
        for name, place in (("rho", 1), ("control", 2)):
            pairs = [(scene[0].ravel(), scene[place].ravel()) for scene in scenes]
            again = [_spearman([pairs[k] for k in rng.integers(0, len(pairs), len(pairs))]) for _ in range(draws)]
            low, high = np.nanquantile(again, [0.025, 0.975])
            prefix = "" if name == "rho" else "control_"
            row |= {name: _spearman(pairs), f"{prefix}low": float(low), f"{prefix}high": float(high)}
        row["verdict"] = "beyond control" if row["low"] > row["control_high"] else "as control"
        rows.append(row)
    return pd.DataFrame(rows)


def _spearman(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    from scipy.stats import spearmanr

    causal, seen = (np.concatenate([pair[k] for pair in pairs]) for k in (0, 1))
    return float(spearmanr(causal, seen).statistic)


def _of_scene(model: MMDiT, item: Scene, method: Method, sigma: float, seed: int, steps: int) -> pd.DataFrame:
    import pandas as pd

    from mmdit_probe.scenes.world import CLASSES

    names = item.class_names
    text, empty = model.encode_prompt(" ".join(names)), model.encode_prompt("")
    clean = model.encode_image(item.image)
    noised = model.noise(clean, sigma, seed)
    target = (noised - clean) / sigma  # n - x, from x_t = (1 - sigma) x + sigma n
    masks = torch.stack([torch.from_numpy(item.classes == CLASSES.index(name)).float() for name in names])
    h, w = clean.shape[-2:]
    regions = torch.nn.functional.adaptive_avg_pool2d(masks, (h, w)).to(clean.device)
    spans = [[p for positions in text.tokens[0].word_spans(name).values() for p in positions] for name in names]

    def gain(embeddings: Tensor) -> Tensor:
        """Negative loss [B, R] in each region for texts [B, T, C]."""
        condition = TextCondition(embeddings, text.pooled.repeat(len(embeddings), 1), text.tokens * len(embeddings))
        velocity = model.denoise(noised.repeat(len(embeddings), 1, 1, 1), sigma, condition, grad=True)
        error = (velocity - target).square().mean(1)  # [B, h, w]
        return -torch.einsum("bhw,rhw->br", error, regions) / regions.sum((1, 2))

    causal = attributions(
        gain, text.prompt_embeds.float(), empty.prompt_embeds.float(), spans, len(names), method, steps
    )
    with probe(model, TextMaps()) as run:
        model.denoise(noised, sigma, text)
    rows = []
    for layer in range(len(model.layers)):
        maps = run[TextMaps].maps(layer)[0]  # [h, w, T]
        areas = torch.nn.functional.adaptive_avg_pool2d(masks, (maps.shape[0], maps.shape[1]))
        seen = torch.einsum("rhw,hwt->rt", areas, maps) / areas.sum((1, 2))[:, None]
        for i, word in enumerate(names):
            for r, region in enumerate(names):
                rows.append(
                    {"word": word, "region": region, "attribution": float(causal[i, r]), "layer": layer,
                     "attention": float(seen[r, spans[i]].sum())}
                )  # fmt: skip
    return pd.DataFrame(rows)


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
    groups = torch.full(embeddings.shape[1:2], len(spans), dtype=torch.long)
    for word, positions in enumerate(spans):
        groups[list(positions)] = word
    mask = groups[None, :, None].expand(embeddings.shape).to(embeddings.device)
    for output in range(outputs):
        if method == "ablation":
            with torch.no_grad():
                values = FeatureAblation(gain).attribute(
                    embeddings, baseline, target=output, feature_mask=mask, perturbations_per_eval=1
                )
            found[:, output] = [float(values[0, positions[0], 0]) for positions in spans]
        else:
            values = IntegratedGradients(gain).attribute(
                embeddings, baseline, target=output, n_steps=steps, internal_batch_size=steps
            )
            found[:, output] = [float(values[0, list(positions)].sum()) for positions in spans]
    return found
