"""TrainMagnet: LoRA mask alignment from a model's name, section 4.3 of arXiv:2509.18096.

    result = TrainMagnet(layers="4", prompt_kind="mixed", train_steps=400).run("scenes-sd3", out="runs/magnet")
    result.table, result.validation, result.summary; result.figure()
    pipe.load_lora_weights(result.lora)            # in a program that knows nothing of this package

The options are those of `magnet.MagnetOptions`; the loop is training's own, with its checkpoints (`magnet.trainer`).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import counted
from mmdit_probe.experiments.experiment import text_of
from mmdit_probe.experiments.options import prompts_of
from mmdit_probe.experiments.progress import Progress
from mmdit_probe.experiments.result import OF_A_FOLDER, Answer
from mmdit_probe.experiments.text import Text
from mmdit_probe.magnet import config
from mmdit_probe.results import RunFolder, atomic
from mmdit_probe.results.folder import AUTO, RECORD, check_out, read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.magnet.trainer import TrainResult


@dataclass(frozen=True, kw_only=True)
class TrainMagnet(config.MagnetOptions):
    """Fine-tune a LoRA so that words own their regions: flow matching plus mask alignment of I2T maps.

    Writes lora/ (loads with pipe.load_lora_weights), best/, training.csv, validation.csv and samples/ into a run
    folder. With --lora, that adapter is merged into the model before the new one is trained on it, and the new one does
    not hold it. Several processes: accelerate launch --num_processes 2 -m mmdit_probe train-magnet ... Defaults are
    the paper's.
    """

    name = "train-magnet"
    recipes = config.RECIPES
    examples = (
        "--recipe ours --layers 4 --prompt-kind mixed --validate-every 100",
        "--recipe paper --layers 9 --dataset coco-stuff:coco --model MODEL --device cuda --precision bf16",
    )

    def run(
        self, target: Any = "scenes-sd3", out: Path | str | None = None, resume: bool = False,
        progress: bool | Progress = True,
    ) -> Training:  # fmt: skip
        """Train; the model ends with the adapter attached, and without it where the training was cut short.

        Args:
            target, resume, progress: as in `Experiment.run`. out: run folder; None and "auto" stand for
                `runs/train-magnet/<time>-<hash>`: a training keeps checkpoints.

        Raises:
            UserError: options, data or model that do not fit. RunError: a loss, gradient or weight is not finite.
        """
        from mmdit_probe.experiments.target import Named, as_model, named
        from mmdit_probe.magnet.inputs import gather

        shown = progress if isinstance(progress, Progress) else Progress(quiet=not progress)
        check_out(out, resume, self.name)
        target = named(target, self)
        prompts = None if self.sample_prompts is None else prompts_of(self.sample_prompts, None, False, 1)
        inputs = gather(self)
        from mmdit_probe.magnet.run import run  # torch, only for a request that can be met
        from mmdit_probe.models.adapters import merge

        for note in inputs.notes:
            shown.note(note)
        model = as_model(target, shown)
        if isinstance(target, Named) and target.options.get("lora") is not None:
            merge(model.pipeline)
        place = None if out in (None, AUTO) else out
        chosen = self if self.sample_prompts is None else replace(self, sample_prompts=prompts)
        found = run(chosen, model, inputs, text=text_of(model), out=place, resume=resume, progress=shown.bar)
        return Training(found)


class Training(Answer):
    """A finished training.

    Attributes:
        path: the run folder. lora: the adapter's folder. log: one row per step. validation: one row each.
    """

    def __init__(self, found: TrainResult) -> None:
        self.path, self.lora, self.log, self.validation = found.path, found.lora, found.log, found.validation

    @property
    def table(self) -> pd.DataFrame:
        """The log: one row per step."""
        return self.log

    @cached_property
    def summary(self) -> pd.DataFrame:
        """The losses of the first and the last step, and the first and the last held-out mIoU, over n pictures."""
        held_out = self._held_out
        curves = [(name, self.log[name], None) for name in ("flow", "focal", "dice")]
        if len(held_out):
            curves.append(("held-out mIoU", held_out["miou"], held_out["n"].iloc[-1]))
        rows = [{"measure": name, "n": n, "first": one.iloc[0], "last": one.iloc[-1]} for name, one, n in curves]
        return pd.DataFrame(rows).astype({"n": "Int64"})

    @property
    def _held_out(self) -> pd.DataFrame:
        """Validations with a score."""
        return self.validation.dropna(subset=["miou"]) if "miou" in self.validation else self.validation.iloc[:0]

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Losses and held-out mIoU by step."""
        from mmdit_probe.plots.magnet import training

        return {"training": training(self.log, self._held_out, title=f"MAGNET, {counted(len(self.log), 'step')}")}

    def texts(self) -> list[Text]:
        first, last = self.log.iloc[0], self.log.iloc[-1]
        lines: list[Text] = [f"{name}: {first[name]:.4f} -> {last[name]:.4f}" for name in ("flow", "focal", "dice")]
        scores = self._held_out.tail(4).to_dict("records")
        if scores:
            shown = ", ".join(f"{row['miou']:.3f} at step {row['step']:.0f}" for row in scores)
            lines.append(f"held-out mIoU (present classes, n = {scores[-1]['n']:.0f}): {shown}")
        return [*lines, f"adapter: {self.lora}"]

    def document(self) -> dict[str, Any]:
        first, last = ({str(name): float(value) for name, value in self.log.iloc[at].items()} for at in (0, -1))
        return {
            "run": self.path, "lora": self.lora, "steps": len(self.log), "first": first, "last": last,
            "validation": self.validation.to_dict("records"),
        }  # fmt: skip

    def save(self, folder: Path | str) -> Path:
        """Copy the run folder: adapter, curves, samples and the last checkpoint.

        Args:
            folder: new or empty.
        """
        record = read_record(self.path) or {}
        with RunFolder.open(TrainMagnet.name, record["request"], out=folder) as target:
            with atomic.disk(target.path):
                shutil.copytree(self.path, target.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RECORD))
            target.record(**{name: value for name, value in record.items() if name not in OF_A_FOLDER})
        return target.path

    def __repr__(self) -> str:
        return f"MAGNET training of {counted(len(self.log), 'step')}, in {self.path}"
