"""The controls of every analysis: what a measurement shows where there is nothing to find.

    for variant in variants(model, ["random", "uniform"]):           # the measurement itself comes first
        with probe(variant.model, AttentionMass(), edits=variant.edits): ...

random      the same network with random weights: what architecture and inputs alone give
shuffled    every item with the caption of another one: what any text of this kind gives
uniform     attention that gives every key the same probability, in all layers: what masses and norms are by count

A claim is the measurement minus its control, paired by item (`results.statistics.compare`); a claim whose control shows
the same is printed as such. Not here: the equal-budget control of an edit (`edit.control`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.results.statistics import NONE
from mmdit_probe.specs import listed

if TYPE_CHECKING:
    from mmdit_probe.models.mmdit import MMDiT

CONTROLS = {
    "random": "the same network with random weights",
    "shuffled": "another item's caption",
    "uniform": "uniform attention in all layers",
}


@dataclass(frozen=True)
class Variant:
    """The measurement itself (name "none") or one of its controls.

    Attributes:
        name: value of the column `control`. stock: the model of the measurement. seed: of random weights.
    """

    name: str
    stock: MMDiT
    seed: int = 0

    @cached_property
    def model(self) -> MMDiT:
        """The model to run; the random twin is made when it is first asked for."""
        return random_model(self.stock, self.seed) if self.name == "random" else self.stock

    @property
    def edits(self) -> tuple[Any, ...]:
        """What to attach to every probe, before other edits."""
        from mmdit_probe.edit.control import Uniform

        return (Uniform(),) if self.name == "uniform" else ()

    def texts(self, texts: Sequence[str]) -> list[str]:
        """The captions of the items, in their order."""
        return others(texts) if self.name == "shuffled" else list(texts)


def parse(text: str, known: Sequence[str] = tuple(CONTROLS)) -> tuple[str, ...]:
    """The controls that "random,uniform" names, in the order of `known`; none for "none".

    Raises:
        UserError: an unknown control, or one that makes no sense for this measurement.
    """
    names = listed(text)
    for name in names:
        if name not in (NONE, *known):
            raise unknown("control", name, [NONE, *known])
    if NONE in names and len(names) > 1:
        raise UserError(f"--control {text}: none stands alone; leave it out, or leave the others out")
    return tuple(name for name in known if name in names)


def variants(model: MMDiT, controls: Sequence[str]) -> list[Variant]:
    """The measurement itself, then its controls (names, from `parse`)."""
    return [Variant(name, model) for name in (NONE, *controls)]


def others(texts: Sequence[str]) -> list[str]:
    """Another caption for each: the next item's, or, where some next one has the same, one that every item has not.

    Raises:
        UserError: more than half of the captions are one.
    """
    moved = [*texts[1:], *texts[:1]]
    if all(map(str.__ne__, moved, texts)):
        return moved
    (caption, most), *_ = Counter(texts).most_common(1)
    if 2 * most > len(texts):
        raise UserError(
            f"--control shuffled exchanges captions between items: {most} of {len(texts)} have {caption!r}, and not as"
            " many another"
        )
    order = sorted(range(len(texts)), key=texts.__getitem__)  # equal ones, at most so many, lie together
    for place, index in enumerate(order):
        moved[index] = texts[order[(place + most) % len(texts)]]
    return moved


def random_model(model: MMDiT, seed: int = 0) -> MMDiT:
    """The same pipeline, with the settings it was made with, around a transformer of random weights; for an embedded
    model the twin that `load` knows."""
    from mmdit_probe.models.layout import unwrap
    from mmdit_probe.models.load import random_twin

    pipeline = model.pipeline
    parts = {**pipeline.components, "transformer": random_twin(unwrap(pipeline.transformer), seed).to(model.device)}
    settings = inspect.signature(type(pipeline)).parameters.keys() & pipeline.config.keys() - parts.keys()
    twin = type(pipeline)(**parts, **{name: pipeline.config[name] for name in settings})
    twin.set_progress_bar_config(disable=True)
    found = type(model)(twin, f"{model.name}-random", model.max_sequence_length)
    found.num_frames, found.size, found.references = model.num_frames, model.size, model.references
    return found
