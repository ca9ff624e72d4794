"""PCA of what the image tokens carry into and out of the joint attention (the paper's Fig. 3 and 29): q, k, v and the
attention's output, heads concatenated, q and k after norm and rotary embedding.

    basis = PCA(components=16)
    with probe(model, basis): ...                    # first pass: fit, streaming
    with probe(model, Projection(basis)) as run: ... # second pass: project
    run[Projection].maps(layer=4, kind="value")      # [B, h, w, 16]

The fit is joint over all images seen and streams: "exact" keeps mean and covariance, one D x D matrix per layer and
kind; "incremental" is scikit-learn's IncrementalPCA, k x D numbers. Components have no common order between layers. Not
here: which images, noise level and prompts were seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdit_probe.data.labels import IGNORE
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, Observer
from mmdit_probe.specs import HeadSpec, heads_at, named_of, reread

if TYPE_CHECKING:
    from sklearn.decomposition import IncrementalPCA

Kind = Literal["query", "key", "value", "output"]
KINDS: tuple[Kind, ...] = ("query", "key", "value", "output")
Solver = Literal["exact", "incremental"]
SOLVERS: tuple[Solver, ...] = ("exact", "incremental")

_OF_SKLEARN = (
    "components_", "singular_values_", "mean_", "var_", "explained_variance_", "explained_variance_ratio_",
    "n_samples_seen_", "noise_variance_",
)  # fmt: skip
"""What IncrementalPCA knows between two batches."""


def image_features(seen: LayerCall, kind: str, heads: HeadSpec = "all", reference: int | None = None) -> Tensor:
    """Features of the image tokens, or of those of a reference picture, of rows that are not unconditional, chosen
    heads concatenated: [B', I, H' * D]."""
    call = seen.call
    tokens = {"query": call.query, "key": call.key, "value": call.value}.get(kind, seen.output)
    rows = [row for row, branch in enumerate(seen.denoising.branches) if branch != "uncond"]
    if not isinstance(heads, str) or heads != "all":
        tokens = tokens[:, list(heads_at(heads, seen.layer.index, tokens.shape[1]))]
    positions = seen.layout.positions("image") if reference is None else seen.picture(reference).positions
    chosen = tokens[rows][:, :, positions]
    return chosen.transpose(1, 2).flatten(2).float()


class PCA(Observer):
    """Streaming fit. Unconditional rows are left out.

    Args:
        kinds: which features: query, key, value, output.
        components: how many to keep; at most the width of the features.
        solver: "exact" or "incremental" (scikit-learn).
        heads: which heads' features; one specification, or layer -> specification.
        reference: number of the reference picture whose tokens are looked at, from 0; None for the image.
    """

    reads = "query, key, value or output"

    def __init__(
        self,
        kinds: Sequence[str] = KINDS,
        components: int = 16,
        solver: str = "exact",
        heads: HeadSpec = "all",
        reference: int | None = None,
    ) -> None:
        named_of("kind of feature", kinds, KINDS)
        if components < 1:
            raise UserError(f"{components} components; expected 1 or more")
        check_known("solver", solver, SOLVERS)
        self.kinds, self.components, self.solver, self.heads = tuple(kinds), components, solver, reread(heads)
        self.reference = reference
        self._fits: dict[tuple[int, str], _Moments | _Incremental] = {}
        self._bases: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}

    def measure(self, seen: LayerCall) -> dict[str, Tensor]:
        return {kind: image_features(seen, kind, self.heads, self.reference).flatten(0, 1) for kind in self.kinds}

    def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
        for layer, of_layer in measured.items():
            for kind, features in of_layer.items():
                if len(features):
                    self._bases.pop((layer, kind), None)
                    self._fits.setdefault((layer, kind), self._new_fit()).update(features)

    def _new_fit(self) -> _Moments | _Incremental:
        return _Moments() if self.solver == "exact" else _Incremental(self.components)

    @property
    def fitted(self) -> list[tuple[int, str]]:
        """(layer, kind) that something was seen of."""
        return sorted(self._fits, key=lambda key: (key[0], KINDS.index(key[1])))  # type: ignore[arg-type]

    def basis(self, layer: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [D], components [D, k] and shares of the total variance [k], largest first, float64 on the CPU.

        A component's sign is such that its largest loading is positive.
        """
        key = (layer, kind)
        if key not in self._fits:
            raise UserError(f"nothing was seen of layer {layer}, {kind}; seen: {self.fitted[:8] or 'nothing'}")
        if key not in self._bases:
            mean, vectors, shares = self._fits[key].basis(self.components)
            largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
            self._bases[key] = (mean, vectors * largest.sign(), shares)
        return self._bases[key]

    def state(self) -> dict[str, Tensor]:
        """What was seen so far, as tensors by name: `restore` of another observer goes on from there."""
        return {
            f"{layer}.{kind}.{name}": tensor
            for (layer, kind), fit in self._fits.items()
            for name, tensor in fit.state().items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state` of the same solver."""
        parts: dict[tuple[int, str], dict[str, Tensor]] = {}
        for path, tensor in state.items():
            layer, kind, name = path.split(".")
            parts.setdefault((int(layer), kind), {})[name] = tensor
        for key, part in parts.items():
            self._fits[key] = self._new_fit()
            self._fits[key].restore(part)


class _Moments:
    """Mean and scatter matrix, from which the components are exact."""

    def __init__(self) -> None:
        self.count, self.mean, self.scatter = 0, torch.zeros(0), torch.zeros(0)

    def update(self, features: Tensor) -> None:
        count, new = len(features), features.mean(0)
        centred = features - new
        mean, scatter = new.cpu().double(), (centred.T @ centred).cpu().double()
        if self.count:
            # Chan, Golub and LeVeque's update of mean and scatter (1983).
            gap, together = mean - self.mean, self.count + count
            scatter = self.scatter + scatter + torch.outer(gap, gap) * (self.count * count / together)
            mean = self.mean + gap * (count / together)
        self.count, self.mean, self.scatter = self.count + count, mean, scatter

    def basis(self, components: int) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.scatter)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :components]
        return self.mean, vectors, values[:components] / values.sum().clamp(min=1e-30)

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.count, self.mean, self.scatter = int(state["count"]), state["mean"], state["scatter"]


class _Incremental:
    """scikit-learn's IncrementalPCA, one batch a call."""

    def __init__(self, components: int) -> None:
        self.wanted = components
        self.fit: IncrementalPCA | None = None

    def update(self, features: Tensor) -> None:
        from sklearn.decomposition import IncrementalPCA

        if self.fit is None:
            self.fit = IncrementalPCA(min(self.wanted, features.shape[1]))
        if len(features) < self.fit.n_components:
            raise UserError(
                f"{len(features)} image tokens in a call are fewer than {self.fit.n_components} components; the"
                " incremental fit needs as many: ask for fewer components or larger batches"
            )
        self.fit.partial_fit(features.cpu().double().numpy())

    def basis(self, components: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.fit is not None
        mean, vectors, shares = self.fit.mean_, self.fit.components_.T, self.fit.explained_variance_ratio_
        return tuple(torch.from_numpy(np.array(part, float)) for part in (mean, vectors, shares))  # type: ignore[return-value]

    def state(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.array(getattr(self.fit, name))) for name in _OF_SKLEARN}

    def restore(self, state: dict[str, Tensor]) -> None:
        from sklearn.decomposition import IncrementalPCA

        self.fit = IncrementalPCA(len(state["components_"]))
        for name in _OF_SKLEARN:
            value = state[name].numpy()
            setattr(self.fit, name, value if value.ndim else value[()])
        self.fit.n_components_ = self.fit.n_components


class Projection(Observer):
    """Projects the tokens of a basis on it and keeps the maps, in the order seen; grows, because it was asked for.

    Args:
        basis: a fitted `PCA`; its layers, kinds, heads and picture are projected.
        each: fit every image's own basis instead (the colours of two images are then not comparable).
    """

    reads = "query, key, value or output"

    def __init__(self, basis: PCA, each: bool = False) -> None:
        self.basis, self.each = basis, each
        self._kept: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}

    def measure(self, seen: LayerCall) -> dict[str, tuple[Tensor, Tensor]]:
        return {kind: self._projected(seen, kind) for kind in self.basis.kinds}

    def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
        for layer, of_layer in measured.items():
            for kind, pair in of_layer.items():
                self._kept.setdefault((layer, kind), []).append(pair)

    def _projected(self, seen: LayerCall, kind: str) -> tuple[Tensor, Tensor]:
        """Maps [B', h, w, k], of a video [B', F, h, w, k], and each one's sum of squared centred features, [B']."""
        features = image_features(seen, kind, self.basis.heads, self.basis.reference).cpu().double()
        if self.each:
            centred = features - features.mean(1, keepdim=True)
            maps = _own_components(centred, self.basis.components)
        else:
            mean, vectors, _ = self.basis.basis(seen.layer.index, kind)
            centred = features - mean
            maps = centred @ vectors
        return maps.float().unflatten(1, seen.picture(self.basis.reference).space), centred.square().sum((1, 2))

    def maps(self, layer: int, kind: str) -> Tensor:
        """[B, h, w, k] float32 on the CPU, of videos [B, F, h, w, k], all in the order seen."""
        return torch.cat([maps for maps, _ in self._of(layer, kind)])

    def totals(self, layer: int, kind: str) -> Tensor:
        """[B] float64: sum of squares of each image's features about the mean; the maps' squares are a part of it."""
        return torch.cat([total for _, total in self._of(layer, kind)])

    def take(self) -> dict[str, Tensor]:
        """What was kept, as tensors by name; nothing is kept any more."""
        result = {}
        for (layer, kind), parts in self._kept.items():
            result[f"{layer}.{kind}.maps"] = torch.cat([maps for maps, _ in parts])
            result[f"{layer}.{kind}.totals"] = torch.cat([total for _, total in parts])
        self._kept.clear()
        return result

    def put(self, taken: dict[str, Tensor]) -> None:
        """Keep what another projection's `take` gave, after what is kept already."""
        for path in taken:
            layer, kind, name = path.split(".")
            if name == "maps":
                pair = (taken[path], taken[f"{layer}.{kind}.totals"])
                self._kept.setdefault((int(layer), kind), []).append(pair)

    def _of(self, layer: int, kind: str) -> list[tuple[Tensor, Tensor]]:
        if (layer, kind) not in self._kept:
            raise UserError(f"no maps of layer {layer}, {kind}; kept: {sorted(self._kept)[:8] or 'nothing'}")
        return self._kept[layer, kind]


def _own_components(centred: Tensor, count: int) -> Tensor:
    """Components [B', I, k] of the features [B', I, D] of each image."""
    if not centred.isfinite().all():  # has no components; refused with its layer when the call is over
        return centred[..., :count]
    _, vectors = torch.linalg.eigh(centred.mT @ centred)
    return centred @ vectors.flip(-1)[..., :count]


def token_classes(masks: NDArray[np.integer], grid: tuple[int, int]) -> NDArray[np.int64]:
    """Class of each token: the most frequent one among the pixels whose middle lies in it. Masks [B, H, W], of any size
    over the same picture -> [B, h, w]."""
    repeats = (-(-cells // side) for cells, side in zip(grid, masks.shape[1:], strict=True))  # no token without a pixel
    for axis, times in enumerate(repeats, start=1):
        masks = masks.repeat(times, axis)
    rows, columns = (
        (2 * np.arange(side) + 1) * cells // (2 * side) for cells, side in zip(grid, masks.shape[1:], strict=True)
    )
    classes, ids = np.unique(masks, return_inverse=True)
    size = (len(masks), *grid, len(classes))
    places = np.ravel_multi_index(np.ix_(np.arange(len(masks)), rows, columns), size[:3])
    counts = np.bincount((places * len(classes) + ids.reshape(masks.shape)).ravel(), minlength=int(np.prod(size)))
    return classes[counts.reshape(size).argmax(-1)].astype(np.int64)


def scores(maps: NDArray[np.floating], classes: NDArray[np.int64] | None) -> dict[str, NDArray[np.float64]]:
    """How well components predict classes, and how much of them is position: one number per held-out image.

    The first half of the images trains, the second is scored (n' = n - n // 2 numbers each).

    Args:
        maps: components [n, h, w, k] in one joint basis.
        classes: class of each token [n, h, w], `IGNORE` where it is not known; None where no masks exist.

    Returns:
        class: recall of a linear probe (discriminant analysis, equal priors), mean over those classes of the image
            that training images have, NaN where they have none;
        silhouette: mean silhouette of the image's tokens grouped by class, -1 to 1: no probe, no training images;
        class_shuffled, silhouette_shuffled: the same with every image's class map swapped for the next image's, the
            control: what layout priors alone give (sky above ground);
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
    target = _place(h, w)
    weights = _regress(flat[:half].reshape(-1, k), np.tile(target, (half, 1)))
    result = {
        "position": 1 - error / np.maximum(total, 1e-30),
        "coordinates": np.array([_r2(image, target, weights) for image in flat[half:]]),
    }
    if classes is not None:
        labels = classes.reshape(n, h * w)
        swapped = np.concatenate([np.roll(labels[:half], 1, 0), np.roll(labels[half:], 1, 0)])
        for suffix, known in (("", labels), ("_shuffled", swapped)):
            probe = _discriminant(flat[:half].reshape(-1, k), known[:half].ravel())
            pairs = list(zip(flat[half:], known[half:], strict=True))
            result[f"class{suffix}"] = np.array([_recall(probe, image, truth) for image, truth in pairs])
            result[f"silhouette{suffix}"] = np.array([_silhouette(image, truth) for image, truth in pairs])
    return result


def own_scores(maps: NDArray[np.floating], classes: NDArray[np.int64] | None) -> dict[str, NDArray[np.float64]]:
    """`scores` where every image has a basis of its own: one number per image, from that image alone.

    Probe and regression are trained on one colour of the token grid's checkerboard and scored on the other. Neighbours
    are alike, so even the classes of another image are predicted to a degree: only the distance to `class_shuffled`
    says anything. There is no `position`: the components of two images are not comparable.
    """
    n, h, w, k = maps.shape
    flat, target = maps.reshape(n, h * w, k).astype(np.float64), _place(h, w)
    train = (np.indices((h, w)).sum(0) % 2 == 0).ravel()
    weights = [_regress(image[train], target[train]) for image in flat]
    result = {
        "coordinates": np.array([_r2(i[~train], target[~train], of) for i, of in zip(flat, weights, strict=True)])
    }
    if classes is not None:
        labels = classes.reshape(n, h * w)
        for suffix, known in (("", labels), ("_shuffled", np.roll(labels, 1, 0))):
            pairs = list(zip(flat, known, strict=True))
            result[f"class{suffix}"] = np.array(
                [_recall(_discriminant(i[train], truth[train]), i[~train], truth[~train]) for i, truth in pairs]
            )
            result[f"silhouette{suffix}"] = np.array([_silhouette(image, truth) for image, truth in pairs])
    return result


def _place(h: int, w: int) -> NDArray[np.float64]:
    """Row and column of every token [h * w, 2], standardised."""
    target = np.indices((h, w)).reshape(2, h * w).T.astype(np.float64)
    return (target - target.mean(0)) / np.maximum(target.std(0), 1e-30)


def _regress(inputs: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    weights, *_ = np.linalg.lstsq(np.column_stack([inputs, np.ones(len(inputs))]), target, rcond=None)
    return np.asarray(weights, np.float64)


def _r2(inputs: NDArray[np.float64], target: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    error = (np.column_stack([inputs, np.ones(len(inputs))]) @ weights - target) ** 2
    return float(1 - error.sum() / ((target - target.mean(0)) ** 2).sum())


def _discriminant(inputs: NDArray[np.float64], labels: NDArray[np.int64]) -> Any:
    """A linear probe of the classes with two tokens or more; None where there is one such class only."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    known, counts = np.unique(labels, return_counts=True)
    known = known[(counts > 1) & (known != IGNORE)]
    if len(known) < 2:
        return None
    there = np.isin(labels, known)
    inputs, labels = inputs[there], labels[there]
    # Shrinkage keeps directions without variance from deciding.
    probe = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1e-3, priors=np.full(len(known), 1 / len(known)))
    return probe.fit(inputs, labels)


def _recall(probe: Any, inputs: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Of the classes that the probe was trained with: of others, features say nothing."""
    if probe is None or not (there := np.intersect1d(truth, probe.classes_)).size:
        return float("nan")
    found = probe.predict(inputs)
    return float(np.mean([(found[truth == c] == c).mean() for c in there]))


_TOKENS = 1024
"""At most so many tokens go into a silhouette, whose cost is quadratic in them: every k-th of a larger grid."""


def _silhouette(inputs: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    from sklearn.metrics import silhouette_score

    every = -(-len(inputs) // _TOKENS)
    inputs, truth = inputs[::every], truth[::every]
    inputs, truth = inputs[truth != IGNORE], truth[truth != IGNORE]
    if not 2 <= len(np.unique(truth)) < len(truth) or np.ptp(inputs, axis=0).max() == 0:
        return float("nan")
    return float(silhouette_score(inputs, truth))
