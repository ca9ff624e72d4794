"""proxyclip and corrclip: CLIP's last values, gathered by a matrix of what belongs together, named by CLIP's text.

The matrix is the method: from the captured forward's attention ("i2i") or features ("features"), from another network
or one's own features, or the identity (the control). Both are written from their papers' descriptions (the official
ProxyCLIP is under a non-commercial licence, CorrCLIP under none). CLIP sees the whole picture at once, or in sliding
windows as in the papers. CorrCLIP's correction of the label map is the refinement "vote".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.errors import UserError
from mmdit_probe.segment.clip import CLIP, ClipInput, PatchVectors, patch_features
from mmdit_probe.segment.methods.base import Method, by_class, renorm
from mmdit_probe.segment.methods.clusters import diffcut
from mmdit_probe.segment.record import Capture
from mmdit_probe.segment.tail import resized

Grid = tuple[int, int]
SPATIAL = {12: 5, 24: 12, 32: 28}
"""Blocks whose mean CorrCLIP adds, by the depth of CLIP, as published; for other depths all but 4, at least one."""


def proxyclip(
    capture: Capture,
    clip: str | CLIP | ClipInput = "scenes-clip",
    source: str | Tensor = "features",
    beta: float = 1.2,
    gamma: float = 3.0,
    temperature: float = 40.0,
    side: int | Sequence[float] | None = None,
) -> Tensor:
    """Scores [C, h, w], probabilities over names (arXiv:2408.04883).

    Args:
        clip: CLIP checkpoint: embedded name, folder or hub id; or a loaded one; or one's own inputs in its place:
            pixels, text vectors, patch vectors (`ClipInput`).
        source: of the matrix: "features" of the forward, its "i2i" attention, "identity", a folder or hub id of a
            vision transformer (DINO, DINOv2, SAM, ...), or one's own features [h', w', E] of the network's input.
        beta, gamma: similarities become gamma (s - beta mean s), negative ones are cut, rows are softmaxed. The mean is
            over this picture, or window (the official code's is over the batch).
        temperature: of the softmax over names.
        side: CLIP's input in pixels: a number squashes the picture to that square (None: CLIP's own); three of them,
            short side, window and stride, slide windows over the picture in its own aspect, logits averaged where
            windows overlap (the papers' 336,336,112); scores then have the picture's size.
    """

    def look(part: View) -> tuple[Tensor, Grid]:
        states, grid = part.clip.hidden(part.pixels)
        matrix, out = _matrix(part, source, beta, gamma, grid)
        return part.clip.head(matrix @ part.clip.values(states[-2], grid, out)), out  # (M, M) x (M, E)

    return _named(capture, clip, temperature, side, look)


def corrclip(
    capture: Capture,
    clip: str | CLIP | ClipInput = "scenes-clip",
    source: str | Tensor = "features",
    tau: float = 4.0,
    eps: float = 0.2,
    weights: Sequence[float] = (1.0, 0.5),
    blocks: int | None = None,
    cut: float = 0.5,
    temperature: float = 40.0,
    side: int | Sequence[float] | None = None,
) -> Tensor:
    """Scores [C, h, w]: as proxyclip, with attention confined to regions (arXiv:2411.10086).

    Regions are the capture's, e.g. SAM's masks (0: none there); without them diffcut's of the same forward.

    Args:
        clip, source, temperature, side: as in proxyclip ("i2i" is not a feature space and is refused).
        tau: factor on cosines before the softmax. eps: regions whose mean features are nearer than this are merged.
        weights: of the mean of the `blocks` blocks before the last but one (None: `SPATIAL`), and of the class token
            that sees a merged region only: the paper's alpha and beta. 0 for patch vectors, which have neither.
        cut: diffcut's threshold for the regions.
    """
    if isinstance(source, str) and source in ("i2i", "identity"):
        raise UserError("corrclip compares features; source must be 'features' or a vision transformer")
    if len(weights) != 2:
        raise UserError(f"corrclip.weights={weights}: expected two, of the earlier blocks and of the region's token")

    def look(part: View) -> tuple[Tensor, Grid]:
        clip, (states, grid) = part.clip, part.clip.hidden(part.pixels)
        features, out = part.features(source)
        merged = _merged(features, part.regions(out, cut), eps)
        matrix = _scoped(features, merged, tau)
        mixed = clip.head(matrix @ clip.values(states[-2], grid, out))
        if isinstance(clip, PatchVectors):
            if any(weights):
                raise UserError("CLIP features have no earlier blocks and no class token: set corrclip.weights to 0,0")
            return mixed, out
        depth = len(states) - 1
        count = blocks or SPATIAL.get(depth, max(1, depth - 4))
        spatial = torch.stack(states[max(1, depth - 1 - count) : depth - 1] or [states[-2]]).mean(0)
        mixed = mixed + weights[0] * clip.head(matrix @ clip.values(spatial, grid, out))
        _, place = torch.unique(_nearest(merged.reshape(out), grid), return_inverse=True)
        tokens = _region_tokens(clip, states[0], place)  # (R, E)
        return mixed + weights[1] * tokens[_nearest(place, out).flatten()], out

    return _named(capture, clip, temperature, side, look)


@dataclass(frozen=True)
class View:
    """What CLIP is shown at once: the whole picture, or a window of it.

    Attributes:
        capture, clip: of the picture. pixels: [3, H, W] CLIP's input.
        whole: (height, width) of the picture that the window is cut from. at: (top, left) of the window, in its pixels.
    """

    capture: Capture
    clip: CLIP | PatchVectors
    pixels: Tensor
    whole: Grid
    at: Grid = (0, 0)

    @property
    def everything(self) -> bool:
        return tuple(self.pixels.shape[-2:]) == self.whole

    def tokens(self, grid: Grid) -> tuple[Tensor, Grid]:
        """Indices of the tokens of a grid over the whole picture whose centres lie in this part, and their own grid."""
        inside = []
        for count, length, start, side in zip(grid, self.whole, self.at, self.pixels.shape[-2:], strict=True):
            centres = (torch.arange(count) + 0.5) * length / count
            found = ((centres >= start) & (centres < start + side)).nonzero()[:, 0]
            inside.append(found if len(found) else (centres - start - side / 2).abs().argmin()[None])
        return (inside[0][:, None] * grid[1] + inside[1]).flatten(), (len(inside[0]), len(inside[1]))

    def features(self, source: str | Tensor) -> tuple[Tensor, Grid]:
        """Unit features [M, E] and their grid."""
        if isinstance(source, Tensor):
            if source.ndim != 3:
                raise UserError(f"own features of shape {tuple(source.shape)}: expected [h, w, E]")
            maps, grid = source.flatten(0, 1).float(), (source.shape[0], source.shape[1])
        elif source == "features":
            maps, grid = self.capture.features("feat_proj"), self.capture.grid
        else:
            features, grid = self._of_network(source)
            return F.normalize(features, dim=-1), grid
        places, out = self.tokens(grid)
        return F.normalize(maps[places], dim=-1), out

    def _of_network(self, name: str) -> tuple[Tensor, Grid]:
        if self.everything:
            return patch_features(name, np.array(self.capture.fit.apply(self.capture.image)))
        (top, left), (height, width) = self.at, self.pixels.shape[-2:]
        picture = np.array(self.capture.fit.at(self.whole).apply(self.capture.image))
        return patch_features(name, picture[top : top + height, left : left + width], (height, width))

    def regions(self, out: Grid, cut: float) -> Tensor:
        """Region of every token [M] of a grid over this part: the capture's (0: none), or diffcut's from 1."""
        size = out if self.everything else self.whole
        ids = region_map(self.capture, size)
        if ids is None:
            ids = resized(diffcut(self.capture, tau=cut), size).argmax(0) + 1
        if self.everything:
            return ids.flatten()
        (top, left), (height, width) = self.at, self.pixels.shape[-2:]
        return _nearest(ids[top : top + height, left : left + width], out).flatten()


def _named(
    capture: Capture, clip: str | CLIP | ClipInput, temperature: float, side: int | Sequence[float] | None,
    look: Callable[[View], tuple[Tensor, Grid]],
) -> Tensor:  # fmt: skip
    """Probabilities over names, the better synonym of each class: [C, h, w] on the capture's grid, or of the picture's
    size where windows slide.

    Args:
        look: features [M, E] of a part of the picture, and their grid.
    """
    given = clip if isinstance(clip, ClipInput) else ClipInput(clip)
    queries = [query for _, query in capture.queries]
    model, words = given.model, given.vectors([query.text for query in queries])

    def logits(part: View) -> Tensor:
        features, grid = look(part)
        return (model.project(features) @ words.T).T.reshape(-1, *grid)  # (M, P) x (P, Q) -> (Q, h, w)

    if isinstance(side, Sequence):
        top, left, bottom, right = capture.fit.shown
        slid = resized(_slid(capture, given, side, logits), (bottom - top, right - left))
        maps = (temperature * slid).softmax(0)
    else:
        size = (model.side(side),) * 2 if isinstance(model, CLIP) else capture.grid
        pixels = given.input(lambda: capture.fit.apply(capture.image), size)
        one = View(capture, model, pixels, (pixels.shape[-2], pixels.shape[-1]))
        maps = resized((temperature * logits(one)).softmax(0), capture.grid)
    return by_class(capture, list(zip(queries, maps, strict=True)))


def _slid(capture: Capture, given: ClipInput, side: Sequence[float], logits: Callable[[View], Tensor]) -> Tensor:
    """Logits [Q, H, W] of a picture in sliding windows, averaged where they overlap."""
    if len(side) != 3:
        raise UserError(f"side={tuple(side)}: expected one number, or three: short side, window, stride")
    short, window, stride = (round(value) for value in side)
    model = given.model
    if isinstance(model, PatchVectors):
        raise UserError("windows slide over pixels; with CLIP features leave side out")
    if window % model.patch or not 0 < stride <= window <= short:
        raise UserError(
            f"side={short},{window},{stride}: expected stride <= window <= short side, and a window of whole patches of"
            f" {model.patch} pixels"
        )
    top, left, bottom, right = capture.fit.shown
    scale = short / min(bottom - top, right - left)
    size = int((bottom - top) * scale + 0.5), int((right - left) * scale + 0.5)
    pixels = given.input(lambda: capture.fit.at(size).apply(capture.image), size)
    whole = (pixels.shape[-2], pixels.shape[-1])
    total, seen = torch.zeros(1, *whole), torch.zeros(*whole)
    for top in _starts(whole[0], window, stride):
        for left in _starts(whole[1], window, stride):
            part = View(capture, model, pixels[:, top : top + window, left : left + window], whole, (top, left))
            found = resized(logits(part), (window, window))
            total = total.expand(len(found), -1, -1).clone() if len(total) != len(found) else total
            total[:, top : top + window, left : left + window] += found
            seen[top : top + window, left : left + window] += 1
    return total / seen


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    """Where windows begin: every stride, the last one at the end."""
    for step in range(-(-max(0, length - window) // stride) + 1):
        yield max(0, min(step * stride, length - window))


def region_map(capture: Capture, out: Grid) -> Tensor | None:
    """The capture's own regions [out] on a grid over the network's input, nearest; 0 where there is none."""
    if capture.regions is None:
        return None
    ids, fit = torch.from_numpy(capture.regions), capture.fit
    if tuple(ids.shape) == fit.picture:
        top, left, bottom, right = fit.shown
        up, across, down, over = fit.target
        canvas = torch.zeros(fit.size, dtype=torch.long)
        canvas[up:down, across:over] = _nearest(ids[top:bottom, left:right], (down - up, over - across))
        ids = canvas
    return _nearest(ids, out)


def _nearest(ids: Tensor, size: Grid) -> Tensor:
    """A map of ids [h, w] at another size."""
    return F.interpolate(ids[None, None].double(), size, mode="nearest")[0, 0].long()


def _matrix(part: View, source: str | Tensor, beta: float, gamma: float, grid: Grid) -> tuple[Tensor, Grid]:
    """Which tokens are mixed: rows [M, M] that sum to 1, and their grid."""
    if isinstance(source, str) and source == "identity":
        return torch.eye(grid[0] * grid[1]), grid
    if isinstance(source, str) and source == "i2i":
        places, out = part.tokens(part.capture.grid)
        return renorm(part.capture.mean("i2i")[places][:, places]), out
    features, out = part.features(source)
    similarity = features @ features.T
    similarity = gamma * (similarity - beta * similarity.mean())
    similarity = similarity.masked_fill(similarity < 0, -torch.inf)
    empty = similarity.isneginf().all(1)
    similarity[empty, empty] = 0.0  # a token that resembles none, itself included, keeps itself
    return similarity.softmax(-1), out


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
