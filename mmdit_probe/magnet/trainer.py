"""The MAGNET training loop on stock diffusers, peft and accelerate.

    result = train(model, ScenesData("train", 1000), MagnetConfig(layers=(4,), steps=200, warmup=20))
    result.lora                                    # a folder for `pipe.load_lora_weights`
    accelerate launch --num_processes 2 -m mmdit_probe train-magnet ...       # the same, in parallel

Exact: what is drawn depends on (seed, place of the sample) alone, so that a killed training continues as if nothing had
happened, two micro-batches of four give the step of eight, and two processes that of one (up to the rounding of sums).
Unlike the published trainer it accumulates in the loop, prints its parameter groups, and trains nothing in secret.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from mmdit_probe.data.sample import Sample
from mmdit_probe.data.training import Data
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.magnet import checkpoint, lora, schedule
from mmdit_probe.magnet.check import check
from mmdit_probe.magnet.config import MagnetConfig
from mmdit_probe.magnet.objective import TERMS, ConvHead, Objective
from mmdit_probe.magnet.tap import TextMapTap
from mmdit_probe.magnet.validation import sample_grid, validate
from mmdit_probe.models.layout import unwrap
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results import RunFolder
from mmdit_probe.specs import layer_indices

COMMAND = "train-magnet"


@dataclass(frozen=True)
class Watch:
    """What is looked at on the way.

    Attributes:
        every: steps between validations; 0 validates at the end only. samples: held-out pictures with named masks.
        sigma: noise level of the validated maps. prompts: of the sample grid; steps, guidance, seed: of its sampling.
        save_every: steps between checkpoints.
    """

    every: int = 0
    samples: Sequence[Sample] = ()
    sigma: float = 0.515
    prompts: Sequence[str] = ()
    steps: int = 28
    guidance: float = 7.5
    seed: int = 0
    save_every: int = 100


@dataclass(frozen=True)
class TrainResult:
    """The run folder, the adapter's folder, the log (one row per step) and the validations (one row each)."""

    path: Path
    lora: Path
    log: pd.DataFrame
    validation: pd.DataFrame


def train(
    model: MMDiT,
    data: Data,
    config: MagnetConfig,
    *,
    watch: Watch | None = None,
    text: Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    advance: Callable[[], None] = lambda: None,
    start: Callable[[int], None] = lambda step: None,
) -> TrainResult:
    """Train a LoRA on `model`; the model ends with it attached.

    Args:
        model: the model; its weights stay as they are.
        data: what to train on; checked first.
        config: the options. watch: validation and checkpoints.
        text: what the request is to say of how the model encodes text, where not in its own way (T5 left out).
        out, resume: as in `RunFolder.open`.
        advance: called after every step, on the main process. start: called once with the step it starts from.

    Raises:
        UserError: data or options do not fit the model. RunError: the loss is not finite.
    """
    from accelerate import Accelerator
    from accelerate.utils import wait_for_everyone

    watch = watch or Watch()
    if not model.family.fixed_length:
        raise UserError(
            f"{model.name} is of family {model.family.name!r}, whose prompts differ in length; MAGNET trains models"
            " that pad them to one length, as SD3 and Flux do"
        )
    layers = layer_indices(list(config.layers), len(model.layers))
    targets = lora.target_modules(model.family, model.transformer, config.lora_layers, config.streams)
    check(data, model, config.alignment)
    if getattr(unwrap(model.transformer), "peft_config", None):
        raise UserError(f"{model.name} has an adapter already; merge it (pipeline.fuse_lora) or load the base model")
    if config.precision == "fp16" and model.device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; on a CPU train with bf16 or no")
    with _precision_of_its_own():
        accelerator = Accelerator(mixed_precision=config.precision, cpu=model.device.type == "cpu")
        if accelerator.device.type != "cpu" and model.device != accelerator.device:
            model.pipeline.to(accelerator.device)
        request = {
            "model": {"id": model.name, "weight_hash": model.weight_hash},
            "data": data.describe(),
            **config.as_request(),
            "effective_batch": config.effective(accelerator.num_processes),
            **(text or {}),
        }
        folder, path = _open(accelerator, request, out, resume)
        loop = _Loop(model, data, config, watch, accelerator, targets, layers, path)
        if folder is not None and not folder.complete:
            folder.record(
                model=request["model"],
                dtype=str(model.dtype),
                device=str(model.device),
                processes=accelerator.num_processes,
                trainable={"modules": len(targets), "parameters": sum(p.numel() for p in loop.parameters.values())},
            )
        state = checkpoint.latest(path) if resume else None
        if state is not None:
            loop.restore(state)
        start(loop.step)
        try:
            loop.run(advance)
        finally:
            accelerator.unwrap_model(loop.wrapped, keep_fp32_wrapper=False)
        if folder is not None and not folder.complete:
            # Nothing that was measured is lost: loss curve, validations and memory stay with the adapter.
            folder.finish(steps=loop.step, final=loop.log[-1] if loop.log else {})
        wait_for_everyone()
    return TrainResult(path, path / "lora", pd.DataFrame(loop.log), pd.DataFrame(loop.validations))


@contextmanager
def _precision_of_its_own() -> Iterator[None]:
    """The precision is process-wide in accelerate; afterwards the next training may have another, also after an error.
    A state that the caller made stays."""
    from accelerate.state import AcceleratorState

    foreign = bool(AcceleratorState._shared_state)
    try:
        yield
    finally:
        if not foreign:
            AcceleratorState._reset_state()


class _Loop:
    """The state of one training."""

    def __init__(
        self, model: MMDiT, data: Data, config: MagnetConfig, watch: Watch, accelerator: Any, targets: Sequence[str],
        layers: Sequence[int], path: Path,
    ) -> None:  # fmt: skip
        self.model, self.data, self.config, self.watch = model, data, config, watch
        self.accelerator, self.layers, self.path = accelerator, layers, path
        lora.attach(model.transformer, targets, rank=config.rank, alpha=config.alpha, seed=config.seed)
        self.parameters: dict[str, nn.Parameter] = dict(lora.named_parameters(model.transformer))
        head = ConvHead(config.seed).to(model.device) if config.score_head == "conv" else None
        if head is not None:
            self.parameters |= {f"score_head.{name}": p for name, p in head.named_parameters()}
        if config.checkpointing:
            model.transformer.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(list(self.parameters.values()), lr=config.rate, weight_decay=config.decay)
        self.wrapped, self.optimizer = accelerator.prepare(model.transformer, optimizer)
        self.head = accelerator.prepare(head) if head is not None else None
        self.objective = Objective(model, config, self.head)
        self.average: dict[str, Tensor] = (
            {name: p.detach().clone() for name, p in self.parameters.items()} if config.ema else {}
        )
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.best = float("-inf")

    def restore(self, state: checkpoint.State) -> None:
        """Go on from a checkpoint."""
        checkpoint.copy_into(self.parameters, state.tensors, "parameter.")
        checkpoint.restore_optimizer(self._plain_optimizer, state.tensors)
        self.average = {name: state.tensors["average." + name].to(self.model.device) for name in self.average}
        self.step, self.log, self.validations = state.step, state.facts["log"], state.facts["validations"]
        self.best = max((row["miou"] for row in self.validations if "miou" in row), default=float("-inf"))
        if self.accelerator.scaler is not None and state.facts.get("scaler"):
            self.accelerator.scaler.load_state_dict(state.facts["scaler"])

    def run(self, advance: Callable[[], None]) -> None:
        config, main = self.config, self.accelerator.is_main_process
        with ExitStack() as stack:
            tap = None
            if config.alignment != "none":
                heads: Any = "all" if config.alignment == "head" else "mean"
                tap = stack.enter_context(
                    TextMapTap(self.model.transformer, list(self.layers), space=config.space, heads=heads)
                )
            while self.step < config.steps:
                self._step(tap)
                self.step += 1
                last = self.step == config.steps
                if (self.watch.every and self.step % self.watch.every == 0) or last:
                    if main:
                        self._look()
                    self.accelerator.wait_for_everyone()
                if main and (self.step % self.watch.save_every == 0 or last):
                    self._save(last)
                if main:
                    advance()

    def _step(self, tap: TextMapTap | None) -> None:
        """One optimiser step over all micro-batches of all processes."""
        config, accelerator = self.config, self.accelerator
        began = time.perf_counter()
        world, rank = accelerator.num_processes, accelerator.process_index
        effective = config.effective(world)
        items = schedule.items_at(self.step, effective, len(self.data), config.seed)
        rate = config.rate * schedule.rate_at(self.step, config.steps, config.warmup, config.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(len(TERMS), device=accelerator.device)
        for micro in range(config.accumulation):
            first = (micro * world + rank) * config.batch
            chosen = range(first, first + config.batch)
            samples = [self.data[items[k]] for k in chosen]
            places = [self.step * effective + k for k in chosen]
            late = micro + 1 < config.accumulation
            with accelerator.no_sync(self.wrapped) if late else nullcontext():
                loss, terms = self.objective(self.wrapped, tap, samples, places)
                accelerator.backward(loss / config.accumulation)
            sums += torch.tensor([terms[name] for name in TERMS], device=sums.device)
        norm = accelerator.clip_grad_norm_(list(self.parameters.values()), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        means = (accelerator.reduce(sums, reduction="mean") / config.accumulation).tolist()
        if not math.isfinite(means[0]):
            raise RunError(f"the loss of step {self.step} is {means[0]}; lower the rate, or train with --precision no")
        for name, average in self.average.items():
            average.lerp_(self.parameters[name].detach(), 1 - config.ema)
        row = {"step": self.step, **dict(zip(TERMS, means, strict=True)), "gradient_norm": float(norm), "rate": rate}
        self.log.append(row | {"seconds": time.perf_counter() - began})

    def _look(self) -> None:
        """Validate the (averaged) adapter, keep it if it is the best so far, and draw the sample grid."""
        watch = self.watch
        if not watch.samples and not watch.prompts:
            return
        row: dict[str, Any] = {"step": self.step}
        with self._averaged(), torch.no_grad():
            if watch.samples:
                scores = validate(self.model, watch.samples, self.layers, sigma=watch.sigma, seed=watch.seed)
                row |= {"miou": scores.miou, "n": len(scores.counts)}
                if scores.miou > self.best:
                    self.best = scores.miou
                    self._write("best")
            if watch.prompts:
                sheet = sample_grid(
                    self.model, watch.prompts, steps=watch.steps, guidance=watch.guidance, seed=watch.seed
                )
                (self.path / "samples").mkdir(exist_ok=True)
                sheet.save(self.path / "samples" / f"step-{self.step:06d}.png")
        self.validations.append(row)

    def _save(self, last: bool) -> None:
        tensors = {"parameter." + name: p.detach() for name, p in self.parameters.items()}
        tensors |= {"average." + name: average for name, average in self.average.items()}
        tensors |= checkpoint.optimizer_tensors(self._plain_optimizer)
        scaler = self.accelerator.scaler
        facts = {"log": self.log, "validations": self.validations,
                 "scaler": None if scaler is None else scaler.state_dict()}  # fmt: skip
        checkpoint.save(self.path, self.step, tensors, facts)
        pd.DataFrame(self.log).to_csv(self.path / "training.csv", index=False)
        if self.validations:
            pd.DataFrame(self.validations).to_csv(self.path / "validation.csv", index=False)
        if last:
            with self._averaged():
                self._write("lora")

    def _write(self, name: str) -> None:
        facts = {"step": self.step, "base": self.model.name, "data": self.data.describe()} | self.config.as_request()
        lora.save_lora(self.model.transformer, self.path / name, facts)
        if self.head is not None:
            from safetensors.torch import save_file

            state = self.accelerator.unwrap_model(self.head).state_dict()
            save_file({k: t.detach().cpu().contiguous() for k, t in state.items()},
                      self.path / name / "score_head.safetensors")  # fmt: skip

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged parameters in place of the current ones, if there are any."""
        current = {name: self.parameters[name].detach().clone() for name in self.average}
        checkpoint.copy_into({name: self.parameters[name] for name in self.average}, self.average, "")
        try:
            yield
        finally:
            checkpoint.copy_into({name: self.parameters[name] for name in current}, current, "")

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)


def _open(
    accelerator: Any, request: dict[str, Any], out: Path | str | None, resume: bool
) -> tuple[RunFolder | None, Path]:
    """The run folder, opened by the main process; the others learn its path, or its refusal."""
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]
    folder, refused = None, None
    if accelerator.is_main_process:
        try:
            folder = RunFolder.open(COMMAND, request, out=out, resume=resume)
            told[0] = str(folder.path)
        except UserError as error:
            refused, told[1] = error, str(error)
    if accelerator.num_processes > 1:
        told = broadcast_object_list(told)
    if told[1] is not None:
        raise refused or UserError(told[1])
    return folder, Path(told[0])
