"""The PCA experiment on pictures: fit on all, project all, score where masks exist (Fig. 3 and 29 of arXiv:2509.18096).

    result = pca_of_pictures(load("scenes-sd3"), resolve("scenes:val", 24), sigma=0.5)
    result.table, result.variance, result.maps[4, "value"]

Two passes over the pictures, each one denoising call per picture; picture k is noised with seed + k in both. Not here:
the fit itself (`observe.pca`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import UserError
from mmdit_probe.observe.pca import KINDS, PCA, Projection, scores, token_classes
from mmdit_probe.observe.probe import probe
from mmdit_probe.specs import Spec, layer_indices

if TYPE_CHECKING:
    import pandas as pd

    from mmdit_probe.data.images import Picture
    from mmdit_probe.models.mmdit import MMDiT

SCORES = ("class", "class_shuffled", "position", "coordinates")


@dataclass(frozen=True)
class PCAResult:
    """What the experiment gives.

    Attributes:
        table: item, layer, kind and one column per score; one row per held-out picture. NaN where there are no masks.
        variance: layer, kind, component, share of the total variance.
        maps: (layer, kind) -> float32 [shown, h, w, k] of the first pictures.
    """

    table: pd.DataFrame
    variance: pd.DataFrame
    maps: dict[tuple[int, str], NDArray[np.float32]]


def scene_masks(pictures: Sequence[Picture]) -> NDArray[np.uint8] | None:
    """Class masks [n, S, S] of pictures that are all scenes; None otherwise."""
    if not all(picture.name.startswith("scenes:") for picture in pictures):
        return None
    from mmdit_probe.scenes import scene

    names = (picture.name.split(":") for picture in pictures)
    return np.stack([scene(split, int(index)).classes for _, split, index in names])


def pca_of_pictures(
    model: MMDiT, pictures: Sequence[Picture], prompts: Sequence[str] = (), *, layers: Spec = "all",
    kinds: Sequence[str] = KINDS, components: int = 16, each: bool = False, sigma: float = 0.515, seed: int = 0,
    shown: int = 4, batch: int = 8, advance: Callable[[], None] = lambda: None,
) -> PCAResult:  # fmt: skip
    """Fit, project and score.

    Args:
        model: from `load`. pictures: from `data.images.resolve`.
        prompts: none (each picture's own caption), one for all, or one per picture.
        layers, kinds, components: see `PCA`.
        each: a basis of its own per picture (maps only; there are no scores across pictures then).
        sigma: noise level, 0 clean to 1 noise. seed: noise of picture k is drawn from seed + k.
        shown: how many pictures' maps to return. batch: pictures per denoising call.
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
    basis = PCA(kinds, components)
    projection = Projection(basis, each)
    for observer in (basis, projection):
        for start in range(0, len(pictures), batch):
            part = slice(start, start + batch)
            _denoise(model, pictures[part], captions[part], observer, chosen, sigma, seed + start)
            advance()
    masks = scene_masks(pictures)
    rows: list[pd.DataFrame] = []
    variance: list[dict[str, Any]] = []
    maps = {}
    for layer, kind in basis.fitted:
        every = projection.maps(layer, kind).numpy()
        maps[layer, kind] = every[:shown]
        for place, share in enumerate(basis.basis(layer, kind)[2].tolist()):
            variance.append({"layer": layer, "kind": kind, "component": place, "share": share})
        if each or len(every) < 2:
            continue
        classes = None if masks is None else token_classes(masks, (every.shape[1], every.shape[2]))
        found = scores(every, classes)
        items = np.arange(len(every) // 2, len(every))
        frame = pd.DataFrame({"item": items, "layer": layer, "kind": kind})
        rows.append(frame.assign(**{name: found.get(name, np.full(len(items), np.nan)) for name in SCORES}))
    table = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["item", "layer", "kind", *SCORES])
    return PCAResult(table, pd.DataFrame(variance), maps)


def _denoise(
    model: MMDiT, pictures: Sequence[Picture], captions: Sequence[str], observer: Any, layers: tuple[int, ...],
    sigma: float, seed: int,
) -> None:  # fmt: skip
    latents = model.encode_image([picture.open(model.default_size) for picture in pictures])
    noised = model.noise(latents, sigma, seed)
    with probe(model, observer, layers=layers):
        model.denoise(noised, sigma, model.encode_prompt(list(captions)), seeds=seed)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per layer and kind: n and, of each score, the mean and its 95 % bootstrap interval over pictures."""
    import pandas as pd

    from mmdit_probe.embedded.report import interval

    rows = []
    for (layer, kind), part in table.groupby(["layer", "kind"], observed=True, sort=False):
        row: dict[str, Any] = {"layer": layer, "kind": kind, "n": len(part)}
        for name in SCORES:
            if part[name].notna().any():
                row[name], row[f"{name}_low"], row[f"{name}_high"] = interval(part[name].dropna())
        if "class" in row:
            difference = (part["class"] - part["class_shuffled"]).dropna()
            row["beyond"], row["beyond_low"], row["beyond_high"] = interval(difference)
        rows.append(row)
    return pd.DataFrame(rows)
