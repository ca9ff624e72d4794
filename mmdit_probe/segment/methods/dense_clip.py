"""proxyclip and corrclip: CLIP's last values, gathered by a matrix of what belongs together, named by CLIP's text.

The matrix is the method; value path and text head are CLIP's and stay fixed. It may come from the captured forward's
attention ("i2i") or features ("features"), from another network the user names, or be the identity (the control). The
class names reach CLIP only, but the capture still holds the forward of the joint prompt, shared with the other methods.

The official ProxyCLIP is under a non-commercial licence and CorrCLIP under none: both are written here from their
descriptions. The whole picture is one window; there is no sliding window.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.errors import UserError
from mmdit_probe.segment.clip import DenseCLIP, patch_features
from mmdit_probe.segment.methods.base import Method, by_class, renorm
from mmdit_probe.segment.methods.clusters import diffcut
from mmdit_probe.segment.record import Capture

SOURCES = ("features", "i2i", "identity")


def proxyclip(
    capture: Capture,
    clip: str = "scenes-clip",
    source: str = "features",
    beta: float = 1.2,
    gamma: float = 3.0,
    temperature: float = 40.0,
    side: int | None = None,
) -> Tensor:
    """Scores [C, h, w], probabilities over names (arXiv:2408.04883).

    Args:
        clip: CLIP checkpoint: embedded name, folder or hub id.
        source: of the matrix: "features" of the forward, its "i2i" attention, "identity", or a folder or hub id of a
            vision transformer (DINO, DINOv2, SAM, ...).
        beta, gamma: similarities become gamma (s - beta mean s), negative ones are cut, rows are softmaxed. The mean is
            over this picture (the official code's is over the batch).
        temperature: of the softmax over names. side: CLIP's input in pixels; its own if None.
    """
    model = DenseCLIP.open(clip)
    image = np.array(capture.fit.apply(capture.image))
    states, grid = model.hidden(image, side)
    matrix, out = _matrix(capture, image, source, beta, gamma, grid)
    features = model.head(matrix @ model.values(states[-2], grid, out))
    return _named(capture, model, model.project(features), out, temperature)


def corrclip(
    capture: Capture,
    clip: str = "scenes-clip",
    source: str = "features",
    tau: float = 4.0,
    eps: float = 0.2,
    alpha: float = 1.0,
    beta: float = 0.5,
    blocks: int = 5,
    cut: float = 0.5,
    correction: bool = True,
    temperature: float = 40.0,
    side: int | None = None,
) -> Tensor:
    """Scores [C, h, w]: as proxyclip, with attention confined to regions (arXiv:2411.10086).

    Regions are diffcut's of the same forward, so no second segmentation model is needed; the paper takes SAM2's.

    Args:
        clip, source, temperature, side: as in proxyclip ("i2i" is not a feature space and is refused).
        tau: factor on cosines before the softmax. eps: regions whose mean features are nearer than this are merged.
        alpha: weight of the mean of the `blocks` blocks before the last but one. beta: weight of the region's own CLS.
        cut: diffcut's threshold for the regions. correction: majority vote of the result within each region.
    """
    if source in ("i2i", "identity"):
        raise UserError("corrclip compares features; source must be 'features' or a vision transformer")
    model = DenseCLIP.open(clip)
    image = np.array(capture.fit.apply(capture.image))
    states, grid = model.hidden(image, side)
    features, out = _features(capture, image, source)
    regions = _regions(capture, cut, out)
    cosine = features @ features.T
    merged = _merged(features, regions, eps)
    allowed = merged[:, None] == merged[None]
    matrix = torch.where(allowed, tau * cosine, -torch.inf).softmax(-1)
    last = len(states) - 1
    spatial = torch.stack(states[max(1, last - 1 - blocks) : last - 1] or [states[-2]]).mean(0)
    mixed = model.head(matrix @ model.values(states[-2], grid, out))
    mixed = mixed + alpha * model.head(matrix @ model.values(spatial, grid, out))
    mixed = mixed + beta * _region_tokens(model, states[0], regions.reshape(out), grid)[regions]
    scores = _named(capture, model, model.project(mixed), out, temperature)
    return _voted(scores, regions) if correction else scores


def _matrix(
    capture: Capture, image: np.ndarray, source: str, beta: float, gamma: float, grid: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    if source == "identity":
        return torch.eye(grid[0] * grid[1]), grid
    if source == "i2i":
        return renorm(capture.mean("i2i")), capture.grid
    features, out = _features(capture, image, source)
    similarity = features @ features.T
    similarity = gamma * (similarity - beta * similarity.mean())
    similarity = similarity.masked_fill(similarity < 0, -torch.inf)
    similarity.fill_diagonal_(gamma)  # a token that resembles none keeps itself: a row must not be empty
    return similarity.softmax(-1), out


def _features(capture: Capture, image: np.ndarray, source: str) -> tuple[Tensor, tuple[int, int]]:
    """Unit features [M, E] and their grid."""
    if source == "features":
        return capture.features("feat_proj"), capture.grid
    features, grid = patch_features(source, image)
    return F.normalize(features, dim=-1), grid


def _named(capture: Capture, model: DenseCLIP, vectors: Tensor, grid: tuple[int, int], temperature: float) -> Tensor:
    """Probabilities [C, h, w] over names, the better synonym of each class, on the capture's grid."""
    queries = [query for one in capture.passes for query in one.prompt.queries]
    shares = (temperature * vectors @ model.text([query.text for query in queries]).T).softmax(-1)  # [M, Q]
    if grid != capture.grid:
        maps = shares.T.reshape(1, -1, *grid)
        shares = F.interpolate(maps, capture.grid, mode="bilinear", align_corners=False)[0].flatten(1).T
    return by_class(capture, [(query, shares[:, index]) for index, query in enumerate(queries)])


def _regions(capture: Capture, cut: float, out: tuple[int, int]) -> Tensor:
    """Region of every token [M], from 0 without gaps."""
    maps = diffcut(capture, tau=cut)
    if tuple(maps.shape[1:]) != out:
        maps = F.interpolate(maps[None], out, mode="bilinear", align_corners=False)[0]
    return torch.unique(maps.argmax(0).flatten(), return_inverse=True)[1]


def _merged(features: Tensor, regions: Tensor, eps: float) -> Tensor:
    """Regions after joining those with like mean features: DBSCAN with one sample is joining by links."""
    from sklearn.cluster import DBSCAN

    count = int(regions.max()) + 1
    means = torch.stack([F.normalize(features[regions == index].mean(0), dim=-1) for index in range(count)])
    cosine = means @ means.T
    distance = (cosine.max() - cosine).clamp(min=0).numpy()
    found = DBSCAN(eps=eps, min_samples=1, metric="precomputed").fit(distance).labels_
    return torch.from_numpy(np.asarray(found))[regions]


def _region_tokens(model: DenseCLIP, state: Tensor, regions: Tensor, grid: tuple[int, int]) -> Tensor:
    """One class token per region [R, E] after all blocks: it sees the true class token and its region's patches.

    A copy does not see itself, so that over the whole picture it is the class token; patches and the true class token
    do not see the copies, so they stay what they were.
    """
    count = int(regions.max()) + 1
    small = F.interpolate(regions[None, None].float(), grid, mode="nearest")[0, 0].long().flatten()
    total = count + len(state)
    mask = torch.full((total, total), -torch.inf)
    mask[count:, count:] = 0.0
    mask[:count, count] = 0.0
    for index in range(count):
        mask[index, count + 1 :][small == index] = 0.0
    tokens = torch.cat([state[:1].expand(count, -1), state])
    for layer in model.layers:
        tokens = model.block(layer, tokens, mask)
    return model.model.vision_model.post_layernorm(tokens[:count])


def _voted(scores: Tensor, regions: Tensor) -> Tensor:
    """Each token's scores replaced by its region's shares of votes; the vote of a region is one label."""
    flat = scores.flatten(1)
    if flat.shape[1] != len(regions):
        return scores
    votes = F.one_hot(flat.argmax(0), len(flat)).float()  # [I, C]
    shares = torch.zeros(int(regions.max()) + 1, len(flat)).index_add_(0, regions, votes)
    shares = renorm(shares)[regions]
    return shares.T.reshape(scores.shape)


PROXYCLIP = Method("proxyclip", proxyclip, ("i2i", "feat_proj"), "arXiv:2408.04883")
CORRCLIP = Method("corrclip", corrclip, ("feat_proj",), "arXiv:2411.10086")
