"""What an evaluation does to each image: which prompts, which captured forwards, which methods read them.

    plan = Plan.of(dataset, ["seg4diff", "iseg"], protocols=["present", "full"], refine=["none", "pamr"], ...)
    plan.rows(captures, index)                      # sparse confusion counts of one image, every configuration

One forward per prompt serves every method, layer and refinement. Protocols (who says which classes there are):

    present        the classes that occur in this image: an oracle, an image of one class is right by construction
    predicted      the classes a tagger names (`evaluate.tagger`, or a JSON file {image name: [class names]})
    full           all classes of the data set
    unsupervised   no names: segments, matched afterwards (`evaluate.scores`)

Not here: the loop over images (`experiments.evaluate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.fit import Fit
from mmdit_probe.data.labels import IGNORE
from mmdit_probe.data.sample import Dataset
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.evaluate.captures import Captures
from mmdit_probe.evaluate.scores import Counts, histogram, matched_by_rows
from mmdit_probe.segment import methods as zoo
from mmdit_probe.segment.capture import layer_weights, middle_layers
from mmdit_probe.segment.methods.base import Method
from mmdit_probe.segment.record import Capture, Reading
from mmdit_probe.segment.refine import Refinement
from mmdit_probe.segment.settings import Background
from mmdit_probe.segment.tail import label
from mmdit_probe.specs import head_indices, layer_indices

PROTOCOLS = ("present", "predicted", "full")
UNSUPERVISED = "unsupervised"
SWEEPS = ("none", "layer", "head", "sigma")
CEILING, RANDOM = "token-grid ceiling", "random"
ONE_CLASS, ONE_SEGMENT = "one class everywhere", "one segment"
KEYS = ("protocol", "method", "refine", "layers", "heads", "sigma", "kind")
COLUMNS = ("image", *KEYS, "truth", "found", "pixels")


@dataclass(frozen=True)
class Entry:
    """One configuration: a method, a refinement, layers (and their weights) and heads it reads, noise levels."""

    method: Method
    refine: str
    layers: tuple[int, ...]
    heads: str
    sigmas: tuple[float, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """See the module. Make it with `Plan.of`."""

    dataset: Dataset
    protocols: tuple[str, ...]
    entries: tuple[Entry, ...]
    background: Background
    reading: Reading
    tags: Mapping[str, Sequence[str]]
    by_rows: bool = False

    @classmethod
    def of(
        cls, dataset: Dataset, methods: Sequence[str], *, layer_count: int, head_count: int,
        reading: Reading | None = None, protocols: Sequence[str] = ("present",), refine: Sequence[str] = ("none",),
        options: Mapping[str, Mapping[str, Any]] | None = None, background: str = "none", heads: Any = None,
        sweep: str = "none", tags: Mapping[str, Sequence[str]] | None = None, by_rows: bool = False,
    ) -> Plan:  # fmt: skip
        """A plan.

        Args:
            dataset: the images. methods: names of methods, open-vocabulary and unsupervised ones mixed.
            layer_count, head_count: of the model.
            reading: layers and weights, noise levels (averaged, but one by one in the sweep over "sigma"), seeds, fit.
            protocols: for the open-vocabulary methods. refine: every method is measured with each.
            options: method name -> its options. background: rule of `segment.tail`.
            heads: that methods read; all if None.
            sweep: "none", "layer" (each layer alone), "head" (each head of each layer alone), "sigma".
            tags: image name -> class names, for the protocol "predicted".
            by_rows: match segments in each pixel row, as the released Seg4Diff evaluation does (`matched_by_rows`).

        Raises:
            UserError: unknown names, or a protocol without what it needs.
        """
        for protocol in protocols:
            check_known("protocol", protocol, PROTOCOLS)
        check_known("sweep", sweep, SWEEPS)
        if "predicted" in protocols and tags is None:
            raise UserError(
                "protocol 'predicted' needs a tagger: --tagger CLIP, or --tags FILE (JSON, image name -> class names)"
            )
        chosen = [zoo.find(name) for name in dict.fromkeys(methods)]
        if dataset.agnostic and not all(one.unsupervised for one in chosen):
            blind = ", ".join(name for name, one in zoo.METHODS.items() if one.unsupervised)
            raise UserError(f"{dataset.name} has masks without names; score it with {blind}")
        named = {one.name for one in chosen}
        for name in options or {}:
            check_known("method with options", name, named)
        chosen = [one.configure((options or {}).get(one.name, {})) for one in chosen]
        if heads is not None:
            chosen = [one.configure({"heads": heads}) if "heads" in one.defaults else one for one in chosen]
        how = reading or Reading()
        layers = layer_indices(middle_layers(layer_count) if how.layers is None else how.layers, layer_count)
        for text in refine:
            Refinement.parse(text)
        entries = [
            Entry(_of_head(method, head), text, layer_set, head, levels, layer_weights(layer_set, how.weights))
            for method in chosen
            for text in refine
            for layer_set, head, levels in _settings(method, sweep, layers, head_count, heads, tuple(how.sigmas))
        ]
        if not entries:
            raise UserError("none of the methods reads single heads, so there is nothing to sweep over heads")
        return cls(
            dataset, tuple(protocols), tuple(entries), Background.parse(background), how, tags or {}, by_rows
        )  # fmt: skip

    @cached_property
    def _names(self) -> list[str]:
        return [one.name for one in self.dataset.classes]

    def rows(self, captures: Captures, index: int) -> dict[str, NDArray[Any]]:
        """Columns `COLUMNS` of one image."""
        sample = self.dataset.samples[index]
        image, truth = sample.image, np.array(sample.label())
        if image.shape[:2] != truth.shape:
            raise UserError(
                f"{sample.name}: the picture has {image.shape[0]} x {image.shape[1]} pixels, its label "
                f"{truth.shape[0]} x {truth.shape[1]}"
            )
        rows = _Rows(index, len(self.dataset.classes))
        named = [entry for entry in self.entries if not entry.method.unsupervised]
        blind = [entry for entry in self.entries if entry.method.unsupervised]
        for protocol in self.protocols if named else ():
            ids = self.vocabulary(protocol, sample.name, truth)
            classes = [self.dataset.classes[i] for i in ids]
            lookup = np.array([*ids, self._background_id])
            for entry, record, scores in self._maps(captures, named, sample.name, image, classes):
                found = np.full(truth.shape, self._background_id)
                if len(ids):
                    pixels = Refinement.parse(entry.refine)(scores, record)
                    found = lookup[label(pixels, self.background, [one.name for one in classes])]
                rows.add(_keys(protocol, entry, "classes"), histogram(self._scored(truth, record), found, rows.classes))
        for entry, record, scores in self._maps(captures, blind, sample.name, image, []):
            segments = label(Refinement.parse(entry.refine)(scores, record))
            self._add_segments(rows, _keys(UNSUPERVISED, entry, "segments"), self._scored(truth, record), segments)
        self._baselines(rows, self._without_forward(captures, image), sample.name, truth, bool(named), bool(blind))
        return rows.columns()

    def _scored(self, truth: NDArray[np.integer], record: Capture) -> NDArray[np.integer]:
        """The truth without what is not scored: ignored ids, and pixels that the network was not shown."""
        return np.where(record.fit.unseen | np.isin(truth, self.dataset.ignore), IGNORE, truth)

    def _add_segments(
        self, rows: _Rows, keys: tuple[str, ...], truth: NDArray[np.integer], segments: NDArray[np.integer]
    ) -> None:
        """Counts of segments, to be matched later; or of classes, matched row by row now."""
        if self.by_rows:
            rows.add((*keys[:-1], "classes"), matched_by_rows(truth, segments, rows.classes))
        else:
            rows.add(keys, histogram(truth, segments, rows.classes))

    @property
    def _background_id(self) -> int:
        """What background pixels are predicted as: the set's background class, or "no class"."""
        return len(self.dataset.classes) if self.dataset.background is None else self.dataset.background

    def vocabulary(self, protocol: str, name: str, truth: NDArray[np.integer]) -> list[int]:
        """Class ids that the prompt names; the background class only if the rule reads it as a word.

        Raises:
            UserError: the tagger said nothing of this image, or named an unknown class.
        """
        if protocol == "present":
            ids = [int(i) for i in np.unique(truth) if i != IGNORE]
        elif protocol == "full":
            ids = list(range(len(self.dataset.classes)))
        else:
            if name not in self.tags:
                raise UserError(f"the tags say nothing of image {name!r}; give it an entry, an empty list if need be")
            for tag in self.tags[name]:
                check_known(f"class in the tags of {name}", tag, self._names)
            ids = sorted({self._names.index(tag) for tag in self.tags[name]})
        hidden = self.dataset.background if self.background.kind != "class" else None
        return [i for i in ids if i != hidden]

    def _maps(
        self, captures: Captures, entries: Sequence[Entry], name: str, image: NDArray[np.uint8],
        classes: Sequence[SegClass],
    ) -> Iterator[tuple[Entry, Capture, Tensor]]:  # fmt: skip
        """(entry, capture, maps) of every entry; entries with the same forward and the same method share them."""
        for levels, together in dict.fromkeys((entry.sigmas, entry.method.together) for entry in entries):
            group = [e for e in entries if (e.sigmas, e.method.together) == (levels, together)]
            if not classes and not group[0].method.unsupervised:
                record = self._without_forward(captures, image)
                yield from ((entry, record, torch.zeros(0, *record.grid)) for entry in group)
                continue
            parts = {p for e in group for p in (*e.method.needs, *Refinement.parse(e.refine).keep)}
            layers = sorted({layer for e in group for layer in e.layers})
            reading = replace(self.reading, layers=layers, weights=None, sigmas=list(levels))
            kinds = [e.method.text_kinds for e in group]
            whole = captures.get(
                name, image, classes, reading, keep=sorted(parts), together=together,
                heads_apart=any(e.method.reads_heads for e in group),
                text_kinds=None if None in kinds else sorted({kind for some in kinds for kind in some or ()}),
            )  # fmt: skip
            known: dict[tuple[int, tuple[int, ...]], Tensor] = {}
            for entry in group:
                record = replace(whole, layers=entry.layers, weights=entry.weights)
                key = (id(entry.method), entry.layers)  # one plan gives a layer set one set of weights
                if key not in known:
                    known[key] = entry.method(record)
                yield entry, record, known[key]

    def _without_forward(self, captures: Captures, image: NDArray[np.uint8]) -> Capture:
        facts = captures.facts
        size, multiple = self.reading.size or tuple(facts["size"]), facts["multiple"]
        fit = Fit.of(image.shape[:2], size, multiple, self.reading.fit, facts["most"])  # type: ignore[arg-type]
        return Capture(image, fit, (fit.size[0] // multiple, fit.size[1] // multiple), [], [], (), ())

    def _baselines(
        self, rows: _Rows, record: Capture, name: str, truth: NDArray[np.integer], named: bool, blind: bool
    ) -> None:
        """The best any map of this token grid can do, and random tokens, under every protocol asked for."""
        scored = self._scored(truth, record)
        ids = [int(i) for i in np.unique(scored) if i != IGNORE]
        if not ids:
            return
        best = np.array(ids)[record.fit.back(_shares(truth, ids, record)).argmax(0).numpy()]
        generator = torch.Generator().manual_seed(rows.index)
        for protocol in [*(self.protocols if named else ()), *([UNSUPERVISED] if blind else [])]:
            keys = (protocol, CEILING, "none", "", "", "", "classes")
            rows.add(keys, histogram(scored, best, rows.classes))
            if protocol == UNSUPERVISED and self.by_rows:
                self._add_segments(rows, (protocol, ONE_SEGMENT, *keys[2:]), scored, np.zeros_like(scored))
            known = self.vocabulary(protocol, name, truth) if protocol != UNSUPERVISED else ids
            if known:
                noise = torch.rand(len(known), *record.grid, generator=generator)
                guess = np.array(known)[record.fit.back(noise).argmax(0).numpy()]
                rows.add((protocol, RANDOM, *keys[2:]), histogram(scored, guess, rows.classes))


class _Rows:
    """Sparse counts of one image in columns."""

    def __init__(self, index: int, classes: int) -> None:
        self.index, self.classes = index, classes
        self._parts: list[tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []

    def add(self, keys: tuple[str, ...], counts: Counts) -> None:
        """Counts [C, P]; of an empty last segment one cell is kept, since matching goes by the number of segments."""
        kept = counts > 0
        if keys[-1] == "segments" and counts.shape[1] > self.classes and kept.any():
            kept[kept.any(1).argmax(), -1] = True
        truth, found = np.nonzero(kept)
        self._parts.append((keys, truth, found, counts[truth, found]))

    def columns(self) -> dict[str, NDArray[Any]]:
        sizes = [len(part[1]) for part in self._parts]
        keys = {
            name: np.repeat(np.array([part[0][place] for part in self._parts], object), sizes)
            for place, name in enumerate(KEYS)
        }
        numbers = [np.concatenate([part[place] for part in self._parts]) for place in (1, 2, 3)]
        return {
            "image": np.full(sum(sizes), self.index, np.int32), **keys, "truth": numbers[0].astype(np.int16),
            "found": numbers[1].astype(np.int16), "pixels": numbers[2],
        }  # fmt: skip


def _shares(truth: NDArray[np.integer], ids: Sequence[int], record: Capture) -> Tensor:
    """Share of each class in each token [K, h, w]."""
    shares = torch.stack([torch.from_numpy(truth == i).float() for i in ids])
    top, left, bottom, right = (round(edge) for edge in record.fit.source)
    up, across, down, over = record.fit.target
    canvas = torch.zeros(len(ids), *record.fit.size)
    part = shares[None, :, top:bottom, left:right]
    canvas[:, up:down, across:over] = F.adaptive_avg_pool2d(part, (down - up, over - across))[0]
    return F.adaptive_avg_pool2d(canvas, record.grid)


def _keys(protocol: str, entry: Entry, kind: str) -> tuple[str, ...]:
    layers = ",".join(str(layer) for layer in entry.layers)
    levels = ",".join(f"{level:g}" for level in entry.sigmas)
    return protocol, entry.method.name, entry.refine, layers, entry.heads, levels, kind


def _settings(
    method: Method, sweep: str, layers: tuple[int, ...], head_count: int, heads: Any, sigmas: tuple[float, ...]
) -> list[tuple[tuple[int, ...], str, tuple[float, ...]]]:
    label_of = "mean" if heads is None else str(heads)
    if sweep == "layer":
        return [((layer,), label_of, sigmas) for layer in layers]
    if sweep == "sigma":
        return [(layers, label_of, (level,)) for level in sigmas]
    if sweep == "head":
        if "heads" not in method.defaults:
            return []
        return [((layer,), str(head), sigmas) for layer in layers for head in head_indices("all", head_count)]
    return [(layers, label_of, sigmas)]


def _of_head(method: Method, head: str) -> Method:
    if "heads" in method.defaults and head.isdigit():
        return method.configure({"heads": [int(head)]})
    return method
