"""Taggers: which classes a picture may hold, said without its labels; the protocol "predicted" prompts with them.

    tagging = Tagging.of(dataset, "openai/clip-vit-base-patch16", split="voc20:ROOT-OF-TRAIN")
    tagging[dataset[0].name]                        # class names

A CLIP scores every class name against the whole picture; a class is named if its cosine is at most the threshold below
the best one (relative, as TagCLIP's), so at least one class is named. The threshold is the user's, or the one with the
best F1 on labelled images of another split: never on the images that are evaluated. "scenes-parser" reads the embedded
world's pictures with the network that was trained to do so; it stands for a strong tagger there. The tags of any other
program (BLIP, GPT-4o, ...) come as a JSON file instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.fit import Fit
from mmdit_probe.data.labels import IGNORE
from mmdit_probe.data.sample import Dataset, Sample
from mmdit_probe.data.sources import dataset as read_dataset
from mmdit_probe.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

PARSER = "scenes-parser"
SPLIT_IMAGES = 200
"""Images that a threshold is chosen on, at most."""

Tagger = Callable[[NDArray[np.uint8]], NDArray[np.float64]]
"""Picture uint8 [height, width, 3] -> score per class [C], at most 0 (CLIP: cosine less the best; parser: log area)."""


@dataclass(frozen=True)
class Quality:
    """How right tags are on n images: shares of tagged classes that are there, and of classes there that are tagged."""

    precision: float
    recall: float
    per_image: float
    n: int

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def open_tagger(name: str, classes: Sequence[SegClass]) -> Tagger:
    """A tagger by name: "scenes-parser", or a CLIP (embedded name, folder or hub id).

    Raises:
        UserError: it cannot be loaded, or the parser is asked for classes of another world.
    """
    if name == PARSER:
        return _parser(classes)
    from mmdit_probe.segment.clip import CLIP

    clip = CLIP.open(name)
    owner = np.array([index for index, one in enumerate(classes) for _ in one.synonyms])
    words = clip.text([synonym for one in classes for synonym in one.synonyms])  # [Q, P]

    def score(image: NDArray[np.uint8]) -> NDArray[np.float64]:
        vector = clip.vectors(clip.pixels([image], (clip.side(), clip.side())))[0]
        cosines = (vector @ words.T).double().numpy()
        best = np.array([cosines[owner == index].max() for index in range(len(classes))])
        return np.asarray(best - best.max())

    return score


def _parser(classes: Sequence[SegClass]) -> Tagger:
    from mmdit_probe.scenes import CLASSES, SIZE, load_parser
    from mmdit_probe.scenes.parser import to_tensor

    if [one.name for one in classes] != list(CLASSES):
        raise UserError(f"tagger {PARSER!r} knows the classes of the embedded world only; name a CLIP checkpoint")
    parser = load_parser()

    def score(image: NDArray[np.uint8]) -> NDArray[np.float64]:
        shown = Fit.of((image.shape[0], image.shape[1]), (SIZE, SIZE)).apply(image)  # the scale that it learnt
        labels, _ = parser.label(to_tensor([shown]))
        shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
        return np.log10(shares.clip(min=0.5 / labels.size))

    return score


def choose_threshold(tagger: Tagger, dataset: Dataset) -> tuple[float, Quality]:
    """The threshold with the best F1 over all (image, class) pairs of labelled images, and how right it is there.

    Raises:
        UserError: no image holds a class.
    """
    scores, truth = [], []
    for sample in dataset.samples:
        scores.append(tagger(sample.image))
        there = np.zeros(len(dataset.classes), bool)
        ids = np.unique(np.asarray(sample.label()))
        there[ids[ids != IGNORE]] = True
        truth.append(there)
    values, wanted = np.stack(scores), np.stack(truth)
    if dataset.background is not None:
        values[:, dataset.background], wanted[:, dataset.background] = -np.inf, False
    if not wanted.any():
        raise UserError(f"{dataset.name} holds no class to choose a threshold with")
    found = [(_quality(values >= threshold, wanted), float(threshold)) for threshold in np.unique(values[wanted])]
    quality, threshold = max(found, key=lambda one: one[0].f1)
    return threshold, quality


@dataclass(frozen=True, eq=False)
class Tagging(Mapping[str, list[str]]):
    """One tagger on one data set: name of an image -> classes that it is said to hold, with one threshold.

    An image is looked at when its tags are first asked for.

    Attributes:
        dataset: the images to tag. tagger: scores them. threshold: None is chosen on `split`.
    """

    dataset: Dataset
    tagger: Tagger
    threshold: float | None
    split: Dataset | None
    _said: dict[str, list[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, dataset: Dataset, name: str, threshold: float | None = None, split: str | None = None) -> Tagging:
        """A tagger by name with a threshold, or with the data set (`scenes:train`, `NAME:ROOT`) to choose it on.

        Raises:
            UserError: neither is given, or the split has other classes, or images of the data set.
        """
        if threshold is None and split is None:
            raise UserError("a tagger needs a threshold, or labelled images to choose it on")
        images = read_dataset(split, SPLIT_IMAGES) if threshold is None and split is not None else None
        if images is not None and [one.name for one in images.classes] != [one.name for one in dataset.classes]:
            raise UserError(f"the images of {split!r} have other classes than {dataset.name}")
        known = {sample.name: sample for sample in dataset.samples}
        for one in images.samples if images is not None else ():
            if one.name in known and known[one.name].fingerprint() == one.fingerprint():
                raise UserError(f"{one.name} of {split!r} is evaluated too; choose the threshold on other images")
        return cls(dataset, open_tagger(name, dataset.classes), threshold, images)

    @cached_property
    def about(self) -> dict[str, Any]:
        """The threshold, and how it was chosen."""
        if self.split is None:
            return {"threshold": self.threshold}
        threshold, there = choose_threshold(self.tagger, self.split)
        return {"threshold": threshold, "chosen_on": self.split.name, "there": asdict(there) | {"f1": there.f1}}

    def __getitem__(self, name: str) -> list[str]:
        if name not in self._said:
            scores = self.tagger(self._samples[name].image)
            if self.dataset.background is not None:
                scores[self.dataset.background] = -np.inf
            above = np.flatnonzero(scores >= self.about["threshold"])
            self._said[name] = [self.dataset.classes[index].name for index in above]
        return self._said[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    @cached_property
    def _samples(self) -> dict[str, Sample]:
        return {sample.name: sample for sample in self.dataset.samples}


def quality(
    said: Mapping[str, Sequence[str]], counts: pd.DataFrame, samples: Sequence[str], names: Sequence[str],
    background: int | None = None,
) -> Quality:  # fmt: skip
    """How right tags were on evaluated images, from the counts (every truth id of an image is in its rows); an image
    without a scored pixel says nothing of them.

    Args:
        said: image name -> tags. counts: rows of `evaluate.plan.COLUMNS`. samples: image names by index.
        names: of the classes. background: id that taggers do not name.
    """
    counts = counts[counts["pixels"] > 0]  # the row of a picture without a scored pixel names no class
    wanted = np.zeros((len(samples), len(names)), bool)
    wanted[counts["image"].to_numpy(), counts["truth"].to_numpy()] = True
    there = np.unique(counts["image"].to_numpy())
    tagged = np.array([[name in said[samples[index]] for name in names] for index in there])
    wanted = wanted[there]
    if background is not None:
        wanted[:, background] = tagged[:, background] = False
    return _quality(tagged, wanted)


def _quality(tagged: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> Quality:
    right = float((tagged & wanted).sum())
    return Quality(
        right / max(1, tagged.sum()), right / max(1, wanted.sum()), float(tagged.sum() / len(tagged)), len(tagged)
    )
