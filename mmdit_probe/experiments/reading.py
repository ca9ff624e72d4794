"""Where a segmentation reads the network and how the picture is shown to it: options of segment, discover and evaluate.

class Segment(Reads, ...): ...
reading, heads, notes = Segment(image="cat.jpg", classes="cat", layers="3-5").reading(Network.of(model))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from mmdit_probe.errors import UserError
from mmdit_probe.experiments.known import grounding_layers
from mmdit_probe.experiments.options import checked_heads
from mmdit_probe.options import LAST_SEED, Option
from mmdit_probe.results.selection import LayerSelection, load_selection
from mmdit_probe.segment.settings import parse_sigmas
from mmdit_probe.specs import HeadSpec, Spec, layer_indices, listed, parse_size

if TYPE_CHECKING:
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.segment.record import Reading

SIGMA, FIT = "0.515", "squash"

RULE = Option(
    "Background rule: none, threshold:0.5, probability:0.2, power:2 or class:NAME.",
    values=("none", "threshold:0.5", "probability:0.2", "power:2", "class:"),
)


def options_of(methods: Sequence[str], before: str = "") -> list[str]:
    """What --set begins with: the options of methods, with what stands before a name ("{method}.")."""
    from mmdit_probe.segment.methods import METHODS

    names = ((method, name) for method in methods for name in METHODS[method].defaults)
    return list(dict.fromkeys(f"{before.format(method=method)}{name}=" for method, name in names))


class Network(NamedTuple):
    """What must be known of a model to say what is read of it."""

    name: str
    weight_hash: str
    layers: range
    heads: int

    @classmethod
    def of(cls, model: MMDiT) -> Network:
        return cls(model.name, model.weight_hash, range(len(model.layers)), model.heads)


class Read(NamedTuple):
    """What is read: for `segment.capture`, the methods' option `heads` (None: all), and what to tell the user."""

    reading: Reading
    heads: HeadSpec | None
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Reads:
    """The options. None stands for the default that is shown."""

    layers: Annotated[
        Spec | None,
        Option(
            "Layers, 0-based: 9, 7-11, all; maps are averaged.",
            shown_default="those known for the model, else the middle third",
        ),
    ] = None
    heads: Annotated[HeadSpec | None, Option("Attention heads: 3, 0-3, 0,5.", shown_default="all, averaged")] = None
    selection: Annotated[
        Path | str | None, Option("Layers and heads from select-layers, in place of --layers and --heads.")
    ] = None
    sigma: Annotated[
        str | float | Sequence[float] | None,
        Option("Noise levels by comma, 0 clean to 1 noise; several are averaged.", shown_default=SIGMA),
    ] = None
    noise_seeds: Annotated[int, Option("Number of noise seeds to average over.", min=1)] = 1
    fit: Annotated[
        Literal["squash", "letterbox", "crop", "aspect"] | None,
        Option("How the picture meets the network's size.", shown_default=FIT),
    ] = None
    size: Annotated[str | None, Option("Network input, HxW in pixels.", shown_default="the model's own")] = None
    seed: Annotated[int, Option("First noise seed.", min=0, max=LAST_SEED)] = 0
    as_reference: Annotated[
        Literal["none", "beside", "read"],
        Option("Give an editing model the picture as its reference too, and read its tokens there."),
    ] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.sigmas()
        parse_size(self.size)

    def sigmas(self, default: str = SIGMA) -> list[float]:
        """The noise levels.

        Raises:
            UserError: no numbers in 0..1.
        """
        asked = default if self.sigma is None else self.sigma
        levels = [asked] if isinstance(asked, int | float) else asked
        return parse_sigmas(levels if isinstance(levels, str) else ",".join(map(str, levels)))

    def read_selection(self) -> LayerSelection | None:
        """The selection, if one is named; read before weights are loaded.

        Raises:
            UserError: no such file, or not a selection.
        """
        return None if self.selection is None else load_selection(self.selection)

    def reading(self, network: Network, sigma: str = SIGMA, fit: str = FIT, size: str | None = None) -> Read:
        """What is read of a network; `sigma`, `fit` and `size` where the options do not say.

        Raises:
            UserError: layers or heads that do not exist, or a selection of other weights.
        """
        from mmdit_probe.segment.record import Reading

        layers, heads, weights, notes = self._places(network)
        reading = Reading(
            layers, weights, None, self.sigmas(sigma), range(self.seed, self.seed + self.noise_seeds), self.fit or fit,
            parse_size(self.size or size), self.as_reference,
        )  # fmt: skip
        return Read(reading, heads, notes)

    def _places(
        self, network: Network
    ) -> tuple[tuple[int, ...], HeadSpec | None, Mapping[int, float] | None, list[str]]:
        heads = self.heads
        if self.selection is not None:
            return self._selected(network)
        weights, notes = None, []
        if self.layers is not None:
            layers = layer_indices(self.layers, len(network.layers))
        else:
            known = grounding_layers([network.name], network.weight_hash, len(network.layers))
            layers = tuple(sorted(known.layers))
            weights = dict(zip(known.layers, known.weights, strict=True)) if known.weights else None
            notes = [f"layers {','.join(map(str, layers))}: {known.source}"]
        return layers, heads if heads is None else checked_heads(heads, layers, network.heads), weights, notes

    def _selected(self, network: Network) -> tuple[tuple[int, ...], HeadSpec | None, Mapping[int, float] | None, Any]:
        assert self.selection is not None
        found = load_selection(self.selection, network)
        weights = dict(zip(found.layers, found.weights, strict=True))
        equal = max(found.weights) - min(found.weights) < 1e-9
        return tuple(found.layers), found.heads or None, None if equal else weights, []


def check_streams_read(options: Mapping[str, Any], no_t5: bool) -> None:
    """A method reads class names in an encoder stream that has them.

    Raises:
        UserError: it is to read them in T5, which is left out.
    """
    if no_t5 and "t5" in listed(options.get("streams", "all")):
        raise UserError("streams=t5 reads class names in T5, which --no-t5 leaves out; take streams=clip, or drop one")
