"""One training loop for every stage: seeded by step, logged, checkpointed, stopped at a time, resumed exactly.

Step ``k`` draws all its randomness from a generator seeded by (stage, k, seed), so a run that was killed or stopped and
resumed is the run that was not: no random state has to be saved. A session with a time stops after the step that
reaches it; with ``finish`` the learning rate comes down over the last fifth of that time, and how is part of the
checkpoint. ``adopt`` makes a checkpoint of weights that came from elsewhere; a run goes on from it with new optimisers,
warmed up over ``REWARM`` steps.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdit_probe.errors import RunError, UserError
from mmdit_probe.results.atomic import replacing, write_json
from training.pool import console
from training.session import Session

REWARM = 200
"""Steps over which the learning rate rises again where a run goes on with new optimisers, or after it had landed."""
LANDING = 0.2
"""Share of a session's time over which the learning rate comes down, with ``finish``."""
FLOOR = 0.02
"""Where it comes down to, as a share of its height."""
SAVE_SECONDS = 180.0

Module = TypeVar("Module", bound=nn.Module)


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


def constant_then_linear(step: int, steps: int, warmup: int, cooldown: float = 0.2) -> float:
    """Learning-rate factor: linear warm-up, constant, linear down to ``FLOOR`` over the last ``cooldown`` share."""
    left = (steps - step) / max(1.0, cooldown * steps)
    return min((step + 1) / warmup, 1.0, max(left, FLOOR))


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
        evaluate: step -> numbers to log, run every ``evaluate_every`` steps and at the end, without gradients and with
            the module in evaluation mode.
        average: optional moving average of the weights.
        clip: gradient norm limit.
        recipe: options that a checkpoint can only be continued with, beside the session's seed and scenes.
        save_seconds: between two checkpoints.
    """

    name: str
    steps: int
    module: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[int], tuple[Tensor, dict[str, float]]]
    rate: Callable[[int], float]
    evaluate: Callable[[int], dict[str, float]] | None = None
    evaluate_every: int = 1000
    average: AverageOfWeights | None = None
    clip: float = 1.0
    recipe: dict[str, Any] = field(default_factory=dict)
    save_seconds: float = SAVE_SECONDS


@dataclass
class Progress:
    """How far a run is; ``progress.json`` of its folder.

    Attributes:
        step: steps done.
        updates: of the average of weights.
        renewed: step at which the learning rate began to rise again.
        landing: first step of the last descent of the learning rate, and its length in steps.
        sums, seen: numbers since the last entry of the curves, added up over steps.
        recipe: what the run was trained with; None if that is not known.
    """

    step: int = 0
    updates: int = 0
    renewed: int | None = None
    landing: tuple[int, int] | None = None
    sums: dict[str, float] = field(default_factory=dict)
    seen: int = 0
    recipe: dict[str, Any] | None = None

    def rate(self, scheduled: float) -> float:
        """The learning-rate factor of the next step, from that of the stage's schedule."""
        warmth = 1.0 if self.renewed is None else min(1.0, (self.step - self.renewed + 1) / REWARM)
        if self.landing is not None:
            first, count = self.landing
            scheduled = min(scheduled, max(FLOOR, 1 - (self.step - first) / count))
        return scheduled * warmth

    def end(self, steps: int) -> int:
        """The step that training ends at."""
        return steps if self.landing is None else min(steps, sum(self.landing))


def run(stage: Stage, folder: Path, session: Session, *, log_every: int = 50) -> bool:
    """Train ``stage`` in ``folder`` (curves.csv, state-*.safetensors, optimizer-*.pt, progress.json).

    Args:
        session: says whether to start anew, when to stop, and the seed.

    Returns: whether the end of the stage was reached, and not only the end of the session's time.

    Raises:
        UserError: the folder holds a run of another recipe. RunError: the loss or its gradient is not finite.
    """
    return _Run(stage, folder, session, log_every).go()


class _Run:
    def __init__(self, stage: Stage, folder: Path, session: Session, log_every: int) -> None:
        self.stage, self.folder, self.session, self.log_every = stage, folder, session, log_every
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in stage.optimizers]
        recipe = {"seed": session.seed, "scenes": session.scenes, **stage.recipe}
        folder.mkdir(parents=True, exist_ok=True)
        known = not session.fresh and (folder / "progress.json").exists()
        self.progress = _restore(stage, folder, recipe) if known else Progress()
        self.progress.recipe = recipe
        self.curves = _Curves(folder / "curves.csv", self.progress.step)
        self.clock: deque[float] = deque([time.monotonic()], maxlen=log_every + 1)
        self.evaluation = 0.0

    @property
    def end(self) -> int:
        return self.progress.end(self.stage.steps)

    def go(self) -> bool:
        saved, when = self.progress.step, time.monotonic()
        while self.progress.step < self.end and self.session.seconds_left() > 0:
            self.land_in_time()
            self.step()
            self.report()
            if time.monotonic() - when >= self.stage.save_seconds:
                self.save()
                saved, when = self.progress.step, time.monotonic()
        if saved != self.progress.step:
            self.save()
        complete = self.progress.step >= self.end
        if not complete:
            console.print(
                f"{self.stage.name}: the time is over at step {self.progress.step} of {self.end}; the same command"
                " without --fresh goes on from here"
            )
        return complete

    def step(self) -> None:
        stage, number = self.stage, self.progress.step
        seed_step(stage.name, number, self.session.seed)
        factor = self.progress.rate(stage.rate(number))
        for optimizer, rates in zip(stage.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss, numbers = stage.loss(number)
        self.finite("loss", loss)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(stage.module.parameters(), stage.clip)
        self.finite("gradient", norm)  # else the weights are not, and may be saved before the next loss tells
        for optimizer in stage.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if stage.average is not None:
            stage.average.update(stage.module)
        sums = self.progress.sums
        for key, value in {"loss": float(loss.detach()), **numbers}.items():
            sums[key] = sums.get(key, 0.0) + value
        self.progress.seen += 1
        self.progress.step += 1

    def finite(self, what: str, value: Tensor) -> None:
        """Go on with numbers alone."""
        if not torch.isfinite(value):
            raise RunError(f"stage {self.stage.name}, step {self.progress.step}: the {what} is {float(value.detach())}")

    def report(self) -> None:
        """Write curves: means over steps, and what is measured every so often."""
        stage, progress, done = self.stage, self.progress, self.progress.step
        self.clock.append(time.monotonic())
        if done % self.log_every == 0 or done == self.end:
            means = {k: v / progress.seen for k, v in progress.sums.items()}
            self.curves.write(done, means)
            text = " ".join(f"{k} {v:.4f}" for k, v in means.items())
            left = self.pace * (self.end - done) / 60
            console.print(f"{stage.name} {done}/{self.end} {text} {self.pace * 1e3:.0f} ms/step, {left:.0f} min left")
            progress.sums, progress.seen = {}, 0
        if stage.evaluate is not None and (done % stage.evaluate_every == 0 or done == self.end):
            stage.module.eval()
            with torch.no_grad():
                numbers = stage.evaluate(done)
            stage.module.train()
            self.evaluation = time.monotonic() - self.clock[-1]
            self.curves.write(done, numbers)
            console.print(f"{stage.name} {done} " + " ".join(f"{k} {v:.4f}" for k, v in numbers.items()))

    @property
    def pace(self) -> float:
        """Seconds per step, of the last ones."""
        return (self.clock[-1] - self.clock[0]) / max(1, len(self.clock) - 1)

    def land_in_time(self) -> None:
        """Begin the descent of the learning rate once a fifth of the time is left."""
        if self.progress.landing is not None or not self.session.lands(self.stage.name) or len(self.clock) < 2:
            return
        left = self.session.seconds_left()
        if left > LANDING * 60 * (self.session.minutes or 0):
            return
        steps = int(0.9 * (left - self.evaluation) / self.pace)
        self.progress.landing = (self.progress.step, max(1, steps))
        console.print(f"{self.stage.name}: the learning rate comes down from step {self.progress.step} to {self.end}")

    def save(self) -> None:
        stage = self.stage
        states = {"module": weights(stage.module)}
        if stage.average is not None:
            states["average"] = stage.average.values
            self.progress.updates = stage.average.updates
        _write(self.folder, self.progress, states, [o.state_dict() for o in stage.optimizers])


def seed_step(name: str, step: int, seed: int = 0) -> None:
    """Seed torch for one step of a stage."""
    torch.manual_seed(zlib.crc32(f"{name}:{step}{f':{seed}' if seed else ''}".encode()))


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
    states = {"module": weights(module), "average": weights(module)}
    _write(folder, Progress(step, updates=step, renewed=step), states, None)


def _write(
    folder: Path, progress: Progress, states: dict[str, dict[str, Tensor]], optimizers: list[dict[str, Any]] | None
) -> None:
    """Write a checkpoint; ``progress.json`` comes last: a kill leaves the previous checkpoint whole."""
    tag = f"{progress.step:07d}"
    with replacing(folder / f"state-{tag}.safetensors") as path:
        save_file({f"{kind}.{n}": t for kind, values in states.items() for n, t in values.items()}, path)
    if optimizers is not None:
        with replacing(folder / f"optimizer-{tag}.pt") as path:
            torch.save(optimizers, path)
    write_json(folder / "progress.json", asdict(progress))
    for old in (*folder.glob("state-*.safetensors"), *folder.glob("optimizer-*.pt")):
        if tag not in old.name:
            old.unlink()


def read_progress(folder: Path) -> Progress:
    """How far the run in a stage's folder is.

    Raises:
        UserError: it holds none.
    """
    path = folder / "progress.json"
    if not path.exists():
        raise UserError(
            f"'{folder.parent}' holds no trained {folder.name}: run `python -m training {folder.name}` first"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    return Progress(**record | {"landing": tuple(record["landing"]) if record.get("landing") else None})


def _restore(stage: Stage, folder: Path, recipe: dict[str, Any]) -> Progress:
    """Load the last checkpoint into a stage."""
    progress = read_progress(folder)
    told = {key: value for key, value in (progress.recipe or recipe).items() if recipe.get(key) != value}
    if told:
        said = ", ".join(f"--{key} {value}" for key, value in told.items())
        raise UserError(f"'{folder}' holds a run with {said}: give the same, another --workdir, or --fresh")
    tag = f"{progress.step:07d}"
    state = load_file(folder / f"state-{tag}.safetensors")
    module = _under("module.", state)
    if module.keys() != stage.module.state_dict().keys():
        raise UserError(f"'{folder}' holds a run of another network or --align: expected another --workdir, or --fresh")
    stage.module.load_state_dict(module)
    if stage.average is not None:
        device = next(stage.module.parameters()).device
        stage.average.values = {name: tensor.to(device) for name, tensor in _under("average.", state).items()}
        stage.average.updates = progress.updates
    optimizers = folder / f"optimizer-{tag}.pt"
    if optimizers.exists():
        for optimizer, values in zip(stage.optimizers, torch.load(optimizers, weights_only=True), strict=True):
            optimizer.load_state_dict(values)
    if progress.landing is not None and progress.step >= sum(progress.landing):
        progress.landing, progress.renewed = None, progress.step
    return progress


def trained_state(folder: Path, *, average: bool = False) -> dict[str, Tensor]:
    """The weights of the last checkpoint in a stage's folder (its moving average, if asked for)."""
    state = load_file(folder / f"state-{read_progress(folder).step:07d}.safetensors")
    return _under("average." if average else "module.", state)


def trained(module: Module, folder: Path) -> Module:
    """The module with the weights of the last checkpoint in a stage's folder, frozen, in evaluation mode."""
    module.load_state_dict(trained_state(folder))
    return module.eval().requires_grad_(False)


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


class _Curves:
    """A long table step, name, value; rows after the step that is resumed from are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        rows: Iterable[list[str]] = []
        if start and path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                rows = [row for row in csv.reader(file) if row[0] != "step" and int(row[0]) <= start]
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "name", "value"])
            writer.writerows(rows)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([step, name, f"{value:.6g}"] for name, value in numbers.items())
