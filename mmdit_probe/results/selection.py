"""LayerSelection: the layers (and heads) that segment, evaluate and train-magnet use, and why they were chosen.

    selection = load_selection("runs/select-layers/...", model)      # a run folder, or its selection.json
    selection.layers, selection.heads.get(5), selection.weights

A selection is a statement about one set of weights; used with others it is refused unless the caller says so. Not here:
how evidence is measured (`experiments.evidence`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmdit_probe.errors import MISSHAPEN, UserError
from mmdit_probe.results.atomic import write_json
from mmdit_probe.results.documents import read_document

FILE = "selection.json"
VERSION = 1


@dataclass(frozen=True)
class LayerSelection:
    """Chosen joint-attention layers.

    Attributes:
        model: name the model was loaded as. weight_hash: SHA-256 of its transformer (`MMDiT.weight_hash`).
        layers: 0-based, best first.
        weights: one per layer, positive, summing to 1: how a map over several layers is averaged.
        heads: chosen layer -> heads to use there; a layer that is absent uses all.
        evidence: one record per evidence and layer (evidence, layer, value, low, high, n, rank).
        how: how it was chosen: rule, split, sizes, seeds.
    """

    model: str
    weight_hash: str
    layers: tuple[int, ...]
    weights: tuple[float, ...] = ()
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    evidence: Sequence[Mapping[str, Any]] = ()
    how: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers or not _numbers(self.layers):
            raise UserError(
                f"selection of layers {list(self.layers)}: expected one or more different whole numbers from 0"
            )
        if not self.weights:
            object.__setattr__(self, "weights", (1.0 / len(self.layers),) * len(self.layers))
        positive = all(math.isfinite(weight) and weight > 0 for weight in self.weights)
        if len(self.weights) != len(self.layers) or not positive or abs(sum(self.weights) - 1) > 1e-6:
            raise UserError(
                f"selection weights {list(self.weights)}: expected {len(self.layers)} positive numbers of sum 1"
            )
        for layer, heads in self.heads.items():
            if layer not in self.layers or not heads or not _numbers(heads):
                raise UserError(
                    f"selection of heads {list(heads)} in layer {layer}: expected one or more different whole numbers "
                    f"from 0 in one of the layers {list(self.layers)}"
                )

    def save(self, path: Path | str) -> Path:
        """Write the JSON file."""
        return write_json(path, {"version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, path: Path | str) -> LayerSelection:
        """Read the JSON file.

        Raises:
            UserError: no such file, not a selection, or one of a newer version.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no selection {str(path)!r}; expected the {FILE} that select-layers writes")
        data = read_document(path, "layer selection", VERSION)
        try:
            return cls(
                model=str(data["model"]),
                weight_hash=str(data["weight_hash"]),
                layers=tuple(data["layers"]),
                weights=tuple(float(weight) for weight in data.get("weights", ())),
                heads={int(layer): tuple(heads) for layer, heads in data.get("heads", {}).items()},
                evidence=tuple(dict(one) for one in data.get("evidence", ())),
                how=dict(data.get("how", {})),
            )
        except (*MISSHAPEN, UserError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{str(path)!r} is no layer selection ({reason}); make one with select-layers") from error


def _numbers(values: Sequence[Any]) -> bool:
    """Whether these are different whole numbers from 0."""
    return all(type(value) is int and value >= 0 for value in values) and len(set(values)) == len(values)


def load_selection(
    source: Path | str | LayerSelection, model: Any = None, *, any_weights: bool = False
) -> LayerSelection:
    """The selection that `--selection` means.

    Args:
        source: a selection file, a run folder of select-layers, or a selection.
        model: what it is to be used with, an `MMDiT` or what has its name, weight_hash, layers and heads; its weights
            must be those of the selection.
        any_weights: only check that the layers and heads exist (for a fine-tuned copy of the same model).

    Raises:
        UserError: no such file, not a selection, other weights, or layers and heads that the model does not have.
    """
    if isinstance(source, LayerSelection):
        selection = source
    else:
        path = Path(source)
        selection = LayerSelection.read(path / FILE if path.is_dir() else path)
    if model is None:
        return selection
    if not any_weights and selection.weight_hash != model.weight_hash:
        raise UserError(
            f"the selection {str(source)!r} was made on {selection.model} (weights {selection.weight_hash[:12]});"
            f" this is {model.name} (weights {model.weight_hash[:12]}): run select-layers on it"
        )
    count, heads = len(model.layers), model.heads
    if max(selection.layers) >= count or any(h >= heads for of in selection.heads.values() for h in of):
        raise UserError(
            f"the selection {str(source)!r} names layers {list(selection.layers)}; {model.name} has {count} layers of"
            f" {heads} heads"
        )
    return selection
