"""One training loop for every stage: seeded by step, logged, checkpointed, resumed exactly.

Step ``k`` draws all its randomness from a generator seeded by (stage, k), so a run that was killed and resumed is the
run that was not: no random state has to be saved.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_console = Console(stderr=True, highlight=False)


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.05) -> float:
    """Learning-rate factor: linear from 0 over ``warmup`` steps, then half a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def constant_then_linear(step: int, steps: int, warmup: int, cooldown: float = 0.2, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, constant, linear down to ``floor`` over the last ``cooldown`` share."""
    left = (steps - step) / max(1.0, cooldown * steps)
    return min((step + 1) / warmup, 1.0, max(left, floor))


class AverageOfWeights:
    """Exponential moving average of a module's parameters, kept in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {n: p.detach().float().clone() for n, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        state = module.state_dict()
        torch._foreach_lerp_(list(self.values.values()), [state[n].float() for n in self.values], weight)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict({n: v.to(module.state_dict()[n].dtype) for n, v in self.values.items()})


@dataclass
class Stage:
    """What one stage trains and how.

    Attributes:
        name: also the name of its folder.
        steps: where training ends.
        module: the weights.
        optimizers: stepped together; their learning rates are multiplied by ``rate(step)``.
        loss: step -> (loss, numbers to log); called under the step's seed.
        rate: step -> learning-rate factor.
        evaluate: step -> numbers to log, run every ``evaluate_every`` steps and at the end.
        average: optional moving average of the weights.
        clip: gradient norm limit.
    """

    name: str
    steps: int
    module: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[int], tuple[Tensor, dict[str, float]]]
    rate: Callable[[int], float]
    evaluate: Callable[[int], dict[str, float]] | None = None
    evaluate_every: int = 1000
    save_every: int = 500
    average: AverageOfWeights | None = None
    clip: float = 1.0


def run(stage: Stage, folder: Path, *, resume: bool = True, log_every: int = 50) -> None:
    """Train ``stage`` to its end in ``folder`` (curves.csv, state.safetensors, optimizer.pt, progress.json).

    Args:
        resume: continue from the last checkpoint in ``folder``; otherwise start anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base_rates = [[group["lr"] for group in o.param_groups] for o in stage.optimizers]
    start = _restore(stage, folder) if resume and (folder / "progress.json").exists() else 0
    curves = _Curves(folder / "curves.csv", start)
    began, sums, seen = time.perf_counter(), dict[str, float](), 0
    for step in range(start, stage.steps):
        seed_step(stage.name, step)
        for optimizer, rates in zip(stage.optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * stage.rate(step)
        loss, numbers = stage.loss(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"stage {stage.name}, step {step}: the loss is {float(loss.detach())}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.module.parameters(), stage.clip)
        for optimizer in stage.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if stage.average is not None:
            stage.average.update(stage.module)
        for key, value in {"loss": float(loss.detach()), **numbers}.items():
            sums[key] = sums.get(key, 0.0) + value
        seen += 1
        done = step + 1
        if done % log_every == 0 or done == stage.steps:
            means = {k: v / seen for k, v in sums.items()}
            pace = (time.perf_counter() - began) / (done - start)
            left = pace * (stage.steps - done) / 60
            curves.write(done, means)
            text = " ".join(f"{k} {v:.4f}" for k, v in means.items())
            _console.print(f"{stage.name} {done}/{stage.steps} {text} {pace * 1e3:.0f} ms/step, {left:.0f} min left")
            sums, seen = {}, 0
        if stage.evaluate is not None and (done % stage.evaluate_every == 0 or done == stage.steps):
            numbers = stage.evaluate(done)
            curves.write(done, numbers)
            _console.print(f"{stage.name} {done} " + " ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        if done % stage.save_every == 0 or done == stage.steps:
            _save(stage, folder, done)


def seed_step(name: str, step: int) -> None:
    """Seed torch for one step of a stage."""
    torch.manual_seed(zlib.crc32(f"{name}:{step}".encode()))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's state, contiguous, ready to be written as safetensors."""
    return {name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}


def _save(stage: Stage, folder: Path, done: int) -> None:
    """Write everything under temporary names, then move: a kill leaves the previous checkpoint whole."""
    state = {f"module.{n}": t for n, t in weights(stage.module).items()}
    if stage.average is not None:
        state |= {f"average.{n}": t for n, t in stage.average.values.items()}
    tag = f"{done:07d}"
    save_file(state, folder / f"state-{tag}.safetensors")
    torch.save([o.state_dict() for o in stage.optimizers], folder / f"optimizer-{tag}.pt")
    record = {"step": done, "updates": stage.average.updates if stage.average else 0}
    partial = folder / "progress.partial"
    partial.write_text(json.dumps(record))
    os.replace(partial, folder / "progress.json")
    for old in (*folder.glob("state-*.safetensors"), *folder.glob("optimizer-*.pt")):
        if tag not in old.name:
            old.unlink()


def _restore(stage: Stage, folder: Path) -> int:
    record: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    tag = f"{record['step']:07d}"
    state = load_file(folder / f"state-{tag}.safetensors")
    stage.module.load_state_dict(_under("module.", state))
    if stage.average is not None:
        stage.average.values = _under("average.", state)
        stage.average.updates = record["updates"]
    saved = torch.load(folder / f"optimizer-{tag}.pt", weights_only=True)
    for optimizer, values in zip(stage.optimizers, saved, strict=True):
        optimizer.load_state_dict(values)
    return int(record["step"])


def trained_state(folder: Path, *, average: bool = False) -> dict[str, Tensor]:
    """The weights of the last checkpoint in a stage's folder (its moving average, if asked for)."""
    record = json.loads((folder / "progress.json").read_text())
    state = load_file(folder / f"state-{record['step']:07d}.safetensors")
    return _under("average." if average else "module.", state)


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


class _Curves:
    """A long table step, name, value; rows after the step that is resumed from are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        rows: Iterable[list[str]] = []
        if start and path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row[0] != "step" and int(row[0]) <= start]
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "name", "value"])
            writer.writerows(rows)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows([step, name, f"{value:.6g}"] for name, value in numbers.items())
