"""LayerSelection: the layers (and heads) that segment, evaluate and train-magnet use, and why they were chosen.

    selection = load_selection("runs/select-layers/...", model)      # a run folder, or its selection.json
    selection.layers, selection.heads.get(5), selection.weights

One JSON file: model, weight hash, layers, heads, weights, evidence, and how it was chosen. A selection is a statement
about one set of weights; used with others it is refused unless the caller says so. Not here: how evidence is measured
(`experiments.evidence`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_probe.errors import UserError

if TYPE_CHECKING:
    from mmdit_probe.models.mmdit import MMDiT

FILE = "selection.json"
VERSION = 1


@dataclass(frozen=True)
class LayerSelection:
    """Chosen joint-attention layers.

    Attributes:
        model: name the model was loaded as. weight_hash: SHA-256 of its transformer (`MMDiT.weight_hash`).
        layers: 0-based, best first.
        weights: one per layer, non-negative, summing to 1: how a map over several layers is averaged.
        heads: layer -> heads to use there; a layer that is absent uses all.
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
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise UserError(f"selection of layers {list(self.layers)}: expected one or more different layers")
        if not self.weights:
            object.__setattr__(self, "weights", (1.0 / len(self.layers),) * len(self.layers))
        if len(self.weights) != len(self.layers) or min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-6:
            raise UserError(
                f"selection weights {list(self.weights)}: expected {len(self.layers)} non-negative numbers of sum 1"
            )

    def save(self, path: Path | str) -> Path:
        """Write the JSON file."""
        path = Path(path)
        document = {"version": VERSION, **asdict(self)}
        document["heads"] = {str(layer): list(heads) for layer, heads in self.heads.items()}
        path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path | str) -> LayerSelection:
        """Read the JSON file.

        Raises:
            UserError: no such file, or not a selection.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no selection {str(path)!r}; expected the {FILE} that select-layers writes")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                model=str(data["model"]),
                weight_hash=str(data["weight_hash"]),
                layers=tuple(int(layer) for layer in data["layers"]),
                weights=tuple(float(weight) for weight in data.get("weights", ())),
                heads={int(k): tuple(int(h) for h in heads) for k, heads in data.get("heads", {}).items()},
                evidence=tuple(data.get("evidence", ())),
                how=data.get("how", {}),
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{str(path)!r} is no layer selection ({reason}); make one with select-layers") from error


def load_selection(source: Path | str, model: MMDiT | None = None, *, any_weights: bool = False) -> LayerSelection:
    """The selection that `--selection` means.

    Args:
        source: a selection file, or a run folder of select-layers.
        model: what it is to be used with; its weights must be those of the selection.
        any_weights: only check that the layers and heads exist (for a fine-tuned copy of the same model).

    Raises:
        UserError: no such file, not a selection, other weights, or layers and heads that the model does not have.
    """
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
