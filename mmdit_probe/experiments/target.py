"""What an experiment is run on: a name, a folder, a hub id, an `MMDiT`, or one's own stock pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmdit_probe import assets
from mmdit_probe.errors import UserError

if TYPE_CHECKING:
    from mmdit_probe.experiments.progress import Progress
    from mmdit_probe.models.mmdit import MMDiT


@dataclass(frozen=True)
class Named:
    """A model by name, with what `load` is told of it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    max_sequence_length: int | None = None


def as_model(target: Any, shown: Progress) -> MMDiT:
    """The model that a target means.

    Raises:
        UserError: it is none, or the name is unknown.
    """
    from mmdit_probe.models.load import load
    from mmdit_probe.models.mmdit import MMDiT

    if isinstance(target, MMDiT):
        return target
    if hasattr(target, "transformer") and hasattr(target, "scheduler"):
        return MMDiT(target)
    if isinstance(target, str) or hasattr(target, "__fspath__"):
        target = Named(str(target))
    if isinstance(target, Named):
        with shown.waiting(f"loading {target.name} ..."):
            model = load(target.name, **target.options)
        if target.max_sequence_length is not None:
            model.max_sequence_length = target.max_sequence_length
        return model
    raise UserError(
        f"cannot probe {type(target).__name__}: expected a model's name, a diffusers folder, a hub id, an MMDiT or a"
        " pipeline"
    )


def knows_scenes(target: Any) -> bool:
    """Whether a target is a model of the scenes world, by its name."""
    return str(getattr(target, "name", target)) in assets.names()
