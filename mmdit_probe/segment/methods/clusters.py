"""Unsupervised methods, both from the empty prompt: diffseg merges attention maps, diffcut cuts a graph of features.

Cost at 64 x 64 tokens on a laptop core: diffseg compares 256 anchors with 4096 maps in matrix products; diffcut pools
features to 32 x 32 before it cuts (as its paper does) and computes only the second eigenvector of each part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.errors import UserError, check_known, counted
from mmdit_probe.segment.methods.base import Method, i2i_part, renorm
from mmdit_probe.segment.methods.seg4diff import greedy_merge, symmetric_kl
from mmdit_probe.segment.record import Capture
from mmdit_probe.segment.tail import ROUNDING

FEATURES = ("feat_proj", "feat_out")
OUTPUTS = ("similarity", "clusters")


def diffseg(
    capture: Capture, tau: float | Sequence[float] = 0.4, rounds: int | None = None, anchors: int = 16,
    kmeans: bool = False, i2i: str = "attn",
) -> Tensor:  # fmt: skip
    """Proposals [P, h, w]: image-image attention maps merged by symmetric KL (arXiv:2308.12469).

    The first round averages all maps near an anchor, the others merge anchors greedily.

    Args:
        tau: threshold of every round, or one for each. The original's 0.9 to 1.1 are for a U-Net's self-attention; the
            default was chosen on scenes:train, scan it for other models.
        rounds: with one threshold, how often it is used (3 if None).
        anchors: per side of the grid.
        kmeans: move the merged proposals by k-means over all maps, started at them (the original's option, off there
            too).
        i2i: "attn", or "attn2" in models that have an image-only attention.
    """
    first, *others = (tau,) * (rounds or 3) if isinstance(tau, int | float) else tau
    if not isinstance(tau, int | float) and rounds not in (None, len(tau)):
        found = f"{counted(len(tau), 'threshold')} for {counted(rounds, 'round')}"
        raise UserError(f"diffseg: {found}; give one per round, or one for all")
    maps = renorm(capture.mean(i2i_part(i2i)))
    h, w = capture.grid
    places = (_evenly(h, anchors)[:, None] * w + _evenly(w, anchors)[None]).flatten()
    near = (symmetric_kl(maps[places], maps) < first).float()
    near[torch.arange(len(places)), places] = 1.0
    proposals = (near @ maps) / near.sum(1, keepdim=True)
    for threshold in others:
        proposals = greedy_merge(proposals, threshold)
    if kmeans and len(proposals) > 1:
        from sklearn.cluster import KMeans

        members = KMeans(len(proposals), init=proposals.numpy(), n_init=1).fit(maps.numpy()).labels_
        proposals = torch.stack([maps[torch.from_numpy(members == index)].mean(0) for index in np.unique(members)])
    return proposals.reshape(-1, h, w)


def diffcut(
    capture: Capture, tau: float = 0.5, alpha: float = 5.0, pool: int = 32, features: str = "feat_proj",
    output: str = "similarity",
) -> Tensor:  # fmt: skip
    """Proposals [P, h, w]: recursive normalised cuts of a feature graph (arXiv:2406.02842).

    Args:
        tau: a part is cut while its normalised cut is below this. alpha: power on the affinities in 0..1; the
            original's 10 is for a U-Net's features and cuts too finely here (chosen on scenes:train).
        pool: the graph has at most pool x pool nodes.
        features: "feat_proj" after the attention's output projection (the original's place), or "feat_out".
        output: "similarity" of every token to the mean of each cluster's unit features, whose argmax at the picture's
            pixels is the official label map; or the "clusters" of the graph themselves, one 0/1 map each.

    Features of several layers are normalised and set side by side. Parts are kept as lists of nodes, so that no two of
    them can collide, as sums of labels do in the official code after some 40 cuts, and tokens with an affinity of
    exactly 0 (the least similar pair) are cut like others, which that code stops to do.
    """
    check_known("features", features, FEATURES)
    check_known("output", output, OUTPUTS)
    whole = capture.features(features)  # (I, E)
    h, w = capture.grid
    grid = whole.T.reshape(1, -1, h, w)
    if max(h, w) > pool:
        grid = F.adaptive_avg_pool2d(grid, (min(h, pool), min(w, pool)))
    nodes = F.normalize(grid[0].flatten(1).T, dim=-1).double()
    affinity = nodes @ nodes.T
    low, high = affinity.min(), affinity.max()
    alike = high - low <= ROUNDING  # all tokens are: what is left is rounding, and no reason to cut
    affinity = torch.ones_like(affinity) if alike else ((affinity - low) / (high - low)) ** alpha
    groups = normalised_cuts(affinity.numpy(), tau)
    if output == "clusters":
        maps = torch.zeros(len(groups), len(nodes))
        for index, group in enumerate(groups):
            maps[index, group] = 1.0
        return maps.reshape(-1, *grid.shape[-2:])
    centres = torch.stack([nodes[group].mean(0) for group in groups]).float()  # means of unit vectors, not made unit
    return (centres @ whole.T).reshape(-1, h, w)


def normalised_cuts(affinity: NDArray[np.float64], tau: float) -> list[NDArray[np.int64]]:
    """Groups of nodes after cutting while the best two-way normalised cut is below tau (Shi and Malik 2000).

    Args:
        affinity: [n, n], symmetric, in 0..1.
    """
    done: list[NDArray[np.int64]] = []
    waiting = [np.arange(len(affinity))]
    while waiting:
        nodes = waiting.pop()
        split = _best_cut(affinity[np.ix_(nodes, nodes)]) if len(nodes) > 1 else None
        if split is None or split[0] >= tau:
            done.append(nodes)
        else:
            waiting += [nodes[split[1]], nodes[~split[1]]]
    return sorted(done, key=lambda group: int(group[0]))


def _best_cut(affinity: NDArray[np.float64]) -> tuple[float, NDArray[np.bool_]] | None:
    """(value, side) of the best of 100 thresholds on the second eigenvector; None if no threshold separates nodes."""
    degree = affinity.sum(1).clip(min=1e-12)
    scale = degree**-0.5
    vector = scale * _second_vector(affinity * scale[:, None] * scale[None])
    vector *= np.sign(vector[np.abs(vector).argmax()])  # its sign decides between equal cuts
    best: tuple[float, NDArray[np.bool_]] | None = None
    total = degree.sum()
    for threshold in np.unique(np.linspace(0.99 * vector.min(), 0.99 * vector.max(), 100)):
        side = vector > threshold
        if not side.any() or side.all():
            continue
        mass = degree[side].sum()
        between = affinity[side][:, ~side].sum()
        value = float(between / mass + between / (total - mass))
        if best is None or value < best[0]:
            best = value, side
    return best


def _second_vector(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eigenvector of the second largest eigenvalue of a symmetric matrix."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import ArpackError, eigsh

    count = len(matrix)
    if count > 400:
        try:
            values, vectors = eigsh(matrix, k=2, which="LA", v0=np.linspace(1.0, 2.0, count), tol=1e-6)
            return np.asarray(vectors[:, np.argsort(values)[0]])
        except ArpackError:
            pass  # nearly equal eigenvalues, or all 0: the dense solver below takes longer and always answers
    return np.asarray(eigh(matrix, subset_by_index=[count - 2, count - 2])[1][:, 0])


def _evenly(length: int, count: int) -> Tensor:
    """Up to `count` evenly spaced places in 0..length-1, centred."""
    count = min(count, length)
    step = 1 if count == 1 else max(1, (length - 1) // (count - 1))
    start = (length - 1 - step * (count - 1)) // 2
    return torch.arange(count) * step + start


DIFFSEG = Method("diffseg", diffseg, lambda options: (i2i_part(options["i2i"]),), "arXiv:2308.12469", unsupervised=True)
DIFFCUT = Method("diffcut", diffcut, lambda options: (options["features"],), "arXiv:2406.02842", unsupervised=True)
