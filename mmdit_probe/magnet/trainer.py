"""The MAGNET training loop on stock diffusers, peft and accelerate.

    result = train(model, ScenesData("train", 1000), MagnetOptions(layers=(4,), train_steps=200, warmup=20))
    result.lora                                    # a folder for `pipe.load_lora_weights`
    accelerate launch --num_processes 2 -m mmdit_probe train-magnet ...       # the same, in parallel

What is drawn depends on (seed, place of the sample) alone, so that a killed training continues as if nothing had
happened, two micro-batches of four give the step of eight, and two processes that of one (up to the rounding of sums).
The first loss, gradient or weight that is not finite ends it; the last checkpoint before that is kept.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit_probe.data.sample import Sample, fingerprint
from mmdit_probe.data.training import Data
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.magnet import lora
from mmdit_probe.magnet.check import check
from mmdit_probe.magnet.config import MagnetOptions
from mmdit_probe.magnet.objective import TERMS, ConvHead, Objective, columns_of, items_at, rate_at
from mmdit_probe.magnet.tap import TextMapTap
from mmdit_probe.magnet.validation import prompted, sample_grid, validate
from mmdit_probe.models.layout import unwrap
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.probe import probe
from mmdit_probe.results import RunFolder, processes
from mmdit_probe.results.atomic import replacing, resumable, write_text
from mmdit_probe.specs import Spec, layer_indices

COMMAND = "train-magnet"
CHECKPOINT = "checkpoint.safetensors"
DEVICE_OF_ACCELERATE = "ACCELERATE_TORCH_DEVICE"


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
    options: MagnetOptions,
    *,
    held_out: Sequence[Sample] = (),
    text: Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    advance: Callable[[], None] = lambda: None,
    start: Callable[[int], None] = lambda step: None,
) -> TrainResult:
    """Train a LoRA on `model`; the model ends with it attached, and without it where the training was cut short.

    Args:
        model: the model; its weights stay as they are.
        data: what to train on; checked first. options: all but those that name data.
        held_out: pictures with named masks for validation, which chooses `best`: a run goes on with the same ones.
        text: what the request is to say of how the model encodes text, where not in its own way (T5 left out).
        out, resume: as in `RunFolder.open`.
        advance: called after every step, on the main process. start: called once with the step it starts from.

    Raises:
        UserError: data or options do not fit the model. RunError: a loss, gradient or weight is not finite.
    """
    targets, layers = _checked(model, data, options)
    chosen_on = _checked_held_out(held_out, model, options)  # now: at the end it could never be finished
    with _accelerator(options.precision, model.device) as accelerator:
        processes.end_in_time()
        if accelerator.device.type != "cpu" and model.device != accelerator.device:
            model.pipeline.to(accelerator.device)
        request = {
            "model": {"id": model.name, "weight_hash": model.weight_hash},
            "data": data.describe(),
            **options.as_request(),
            "layers": list(layers),
            "effective_batch": options.effective(accelerator.num_processes),
            **chosen_on,
            **(text or {}),
        }
        with processes.joined(), resumable():
            opened = processes.from_first(lambda: RunFolder.open(COMMAND, request, out=out, resume=resume))
            with opened as folder:
                loop = _Loop(model, data, options, held_out, accelerator, targets, layers, folder.path)
                try:
                    if not folder.complete:
                        folder.record(model=request["model"] | model.memory, **loop.facts(targets))
                    if resume:
                        loop.restore()
                    start(loop.step)
                    loop.run(advance)
                except BaseException:
                    lora.detach(model.transformer)  # a later run on this model goes on from the checkpoint
                    raise
                finally:
                    accelerator.unwrap_model(loop.wrapped, keep_fp32_wrapper=False)
                if not folder.complete:
                    # Nothing that was measured is lost: loss curve, validations and memory stay with the adapter.
                    folder.finish(steps=loop.step, final=loop.log[-1] if loop.log else {})
                processes.barrier()
    return TrainResult(folder.path, folder.path / "lora", pd.DataFrame(loop.log), pd.DataFrame(loop.validations))


def _checked(model: MMDiT, data: Data, options: MagnetOptions) -> tuple[list[str], tuple[int, ...]]:
    """Modules to adapt and layers to align, once everything is known to fit."""
    if not model.family.fixed_length:
        raise UserError(
            f"{model.name} is of family {model.family.name!r}, whose prompts differ in length; MAGNET trains models"
            " that pad them to one length, as SD3 and Flux do"
        )
    if options.layers is None:
        raise UserError("which layers' maps are to be aligned? Read them from the selection: layers=(4,)")
    layers = layer_indices(options.layers, len(model.layers))
    adapted: Spec = list(layers) if str(options.lora_layers) == "selected" else options.lora_layers
    targets = lora.target_modules(model.family, model.transformer, adapted, options.lora_streams)
    if options.level != "none":
        columns_of(options, model.token_tables("")[0])
    check(data, model, options.level)
    if getattr(unwrap(model.transformer), "peft_config", None):
        raise UserError(
            f"{model.name} has an adapter already; take it off (pipeline.transformer.unload_lora()) or make it part of"
            " the weights (mmdit_probe.models.adapters.merge)"
        )
    if options.precision == "fp16" and model.device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; on a CPU train with bf16 or no")
    return targets, layers


def _checked_held_out(held_out: Sequence[Sample], model: MMDiT, options: MagnetOptions) -> dict[str, Any]:
    """What the request says of the pictures that choose the best adapter, once they are known to fit."""
    named = [prompted(sample) for sample in held_out if sample.names]
    if not held_out:
        return {}
    if not named:
        raise UserError(f"none of {len(held_out)} held-out pictures has a mask with a name: there is nothing to score")
    check(named, model, "token", len(named))
    return {"validation": {"n": len(named), "content": fingerprint(named), "sigma": options.validate_sigma}}


@contextmanager
def _accelerator(precision: str, device: torch.device) -> Iterator[Any]:
    """An accelerator of this precision; of this device, too, unless a launcher or the caller's own accelerator has
    chosen one.

    accelerate keeps both for the whole process. Afterwards the next training may have others, also after an error; a
    state that the caller made stays.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    foreign, alone = bool(AcceleratorState._shared_state), processes.world() == 1 and not PartialState._shared_state
    chosen = {} if DEVICE_OF_ACCELERATE in os.environ or not alone else {DEVICE_OF_ACCELERATE: str(device)}
    try:
        os.environ.update(chosen)
        try:
            accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
        finally:
            for name in chosen:
                del os.environ[name]
        yield accelerator
    finally:
        if not foreign:
            AcceleratorState._reset_state(reset_partial_state=alone)


class _Loop:
    """The state of one training."""

    def __init__(
        self, model: MMDiT, data: Data, options: MagnetOptions, held_out: Sequence[Sample], accelerator: Any,
        targets: Sequence[str], layers: Sequence[int], path: Path,
    ) -> None:  # fmt: skip
        self.model, self.data, self.options, self.held_out = model, data, options, held_out
        self.accelerator, self.layers, self.path = accelerator, layers, path
        lora.attach(model.transformer, targets, rank=options.rank, alpha=options.alpha, seed=options.seed)
        self.parameters: dict[str, nn.Parameter] = dict(lora.named_parameters(model.transformer))
        head = ConvHead(options.seed).to(model.device) if options.score_head == "conv" else None
        if head is not None:
            self.parameters |= {f"score_head.{name}": p for name, p in head.named_parameters()}
        if options.checkpointing:
            model.transformer.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(list(self.parameters.values()), lr=options.rate, weight_decay=options.decay)
        self.wrapped, self.optimizer = accelerator.prepare(model.transformer, optimizer)
        self.head = accelerator.prepare(head) if head is not None else None
        self.objective = Objective(model, options, self.head)
        self.average: dict[str, Tensor] = (
            {name: p.detach().clone() for name, p in self.parameters.items()} if options.ema else {}
        )
        self.step, self.saved = 0, 0
        self.log: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.best = float("-inf")

    def facts(self, targets: Sequence[str]) -> dict[str, Any]:
        """What the run's record says beside the model: on what it is trained, and how much of it."""
        trainable = {"modules": len(targets), "parameters": sum(p.numel() for p in self.parameters.values())}
        return {"dtype": str(self.model.dtype), "device": str(self.model.device),
                "processes": self.accelerator.num_processes, "trainable": trainable}  # fmt: skip

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        state = load_state(self.path / CHECKPOINT)
        if state is None:
            return
        tensors, facts = state
        copy_into(self.parameters, tensors, "parameter.")
        restore_optimizer(self._plain_optimizer, tensors)
        self.average = {name: tensors["average." + name].to(self.model.device) for name in self.average}
        self.step = self.saved = int(facts["step"])
        self.log, self.validations = facts["log"], facts["validations"]
        self.best = max((row["miou"] for row in self.validations if "miou" in row), default=float("-inf"))
        if self.accelerator.scaler is not None and facts.get("scaler"):
            self.accelerator.scaler.load_state_dict(facts["scaler"])

    def run(self, advance: Callable[[], None]) -> None:
        options, main = self.options, self.accelerator.is_main_process
        with ExitStack() as stack:
            tap = None
            if options.level != "none":
                tap = TextMapTap(list(self.layers), space=options.space, reduce=options.level == "token")
            if self.step < options.train_steps:
                self._track(stack)
            while self.step < options.train_steps:
                self._step(tap)
                self.step += 1
                last = self.step == options.train_steps
                if (options.validate_every and self.step % options.validate_every == 0) or last:
                    if main:
                        self._look()
                    self.accelerator.wait_for_everyone()
                if main and (self.step % options.save_every == 0 or last):
                    self._save(last)
                if main:
                    advance()

    def _step(self, tap: TextMapTap | None) -> None:
        """One optimiser step over all micro-batches of all processes."""
        options, accelerator = self.options, self.accelerator
        began = time.perf_counter()
        rate = options.rate * rate_at(self.step, options.train_steps, options.warmup_steps, options.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        means = self._gradients(tap)
        self._finite("loss", means[0])
        norm = float(accelerator.clip_grad_norm_(list(self.parameters.values()), options.max_grad_norm))
        scaler = accelerator.scaler
        if scaler is None:
            self._finite("gradient norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if scaler is not None and scaler.get_scale() < 1:  # a step whose gradients overflow halves the scale
            self._finite("gradient norm, at every scale of the loss,", math.inf)
        self._finite("largest weight", max(float(p.detach().abs().max()) for p in self.parameters.values()))
        for name, average in self.average.items():
            average.lerp_(self.parameters[name].detach(), 1 - options.ema)
        row = {"step": self.step, **dict(zip(TERMS, means, strict=True)), "gradient_norm": norm, "rate": rate}
        self._record(self.log, row | {"seconds": time.perf_counter() - began})

    def _gradients(self, tap: TextMapTap | None) -> list[float]:
        """The gradients of one step, and the means of the terms over all its samples."""
        options, accelerator = self.options, self.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        effective = options.effective(world)
        items = items_at(self.step, effective, len(self.data), options.seed)
        sums = torch.zeros(len(TERMS), device=accelerator.device)
        for micro in range(options.accumulation):
            first = (micro * world + rank) * options.batch
            chosen = range(first, first + options.batch)
            samples = [self.data[items[k]] for k in chosen]
            places = [self.step * effective + k for k in chosen]
            late = micro + 1 < options.accumulation
            tapped = nullcontext() if tap is None else probe(self.model.transformer, edits=tap)
            with tapped, accelerator.no_sync(self.wrapped) if late else nullcontext():
                loss, terms = self.objective(self.wrapped, tap, samples, places)
                accelerator.backward(loss / options.accumulation)
            sums += torch.tensor([terms[name] for name in TERMS], device=sums.device)
        means: list[float] = (accelerator.reduce(sums, reduction="mean") / options.accumulation).tolist()
        return means

    def _finite(self, what: str, value: float) -> None:
        """Refuse to go on with a number that is none; every process sees the same."""
        if not math.isfinite(value):
            kept = f"the checkpoint after step {self.saved} is kept" if self.saved else "there is no checkpoint yet"
            raise RunError(
                f"the {what} of step {self.step} is {value}, so training stops; {kept}; lower --rate or"
                " --max-grad-norm, or train with --precision no"
            )

    def _look(self) -> None:
        """Validate the (averaged) adapter, keep it if it is the best so far, and draw the sample grid."""
        options = self.options
        if not self.held_out and not options.sample_prompts:
            return
        row: dict[str, Any] = {"step": self.step}
        with self._averaged(), torch.no_grad():
            if self.held_out:
                scores = validate(
                    self.model, self.held_out, self.layers, sigma=options.validate_sigma, seed=options.seed
                )
                row |= {"miou": scores.miou(), "n": len(scores)}
                if row["miou"] > self.best:
                    self.best = row["miou"]
                    self._write("best")
            if options.sample_prompts:
                sheet = sample_grid(self.model, options.sample_prompts, steps=options.sample_num_steps,
                                    guidance=options.sample_guidance, seed=options.seed)  # fmt: skip
                with replacing(self.path / "samples" / f"step-{self.step:06d}.png") as temporary:
                    sheet.save(temporary, format="PNG")
        self._record(self.validations, row)

    def _track(self, stack: ExitStack) -> None:
        """Start accelerate's tracker that `report_to` names."""
        from accelerate.tracking import filter_trackers

        accelerator, name = self.accelerator, self.options.report_to
        if name is None:
            return
        accelerator.project_configuration.set_directories(str(self.path))
        accelerator.log_with = filter_trackers([name], str(self.path))
        facts = {k: v if isinstance(v, int | float | str) else str(v) for k, v in self.options.as_request().items()}
        accelerator.init_trackers(COMMAND, config=facts)
        for tracker in accelerator.trackers:
            stack.callback(tracker.finish)

    def _record(self, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
        """Keep a row of the log, and tell the tracker."""
        rows.append(row)
        if self.accelerator.trackers:
            self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def _save(self, last: bool) -> None:
        """Write what the training is for, then the checkpoint: a resumed run goes on behind it and writes no more."""
        write_text(self.path / "training.csv", pd.DataFrame(self.log).to_csv(index=False))
        if self.validations:
            write_text(self.path / "validation.csv", pd.DataFrame(self.validations).to_csv(index=False))
        if last:
            with self._averaged():
                self._write("lora")
        tensors = {"parameter." + name: p.detach() for name, p in self.parameters.items()}
        tensors |= {"average." + name: average for name, average in self.average.items()}
        tensors |= optimizer_tensors(self._plain_optimizer)
        scaler = self.accelerator.scaler
        facts = {"step": self.step, "log": self.log, "validations": self.validations,
                 "scaler": None if scaler is None else scaler.state_dict()}  # fmt: skip
        save_state(self.path / CHECKPOINT, tensors, facts)
        self.saved = self.step

    def _write(self, name: str) -> None:
        facts = {"step": self.step, "base": self.model.name, "data": self.data.describe()}
        facts |= self.options.as_request() | {"layers": list(self.layers)}
        lora.save_lora(self.model.transformer, self.path / name, facts)
        if self.head is not None:
            state = self.accelerator.unwrap_model(self.head).state_dict()
            with replacing(self.path / name / "score_head.safetensors") as temporary:
                save_file({k: t.detach().cpu().contiguous() for k, t in state.items()}, temporary)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged parameters in place of the current ones, if there are any."""
        current = {name: self.parameters[name].detach().clone() for name in self.average}
        copy_into({name: self.parameters[name] for name in self.average}, self.average, "")
        try:
            yield
        finally:
            copy_into({name: self.parameters[name] for name in current}, current, "")

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)


def save_state(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint, atomically: tensors, and JSON facts in the header.

    No random state is kept: nothing is drawn from a running generator.
    """
    with replacing(file) as temporary:
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(plain, temporary, metadata={"facts": json.dumps(facts)})


def load_state(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of a checkpoint; None where there is none.

    Raises:
        RunError: it cannot be read.
    """
    if not file.exists():
        return None
    try:
        with safe_open(str(file), framework="pt") as opened:
            facts = json.loads(opened.metadata()["facts"])
            return {name: opened.get_tensor(name) for name in opened.keys()}, facts  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"checkpoint {str(file)!r} cannot be read: {error}; remove it to start again") from error


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
