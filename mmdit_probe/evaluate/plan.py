"""What an evaluation does to each image: which prompts, which captured forwards, which methods read them.

    plan = Plan.of(dataset, ["seg4diff", "iseg"], (24, 24), refine=["none", "pamr"], scoring=Scoring(("full",)))
    for columns in plan.rows(captures, range(100)): ...   # sparse confusion counts of an image, every configuration

One forward per prompt serves every method, layer and refinement. Protocols (who says which classes there are):

    present        the classes that occur in what is read of this image (a crop's own): an oracle, an image of one class
                   is right by construction
    predicted      the classes a tagger names (`evaluate.tagger`, or a JSON file {image name: [class names]})
    full           all classes of the data set
    unsupervised   no names: segments, matched afterwards (`evaluate.scores`)

Controls are counted with every refinement that the methods are: maps of random numbers, one true token per class (a
token of the class, drawn by chance, is 1 in its map, all others 0), and "words shifted": the method's own maps, each
given to the next class of the list, which is right where order and layout alone are enough.

Not here: the loop over images (`experiments.evaluate`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, groupby
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
from mmdit_probe.segment.settings import Background, scoring_size
from mmdit_probe.segment.tail import strongest
from mmdit_probe.specs import heads_at, layer_indices, named_of

PROTOCOLS = ("present", "predicted", "full")
UNSUPERVISED = "unsupervised"
SWEEPS = ("none", "layer", "head", "sigma")
CEILING = "token-grid ceiling"
RANDOM, ONE_TOKEN, SHIFTED = "random", "one true token per class", ", words shifted"
"""Controls; the last one follows the name of the method whose maps they are."""
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
class Scoring:
    """Who says which classes there are, and how labels are compared.

    Attributes:
        protocols: for the open-vocabulary methods. tags: image name -> class names, for "predicted".
        background: rule of `segment.tail`.
        by_rows: match segments in each pixel row, as the released Seg4Diff evaluation does (`matched_by_rows`).
        size: of what the network is shown, where label (nearest) and maps (bilinear) are compared: "128x128",
            "short:640" (`settings.scoring_size`); None: the picture's own.

    Raises:
        UserError: unknown names, or a protocol without what it needs.
    """

    protocols: tuple[str, ...] = ("present",)
    tags: Mapping[str, Sequence[str]] | None = None
    background: str = "none"
    by_rows: bool = False
    size: str | None = None

    def __post_init__(self) -> None:
        named_of("protocol", self.protocols, PROTOCOLS)
        if "predicted" in self.protocols and self.tags is None:
            raise UserError(
                "protocol 'predicted' needs a tagger: --tagger CLIP, or --tags FILE (JSON, image name -> class names)"
            )
        _ = self.rule

    @property
    def rule(self) -> Background:
        return Background.parse(self.background)

    def fit(self, fit: Fit) -> Fit:
        """How the part of the picture that the network is shown lies in the scored label."""
        top, left, bottom, right = fit.shown
        return fit.at(scoring_size(str(self.size), (bottom - top, right - left)))

    def view(self, record: Capture) -> Capture:
        """The capture whose picture is what is scored: refinements and labels come at that size."""
        if self.size is None:
            return record
        to = self.fit(record.fit)
        fit = Fit(to.size, record.fit.size, (0, 0, *to.size), (0, 0, *record.fit.size), record.fit.how)
        return replace(record, picture=np.array(to.apply(record.image)), fit=fit)

    def label(self, truth: NDArray[np.integer], fit: Fit, ignore: Collection[int]) -> NDArray[np.integer]:
        """The truth that is scored: without ignored ids, and without pixels that the network was not shown."""
        kept = np.where(fit.unseen | np.isin(truth, list(ignore)), IGNORE, truth)
        return kept if self.size is None else self.fit(fit).masks(kept)


@dataclass(frozen=True)
class Plan:
    """See the module. Make it with `Plan.of`. `controls`: whether they are counted."""

    dataset: Dataset
    scoring: Scoring
    entries: tuple[Entry, ...]
    reading: Reading
    controls: bool = True

    @classmethod
    def of(
        cls, dataset: Dataset, methods: Sequence[str], network: tuple[int, int], *, reading: Reading | None = None,
        scoring: Scoring | None = None, refine: Sequence[str] = ("none",),
        options: Mapping[str, Mapping[str, Any]] | None = None, heads: Any = None, sweep: str = "none",
    ) -> Plan:  # fmt: skip
        """A plan.

        Args:
            dataset: the images. methods: names of methods, open-vocabulary and unsupervised ones mixed.
            network: numbers of layers and heads of the model.
            reading: layers and weights, noise levels (averaged, but one by one in the sweep over "sigma"), seeds, fit.
            scoring: protocols, and how labels are compared.
            refine: every method is measured with each. options: method name -> its options.
            heads: that methods read; all if None.
            sweep: "none", "layer" (each layer alone), "head" (each head of each layer alone), "sigma".

        Raises:
            UserError: unknown names.
        """
        check_known("sweep", sweep, SWEEPS)
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
        layers = layer_indices(middle_layers(network[0]) if how.layers is None else how.layers, network[0])
        for text in refine:
            Refinement.parse(text)
        entries = [
            Entry(_of_head(method, head), text, layer_set, head, levels, layer_weights(layer_set, how.weights))
            for method in chosen
            for text in refine
            for layer_set, head, levels in _settings(method, sweep, layers, network[1], heads, tuple(how.sigmas))
        ]
        if not entries:
            raise UserError("none of the methods reads single heads, so there is nothing to sweep over heads")
        return cls(dataset, scoring or Scoring(), tuple(entries), how)

    @cached_property
    def _names(self) -> list[str]:
        return [one.name for one in self.dataset.classes]

    def rows(self, captures: Captures, indices: Iterable[int]) -> Iterator[dict[str, NDArray[Any]]]:
        """Columns `COLUMNS` of each of these images, in order.

        Several images share their forwards; beside those of a GPU, images are read and methods run in threads.
        """
        return overlapped(
            indices,
            partial(self._opened, captures),
            lambda batch: self._captured(captures, batch),
            lambda opened, found: self._counted(captures, opened, found),
            size=lambda: captures.pictures,
            workers=captures.workers,
        )

    def _opened(self, captures: Captures, index: int) -> _Opened:
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
        unseen = _fit(self.reading, captures, image).unseen
        seen = np.where(unseen, IGNORE, truth)  # what a crop cuts off is not in the picture that is read
        asked = [(one, self.vocabulary(one, sample.name, seen)) for one in (self.scoring.protocols if named else ())]
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
        index, rows = image.index, _Rows(image.index, len(self.dataset.classes))
        record = _without_forward(self.reading, captures, image.image)
        scored = self.scoring.label(image.truth, record.fit, self.dataset.ignore)
        ids = [int(i) for i in np.unique(scored) if i != IGNORE]
        view = self.scoring.view(record)
        best, nowhere, tokens = np.zeros_like(scored), torch.zeros(view.grid), {}
        if ids:  # a picture without a scored pixel says nothing of any row, and is counted as done
            shares = _shares(scored, ids, view)
            best = np.array(ids)[strongest(view.fit.back(shares)).numpy()]
            tokens = dict(zip(ids, _true_tokens(shares, index), strict=True))
        for protocol, together in groupby(image.groups, lambda group: group.protocol):
            groups = list(together)
            entries = chain.from_iterable(self._maps(group, found.get(group, record)) for group in groups)
            if protocol == UNSUPERVISED:
                rows.add((UNSUPERVISED, CEILING, "none", "", "", "", "classes"), histogram(scored, best, rows.classes))
                if self.scoring.by_rows:
                    whole = (UNSUPERVISED, ONE_SEGMENT, "none", "", "", "")
                    self._add_segments(rows, scored, whole, np.zeros_like(scored))
                count = partial(self._add_segments, rows, scored)
                self._count(protocol, entries, None, count, torch.stack(list(tokens.values()) or [nowhere]), index)
                continue
            known = groups[0].ids
            rows.add((protocol, CEILING, "none", "", "", "", "classes"), histogram(scored, best, rows.classes))
            seeds = torch.stack([tokens.get(i, nowhere) for i in known]) if known else torch.zeros(0, *view.grid)
            self._count(protocol, entries, known, partial(self._add_classes, rows, scored, known), seeds, index)
        return rows.columns()

    def _count(
        self, protocol: str, entries: Iterable[tuple[Entry, Capture, Tensor]], known: Sequence[int] | None,
        count: Callable[..., None], tokens: Tensor, seed: int,
    ) -> None:  # fmt: skip
        """Every entry, and the controls with its refinement.

        Args:
            known: class ids of the maps; None: they are segments.
            count: takes the keys and labels [H, W] of the maps at the scored size.
            tokens: [C, h, w] of "one true token per class".
        """
        names = None if known is None else [self._names[i] for i in known]
        rule = None if known is None else self.scoring.rule
        noise = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
        done: set[tuple[str, ...]] = set()
        for entry, record, scores in entries:
            steps, keys = Refinement.parse(entry.refine), _keys(protocol, entry)

            def counted(
                of: tuple[str, ...], pixels: Tensor, steps: Refinement = steps, record: Capture = record
            ) -> None:
                count(
                    of, steps.labels(pixels, record, rule, names) if len(pixels) else np.zeros(record.size, np.uint16)
                )

            pixels = steps(scores, record) if len(scores) else torch.zeros(0, *record.size)
            counted(keys, pixels)
            if not self.controls:
                continue
            if not entry.method.unsupervised:
                counted((protocol, f"{entry.method.name}{SHIFTED}", *keys[2:]), pixels.roll(1, 0))
            place = (entry.refine, keys[3], "", keys[5]) if steps.keep else (entry.refine, "", "", "")
            for name, maps in ((RANDOM, noise), (ONE_TOKEN, tokens)) if place not in done else ():
                counted((protocol, name, *place), steps(maps, record) if len(maps) else torch.zeros(0, *record.size))
            done.add(place)

    def _add_classes(
        self, rows: _Rows, scored: NDArray[np.integer], known: Sequence[int], keys: tuple[str, ...],
        labels: NDArray[np.integer],
    ) -> None:  # fmt: skip
        """Counts of labels, whose number C is the background: all of them where no class is known."""
        rows.add((*keys, "classes"), histogram(scored, np.array([*known, self._background_id])[labels], rows.classes))

    def _add_segments(
        self, rows: _Rows, scored: NDArray[np.integer], keys: tuple[str, ...], segments: NDArray[np.integer]
    ) -> None:
        """Counts of segments, to be matched later; or of classes, matched row by row now."""
        if self.scoring.by_rows:
            rows.add((*keys, "classes"), matched_by_rows(scored, segments, rows.classes))
        else:
            rows.add((*keys, "segments"), histogram(scored, segments, rows.classes))

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
            tags = self.scoring.tags or {}
            if name not in tags:
                raise UserError(f"the tags say nothing of image {name!r}; give it an entry, an empty list if need be")
            for tag in tags[name]:
                check_known(f"class in the tags of {name}", tag, self._names)
            ids = sorted({self._names.index(tag) for tag in tags[name]})
        hidden = self.dataset.background if self.scoring.rule.kind != "class" else None
        return [i for i in ids if i != hidden]

    def _maps(self, group: _Group, whole: Capture) -> Iterator[tuple[Entry, Capture, Tensor]]:
        """(entry, capture as it is scored, maps) of every entry; entries with the same method share them."""
        view = self.scoring.view(whole)
        known: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        for entry in group.entries:
            if group.request is None:
                yield entry, view, torch.zeros(0, *view.grid)
                continue
            key = (id(entry.method), entry.layers)  # one plan gives a layer set one set of weights
            if key not in known:
                known[key] = entry.method(replace(whole, layers=entry.layers, weights=entry.weights))
            yield entry, replace(view, layers=entry.layers, weights=entry.weights), known[key]


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


def _fit(reading: Reading, captures: Captures, image: NDArray[np.uint8]) -> Fit:
    """How an image lies in the network's input."""
    facts = captures.facts
    size = reading.size or tuple(facts["size"])
    return Fit.of(image.shape[:2], size, facts["multiple"], reading.fit, facts["most"])  # type: ignore[arg-type]


def _without_forward(reading: Reading, captures: Captures, image: NDArray[np.uint8]) -> Capture:
    """How an image lies in the network's input, and nothing read."""
    fit, multiple = _fit(reading, captures, image), captures.facts["multiple"]
    return Capture(image, fit, (fit.size[0] // multiple, fit.size[1] // multiple), [], [], (), ())


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
        if not kept.any():  # a picture without a scored pixel is done, too
            kept[0, 0] = True
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
    top, left, bottom, right = record.fit.shown
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


def _true_tokens(shares: Tensor, seed: int) -> Tensor:
    """One token of each class as a map [K, h, w] of 0 and 1, of shares [K, h, w]: by chance among those where the class
    has the largest share, else the token where its share is largest."""
    generator = torch.Generator().manual_seed(seed)
    flat, owner = shares.flatten(1), shares.argmax(0).flatten()
    found = torch.zeros_like(flat)
    for index, share in enumerate(flat):
        own = ((owner == index) & (share > 0)).nonzero()[:, 0]
        pick = int(torch.randint(max(1, len(own)), (), generator=generator))
        found[index, own[pick] if len(own) else share.argmax()] = 1.0
    return found.reshape(shares.shape)


def _keys(protocol: str, entry: Entry) -> tuple[str, ...]:
    """All of `KEYS` but the last."""
    layers = ",".join(str(layer) for layer in entry.layers)
    levels = ",".join(f"{level:g}" for level in entry.sigmas)
    return protocol, entry.method.name, entry.refine, layers, entry.heads, levels


def _settings(
    method: Method, sweep: str, layers: tuple[int, ...], head_count: int, heads: Any, sigmas: tuple[float, ...]
) -> list[tuple[tuple[int, ...], str, tuple[float, ...]]]:
    """Layers, heads ("mean" for a method that has no such option) and noise levels of every entry of a method."""
    label_of = str(method.defaults.get("heads", "mean"))
    if sweep == "layer":
        return [((layer,), label_of, sigmas) for layer in layers]
    if sweep == "sigma":
        return [(layers, label_of, (level,)) for level in sigmas]
    if sweep == "head":
        if "heads" not in method.defaults:
            return []
        read = "all" if heads is None else heads
        return [((layer,), str(head), sigmas) for layer in layers for head in heads_at(read, layer, head_count)]
    return [(layers, label_of, sigmas)]


def _of_head(method: Method, head: str) -> Method:
    if "heads" in method.defaults and head.isdigit():
        return method.configure({"heads": [int(head)]})
    return method
