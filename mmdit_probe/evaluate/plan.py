"""What an evaluation does to each image: which prompts, which captured forwards, which methods read them.

    compared = Comparison(["seg4diff", "iseg"], protocols=["present", "full"], refine=["none", "pamr"])
    plan = Plan.of(dataset, compared, layer_count=24, head_count=24)
    for columns in plan.rows(captures, range(100)): ...   # sparse confusion counts of an image, every configuration

One forward per prompt serves every method, layer and refinement. Protocols (who says which classes there are):

    present        the classes that occur in this image: an oracle, an image of one class is right by construction
    predicted      the classes a tagger names (`evaluate.tagger`, or a JSON file {image name: [class names]})
    full           all classes of the data set
    unsupervised   no names: segments, matched afterwards (`evaluate.scores`)

Not here: the loop over images (`experiments.evaluate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdit_probe.data.fit import Fit
from mmdit_probe.data.labels import IGNORE
from mmdit_probe.data.sample import Dataset
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.evaluate.captures import Captures
from mmdit_probe.evaluate.overlap import overlapped
from mmdit_probe.evaluate.scores import Counts, histogram, matched_by_rows
from mmdit_probe.segment import methods as zoo
from mmdit_probe.segment.capture import Request, layer_weights, middle_layers
from mmdit_probe.segment.methods.base import Method
from mmdit_probe.segment.record import Capture, Reading
from mmdit_probe.segment.refine import Refinement
from mmdit_probe.segment.settings import Background
from mmdit_probe.segment.tail import label, strongest
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
class Comparison:
    """What is compared.

    Attributes:
        methods: names, open-vocabulary and unsupervised ones mixed. options: name -> its options.
        protocols: for the open-vocabulary methods. refine: every method is measured with each.
        background: rule of `segment.tail`. heads: that methods read; all if None.
        sweep: "none", "layer" (each layer alone), "head" (each head of each layer alone), "sigma".
        tags: image name -> class names, for the protocol "predicted".
        by_rows: match segments in each pixel row, as the released Seg4Diff evaluation does (`matched_by_rows`).
    """

    methods: Sequence[str]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    protocols: Sequence[str] = ("present",)
    refine: Sequence[str] = ("none",)
    background: str = "none"
    heads: Any = None
    sweep: str = "none"
    tags: Mapping[str, Sequence[str]] | None = None
    by_rows: bool = False

    def configured(self, dataset: Dataset) -> list[Method]:
        """The methods with their options.

        Raises:
            UserError: unknown names, or methods that this data set cannot be scored with.
        """
        chosen = [zoo.find(name) for name in dict.fromkeys(self.methods)]
        if dataset.agnostic and not all(one.unsupervised for one in chosen):
            blind = ", ".join(name for name, one in zoo.METHODS.items() if one.unsupervised)
            raise UserError(f"{dataset.name} has masks without names; score it with {blind}")
        for name in self.options:
            check_known("method with options", name, {one.name for one in chosen})
        chosen = [one.configure(self.options.get(one.name, {})) for one in chosen]
        if self.heads is None:
            return chosen
        return [one.configure({"heads": self.heads}) if "heads" in one.defaults else one for one in chosen]


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
        cls, dataset: Dataset, compared: Comparison, reading: Reading | None = None, *, layer_count: int,
        head_count: int,
    ) -> Plan:  # fmt: skip
        """A plan.

        Args:
            dataset: the images. compared: methods and how they are set.
            reading: layers and weights, noise levels (averaged, but one by one in the sweep over "sigma"), seeds, fit.
            layer_count, head_count: of the model.

        Raises:
            UserError: unknown names, or a protocol without what it needs.
        """
        for protocol in compared.protocols:
            check_known("protocol", protocol, PROTOCOLS)
        check_known("sweep", compared.sweep, SWEEPS)
        if "predicted" in compared.protocols and compared.tags is None:
            raise UserError(
                "protocol 'predicted' needs a tagger: --tagger CLIP, or --tags FILE (JSON, image name -> class names)"
            )
        chosen, how = compared.configured(dataset), reading or Reading()
        layers = layer_indices(middle_layers(layer_count) if how.layers is None else how.layers, layer_count)
        for text in compared.refine:
            Refinement.parse(text)
        entries = [
            Entry(_of_head(method, head), text, layer_set, head, levels, layer_weights(layer_set, how.weights))
            for method in chosen
            for text in compared.refine
            for layer_set, head, levels in _settings(method, compared, layers, head_count, tuple(how.sigmas))
        ]
        if not entries:
            raise UserError("none of the methods reads single heads, so there is nothing to sweep over heads")
        background = Background.parse(compared.background)
        return cls(
            dataset, tuple(compared.protocols), tuple(entries), background, how,
            {} if compared.tags is None else compared.tags, compared.by_rows,
        )  # fmt: skip

    @cached_property
    def _names(self) -> list[str]:
        return [one.name for one in self.dataset.classes]

    def rows(self, captures: Captures, indices: Iterable[int]) -> Iterator[dict[str, NDArray[Any]]]:
        """Columns `COLUMNS` of each of these images, in order.

        Several images share their forwards; beside those of a GPU, images are read and methods run in threads.
        """
        return overlapped(
            indices,
            self._opened,
            lambda batch: self._captured(captures, batch),
            lambda opened, found: self._counted(captures, opened, found),
            size=lambda: captures.pictures,
            workers=captures.workers,
        )

    def _opened(self, index: int) -> _Opened:
        """An image, its truth, and what is to be read of it."""
        sample = self.dataset.samples[index]
        image, truth = sample.image, np.array(sample.label())
        if image.shape[:2] != truth.shape:
            raise UserError(
                f"{sample.name}: the picture has {image.shape[0]} x {image.shape[1]} pixels, its label "
                f"{truth.shape[0]} x {truth.shape[1]}"
            )
        named = [entry for entry in self.entries if not entry.method.unsupervised]
        blind = [entry for entry in self.entries if entry.method.unsupervised]
        asked = [(one, self.vocabulary(one, sample.name, truth)) for one in (self.protocols if named else ())]
        groups = [group for protocol, ids in asked for group in self._groups(protocol, named, image, ids)]
        groups += self._groups(UNSUPERVISED, blind, image, [])
        return _Opened(index, sample.name, image, truth, groups)

    def _groups(
        self, protocol: str, entries: Sequence[Entry], image: NDArray[np.uint8], ids: Sequence[int]
    ) -> list[_Group]:
        """Entries by what they read: those of one group share a capture; without classes there is none to read."""
        groups = []
        for levels, together in dict.fromkeys((entry.sigmas, entry.method.together) for entry in entries):
            group = [e for e in entries if (e.sigmas, e.method.together) == (levels, together)]
            if not ids and protocol != UNSUPERVISED:
                groups.append(_Group(protocol, group, ids, None))
                continue
            parts = {p for e in group for p in (*e.method.needs, *Refinement.parse(e.refine).keep)}
            layers = sorted({layer for e in group for layer in e.layers})
            kinds = [e.method.text_kinds for e in group]
            request = Request(
                image, [self.dataset.classes[i] for i in ids],
                replace(self.reading, layers=layers, weights=None, sigmas=list(levels)), sorted(parts), together,
                heads_apart=any(e.method.reads_heads for e in group),
                text_kinds=None if None in kinds else sorted({kind for some in kinds for kind in some or ()}),
            )  # fmt: skip
            groups.append(_Group(protocol, group, ids, request))
        return groups

    def _captured(self, captures: Captures, batch: Sequence[_Opened]) -> dict[_Group, Capture]:
        """A capture of every group of these images that reads one."""
        asked = [(one.name, group) for one in batch for group in one.groups if group.request is not None]
        requests = [(name, group.request) for name, group in asked if group.request is not None]
        return dict(zip([group for _, group in asked], captures.get(requests), strict=True))

    def _counted(self, captures: Captures, image: _Opened, found: Mapping[_Group, Capture]) -> dict[str, NDArray[Any]]:
        """Columns of one image."""
        rows, bare = _Rows(image.index, len(self.dataset.classes)), _without_forward(self.reading, captures, image)
        truth = self._scored(image.truth, bare)
        for group in image.groups:
            lookup = np.array([*group.ids, self._background_id])
            names = [self._names[i] for i in group.ids]
            for entry, record, scores in _maps(group, found.get(group, bare)):
                keys = (group.protocol, *_keys(entry))
                if group.protocol == UNSUPERVISED:
                    segments = label(Refinement.parse(entry.refine)(scores, record))
                    self._add_segments(rows, (*keys, "segments"), truth, segments)
                    continue
                labels = np.full(truth.shape, self._background_id)
                if group.ids:
                    labels = lookup[label(Refinement.parse(entry.refine)(scores, record), self.background, names)]
                rows.add((*keys, "classes"), histogram(truth, labels, rows.classes))
        self._baselines(rows, bare, truth, {group.protocol: group.ids for group in image.groups})
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

    def _baselines(
        self, rows: _Rows, record: Capture, truth: NDArray[np.integer], protocols: Mapping[str, Sequence[int]]
    ) -> None:
        """The best any map of this token grid can do, and random tokens, under every protocol and its classes."""
        ids = [int(i) for i in np.unique(truth) if i != IGNORE]
        if not ids:
            return
        best = np.array(ids)[strongest(record.fit.back(_shares(truth, ids, record))).numpy()]
        generator = torch.Generator().manual_seed(rows.index)
        for protocol, named in protocols.items():
            keys = (protocol, CEILING, "none", "", "", "", "classes")
            rows.add(keys, histogram(truth, best, rows.classes))
            if protocol == UNSUPERVISED and self.by_rows:
                self._add_segments(rows, (protocol, ONE_SEGMENT, *keys[2:]), truth, np.zeros_like(truth))
            known = named if protocol != UNSUPERVISED else ids
            if known:
                noise = torch.rand(len(known), *record.grid, generator=generator)
                guess = np.array(known)[strongest(record.fit.back(noise)).numpy()]
                rows.add((protocol, RANDOM, *keys[2:]), histogram(truth, guess, rows.classes))


@dataclass(frozen=True, eq=False)
class _Group:
    """Entries that read one capture of an image, under a protocol and the class ids that it names."""

    protocol: str
    entries: Sequence[Entry]
    ids: Sequence[int]
    request: Request | None


@dataclass(frozen=True, eq=False)
class _Opened:
    """An image, its truth, and what is to be read of it."""

    index: int
    name: str
    image: NDArray[np.uint8]
    truth: NDArray[np.integer]
    groups: Sequence[_Group]


def _maps(group: _Group, whole: Capture) -> Iterator[tuple[Entry, Capture, Tensor]]:
    """(entry, capture, maps) of every entry; entries with the same method share them."""
    known: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for entry in group.entries:
        if group.request is None:
            yield entry, whole, torch.zeros(0, *whole.grid)
            continue
        record = replace(whole, layers=entry.layers, weights=entry.weights)
        key = (id(entry.method), entry.layers)  # one plan gives a layer set one set of weights
        if key not in known:
            known[key] = entry.method(record)
        yield entry, record, known[key]


def _without_forward(reading: Reading, captures: Captures, opened: _Opened) -> Capture:
    """How an image lies in the network's input, and nothing read."""
    facts = captures.facts
    size, multiple = reading.size or tuple(facts["size"]), facts["multiple"]
    fit = Fit.of(opened.image.shape[:2], size, multiple, reading.fit, facts["most"])  # type: ignore[arg-type]
    return Capture(opened.image, fit, (fit.size[0] // multiple, fit.size[1] // multiple), [], [], (), ())


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
    """Share of each class in each token [K, h, w]: pooled to the network's input, then to its grid."""
    top, left, bottom, right = (round(edge) for edge in record.fit.source)
    up, across, down, over = record.fit.target
    (height, width), (rows, columns) = record.fit.size, record.grid
    below = _pooling(height, rows)[:, up:down] @ _pooling(bottom - top, down - up)
    beside = _pooling(width, columns)[:, across:over] @ _pooling(right - left, over - across)
    shown = torch.from_numpy(truth[top:bottom, left:right])
    return torch.stack([below @ (shown == i).float() @ beside.T for i in ids])


def _pooling(count: int, bins: int) -> Tensor:
    """The means of adaptive average pooling as a matrix [bins, count]: both of its axes are linear and separate."""
    places, first = torch.arange(count), torch.arange(bins)[:, None]
    inside = (places >= first * count // bins) & (places < -((first + 1) * count // -bins))
    return inside / inside.sum(1, keepdim=True)


def _keys(entry: Entry) -> tuple[str, ...]:
    """`KEYS` but the first and the last."""
    layers = ",".join(str(layer) for layer in entry.layers)
    levels = ",".join(f"{level:g}" for level in entry.sigmas)
    return entry.method.name, entry.refine, layers, entry.heads, levels


def _settings(
    method: Method, compared: Comparison, layers: tuple[int, ...], head_count: int, sigmas: tuple[float, ...]
) -> list[tuple[tuple[int, ...], str, tuple[float, ...]]]:
    """Layers, heads and noise levels of every entry of a method."""
    sweep, label_of = compared.sweep, "mean" if compared.heads is None else str(compared.heads)
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
