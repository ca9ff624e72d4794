"""Training state on disk, exact and atomic: parameters, moments and averages as safetensors, counters as JSON.

A checkpoint counts once its folder has been renamed into place; older ones are removed after that, so a kill at any
moment leaves one that can be continued from. No random state is kept: nothing is drawn from a running generator.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_probe.errors import RunError
from mmdit_probe.results.atomic import disk


@dataclass(frozen=True)
class State:
    """What a training continues from: finished steps, tensors by name, and JSON facts."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the state after `step` steps into `folder/checkpoint-<step>`; remove the older ones."""
    from safetensors.torch import save_file

    final = folder / f"checkpoint-{step:07d}"
    temporary = folder / "checkpoint.tmp"
    with disk(final):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(
            {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, temporary / "state.safetensors"
        )
        (temporary / "state.json").write_text(json.dumps({"step": step, **facts}, indent=1), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    for old in folder.glob("checkpoint-*"):
        if old != final:
            shutil.rmtree(old)


def latest(folder: Path) -> State | None:
    """The newest state under a folder, or None.

    Raises:
        RunError: its files cannot be read.
    """
    from safetensors.torch import load_file

    found = sorted(folder.glob("checkpoint-*"))
    if not found:
        return None
    try:
        facts = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
        return State(int(facts.pop("step")), load_file(found[-1] / "state.safetensors"), facts)
    except (OSError, ValueError) as error:
        raise RunError(f"checkpoint {str(found[-1])!r} cannot be read: {error}; remove it to go on") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by `optimizer.<parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": torch.as_tensor(value) for i, of in state.items() for name, value in of.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors of `optimizer_tensors` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def copy_into(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Copy `prefix + name` tensors into parameters.

    Raises:
        RunError: the checkpoint is of other parameters.
    """
    missing = [name for name in parameters if prefix + name not in tensors]
    if missing:
        raise RunError(f"the checkpoint has no {prefix}{missing[0]}: it is of another training")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[prefix + name])
