"""One training loop for every stage: seeded by step, logged, checkpointed, resumed exactly.

Step ``k`` draws all its randomness from a generator seeded by (stage, k), so a run that was killed and resumed is the
run that was not: no random state has to be saved. ``adopt`` makes a checkpoint of weights that came from elsewhere; a
run goes on from it with new optimisers, warmed up over ``REWARM`` steps.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdit_probe.errors import UserError

REWARM = 200
"""Steps over which the learning rate rises again where a run goes on with new optimisers."""

_console = Console(stderr=True, highlight=False)


def low_precision(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 autocast where the device computes in it; on a processor without such units it would be slower."""
    if device.type == "cpu" and not any(
        torch.cpu.get_capabilities().get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16")
    ):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


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
    start, renewed = _restore(stage, folder) if resume and (folder / "progress.json").exists() else (0, None)
    curves = _Curves(folder / "curves.csv", start)
    began, sums, seen = time.perf_counter(), dict[str, float](), 0
    for step in range(start, stage.steps):
        seed_step(stage.name, step)
        for optimizer, rates in zip(stage.optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                warmth = 1.0 if renewed is None else min(1.0, (step - renewed + 1) / REWARM)
                group["lr"] = rate * stage.rate(step) * warmth
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
            _save(stage, folder, done, renewed)


def seed_step(name: str, step: int) -> None:
    """Seed torch for one step of a stage."""
    torch.manual_seed(zlib.crc32(f"{name}:{step}".encode()))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's state, contiguous, ready to be written as safetensors."""
    return {name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}


def adopt(folder: Path, module: nn.Module, step: int, curves: Path) -> None:
    """Make ``module`` the checkpoint of a stage after ``step`` steps, as its weights and as their average.

    Args:
        folder: of the stage; must hold no checkpoint.
        curves: the table of numbers up to this step.

    Raises:
        UserError: the folder holds a checkpoint.
    """
    if (folder / "progress.json").exists():
        raise UserError(f"'{folder}' holds a checkpoint already: expected a new working folder (--workdir)")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(curves, folder / "curves.csv")
    _write(folder, step, {"module": weights(module), "average": weights(module)}, None, step, step)


def _save(stage: Stage, folder: Path, done: int, renewed: int | None) -> None:
    states = {"module": weights(stage.module)}
    if stage.average is not None:
        states["average"] = stage.average.values
    updates = stage.average.updates if stage.average else 0
    _write(folder, done, states, [o.state_dict() for o in stage.optimizers], updates, renewed)


def _write(
    folder: Path,
    step: int,
    states: dict[str, dict[str, Tensor]],
    optimizers: list[dict[str, Any]] | None,
    updates: int,
    renewed: int | None,
) -> None:
    """Write everything under temporary names, then move: a kill leaves the previous checkpoint whole."""
    tag = f"{step:07d}"
    state = {f"{kind}.{n}": t for kind, values in states.items() for n, t in values.items()}
    save_file(state, folder / f"state-{tag}.safetensors")
    if optimizers is not None:
        torch.save(optimizers, folder / f"optimizer-{tag}.pt")
    record = {"step": step, "updates": updates, "renewed": renewed}
    partial = folder / "progress.partial"
    partial.write_text(json.dumps(record))
    os.replace(partial, folder / "progress.json")
    for old in (*folder.glob("state-*.safetensors"), *folder.glob("optimizer-*.pt")):
        if tag not in old.name:
            old.unlink()


def _restore(stage: Stage, folder: Path) -> tuple[int, int | None]:
    """The step to go on from, and the one at which the optimisers were new, if that was not 0."""
    record: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    tag = f"{record['step']:07d}"
    state = load_file(folder / f"state-{tag}.safetensors")
    stage.module.load_state_dict(_under("module.", state))
    if stage.average is not None:
        stage.average.values = _under("average.", state)
        stage.average.updates = record["updates"]
    optimizers = folder / f"optimizer-{tag}.pt"
    if optimizers.exists():
        for optimizer, values in zip(stage.optimizers, torch.load(optimizers, weights_only=True), strict=True):
            optimizer.load_state_dict(values)
    return int(record["step"]), record["renewed"]


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
