"""The training loop: exactness of resume, of accumulation and of splitting over processes, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mmdit_probe import UserError, load
from mmdit_probe.data import Sample, ScenesData
from mmdit_probe.magnet.config import MagnetConfig
from mmdit_probe.magnet.lora import named_parameters
from mmdit_probe.magnet.losses import LossWeights
from mmdit_probe.magnet.schedule import items_at, level_of, noise, noise_levels, rate_at
from mmdit_probe.magnet.trainer import TrainResult, Watch, train
from mmdit_probe.magnet.validation import validate
from mmdit_probe.models.adapters import FILE, read_metadata
from mmdit_probe.models.mmdit import MMDiT
from tests import tiny

CONFIG = MagnetConfig(layers=(1,), rank=2, alpha=4, steps=5, batch=2, warmup=1, rate=0.05, clip=1.0, streams="joint")


class Pictures:
    """Seven pictures: left and right halves are the two words of the prompt, one picture has no mask."""

    def __init__(self, names: bool = True) -> None:
        self.named = names

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Sample:
        image = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        left = np.zeros((64, 64), bool)
        left[:, : 20 + 4 * index] = True
        masks = np.stack([left, ~left]) if index != 3 else np.zeros((0, 64, 64), bool)
        names = ("ring", "cat") if index != 3 and self.named else ()
        return Sample(f"picture {index}", image, "ring cat", masks, names)

    def describe(self) -> dict[str, Any]:
        return {"data": "test pictures", "named": self.named}


def fresh() -> MMDiT:
    return MMDiT(tiny.pipeline(), "tiny", tiny.T5_LENGTH)


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.lora / FILE)


def assert_equal(first: TrainResult, second: TrainResult) -> None:
    ours, other = weights(first), weights(second)
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)


def run(out: Path, config: MagnetConfig = CONFIG, **options: Any) -> TrainResult:
    return train(fresh(), Pictures(), config, out=out, **options)


@pytest.mark.parametrize("ema", [0.0, 0.6])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, ema: float) -> None:
    config, watch = replace(CONFIG, ema=ema), Watch(every=2, samples=[Pictures()[0]], save_every=2)
    whole = run(tmp_path / "whole", config, watch=watch)

    def kill_after(steps: int) -> Callable[[], None]:
        left = [steps]

        def advance() -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", config, watch=watch, advance=kill_after(3))
    started: list[int] = []
    resumed = run(tmp_path / "killed", config, watch=watch, resume=True, start=started.append)
    assert started == [2]  # of three steps the one after the checkpoint is done again
    assert_equal(whole, resumed)
    assert whole.log.drop(columns="seconds").equals(resumed.log.drop(columns="seconds"))
    assert whole.validation.equals(resumed.validation)
    again = run(tmp_path / "killed", config, watch=watch, resume=True)
    assert_equal(whole, again)


def test_the_averaged_adapter_is_what_is_saved(tmp_path: Path) -> None:
    """From the start's values on, by hand."""
    model, seen = fresh(), []

    def look(*_: int) -> None:
        seen.append({name: p.detach().clone() for name, p in named_parameters(model.transformer)})

    result = train(model, Pictures(), replace(CONFIG, steps=3, ema=0.6), out=tmp_path, start=look, advance=look)
    expected = seen[0]
    for parameters in seen[1:]:
        expected = {name: 0.6 * average + 0.4 * parameters[name] for name, average in expected.items()}
    saved = weights(result)
    assert len(saved) == len(expected)
    for name, average in expected.items():
        torch.testing.assert_close(saved["transformer." + name.replace(".magnet.", ".")], average)
    last = seen[-1]
    assert any(not torch.allclose(last[name], average) for name, average in expected.items())


def test_a_run_of_other_options_is_not_continued(tmp_path: Path) -> None:
    run(tmp_path / "run", replace(CONFIG, steps=2))
    with pytest.raises(UserError, match="made with rate"):
        run(tmp_path / "run", replace(CONFIG, steps=2, rate=0.01), resume=True)
    # Refused after accelerate was set up: the next training may still choose its precision.
    assert not AcceleratorState._shared_state


def test_two_micro_batches_of_four_give_the_step_of_eight(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=3, batch=8)
    whole = weights(run(tmp_path / "whole", config))
    halves = weights(run(tmp_path / "halves", replace(config, batch=4, accumulation=2)))
    quarter = weights(run(tmp_path / "quarter", replace(config, batch=4)))
    moved = max(float((whole[name] - quarter[name]).abs().max()) for name in whole)
    assert all(torch.allclose(whole[name], halves[name], atol=2e-4) for name in whole)
    assert moved > 5e-3  # control: half the batch is another training


@pytest.mark.slow
def test_two_processes_give_the_step_of_one(tmp_path: Path) -> None:
    one = run(tmp_path / "one", replace(CONFIG, steps=2, batch=4))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    # On a CPU alone, `accelerate launch --cpu` wants MPI for more than one process; its other launcher is torchrun's.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no"]  # fmt: skip
    command = [*launch, "-m", "tests.magnet.two_processes", str(tmp_path / "two")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, cwd=environment["PYTHONPATH"]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_file(tmp_path / "two" / "lora" / FILE)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    ours = weights(one)
    assert all(torch.allclose(ours[name], two[name], atol=2e-4) for name in ours)


@pytest.mark.parametrize(
    "change",
    [
        {"alignment": "head"},
        {"alignment": "none"},
        {"space": "probability"},
        {"space": "probability", "normalise": "minmax"},
        {"score_head": "conv"},
        {"layers": (0, 2), "alignment": "head", "space": "probability"},
        {"checkpointing": True},
        {"drop_prompt": 0.5},
    ],
    ids=str,
)
def test_every_variant_trains(tmp_path: Path, change: dict[str, Any]) -> None:
    result = run(tmp_path, replace(CONFIG, steps=3, **change))
    log = result.log
    assert np.isfinite(log.loss).all()
    expected = CONFIG.weights
    total = expected.flow * log.flow + expected.mask * (expected.focal * log.focal + expected.dice * log.dice)
    np.testing.assert_allclose(log.loss, total, rtol=1e-4)
    assert (log.dice.max() > 0) == (change.get("alignment") != "none")
    assert any(float(t.abs().max()) > 0 for name, t in weights(result).items() if "lora_B" in name)
    assert (result.lora / "score_head.safetensors").exists() == ("score_head" in change)


def test_checkpointing_changes_no_number(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", replace(CONFIG, steps=2))
    assert_equal(plain, run(tmp_path / "recomputed", replace(CONFIG, steps=2, checkpointing=True)))


def test_training_on_masks_lowers_the_mask_loss(tmp_path: Path) -> None:
    only_masks = LossWeights(flow=0.0, focal=1.0, dice=1.0)
    config = replace(CONFIG, steps=30, batch=4, rate=0.02, weights=only_masks, warmup=2)
    log = run(tmp_path, config).log
    assert log.dice[-5:].mean() < 0.8 * log.dice[:3].mean()


@pytest.mark.slow
def test_words_of_the_embedded_model_come_to_own_their_regions(tmp_path: Path) -> None:
    held_out = [ScenesData("val", 24)[index] for index in range(24)]
    model = load("scenes-sd3")
    untrained = [validate(model, held_out, [layer]).miou for layer in range(len(model.layers))]
    layer = int(np.argmax(untrained))
    config = MagnetConfig(layers=(layer,), steps=24, batch=4, warmup=2, rate=3e-3, clip=1.0)
    result = train(
        model, ScenesData("train", 96), config, watch=Watch(every=12, samples=held_out, save_every=12), out=tmp_path
    )
    assert result.validation.miou.max() > untrained[layer] + 0.01
    assert (tmp_path / "best" / FILE).exists()
    again = load("scenes-sd3", lora=result.lora)
    assert validate(again, held_out, [layer]).miou == pytest.approx(result.validation.miou.iloc[-1], abs=1e-6)


def test_what_is_written(tmp_path: Path) -> None:
    watch = Watch(every=1, prompts=["a red ring", "a cat"], steps=2, guidance=2.0, save_every=1)
    result = run(tmp_path, replace(CONFIG, steps=2), watch=watch)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.json", "lora", "samples", "training.csv", "validation.csv", "checkpoint-0000002"}
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000001.png", "step-000002.png"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["request"]["effective_batch"] == 2
    assert record["trainable"] == {"modules": 22, "parameters": 22 * 2 * 2 * 32}
    facts = read_metadata(result.lora)["mmdit_probe"]
    assert facts["layers"] == [1]
    assert facts["weights"]["dice"] == 0.2
    assert facts["data"]["data"] == "test pictures"


def test_data_that_cannot_train_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 masks and 0 names"):
        train(fresh(), Pictures(names=False), CONFIG, out=tmp_path / "run")

    class Other(Pictures):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return Sample(sample.name, sample.image, "a house", sample.masks, sample.names)

    with pytest.raises(UserError, match="unknown word 'ring'"):
        train(fresh(), Other(), CONFIG, out=tmp_path / "run")

    class NoMasks(Pictures):
        def __getitem__(self, index: int) -> Sample:
            return super().__getitem__(3)

    with pytest.raises(UserError, match="none of 7 samples"):
        train(fresh(), NoMasks(), CONFIG, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'token'"):
        replace(CONFIG, alignment="tokn")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="warm-up of 9"):
        replace(CONFIG, warmup=9)
    with pytest.raises(UserError, match="convolution head"):
        replace(CONFIG, score_head="conv", alignment="head")


def test_schedules_are_functions_of_seed_and_place() -> None:
    passes = [item for step in range(7) for item in items_at(step, 2, 7, seed=0)]
    assert sorted(passes[:7]) == sorted(passes[7:]) == list(range(7))
    assert passes[:7] != passes[7:]
    assert torch.equal(noise((2, 3), 5, 0), noise((2, 3), 5, 0))
    assert not torch.equal(noise((2, 3), 5, 0), noise((2, 3), 6, 0))
    rates = [rate_at(step, 100, 10, 0.01) for step in range(100)]
    assert rates[0] == 0.01
    assert rates[10] == max(rates) == 1.0
    assert rates[99] < 0.001


def test_noise_levels_are_those_of_the_shifted_schedule() -> None:
    """The paper: normal draw 0 is index 500 of 1000, sigma .75 after shift 3; a larger draw means less noise."""
    levels = noise_levels(tiny.pipeline().scheduler)
    assert levels[0] == 1.0
    assert level_of(0.0, levels, 0.0, 0.5) == pytest.approx(0.75, abs=2e-3)
    assert level_of(1.0, levels, 0.0, 0.5) < level_of(0.0, levels, 0.0, 0.5) < level_of(-1.0, levels, 0.0, 0.5)
