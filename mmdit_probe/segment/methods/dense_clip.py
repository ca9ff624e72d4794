"""proxyclip and corrclip: CLIP's last values, gathered by a matrix of what belongs together, named by CLIP's text.

The matrix is the method: from the captured forward's attention ("i2i") or features ("features"), from another network
or one's own features, or the identity (the control). Both are written from their papers' descriptions (the official
ProxyCLIP is under a non-commercial licence, CorrCLIP under none). The whole picture is one window. CorrCLIP's
correction of the label map is the refinement "vote".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.errors import UserError
from mmdit_probe.segment.clip import CLIP, patch_features
from mmdit_probe.segment.methods.base import Method, by_class, renorm
from mmdit_probe.segment.methods.clusters import diffcut
from mmdit_probe.segment.record import Capture
from mmdit_probe.segment.tail import resized

Grid = tuple[int, int]
SPATIAL = {12: 5, 24: 12, 32: 28}
"""Blocks whose mean CorrCLIP adds, by the depth of CLIP, as published; for other depths all but 4, at least one."""


def proxyclip(
    capture: Capture,
    clip: str | CLIP = "scenes-clip",
    source: str | Tensor = "features",
    beta: float = 1.2,
    gamma: float = 3.0,
    temperature: float = 40.0,
    side: int | None = None,
    text: Tensor | None = None,
    pixels: Tensor | None = None,
) -> Tensor:
    """Scores [C, h, w], probabilities over names (arXiv:2408.04883).

    Args:
        clip: CLIP checkpoint: embedded name, folder or hub id; or a loaded one.
        source: of the matrix: "features" of the forward, its "i2i" attention, "identity", a folder or hub id of a
            vision transformer (DINO, DINOv2, SAM, ...), or one's own features [h', w', E].
        beta, gamma: similarities become gamma (s - beta mean s), negative ones are cut, rows are softmaxed. The mean is
            over this picture (the official code's is over the batch).
        temperature: of the softmax over names. side: CLIP's input in pixels; its own if None.
        text: [Q, P] unit vectors of the names in order, in place of CLIP's text.
        pixels: [3, H, W] CLIP's input, in place of the picture.
    """
    model, states, grid = _seen(capture, clip, side, pixels)
    matrix, out = _matrix(capture, source, beta, gamma, grid)
    features = model.head(matrix @ model.values(states[-2], grid, out))  # (M, M) x (M, E)
    return _named(capture, model, model.project(features), out, temperature, text)


def corrclip(
    capture: Capture,
    clip: str | CLIP = "scenes-clip",
    source: str | Tensor = "features",
    tau: float = 4.0,
    eps: float = 0.2,
    alpha: float = 1.0,
    beta: float = 0.5,
    blocks: int | None = None,
    cut: float = 0.5,
    temperature: float = 40.0,
    side: int | None = None,
    text: Tensor | None = None,
    pixels: Tensor | None = None,
) -> Tensor:
    """Scores [C, h, w]: as proxyclip, with attention confined to regions (arXiv:2411.10086).

    Regions are the capture's, e.g. SAM's masks (0: none there); without them diffcut's of the same forward.

    Args:
        clip, source, temperature, side, text, pixels: as in proxyclip ("i2i" is not a feature space and is refused).
        tau: factor on cosines before the softmax. eps: regions whose mean features are nearer than this are merged.
        alpha: weight of the mean of the `blocks` blocks before the last but one (None: `SPATIAL`).
        beta: weight of the class token that sees a merged region only.
        cut: diffcut's threshold for the regions.
    """
    if isinstance(source, str) and source in ("i2i", "identity"):
        raise UserError("corrclip compares features; source must be 'features' or a vision transformer")
    model, states, grid = _seen(capture, clip, side, pixels)
    features, out = _features(capture, source)
    merged = _merged(features, _regions(capture, cut, out), eps)
    matrix = _scoped(features, merged, tau)
    depth = len(states) - 1
    count = blocks or SPATIAL.get(depth, max(1, depth - 4))
    spatial = torch.stack(states[max(1, depth - 1 - count) : depth - 1] or [states[-2]]).mean(0)
    mixed = model.head(matrix @ model.values(states[-2], grid, out))
    mixed = mixed + alpha * model.head(matrix @ model.values(spatial, grid, out))
    small = _nearest(merged.reshape(out), grid)
    _, place = torch.unique(small, return_inverse=True)
    tokens = _region_tokens(model, states[0], place)  # (R, E)
    mixed = mixed + beta * tokens[_nearest(place, out).flatten()]
    return _named(capture, model, model.project(mixed), out, temperature, text)


def region_map(capture: Capture, out: Grid) -> Tensor | None:
    """The capture's own regions [out] on a grid over the network's input, nearest; 0 where there is none."""
    if capture.regions is None:
        return None
    ids, fit = torch.from_numpy(capture.regions), capture.fit
    if tuple(ids.shape) == fit.picture:
        top, left, bottom, right = (round(edge) for edge in fit.source)
        up, across, down, over = fit.target
        canvas = torch.zeros(fit.size, dtype=torch.long)
        canvas[up:down, across:over] = _nearest(ids[top:bottom, left:right], (down - up, over - across))
        ids = canvas
    return _nearest(ids, out)


def _nearest(ids: Tensor, size: Grid) -> Tensor:
    """A map of ids [h, w] at another size."""
    return F.interpolate(ids[None, None].double(), size, mode="nearest")[0, 0].long()


def _seen(
    capture: Capture, clip: str | CLIP, side: int | None, pixels: Tensor | None
) -> tuple[CLIP, list[Tensor], Grid]:
    """CLIP, its block inputs for the picture, and their grid."""
    model = clip if isinstance(clip, CLIP) else CLIP.open(clip)
    if pixels is None:
        pixels = model.pixels([capture.fit.apply(capture.image)], (model.side(side),) * 2)
    return model, *model.hidden(pixels)


def _matrix(capture: Capture, source: str | Tensor, beta: float, gamma: float, grid: Grid) -> tuple[Tensor, Grid]:
    """Which tokens are mixed: rows [M, M] that sum to 1, and their grid."""
    if isinstance(source, str) and source == "identity":
        return torch.eye(grid[0] * grid[1]), grid
    if isinstance(source, str) and source == "i2i":
        return renorm(capture.mean("i2i")), capture.grid
    features, out = _features(capture, source)
    similarity = features @ features.T
    similarity = gamma * (similarity - beta * similarity.mean())
    similarity = similarity.masked_fill(similarity < 0, -torch.inf)
    empty = similarity.isneginf().all(1)
    similarity[empty, empty] = 0.0  # a token that resembles none, itself included, keeps itself
    return similarity.softmax(-1), out


def _features(capture: Capture, source: str | Tensor) -> tuple[Tensor, Grid]:
    """Unit features [M, E] and their grid."""
    if isinstance(source, Tensor):
        if source.ndim != 3:
            raise UserError(f"own features of shape {tuple(source.shape)}: expected [h, w, E]")
        return F.normalize(source.flatten(0, 1).float(), dim=-1), (source.shape[0], source.shape[1])
    if source == "features":
        return capture.features("feat_proj"), capture.grid
    features, grid = patch_features(source, np.array(capture.fit.apply(capture.image)))
    return F.normalize(features, dim=-1), grid


def _named(
    capture: Capture, model: CLIP, vectors: Tensor, grid: Grid, temperature: float, text: Tensor | None
) -> Tensor:
    """Probabilities [C, h, w] over names, the better synonym of each class, on the capture's grid."""
    queries = [query for _, query in capture.queries]
    words = model.text([query.text for query in queries]) if text is None else text.to(vectors)
    if words.shape != (len(queries), vectors.shape[-1]):
        raise UserError(f"text of shape {tuple(words.shape)}: expected [{len(queries)}, {vectors.shape[-1]}]")
    shares = (temperature * vectors @ words.T).softmax(-1)  # (M, P) x (P, Q) -> (M, Q)
    maps = resized(shares.T.reshape(-1, *grid), capture.grid).flatten(1)
    return by_class(capture, list(zip(queries, maps, strict=True)))


def _regions(capture: Capture, cut: float, out: Grid) -> Tensor:
    """Region of every token [M]: the capture's (0: none), or diffcut's from 1."""
    given = region_map(capture, out)
    if given is not None:
        return given.flatten()
    return resized(diffcut(capture, tau=cut), out).argmax(0).flatten() + 1


def _merged(features: Tensor, regions: Tensor, eps: float) -> Tensor:
    """Regions from 1 after joining those with like mean features; 0 stays. DBSCAN with one sample joins by links."""
    from sklearn.cluster import DBSCAN

    ids, place = torch.unique(regions, return_inverse=True)
    known = ids > 0
    if not known.any():
        return torch.zeros_like(regions)
    means = torch.stack([F.normalize(features[place == index].mean(0), dim=-1) for index in known.nonzero()[:, 0]])
    cosine = means @ means.T
    distance = (cosine.max() - cosine).clamp(min=0).numpy()
    clusters = torch.zeros_like(ids)
    found = DBSCAN(eps=eps, min_samples=1, metric="precomputed").fit(distance).labels_
    clusters[known] = torch.from_numpy(np.asarray(found)).long() + 1
    return clusters[place]


def _scoped(features: Tensor, regions: Tensor, tau: float) -> Tensor:
    """Rows [M, M]: softmax of tau cos within a region; pairs with a token of none count where cos is above its mean."""
    cosine = features @ features.T
    none = regions == 0
    allowed = (regions[:, None] == regions[None]) & ~none
    allowed |= (none[:, None] | none[None]) & (cosine > cosine.mean())
    allowed.fill_diagonal_(True)  # a row must not be empty
    return (tau * cosine).masked_fill(~allowed, -torch.inf).softmax(-1)


def _region_tokens(model: CLIP, state: Tensor, regions: Tensor) -> Tensor:
    """One class token per region [R, E] after all blocks: it sees the true class token and its region's patches.

    A copy does not see itself, so that over the whole picture it is the class token; patches and the true class token
    do not see the copies, so they stay what they were.

    Args:
        state: input [1 + n, E] of the first block. regions: [h, w] of the patches, 0..R-1.
    """
    count, patches = int(regions.max()) + 1, regions.flatten()
    mask = torch.full((count + len(state),) * 2, -torch.inf)
    mask[count:, count:] = 0.0
    mask[:count, count] = 0.0
    mask[:count, count + 1 :][torch.arange(count)[:, None] == patches] = 0.0
    tokens = torch.cat([state[:1].expand(count, -1), state])
    for layer in model.layers:
        tokens = model.block(layer, tokens, mask)
    return model.model.vision_model.post_layernorm(tokens[:count])  # type: ignore[no-any-return]


def _reads(options: Mapping[str, Any]) -> tuple[str, ...]:
    source = options["source"]
    return {"features": ("feat_proj",), "i2i": ("i2i",)}.get(source, ()) if isinstance(source, str) else ()


PROXYCLIP = Method("proxyclip", proxyclip, _reads, "arXiv:2408.04883")
CORRCLIP = Method("corrclip", corrclip, lambda options: ("feat_proj",), "arXiv:2411.10086")
