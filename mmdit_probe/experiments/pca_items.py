"""The PCA experiment on pictures: fit on all, project all, score where masks exist (Fig. 3 and 29 of arXiv:2509.18096).

    result = pca_of_pictures(load("scenes-sd3"), samples("scenes:val", 24), sigma=0.5)
    result.table, result.variance, result.maps[4, "value"]

Two passes over the pictures, each one denoising call per picture; picture k is noised with seed + k in both. With a
folder for its state, a killed run loses at most one batch. Not here: the fit itself (`observe.pca`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmdit_probe.errors import UserError
from mmdit_probe.observe.pca import KINDS, PCA, Projection, own_scores, scores, token_classes
from mmdit_probe.observe.probe import probe
from mmdit_probe.results.statistics import interval, measured
from mmdit_probe.specs import HeadSpec, Spec, layer_indices

if TYPE_CHECKING:
    import pandas as pd

    from mmdit_probe.data.sample import Sample
    from mmdit_probe.models.mmdit import MMDiT

SCORES = (
    "class", "class_shuffled", "silhouette", "silhouette_shuffled", "position", "coordinates", "explained_3",
    "explained",
)  # fmt: skip
"""Columns of the table: those of `observe.pca.scores`, and the share of the picture's variance in the first three and
in all kept components."""


@dataclass(frozen=True)
class PCAResult:
    """What the experiment gives.

    Attributes:
        table: item, layer, kind and one column per score; one row per held-out picture (joint basis) or per picture
            (a basis each). NaN where there are no masks, and for the position where every picture has its basis.
        variance: layer, kind, component, share of the total variance (of a basis each: mean over pictures).
        maps: (layer, kind) -> float32 [shown, h, w, k] of the first pictures.
    """

    table: pd.DataFrame
    variance: pd.DataFrame
    maps: dict[tuple[int, str], NDArray[np.float32]]


def scene_masks(pictures: Sequence[Sample]) -> NDArray[np.uint8] | None:
    """Class masks [n, S, S] of pictures that are all scenes; None otherwise."""
    if not all(picture.name.startswith("scenes:") for picture in pictures):
        return None
    from mmdit_probe.scenes import scene

    names = (picture.name.split(":") for picture in pictures)
    return np.stack([scene(split, int(index)).classes for _, split, index in names])


def pca_of_pictures(
    model: MMDiT, pictures: Sequence[Sample], prompts: Sequence[str] = (), *, layers: Spec = "all",
    kinds: Sequence[str] = KINDS, components: int = 16, each: bool = False, solver: str = "exact",
    heads: HeadSpec = "all", sigma: float = 0.515, seed: int = 0, shown: int = 4, batch: int = 8,
    edits: Sequence[Any] = (), state: Path | None = None, advance: Callable[[], None] = lambda: None,
) -> PCAResult:  # fmt: skip
    """Fit, project and score.

    Args:
        model: from `load`. pictures: from `data.samples`.
        prompts: none (each picture's own caption), one for all, or one per picture.
        layers, kinds, components, solver, heads: see `PCA`.
        each: a basis of its own per picture.
        sigma: noise level, 0 clean to 1 noise. seed: noise of picture k is drawn from seed + k.
        shown: how many pictures' maps to return. batch: pictures per denoising call.
        edits: attached to every call, such as those of a control.
        state: folder that keeps finished batches; a run that finds one goes on from there. The caller removes it.
        advance: called after every batch of both passes.
    """
    import pandas as pd

    if not 0.0 <= sigma <= 1.0:
        raise UserError(f"--sigma {sigma} is no noise level; expected 0 (clean) to 1 (noise)")
    if len(prompts) not in (0, 1, len(pictures)):
        raise UserError(f"{len(prompts)} prompts for {len(pictures)} pictures; expected none, one, or one per picture")
    captions = [picture.prompt for picture in pictures] if not prompts else list(prompts)
    captions *= len(pictures) // len(captions)
    chosen = layer_indices(layers, len(model.layers))
    basis = PCA(kinds, components, solver, heads)
    projection = Projection(basis, each)
    kept = _State(state)
    starts = range(0, len(pictures), batch)

    def run(observer: PCA | Projection, start: int) -> None:
        part = slice(start, start + batch)
        latents = model.encode_image([picture.open(model.default_size) for picture in pictures[part]])
        noised = model.noise(latents, sigma, seed + start)
        with probe(model, observer, layers=chosen, edits=edits):
            model.denoise(noised, sigma, model.encode_prompt(list(captions[part])), seeds=seed + start)

    fitted = kept.fit(basis)
    for number, start in enumerate(starts):
        if number >= fitted:
            run(basis, start)
            kept.save_fit(basis, number + 1)
        advance()
    for number, start in enumerate(starts):
        if not kept.maps(projection, number):
            now = Projection(basis, each)
            run(now, start)
            taken = now.take()
            kept.save_maps(taken, number)
            projection.put(taken)
        advance()

    masks = scene_masks(pictures)
    rows: list[pd.DataFrame] = []
    variance: list[dict[str, Any]] = []
    maps = {}
    for layer, kind in basis.fitted:
        every = projection.maps(layer, kind).numpy()
        maps[layer, kind] = every[:shown]
        squares = (every.astype(np.float64) ** 2).sum((1, 2)) / projection.totals(layer, kind).numpy()[:, None]
        shares = squares.mean(0) if each else basis.basis(layer, kind)[2].numpy()
        variance += [{"layer": layer, "kind": kind, "component": c, "share": float(s)} for c, s in enumerate(shares)]
        if len(every) < 2 and not each:
            continue
        classes = None if masks is None else token_classes(masks, (every.shape[1], every.shape[2]))
        found = own_scores(every, classes) if each else scores(every, classes)
        items = np.arange(0 if each else len(every) // 2, len(every))
        found |= {"explained_3": squares[items, :3].sum(1), "explained": squares[items].sum(1)}
        frame = pd.DataFrame({"item": items, "layer": layer, "kind": kind})
        rows.append(frame.assign(**{name: found.get(name, np.full(len(items), np.nan)) for name in SCORES}))
    table = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["item", "layer", "kind", *SCORES])
    return PCAResult(table, pd.DataFrame(variance), maps)


class _State:
    """Finished batches on disk: the fit so far, and the maps of each batch. Without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def fit(self, basis: PCA) -> int:
        """Restore the fit; how many batches it has seen."""
        from safetensors.torch import load_file

        if self.folder is None or not (self.folder / "fit.safetensors").exists():
            return 0
        tensors = load_file(self.folder / "fit.safetensors")
        count = int(tensors.pop("batches"))
        basis.restore(tensors)
        return count

    def save_fit(self, basis: PCA, batches: int) -> None:
        import torch

        self._save("fit", basis.state() | {"batches": torch.tensor(batches)})

    def maps(self, projection: Projection, number: int) -> bool:
        """Put the maps of a batch into the projection; whether they were there."""
        from safetensors.torch import load_file

        path = None if self.folder is None else self.folder / f"maps-{number:05d}.safetensors"
        if path is None or not path.exists():
            return False
        projection.put(load_file(path))
        return True

    def save_maps(self, taken: dict[str, Tensor], number: int) -> None:
        self._save(f"maps-{number:05d}", taken)

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        if self.folder is not None:
            temporary = self.folder / f"{name}.tmp"
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
            os.replace(temporary, self.folder / f"{name}.safetensors")


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per layer and kind: n and, of each score, the mean and its 95 % bootstrap interval over pictures.

    `beyond` and `silhouette_beyond` are the differences to the shuffled masks, paired.
    """
    import pandas as pd

    rows = []
    for (layer, kind), part in measured(table).groupby(["layer", "kind"], observed=True, sort=False):
        row: dict[str, Any] = {"layer": layer, "kind": kind, "n": len(part)}
        for name in (name for name in SCORES if name in part):
            if part[name].notna().any():
                row[name], row[f"{name}_low"], row[f"{name}_high"] = interval(part[name].dropna())
        for name, prefix in (("class", ""), ("silhouette", "silhouette_")):
            if name in row and f"{name}_shuffled" in row:
                difference = (part[name] - part[f"{name}_shuffled"]).dropna()
                row |= dict(
                    zip((f"{prefix}beyond{end}" for end in ("", "_low", "_high")), interval(difference), strict=True)
                )
        rows.append(row)
    return pd.DataFrame(rows)
