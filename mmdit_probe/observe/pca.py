"""PCA of what the image tokens carry into and out of the joint attention (the paper's Fig. 3 and 29): q, k, v and the
attention's output, heads concatenated, q and k after norm and rotary embedding.

    basis = PCA(components=16)
    with probe(model, basis): ...                    # first pass: fit, streaming
    with probe(model, Projection(basis)) as run: ... # second pass: project
    run[Projection].maps(layer=4, kind="value")      # [B, h, w, 16]

The fit is joint over all images seen and exact: mean and covariance are updated call by call, so the state is one
D x D matrix per layer and kind, however many images there are. Which images, noise level and prompts were seen is the
caller's to record. Colours of different layers are not comparable: components have no common order between layers.
`scores` makes the pictures quantitative where exact masks exist: see there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.observe.base import DenoisingCall, LayerCall, Observer

Kind = Literal["query", "key", "value", "output"]
KINDS: tuple[Kind, ...] = ("query", "key", "value", "output")


def image_features(seen: LayerCall, kind: str) -> Tensor:
    """Features of the image tokens of the rows that are not unconditional, heads concatenated: [B', I, H * D]."""
    call = seen.call
    tokens = {"query": call.query, "key": call.key, "value": call.value}.get(kind, seen.output)
    rows = [row for row, branch in enumerate(seen.denoising.branches) if branch != "uncond"]
    chosen = tokens[rows][:, :, seen.layout.positions("image")]
    return chosen.transpose(1, 2).flatten(2).float()


class PCA(Observer):
    """Streaming fit. Unconditional rows are left out.

    Args:
        kinds: which features: query, key, value, output.
        components: how many to keep; at most the width of the features.
    """

    needs: ClassVar[Literal["call", "lse"]] = "call"

    def __init__(self, kinds: Sequence[str] = KINDS, components: int = 16) -> None:
        for kind in kinds:
            if kind not in KINDS:
                raise unknown("kind of feature", kind, KINDS)
        if components < 1:
            raise UserError(f"{components} components; expected 1 or more")
        self.kinds, self.components = tuple(kinds), components
        self._moments: dict[tuple[int, str], tuple[int, Tensor, Tensor]] = {}
        self._seen: dict[tuple[int, str], tuple[int, Tensor, Tensor]] = {}
        self._bases: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}

    def observe(self, seen: LayerCall) -> None:
        for kind in self.kinds:
            features = image_features(seen, kind).flatten(0, 1)
            if len(features) == 0:
                continue
            mean = features.mean(0)
            centred = features - mean
            self._seen[seen.layer.index, kind] = (
                len(features),
                mean.cpu().double(),
                (centred.T @ centred).cpu().double(),
            )

    def end_call(self, denoising: DenoisingCall) -> None:
        for key, (count, mean, scatter) in self._seen.items():
            self._bases.pop(key, None)
            if key not in self._moments:
                self._moments[key] = (count, mean, scatter)
                continue
            # Chan, Golub and LeVeque's update of mean and scatter (1983).
            before, old, total = self._moments[key]
            gap = mean - old
            together = before + count
            scatter = total + scatter + torch.outer(gap, gap) * (before * count / together)
            self._moments[key] = (together, old + gap * (count / together), scatter)
        self._seen.clear()

    def abandon_call(self) -> None:
        self._seen.clear()

    @property
    def fitted(self) -> list[tuple[int, str]]:
        """(layer, kind) that something was seen of."""
        return sorted(self._moments, key=lambda key: (key[0], KINDS.index(key[1])))  # type: ignore[arg-type]

    def basis(self, layer: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [D], components [D, k] and shares of the total variance [k], largest first, float64 on the CPU.

        A component's sign is such that its largest loading is positive.
        """
        key = (layer, kind)
        if key not in self._moments:
            raise UserError(f"nothing was seen of layer {layer}, {kind}; seen: {self.fitted[:8] or 'nothing'}")
        if key not in self._bases:
            _, mean, scatter = self._moments[key]
            values, vectors = torch.linalg.eigh(scatter)
            values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, : self.components]
            largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
            shares = values[: self.components] / values.sum().clamp(min=1e-30)
            self._bases[key] = (mean, vectors * largest.sign(), shares)
        return self._bases[key]


class Projection(Observer):
    """Projects image tokens on a fitted basis and keeps the maps, in the order seen; grows, because it was asked for.

    Args:
        basis: a fitted `PCA`; its layers and kinds are projected.
        each: fit every image's own basis instead (the colours of two images are then not comparable).
    """

    needs: ClassVar[Literal["call", "lse"]] = "call"

    def __init__(self, basis: PCA, each: bool = False) -> None:
        self.basis, self.each = basis, each
        self._seen: dict[tuple[int, str], Tensor] = {}
        self._kept: dict[tuple[int, str], list[Tensor]] = {}

    def observe(self, seen: LayerCall) -> None:
        if seen.layout.grid is None:
            raise UserError("the image tokens have no known grid")
        for kind in self.basis.kinds:
            features = image_features(seen, kind).cpu()
            if self.each:
                maps = torch.stack([_own_components(image, self.basis.components) for image in features.double()])
            else:
                mean, vectors, _ = self.basis.basis(seen.layer.index, kind)
                maps = (features.double() - mean) @ vectors
            self._seen[seen.layer.index, kind] = maps.float().unflatten(1, seen.layout.grid)

    def end_call(self, denoising: DenoisingCall) -> None:
        for key, maps in self._seen.items():
            self._kept.setdefault(key, []).append(maps)
        self._seen.clear()

    def abandon_call(self) -> None:
        self._seen.clear()

    def maps(self, layer: int, kind: str) -> Tensor:
        """[B, h, w, k] float32 on the CPU, all images in the order seen."""
        if (layer, kind) not in self._kept:
            raise UserError(f"no maps of layer {layer}, {kind}; kept: {sorted(self._kept)[:8] or 'nothing'}")
        return torch.cat(self._kept[layer, kind])


def _own_components(features: Tensor, count: int) -> Tensor:
    centred = features - features.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return centred @ vectors.flip(1)[:, :count]


def token_classes(masks: NDArray[np.integer], grid: tuple[int, int]) -> NDArray[np.int64]:
    """Class of each token: the most frequent one among its pixels. Masks [B, S, S] -> [B, h, w]; h and w divide S."""
    batch, height, width = masks.shape
    h, w = grid
    cells = masks.reshape(batch, h, height // h, w, width // w).transpose(0, 1, 3, 2, 4).reshape(batch, h, w, -1)
    classes = np.unique(masks)
    counts = np.stack([(cells == c).sum(-1) for c in classes], -1)
    return classes[counts.argmax(-1)].astype(np.int64)


def scores(maps: NDArray[np.floating], classes: NDArray[np.int64] | None) -> dict[str, NDArray[np.float64]]:
    """How well components predict classes, and how much of them is position: one number per held-out image.

    The first half of the images trains, the second is scored (n' = n - n // 2 numbers each).

    Args:
        maps: components [n, h, w, k] in one joint basis.
        classes: class of each token [n, h, w]; None where no masks exist.

    Returns:
        class: recall of a linear probe (discriminant analysis, equal priors), mean over the classes of the image;
        class_shuffled: the same with every image's class map swapped for the next image's, the control: what layout
            priors alone give (sky above ground);
        position: share of the components' variance that the mean map over training images predicts (1 - SSE / SST):
            stripes and gradients that do not depend on the picture;
        coordinates: R^2 of a linear regression of row and column on the components.
    """
    n, h, w, k = maps.shape
    if n < 2:
        raise UserError("scores need two images or more: one half trains, the other is scored")
    half = n // 2
    flat = maps.reshape(n, h * w, k).astype(np.float64)
    mean_map = flat[:half].mean(0)
    centre = flat[:half].mean((0, 1))
    error, total = ((flat[half:] - mean_map) ** 2).sum((1, 2)), ((flat[half:] - centre) ** 2).sum((1, 2))
    result = {"position": 1 - error / np.maximum(total, 1e-30), "coordinates": _coordinates(flat, half, h, w)}
    if classes is not None:
        labels = classes.reshape(n, h * w)
        result["class"] = _probe(flat, labels, half)
        swapped = np.concatenate([np.roll(labels[:half], 1, 0), np.roll(labels[half:], 1, 0)])
        result["class_shuffled"] = _probe(flat, swapped, half)
    return result


def _coordinates(flat: NDArray[np.float64], half: int, h: int, w: int) -> NDArray[np.float64]:
    target = np.indices((h, w)).reshape(2, h * w).T.astype(np.float64)
    target = (target - target.mean(0)) / np.maximum(target.std(0), 1e-30)
    inputs = np.concatenate([flat, np.ones_like(flat[..., :1])], -1)
    weights, *_ = np.linalg.lstsq(inputs[:half].reshape(-1, inputs.shape[-1]), np.tile(target, (half, 1)), rcond=None)
    error = ((inputs[half:] @ weights - target) ** 2).sum((1, 2))
    return 1 - error / (target**2).sum()


def _probe(flat: NDArray[np.float64], labels: NDArray[np.int64], half: int) -> NDArray[np.float64]:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    known = np.unique(labels[:half])
    # Shrinkage keeps directions without variance from deciding.
    probe = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1e-3, priors=np.full(len(known), 1 / len(known)))
    if len(known) < 2:
        return np.full(len(flat) - half, np.nan)
    probe.fit(flat[:half].reshape(-1, flat.shape[-1]), labels[:half].ravel())
    result = []
    for features, truth in zip(flat[half:], labels[half:], strict=True):
        found = probe.predict(features)
        result.append(np.mean([(found[truth == c] == c).mean() for c in np.unique(truth)]))
    return np.array(result)
