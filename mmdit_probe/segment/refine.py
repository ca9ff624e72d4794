"""Refinement beyond the token grid: separate steps, usable after any method, off unless asked for by name.

    Refinement.parse("affinity:2+pamr")(scores, capture)          # [C, h, w] -> [C, height, width]

    minmax           each class map to 0..1 over the grid     centre   each class map divided by its mean
    affinity[:n]     scores <- S^n scores, S the row-normalised I2I block (DiffSegmenter, iSeg, GoCA)
    walk[:n]         the same with heads weighted by how slowly their walk mixes (TokenRank) instead of equally
    nosink[:n]       the same after taking out sink columns: tokens that many queries look at whatever they show
    regions          each token gets the mean scores of its region; regions are the capture's own, else diffcut's
    pamr[:n]         n rounds of pixel-adaptive averaging on the picture's colours (arXiv:2005.08104)
    vote             each pixel of a region takes the region's most frequent label (CorrCLIP's map correction)

Steps run in the order of their names, those on the grid before those on pixels. "vote" is the last: it counts labels,
the background's too, so it comes after the background rule (`Refinement.labels`). Put "minmax" or "centre" before
"affinity" for methods whose scores are raw probabilities: averaging leaves only the difference of the words' means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.segment.methods.base import renorm
from mmdit_probe.segment.methods.clusters import diffcut
from mmdit_probe.segment.methods.dense_clip import region_map
from mmdit_probe.segment.record import Capture
from mmdit_probe.segment.settings import PIXELS, Background, parse_steps
from mmdit_probe.segment.tail import STRETCHES, label, probabilities, resized, strongest

_DILATIONS = (1, 2, 4, 8)
_SIDE = 512
"""Longest side at which pixels are refined; larger pictures are refined at this size and enlarged."""


@dataclass(frozen=True)
class Refinement:
    """Steps with their numbers of rounds, in order."""

    steps: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Refinement:
        """From "none", "affinity", "affinity:3+pamr".

        Raises:
            UserError: an unknown step or number, or a pixel step before a grid step.
        """
        return cls(parse_steps(text))

    @property
    def keep(self) -> tuple[str, ...]:
        """Parts of the record that the steps read."""
        names = {name for name, _ in self.steps}
        parts = {"i2i": {"affinity", "nosink"}, "i2i_walk": {"walk"}, "feat_proj": {"regions", "vote"}}
        return tuple(part for part, readers in parts.items() if names & readers)

    def on_grid(self, scores: Tensor, capture: Capture) -> Tensor:
        """Scores [C, h, w] after the steps that work on tokens; maps of another grid are brought to the token grid."""
        for name, rounds in self.steps:
            if name in PIXELS:
                continue
            if name in STRETCHES:
                scores = STRETCHES[name](scores)
                continue
            scores = resized(scores, capture.grid)
            if name == "regions":
                scores = by_region(scores, regions_of(capture, capture.grid))
                continue
            chain = capture.once(name, lambda name=name: _chain(capture, name))  # type: ignore[misc]
            flat = scores.flatten(1).T
            for _ in range(rounds):
                flat = chain @ flat
            scores = flat.T.reshape(scores.shape)
        return scores

    def on_pixels(self, scores: Tensor, capture: Capture) -> Tensor:
        """Scores [C, H, W] after the steps at the picture's size; pixels that were not shown take no part in them."""
        top, left, bottom, right = capture.fit.shown
        shown = np.s_[..., top:bottom, left:right]
        for name, rounds in self.steps:
            if name == "pamr":
                affinity = capture.once("pamr", lambda: PixelAffinity.of(capture.image[top:bottom, left:right]))
                scores, before = torch.zeros_like(scores), scores
                scores[shown] = affinity.spread(before[shown], rounds)
        return scores

    def labels(
        self, scores: Tensor, capture: Capture, background: Background | None = None, names: list[str] | None = None
    ) -> NDArray[np.uint16]:
        """Labels [H, W] of scores [C, H, W] that the other steps were taken on, as `tail.label`, after the vote.

        Pixels that the network was not shown have no scores: their label is 0, and they decide nothing.
        """
        top, left, bottom, right = capture.fit.shown
        shown = np.s_[top:bottom, left:right]
        found = np.zeros(scores.shape[1:], np.uint16)
        found[shown] = label(scores[:, top:bottom, left:right], background, names)
        if any(name == "vote" for name, _ in self.steps):
            regions = capture.once("pixel regions", lambda: pixel_regions(capture)).numpy()
            found[shown] = voted(found[shown], regions[shown], len(scores))
        return found

    def __call__(self, scores: Tensor, capture: Capture) -> Tensor:
        """Scores [C, height, width] at the picture's size, every step but the vote taken in its place."""
        return self.on_pixels(capture.fit.back(self.on_grid(scores, capture)), capture)


def regions_of(capture: Capture, out: tuple[int, int]) -> Tensor:
    """Region ids [h, w] of the tokens: the capture's own (0: none), else diffcut's from 1."""
    own = region_map(capture, out)
    return own if own is not None else capture.once("regions", lambda: diffcut(capture).argmax(0) + 1)


def pixel_regions(capture: Capture) -> Tensor:
    """Region ids [height, width] of the picture's pixels, as `regions_of`."""
    if capture.regions is not None and capture.regions.shape == capture.size:
        return torch.from_numpy(capture.regions)
    ids = regions_of(capture, capture.grid)
    names, place = torch.unique(ids, return_inverse=True)
    return names[strongest(capture.fit.back(F.one_hot(place).permute(2, 0, 1)))]


def voted(labels: NDArray[np.uint16], regions: NDArray[np.integer], background: int) -> NDArray[np.uint16]:
    """Labels [h, w] of which each region's most frequent one is taken; region 0 keeps its own.

    Of labels that are equally frequent in a region the background wins, else the first: it is class 0 in the official
    code.

    Args:
        labels: 0..C-1, or C, the `background`.
    """
    _, place = np.unique(regions.ravel(), return_inverse=True)
    ranks = (labels.ravel().astype(np.int64) + 1) % (background + 1)  # the background first
    votes = np.bincount(place * (background + 1) + ranks, minlength=(int(place.max()) + 1) * (background + 1))
    best = (votes.reshape(-1, background + 1).argmax(1) + background) % (background + 1)
    return np.where(regions == 0, labels, best[place].reshape(labels.shape)).astype(np.uint16)


def _chain(capture: Capture, name: str) -> Tensor:
    """The row-stochastic matrix [I, I] of a step that spreads scores."""
    block = capture.mean("i2i_walk" if name == "walk" else "i2i")
    return renorm(without_sinks(block) if name == "nosink" else block)


def by_region(scores: Tensor, regions: Tensor) -> Tensor:
    """Scores [C, h, w] averaged within each region of a map [h, w]; region 0, "none", keeps its own."""
    _, place = torch.unique(regions.flatten(), return_inverse=True)
    flat = scores.flatten(1).T
    sums = torch.zeros(int(place.max()) + 1, len(scores)).index_add_(0, place, flat)
    means = sums / torch.bincount(place)[:, None]
    return torch.where(regions == 0, scores, means[place].T.reshape(scores.shape))


def without_sinks(block: Tensor) -> Tensor:
    """I2I [I, I] with the columns zeroed whose mean exceeds four times the median column's mean.

    Sinks collect attention from everywhere and say nothing of what belongs together. A token keeps its own diagonal.
    """
    share = renorm(block).mean(0)
    sink = share > 4.0 * share.median()
    kept = block.clone()
    kept[:, sink] = 0.0
    kept.diagonal()[:] = block.diagonal()
    return kept


@dataclass(frozen=True)
class PixelAffinity:
    """Pixel-adaptive averaging (PAMR, arXiv:2005.08104): each pixel becomes a mean of its neighbours of like colour.

    Made once per picture, used for any number of maps.

    Attributes:
        weights: [8 D, H, W], softmax over the 8 neighbours at each of D distances of -|difference of colour| /
            (0.1 x local deviation), averaged over colours; borders replicated.
        size: (height, width) of the picture; [H, W] is smaller where its longer side exceeds 512.
    """

    weights: Tensor
    size: tuple[int, int]
    dilations: tuple[int, ...] = _DILATIONS

    @classmethod
    def of(cls, image: NDArray[np.uint8], dilations: tuple[int, ...] = _DILATIONS) -> PixelAffinity:
        """Weights of a picture uint8 [height, width, 3]."""
        height, width = image.shape[:2]
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
        scale = _SIDE / max(height, width)
        if scale < 1.0:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
        around = torch.stack([pixels, *_neighbours(pixels, dilations)])
        far = (around[1:] - pixels).abs() / (1e-8 + 0.1 * around.std(0))
        return cls((-far.mean(1)).softmax(0), (height, width), dilations)

    def spread(self, scores: Tensor, rounds: int) -> Tensor:
        """Shares of the scores [C, height, width] over classes, averaged `rounds` times."""
        height, width = self.weights.shape[1:]
        maps = resized(probabilities(scores), (height, width))
        for _ in range(rounds):
            out = torch.zeros_like(maps)
            for weight, part in zip(self.weights, _neighbours(maps, self.dilations), strict=True):
                out.addcmul_(weight, part)
            maps = out
        return resized(maps, self.size)


def _neighbours(maps: Tensor, dilations: tuple[int, ...]) -> Iterator[Tensor]:
    """The 8 neighbours of every pixel at each distance, borders replicated: views [C, H, W] of one padded tensor."""
    height, width = maps.shape[-2:]
    reach = max(dilations)
    padded = F.pad(maps[None], (reach,) * 4, mode="replicate")[0]
    for at in dilations:
        for dy in (-at, 0, at):
            for dx in (-at, 0, at):
                if (dy, dx) != (0, 0):
                    yield padded[:, reach + dy : reach + dy + height, reach + dx : reach + dx + width]
