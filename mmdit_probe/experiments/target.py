"""What an experiment is run on: a name, a folder, a hub id, an `MMDiT`, or one's own stock pipeline."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmdit_probe import assets
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.models.names import (
    DTYPES,
    check_adapter,
    check_device,
    check_memory_options,
    counts_of,
    size_limits,
    source_of,
    streams_of,
)
from mmdit_probe.results import processes
from mmdit_probe.results.selection import load_selection
from mmdit_probe.specs import head_indices, layer_indices, named_of

if TYPE_CHECKING:
    from mmdit_probe.experiments.progress import Progress
    from mmdit_probe.models.mmdit import MMDiT


LAYERS = ("layers", "enhance", "perturb_layers", "lora_layers")
"""Options that name layers."""


@dataclass(frozen=True)
class Named:
    """A model by name.

    Attributes:
        name: embedded model, diffusers folder or hub id. options: what `load` is told of it.
        max_sequence_length: of the text encoder without a length of its own; None: the model's default.
        num_frames: of a video; None: the model's own. size: (height, width) in pixels of what is made; None: its own.
        alone: this process does nothing else, as that of a command.

    Raises:
        UserError: no such model, device, precision, adapter or way to store weights, as far as that is known without
            torch.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    max_sequence_length: int | None = None
    num_frames: int | None = None
    size: tuple[int, int] | None = None
    alone: bool = False

    def __post_init__(self) -> None:
        source_of(self.name)
        check_device(str(self.options.get("device", "auto")))
        dtype = self.options.get("dtype", "auto")
        if isinstance(dtype, str):
            check_known("dtype", dtype, DTYPES)
        check_memory_options(self.options.get("offload"), self.options.get("quantize"))
        if self.options.get("lora") is not None:
            check_adapter(str(self.options["lora"]))
        self.check_size(self.size)

    def check_size(self, size: tuple[int, int] | None) -> None:
        """Hold a size (height, width) in pixels to what the model reads, as far as its configuration here tells.

        Raises:
            UserError: it is another.
        """
        if size is not None and (limits := size_limits(self.name)) is not None:
            from mmdit_probe.data.fit import check_size

            check_size(size, *limits)

    @property
    def full_name(self) -> str:
        """The name that the loaded model has: with its adapter, and how its weights are stored."""
        return "+".join([self.name, *(str(self.options[of]) for of in ("lora", "quantize") if self.options.get(of))])

    @property
    def text(self) -> dict[str, Any]:
        """What a request says of how text is encoded, before the model is there: nothing for the model's own way."""
        asked = {"no_t5": not self.options.get("t5", True), "max_sequence_length": self.max_sequence_length}
        return {name: value for name, value in asked.items() if value}


def as_model(target: Any, shown: Progress, references: int = 0) -> MMDiT:
    """The model that a target means.

    Args:
        references: how many pictures it will be given beside the prompt; a name is refused before it is loaded.

    Raises:
        UserError: it is none, the name is unknown, or its pipeline does not take so many pictures.
    """

    target = named(target)
    if isinstance(target, Named):
        with shown.waiting(f"loading {target.name} ..."):
            with _uncollected(target.alone):
                from mmdit_probe.models.load import check_references_of, load

                check_references_of(target.name, references)
            options = dict(target.options)
            options["device"] = processes.local_device(str(options.get("device", "auto")))
            model = load(target.name, **options)
        if target.max_sequence_length is not None:
            model.max_sequence_length = target.max_sequence_length
        model.num_frames, model.size = target.num_frames or model.num_frames, target.size
        if model.size is not None and not model.makes_videos:
            from mmdit_probe.data.fit import check_size
            from mmdit_probe.segment.capture import most_tokens

            check_size(model.size, model.size_multiple, most_tokens(model))
        return model
    from mmdit_probe.models.mmdit import MMDiT

    if isinstance(target, MMDiT):
        return target
    if hasattr(target, "transformer") and hasattr(target, "scheduler"):
        return MMDiT(target)
    raise UserError(
        f"cannot probe {type(target).__name__}: expected a model's name, a diffusers folder, a hub id, an MMDiT or a"
        " pipeline"
    )


@contextmanager
def _uncollected(ever: bool) -> Iterator[None]:
    """Import without the garbage collector: torch, diffusers and transformers make millions of objects that stay, and
    it looks them all through again and again, for a quarter of the time that their import takes. `ever`: nor later."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
        if ever:
            gc.freeze()
    finally:
        if on:
            gc.enable()


def named(target: Any, asked: Any = None) -> Any:
    """A name or a folder as `Named`; anything else as it is.

    Args:
        asked: an options dataclass; a selection that it names must be one, and layers and heads must exist.

    Raises:
        UserError: they do not, as far as the model's configuration on this machine tells.
    """
    if getattr(asked, "selection", None) is not None:
        load_selection(asked.selection)
    found = Named(str(target)) if isinstance(target, str) or hasattr(target, "__fspath__") else target
    streams = getattr(asked, "streams", None)
    if streams is not None and isinstance(found, Named) and (known := streams_of(found.name)) is not None:
        named_of("encoder stream", streams, known)
    counts = counts_of(found.name) if isinstance(found, Named) and asked is not None else None
    if counts is not None:
        layers, heads = counts
        for name in LAYERS:
            spec = getattr(asked, name, None)
            if spec is not None and str(spec) not in ("all", "selected"):  # an array is compared number by number
                layer_indices(spec, layers)
        spec = getattr(asked, "heads", None)
        if spec is not None and not isinstance(spec, Mapping):
            head_indices(spec, heads)
        if hasattr(asked, "check_counts"):  # how many of them are asked for
            asked.check_counts(layers, heads)
    return found


def knows_scenes(target: Any) -> bool:
    """Whether a target is a model of the scenes world, by its name, also with an adapter or quantised."""
    return str(getattr(target, "name", target)).partition("+")[0] in assets.names()
