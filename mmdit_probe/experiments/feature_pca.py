"""FeaturePCA: what the image tokens' q, k, v and outputs carry, as colours and as numbers; Fig. 3 and 29 of
arXiv:2509.18096.

    result = FeaturePCA(images="scenes:val", limit=24).run("scenes-sd3")
    result.summary; result.figure("pca_maps")

Two passes over the pictures, fit on all and project all, each one denoising call per batch; picture k is noised with
seed + k in both. A killed run loses at most one batch. Not here: the fit itself (`observe.pca`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.data.labels import IGNORE
from mmdit_probe.errors import counted
from mmdit_probe.experiments import controls
from mmdit_probe.experiments.experiment import Experiment, Study, one_per_item, plain, request_of
from mmdit_probe.experiments.options import (
    Control,
    LayersAndHeads,
    Output,
    OverReference,
    Pictured,
    notes_on,
)
from mmdit_probe.experiments.text import Text, TextTable, bounded, signed
from mmdit_probe.experiments.token_rows import cut_off
from mmdit_probe.options import Option
from mmdit_probe.results import atomic
from mmdit_probe.results.statistics import LEVEL, NOT_ABOVE, TOO_FEW, corrected, interval, kind_of, measured, p_value
from mmdit_probe.specs import named_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

    from mmdit_probe.data import Sample
    from mmdit_probe.experiments.controls import Variant
    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import Store, TaskRecord
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.observe.pca import PCA, Projection

KINDS = ("query", "key", "value", "output")
SCORES = (
    "class", "class_shuffled", "silhouette", "silhouette_shuffled", "position", "coordinates", "explained_3",
    "explained",
)  # fmt: skip
"""Columns of the table: those of `observe.pca.scores`, and the share of the picture's variance in the first three and
in all kept components."""

SHARES = ("class", "class_shuffled", "explained_3", "explained")
"""Scores within 0..1; the others may be negative."""

SHOWN = "shown"
"""Name of the arrays of the figure: the first pictures' maps and pixels."""


@dataclass(frozen=True, kw_only=True)
class FeaturePCA(Pictured, LayersAndHeads, OverReference, Experiment):
    """PCA of the image tokens' query, key, value and attention output per layer, to RGB, explained variance and scores.

    On scenes: how well a linear probe on the components predicts the class mask of held-out images, how well classes
    separate without one (silhouette), both beside the same with another scene's mask, and how much is mere position.
    """

    name = "pca"
    examples = ("--layers all --limit 8", '--images photos --prompts "a photo of a cat" --model MODEL')
    tables = ("pca", "pca_variance")

    kinds: Annotated[str, Option("Features: query,key,value,output.")] = ",".join(KINDS)
    components: Annotated[
        int, Option("Components kept and scored; three are drawn, in grey if one.", min=1, max=4096)
    ] = 16
    basis: Annotated[Literal["joint", "image"], Option("One basis for all pictures, or one per picture.")] = "joint"
    solver: Annotated[
        Literal["exact", "incremental"],
        Option("Streaming fit: exact (D x D per layer), or scikit-learn's IncrementalPCA."),
    ] = "exact"
    shown: Annotated[int, Output("Pictures in the figure.", min=1)] = 2
    batch: Annotated[int, Output("Pictures per denoising call.", min=1)] = 8
    control: Control = "none"

    default_pictures = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wanted_kinds()

    def wanted_kinds(self) -> list[str]:
        """The features to fit.

        Raises:
            UserError: one does not exist.
        """
        return named_of("kind of feature", self.kinds, KINDS)

    def prepare(self, model: MMDiT, inputs: list[Sample]) -> Study:
        layers, heads = self.places(model)
        chosen = self.chosen_controls()
        captions, items = self.texts(inputs, self.seed)
        each = self.basis == "image" or len(inputs) == 1
        request = request_of(
            model,
            layers=list(layers),
            heads=plain(heads),
            kinds=self.wanted_kinds(),
            components=self.components,
            fit=self.basis,
            solver=self.solver,
            shown=self.shown,
            controls=list(chosen),
            **self.requested_over(model),
            **items,
        )
        basis = "one basis per picture" if each else f"one basis for all pictures, {self.solver}, streaming"
        notes = notes_on(model, inputs, captions, model.default_size) + cut_off(model, captions)
        facts = {
            "pictures": [picture.name for picture in inputs], "basis": basis, "remarks": notes,
            "features": "heads concatenated, q and k after norm and rotary embedding, conditional rows",
        }  # fmt: skip
        tasks = [(variant, variant.texts(captions)) for variant in controls.variants(model, chosen)]
        ticks = 2 * -(-len(inputs) // self.batch)
        return Study(model, request, tasks, "batches", ticks, facts, notes, (inputs, layers, heads, each))

    def measure(self, study: Study, task: tuple[Variant, list[str]], record: TaskRecord) -> None:
        (variant, texts), (pictures, layers, heads, each) = task, study.state
        place = record.workplace(variant.name)
        passes = _Passes(self, variant, pictures, texts, layers, heads, each, place, record.advance)
        found = passes.run()
        if task is study.tasks[0]:
            size = study.model.default_size
            shown = {f"{layer}:{kind}": maps for (layer, kind), maps in found.maps.items()}
            seen = [p.open(size) for p in pictures[: self.shown]]
            if self.over is not None:
                seen = [study.model.references[self.over]] * len(seen)
            shown["pictures"] = np.stack([np.asarray(one) for one in seen])
            record.arrays(SHOWN, **shown)
        record.write("pca_variance", found.variance, control=variant.name)
        record.write("pca", found.table, control=variant.name)

    def finish(self, study: Study, store: Store) -> None:
        if (place := store.workplace("")) is not None:
            shutil.rmtree(place, ignore_errors=True)

    def summarise(self, result: Result) -> pd.DataFrame:
        return summarise(self._rows(result))

    def scores(self, result: Result) -> pd.DataFrame:
        names = self._claimed(result)
        return self._rows(result).melt(["item", "control", "layer", "kind"], names, "measure")

    def _rows(self, result: Result) -> pd.DataFrame:
        return one_per_item(result.table, result.request["items"], ["control", "layer", "kind"])

    def _claimed(self, result: Result) -> list[str]:
        return [name for name in ("class", "silhouette", "coordinates") if name in result.summary]

    def claim(self, result: Result) -> str:
        return f"the components predict the {self._claimed(result)[0]} beyond the control"

    def headline(self, claims: pd.DataFrame) -> pd.DataFrame:
        return claims[claims["measure"] == claims["measure"].iloc[0]].drop(columns="measure")

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.pca import pca_maps, pca_scores

        shown = result.store.load_arrays(SHOWN)
        pictures = list(shown.pop("pictures"))
        maps = {(int(layer), kind): array for (layer, kind), array in ((k.split(":"), v) for k, v in shown.items())}
        name, request = result.model_name, result.request
        of = "image tokens" if self.over is None else f"tokens of reference {self.over}"
        title = f"{name}: PCA of {of}, {self.basis} basis, sigma {self.sigma:g}"
        figures = {"pca_maps": pca_maps(maps, pictures, request["kinds"], each=self.basis == "image", title=title)}
        count = result.summary["n"].max()
        scored = f"{name}: PCA, {counted(self.components, 'component')}, n = {counted(count, 'picture')}"
        return figures | {"pca_scores": pca_scores(result.summary, title=scored)}

    def tell(self, result: Result) -> list[Text]:
        lines: list[Text] = [score_table(result.summary, self.components)]
        if "class" in result.summary:
            lines.append(
                "class: recall of a linear probe on held-out tokens; silhouette: of the classes, without a probe; in"
                " both the control is another scene's classes; position: share of the components' variance that the"
                " mean map explains; coordinates: R2 of row and column."
            )
        count = len(result.request["items"])
        return [*lines, f"{counted(count, 'picture')}, sigma {self.sigma:g}, {result.data['basis']}."]


@dataclass(frozen=True)
class Found:
    """What both passes give.

    Attributes:
        table: item, layer, kind and one column per score; one row per held-out picture (joint basis) or per picture
            (a basis each). NaN where there are no masks, and for the position where every picture has its basis.
        variance: layer, kind, component, share of the total variance (of a basis each: mean over pictures).
        maps: (layer, kind) -> float32 [shown, h, w, k] of the first pictures.
    """

    table: pd.DataFrame
    variance: pd.DataFrame
    maps: dict[tuple[int, str], NDArray[np.float32]]


@dataclass
class _Passes:
    """Fit, project and score, under one variant of the model; finished batches are kept in `place`."""

    ask: FeaturePCA
    variant: Variant
    pictures: Sequence[Sample]
    captions: Sequence[str]
    layers: Sequence[int]
    heads: Any
    each: bool
    place: Path | None
    advance: Callable[[float], None]
    basis: PCA = field(init=False)
    projection: Projection = field(init=False)

    def __post_init__(self) -> None:
        from mmdit_probe.observe.pca import PCA, Projection

        self.basis = PCA(self.ask.wanted_kinds(), self.ask.components, self.ask.solver, self.heads, self.ask.over)
        self.projection = Projection(self.basis, self.each)

    def run(self) -> Found:
        import torch

        from mmdit_probe.observe.pca import Projection

        # What is kept says which pictures it is of: a run may be continued with other batches.
        kept, size, count = _Kept(self.place), self.ask.batch, len(self.pictures)
        fitted = 0
        if (fit := kept.load("fitted")) is not None:
            fitted = int(fit.pop("pictures"))
            self.basis.restore(fit)
            self.advance(fitted / size)
        for start in range(fitted, count, size):
            stop = min(start + size, count)
            self._denoise(self.basis, slice(start, stop))
            kept.save("fitted", self.basis.state() | {"pictures": torch.tensor(stop)})
            self.advance((stop - start) / size)
        start = 0
        while start < count:
            maps = kept.load(f"maps-of-{start:05d}")
            if maps is None:
                now = Projection(self.basis, self.each)
                self._denoise(now, slice(start, min(start + size, count)))
                maps = now.take()
                kept.save(f"maps-of-{start:05d}", maps)
            self.projection.put(maps)
            seen = len(next(iter(maps.values())))
            start += seen
            self.advance(seen / size)
        return self._scored()

    def _denoise(self, observer: PCA | Projection, part: slice) -> None:
        from mmdit_probe.observe.probe import probe

        model, ask, seed = self.variant.model, self.ask, self.ask.seed + part.start
        latents = model.encode_image([picture.open(model.default_size) for picture in self.pictures[part]])
        noised = model.noise(latents, ask.sigma, seed)
        with probe(model, observer, layers=self.layers, edits=self.variant.edits):
            model.denoise(noised, ask.sigma, model.encode_prompt(list(self.captions[part])), seeds=seed)

    def _scored(self) -> Found:
        from mmdit_probe.observe.pca import own_scores, scores

        classes = classes_of(self.pictures, self.variant.model) if self.ask.over is None else None
        tables: list[pd.DataFrame] = []
        variance: list[dict[str, Any]] = []
        maps = {}
        for layer, kind in self.basis.fitted:
            every = self.projection.maps(layer, kind).numpy()
            maps[layer, kind] = every[: self.ask.shown]
            totals = self.projection.totals(layer, kind).numpy()[:, None]
            squares = (every.astype(np.float64) ** 2).sum((1, 2)) / totals
            shares = squares.mean(0) if self.each else self.basis.basis(layer, kind)[2].numpy()
            variance += [
                {"layer": layer, "kind": kind, "component": c, "share": float(s)} for c, s in enumerate(shares)
            ]
            if len(every) < 2 and not self.each:
                continue
            found = own_scores(every, classes) if self.each else scores(every, classes)
            items = np.arange(0 if self.each else len(every) // 2, len(every))
            found |= {"explained_3": squares[items, :3].sum(1), "explained": squares[items].sum(1)}
            frame = pd.DataFrame({"item": items, "layer": layer, "kind": kind})
            tables.append(frame.assign(**{name: found.get(name, np.full(len(items), np.nan)) for name in SCORES}))
        empty = pd.DataFrame(columns=["item", "layer", "kind", *SCORES])
        return Found(pd.concat(tables, ignore_index=True) if tables else empty, pd.DataFrame(variance), maps)


def classes_of(pictures: Sequence[Sample], model: MMDiT) -> NDArray[np.int64] | None:
    """Class of each token [n, h, w] of pictures as the model is shown them, by the names that all of them have; None if
    one has no label, or no names: ids alone mean nothing in another picture."""
    from mmdit_probe.observe.pca import token_classes

    h, w = model.token_grid(*model.default_size)
    names: dict[str, int] = {}
    found = []
    for picture in pictures:
        label = picture.label(model.default_size) if picture.names else None
        if label is None:
            return None
        ids = [*(names.setdefault(name, len(names)) for name in picture.names), IGNORE]
        found.append(token_classes(np.take(ids, np.where(label == IGNORE, -1, label))[None], (h, w)))
    return np.concatenate(found)


class _Kept:
    """Tensors of finished batches on disk by name: the fit so far, the maps of each. No folder: nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, name: str) -> dict[str, Tensor] | None:
        from safetensors.torch import load_file

        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        return None if path is None or not path.exists() else load_file(path)

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        if self.folder is not None:
            with atomic.replacing(self.folder / f"{name}.safetensors") as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)


def summarise(by_picture: pd.DataFrame) -> pd.DataFrame:
    """One row per layer and kind: n (pictures; those with scores of classes, where there are any) and, of each score,
    the mean and its 95 % interval over pictures.

    `beyond` and `silhouette_beyond` are the differences to the shuffled masks, paired; their `p_holm` are corrected for
    the rows of the table.
    """
    rows = []
    for (layer, kind), part in measured(by_picture).groupby(["layer", "kind"], observed=True, sort=False):
        row: dict[str, Any] = {"layer": layer, "kind": kind, "n": len(part)}
        for name in (name for name in SCORES if name in part):
            if part[name].notna().any():
                found = interval(part[name].clip(0, 1), "share") if name in SHARES else interval(part[name])
                row |= found.named(name)
        for name, prefix in (("class", ""), ("silhouette", "silhouette_")):
            if name in row and f"{name}_shuffled" in row:
                difference = part[name] - part[f"{name}_shuffled"]
                if name == "class":
                    row["n"] = int(difference.notna().sum())
                kind = kind_of(part[name], part[f"{name}_shuffled"])
                row |= interval(difference, kind).named(f"{prefix}beyond")
                row[f"{prefix}p_holm"] = p_value(difference, kind)
        rows.append(row)
    table = pd.DataFrame(rows)
    return corrected(table, [name for name in ("p_holm", "silhouette_p_holm") if name in table])


def score_table(summary: pd.DataFrame, components: int) -> TextTable:
    """The per-layer table in text; `components`: how many were kept, of which `explained_3` tells up to three."""
    has_classes, explained = "class" in summary, counted(min(3, components), "component")
    columns = ["layer", "feature", explained]
    columns += ["class", "of another", "beyond it", "silhouette", "of another's"] if has_classes else []
    columns += ["position"] if "position" in summary else []
    spare = ("of another's", "silhouette", "position", explained, "coordinates", "of another")
    table = TextTable([*columns, "coordinates"], left=("feature",), spare=spare)
    for row in summary.to_dict("records"):
        cells = [str(row["layer"]), str(row["kind"]), f"{row['explained_3']:.2f}"]
        if has_classes:
            beyond = signed(row["beyond"], row["beyond_low"], row["beyond_high"])
            lacks = TOO_FEW if np.isnan(row["p_holm"]) else NOT_ABOVE
            cells += [
                bounded(row["class"], row["class_low"], row["class_high"]),
                f"{row['class_shuffled']:.3f}",
                beyond if row["beyond_low"] > 0 and row["p_holm"] <= 1 - LEVEL else f"{beyond} {lacks}",
                f"{row['silhouette']:+.3f}",
                f"{row['silhouette_shuffled']:+.3f}",
            ]
        cells += [f"{row['position']:.3f}"] if "position" in summary else []
        table.add(*cells, f"{row['coordinates']:.3f}")
    return table
