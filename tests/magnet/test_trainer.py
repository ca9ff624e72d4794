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
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from mmdit_probe import UserError, load
from mmdit_probe.data import Sample, ScenesData
from mmdit_probe.errors import RunError
from mmdit_probe.evaluate.scores import map_quality
from mmdit_probe.magnet import lora, validation
from mmdit_probe.magnet.config import MagnetOptions, recipe
from mmdit_probe.magnet.inputs import gather
from mmdit_probe.magnet.lora import named_parameters
from mmdit_probe.magnet.objective import Encoder, Objective, items_at, level_of, noise_levels, noise_of, rate_at
from mmdit_probe.magnet.trainer import CHECKPOINT, TrainResult, train
from mmdit_probe.magnet.validation import readouts, validate
from mmdit_probe.models.adapters import read_metadata
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.names import ADAPTER_FILE
from tests import tiny
from tests.data.test_training import folder

CONFIG = MagnetOptions(
    layers=(1,), rank=2, alpha=4, train_steps=5, batch=2, warmup=1, rate=0.05, max_grad_norm=1.0, lora_streams="joint"
)


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
    return load_file(result.lora / ADAPTER_FILE)


def assert_equal(first: TrainResult, second: TrainResult) -> None:
    ours, other = weights(first), weights(second)
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)


def run(out: Path, config: MagnetOptions = CONFIG, **options: Any) -> TrainResult:
    return train(fresh(), Pictures(), config, out=out, **options)


def test_scenes_by_their_short_name_are_validated_too(tmp_path: Path) -> None:
    """`scenes` means scenes:train, and was trained on without held-out pictures."""
    for data, count in (("scenes", 2), ("scenes:val", 2), (str(folder(tmp_path / "data")), 0)):
        held = gather(MagnetOptions(layers=(0,), dataset=data, validate_limit=2)).held_out or ()
        assert [one.name for one in held] == ["scenes:val:0", "scenes:val:1"][:count]


def test_held_out_pictures_are_checked_before_the_first_step(tmp_path: Path) -> None:
    """A name that is cut off ended a training at its validation, after its last step, and again when resumed."""
    names = ("a " * 60 + "ring", "cat")
    held_out = [*[Pictures()[0]] * 40, Sample("long", Pictures()[0].image, "", Pictures()[0].masks, names)]
    with pytest.raises(UserError, match="fell off the end"):
        run(tmp_path / "run", held_out=held_out, advance=lambda: pytest.fail("it was trained"))
    assert not (tmp_path / "run").exists()


def test_held_out_pictures_without_names_are_refused(tmp_path: Path) -> None:
    """They were scored as NaN of 0 pictures, and no adapter was the best."""
    nameless = Sample("plain", Pictures()[0].image, "", Pictures()[0].masks)
    with pytest.raises(UserError, match="none of 1 held-out pictures has a mask with a name"):
        run(tmp_path / "run", held_out=[nameless])
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_with_other_held_out_pictures(tmp_path: Path) -> None:
    """Scores of both stood in one table, and the best adapter was chosen among them."""
    config = replace(CONFIG, train_steps=1)
    run(tmp_path / "run", config, held_out=[Pictures()[0]])
    for held_out, other in (([Pictures()[1]], config), ([Pictures()[0]], replace(config, validate_sigma=0.9))):
        with pytest.raises(UserError, match="made with validation: "):
            run(tmp_path / "run", other, held_out=held_out, resume=True)
    run(tmp_path / "run", replace(config, validate_every=1), held_out=[Pictures()[0]], resume=True)


def test_a_name_within_a_longer_one_is_no_word_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a teddy bear and a bear, the bear's map was that of both."""
    names, masks = ("cat", "ring cat"), Pictures()[0].masks
    model, sample = fresh(), Sample("a", Pictures()[0].image, "ring cat cat", masks, names)
    table = model.token_tables([sample.prompt])[0]
    weights = Objective(model, CONFIG)._groups([sample], [table], [masks])[0]  # [T, 2]
    for column, word in ((0, [2]), (1, [0, 1])):
        of = [place for place, token in enumerate(table.tokens) if token.word_index in word]
        assert of and weights[:, column].nonzero()[:, 0].tolist() == of
    seen: list[torch.Tensor] = []
    places = torch.arange(len(table)).float()[None, :, None, None].expand(1, -1, 2, 2)
    monkeypatch.setattr(validation, "_maps", lambda *_: {"probability": places})
    monkeypatch.setattr(validation, "map_quality", lambda maps, *rest: seen.append(maps) or map_quality(maps, *rest))
    validate(model, [sample], [1])  # of "cat ring cat"
    table = model.token_tables(["cat ring cat"])[0]
    of = [place for place, token in enumerate(table.tokens) if token.word_index == 0]
    assert seen[0][0].unique().tolist() == [sum(of) / len(of)]
    with pytest.raises(UserError, match="'cat' stands only within longer names"):
        table = model.token_tables(["ring cat"])[0]
        table.word_spans("cat", beside=names)


def test_pictures_of_one_name_are_each_encoded() -> None:
    """Latents were remembered by the picture's name: those of the first stood for all that are called alike."""
    encode, pictures = Encoder(fresh()), Pictures()
    same = [Sample("a", pictures[index].image, "ring") for index in (0, 1, 0)]
    first, second, third = (encode(one, "ring") for one in same)
    assert third is first and not torch.equal(first.latents, second.latents)


def test_pictures_are_remembered_up_to_a_number_of_bytes() -> None:
    """The one that was asked for longest ago goes first; the last one stays, however large."""
    model, pictures = fresh(), Pictures()
    one = Encoder(model)(pictures[0], "ring")
    size = sum(part.numpy().nbytes for part in (one.latents, one.text, one.pooled))
    for room, kept in ((2 * size, {0, 2}), (2 * size - 1, {2}), (1, {2})):
        encode = Encoder(model, limit=room)
        found = {index: encode(pictures[index], "ring") for index in (0, 1, 0, 2)}
        assert {index for index in (2, 0, 1) if encode(pictures[index], "ring") is found[index]} == kept


def test_validation_counts_a_pixel_of_two_masks_as_the_smaller_one() -> None:
    """It took the mask that came last, where everything else that reads overlapping masks takes the smaller one."""
    cup, table = np.zeros((2, 64, 64), bool)
    cup[20:40, 20:40], table[10:] = True, True
    image = Pictures()[0].image
    truths = {True: [cup, table], False: [cup, table & ~cup]}  # as they overlap, and cut apart
    overlapping, apart = (
        validate(fresh(), [Sample("both", image, "ring cat", np.stack(truths[of]), ("ring", "cat"))], (1,)).truth
        for of in (True, False)
    )
    assert overlapping.tolist() == apart.tolist() == [[54 * 64 - 400, 400]]  # cat, ring


def test_each_picture_of_a_validation_has_a_row_of_its_own() -> None:
    """Six in batches of two, of which number 3 has no masks: the pixels of cat and ring."""
    kind: Any = ("probability", "none")
    found = readouts(fresh(), [Pictures()[index] for index in range(6)], (1,), [kind], batch=2)[kind]
    rings = [64 * (20 + 4 * index) for index in (0, 1, 2, 4, 5)]
    assert found.truth.tolist() == [[64 * 64 - ring, ring] for ring in rings]


@pytest.mark.parametrize("ema", [0.0, 0.6])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, ema: float) -> None:
    config, held_out = replace(CONFIG, ema=ema, validate_every=2, save_every=2), [Pictures()[0]]
    whole = run(tmp_path / "whole", config, held_out=held_out)

    def kill_after(steps: int) -> Callable[[], None]:
        left = [steps]

        def advance() -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        return advance

    model = fresh()
    untrained = model.weight_hash
    with pytest.raises(KeyboardInterrupt):
        train(model, Pictures(), config, out=tmp_path / "killed", held_out=held_out, advance=kill_after(3))
    assert model.weight_hash == untrained  # nothing half-trained stays in the model, which goes on
    started: list[int] = []
    resumed = train(
        model, Pictures(), config, out=tmp_path / "killed", held_out=held_out, resume=True, start=started.append
    )
    assert started == [2]  # of three steps the one after the checkpoint is done again
    assert_equal(whole, resumed)
    assert whole.log.drop(columns="seconds").equals(resumed.log.drop(columns="seconds"))
    assert whole.validation.equals(resumed.validation)
    again = run(tmp_path / "killed", config, held_out=held_out, resume=True)
    assert_equal(whole, again)
    with pytest.raises(UserError, match=r"has an adapter already; take it off \(pipeline\.transformer\.unload_lora"):
        train(model, Pictures(), config, out=tmp_path / "another")
    model.pipeline.transformer.unload_lora()
    assert model.weight_hash == untrained


def test_killed_while_the_adapter_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint was there before the adapter, and the resumed run had nothing left to do."""
    config = replace(CONFIG, train_steps=2, save_every=1)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lora, "save_lora", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", config)
    assert_equal(run(tmp_path / "killed", config, resume=True), run(tmp_path / "whole", config))


def test_the_averaged_adapter_is_what_is_saved(tmp_path: Path) -> None:
    """From the start's values on, by hand."""
    model, seen = fresh(), []

    def look(*_: int) -> None:
        seen.append({name: p.detach().clone() for name, p in named_parameters(model.transformer)})

    result = train(model, Pictures(), replace(CONFIG, train_steps=3, ema=0.6), out=tmp_path, start=look, advance=look)
    expected = seen[0]
    for parameters in seen[1:]:
        expected = {name: 0.6 * average + 0.4 * parameters[name] for name, average in expected.items()}
    saved = weights(result)
    assert len(saved) == len(expected)
    for name, average in expected.items():
        scale = 4 / 2 if "lora_B" in name else 1.0  # the file carries alpha over rank
        torch.testing.assert_close(saved["transformer." + name.replace(".magnet.", ".")], scale * average)
    last = seen[-1]
    assert any(not torch.allclose(last[name], average) for name, average in expected.items())


def test_a_run_of_other_options_is_not_continued(tmp_path: Path) -> None:
    run(tmp_path / "run", replace(CONFIG, train_steps=2))
    with pytest.raises(UserError, match="made with rate"):
        run(tmp_path / "run", replace(CONFIG, train_steps=2, rate=0.01), resume=True)
    # Refused after accelerate was set up: the next training may still choose its precision and its device.
    assert not AcceleratorState._shared_state
    assert not PartialState._shared_state


def test_two_micro_batches_of_four_give_the_step_of_eight(tmp_path: Path) -> None:
    config = replace(CONFIG, train_steps=3, batch=8)
    whole = weights(run(tmp_path / "whole", config))
    halves = weights(run(tmp_path / "halves", replace(config, batch=4, accumulation=2)))
    quarter = weights(run(tmp_path / "quarter", replace(config, batch=4)))
    moved = max(float((whole[name] - quarter[name]).abs().max()) for name in whole)
    assert all(torch.allclose(whole[name], halves[name], atol=2e-4) for name in whole)
    assert moved > 5e-3  # control: half the batch is another training


@pytest.mark.slow
def test_two_processes_give_the_step_of_one(tmp_path: Path) -> None:
    one = run(tmp_path / "one", replace(CONFIG, train_steps=2, batch=4))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    # On a CPU alone, `accelerate launch --cpu` wants MPI for more than one process; its other launcher is torchrun's.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no"]  # fmt: skip
    command = [*launch, "-m", "tests.magnet.two_processes", str(tmp_path / "two")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, cwd=environment["PYTHONPATH"]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_file(tmp_path / "two" / "lora" / ADAPTER_FILE)
    assert [(tmp_path / f"group-{rank}").read_text() for rank in (0, 1)] == ["ended", "ended"]
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
        {"streams": "clip"},
        {"streams": "clip", "alignment": "head", "focal": "released"},
    ],
    ids=str,
)
def test_every_variant_trains(tmp_path: Path, change: dict[str, Any]) -> None:
    result = run(tmp_path, replace(CONFIG, train_steps=3, **change))
    log = result.log
    assert np.isfinite(log.loss).all()
    total = log.flow + 0.1 * log.focal + 0.2 * log.dice
    np.testing.assert_allclose(log.loss, total, rtol=1e-4)
    assert (log.dice.max() > 0) == (change.get("alignment") != "none")
    assert any(float(t.abs().max()) > 0 for name, t in weights(result).items() if "lora_B" in name)
    assert (result.lora / "score_head.safetensors").exists() == ("score_head" in change)


def test_checkpointing_changes_no_number(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", replace(CONFIG, train_steps=2))
    assert_equal(plain, run(tmp_path / "recomputed", replace(CONFIG, train_steps=2, checkpointing=True)))


def test_training_on_masks_lowers_the_mask_loss(tmp_path: Path) -> None:
    config = replace(
        CONFIG, train_steps=30, batch=4, rate=0.02, flow_weight=0.0, focal_weight=1.0, dice_weight=1.0, warmup=2
    )
    log = run(tmp_path, config).log
    assert log.dice[-5:].mean() < 0.8 * log.dice[:3].mean()


@pytest.mark.slow
def test_words_of_the_embedded_model_come_to_own_their_regions(tmp_path: Path) -> None:
    held_out = [ScenesData("val", 24)[index] for index in range(24)]
    model = load("scenes-sd3")
    untrained = [validate(model, held_out, [layer]).miou() for layer in range(len(model.layers))]
    layer = int(np.argmax(untrained))
    config = MagnetOptions(
        layers=(layer,),
        train_steps=24,
        batch=4,
        warmup=2,
        rate=3e-3,
        max_grad_norm=1.0,
        validate_every=12,
        save_every=12,
    )
    result = train(model, ScenesData("train", 96), config, held_out=held_out, out=tmp_path)
    assert result.validation.miou.max() > untrained[layer] + 0.01
    assert (tmp_path / "best" / ADAPTER_FILE).exists()
    again = load("scenes-sd3", lora=result.lora)
    assert validate(again, held_out, [layer]).miou() == pytest.approx(result.validation.miou.iloc[-1], abs=1e-6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_masks_that_overlap_the_smaller_one_is_scored(order: tuple[int, int]) -> None:
    """As in evaluation: a cat on a ring that fills the picture is 8 x 8 pixels of cat, in any order of the masks."""
    names, masks = ("cat", "ring"), np.ones((2, 64, 64), bool)
    masks[0, 8:] = masks[0, :, 8:] = False
    sample = Sample("a", np.zeros((64, 64, 3), np.uint8), "", masks[list(order)], [names[k] for k in order])
    found = validate(MMDiT(tiny.pipeline(), "tiny", tiny.T5_LENGTH), [sample], [1])
    assert found.truth.tolist() == [[64, 64 * 64 - 64]]


def test_what_is_written(tmp_path: Path) -> None:
    config = replace(
        CONFIG, train_steps=2, validate_every=1, sample_prompts=["a red ring", "a cat"], sample_num_steps=2,
        sample_guidance=2.0, save_every=1,
    )  # fmt: skip
    result = run(tmp_path, config)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.json", "lora", "samples", "training.csv", "validation.csv", CHECKPOINT}
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000001.png", "step-000002.png"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["request"]["effective_batch"] == 2
    assert record["trainable"] == {"modules": 22, "parameters": 22 * 2 * 2 * 32}
    facts = read_metadata(result.lora)["mmdit_probe"]
    assert facts["layers"] == [1]
    assert facts["dice_weight"] == 0.2
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
    assert torch.equal(noise_of((2, 3), 5, 0), noise_of((2, 3), 5, 0))
    assert not torch.equal(noise_of((2, 3), 5, 0), noise_of((2, 3), 6, 0))
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


def poisoned_weight(model: MMDiT, step: int) -> Callable[[], None]:
    """A callback that makes one weight infinite after a step."""
    done = []

    def advance() -> None:
        done.append(1)
        if len(done) == step:
            with torch.no_grad():
                named_parameters(model.transformer)[0][1][0, 0] = float("inf")

    return advance


def test_the_first_number_that_is_not_finite_stops_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    config = replace(CONFIG, save_every=2, train_steps=8)
    good = run(tmp_path / "good", replace(config, train_steps=2, warmup=1))
    model = fresh()
    with pytest.raises(
        RunError, match=r"the loss of step 3 is nan, .* the checkpoint after step 2 is kept; lower --rate"
    ):
        train(model, Pictures(), config, out=tmp_path / "run", advance=poisoned_weight(model, 3))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed" and "step 3" in record["reason"]
    assert not (tmp_path / "run" / "lora").exists()
    kept = load_file(tmp_path / "run" / CHECKPOINT)
    assert kept and all(bool(tensor.isfinite().all()) for tensor in kept.values())
    assert len(good.log) == 2
    resumed = train(fresh(), Pictures(), config, out=tmp_path / "run", resume=True)
    assert_equal(resumed, run(tmp_path / "whole", config))


def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path: Path) -> None:
    model, before = fresh(), []

    def look(*_: int) -> None:
        before.extend((p, p.detach().clone()) for _, p in named_parameters(model.transformer))  # taken off at the end
        with torch.no_grad():
            model.transformer.proj_out.bias.fill_(float("nan"))

    with pytest.raises(RunError, match=r"the loss of step 0 is nan, so training stops; there is no checkpoint yet"):
        train(model, Pictures(), CONFIG, out=tmp_path / "run", start=look)
    assert before and all(torch.equal(p, was) for p, was in before)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_grad_norm": 0.0}, "--max-grad-norm is 0.0; expected a finite number above 0"),
        ({"max_grad_norm": float("nan")}, "--max-grad-norm is nan"),
        ({"rate": float("inf")}, "--rate is inf; expected a finite number above 0 and at most 1"),
        ({"rate": 0.0}, "--rate"),
        ({"drop_prompt": 1.5}, "--drop-prompt is 1.5; expected a finite number from 0 to 1"),
        ({"sigma_std": -1.0}, "--sigma-std"),
        ({"rank": 10**9}, "--rank is 1000000000; expected a whole number from 1 to 4096"),
        ({"rank": 0}, "--rank"),
        ({"train_steps": 10**30}, "--train-steps"),
        ({"ema": 1.0}, "--ema"),
        ({"alpha": -4.0}, "--alpha"),
        ({"seed": 2**63}, "--seed"),
        ({"dice_weight": float("nan")}, "--dice-weight"),
        ({"report_to": "tensorbord"}, "did you mean 'tensorboard'"),
        ({"layers": None}, "Give --layers 9"),
        ({"lora_layers": "1-x"}, "cannot read '1-x' as a layer"),
        ({"selection": Path("selection.json")}, "leave --layers out"),
        ({"masks": "clas"}, "did you mean 'class'"),
    ],
)
def test_every_option_has_its_range(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        replace(CONFIG, **change)
    assert said in str(refused.value)


def test_recipes() -> None:
    """The facts of the paper and of its published code, and what the embedded model's analysis chose."""
    paper = recipe("paper", layers=(9,))
    assert (paper.lora_streams, paper.space, paper.normalise, paper.streams) == ("image", "logit", "none", "clip")
    assert (paper.rank, paper.alpha, paper.lora_layers) == (16, 16, "all")
    assert (paper.rate, paper.max_grad_norm, paper.decay, paper.warmup_steps) == (1e-4, 0.01, 1e-4, 500)
    assert (paper.flow_weight, paper.mask_weight * paper.focal_weight, paper.dice_weight) == (1.0, 0.1, 0.2)
    assert (paper.focal_alpha, paper.focal_gamma, paper.match_focal, paper.match_dice) == (0.25, 2.0, 0.02, 1.0)
    assert (paper.sigma_mean, paper.sigma_std, paper.train_steps, paper.batch) == (0.0, 0.5, 3000, 8)
    ours = recipe("ours", layers=(4,), rate=1e-3)
    assert (ours.lora_streams, ours.space, ours.rate) == ("joint", "probability", 1e-3)
    with pytest.raises(UserError, match="did you mean 'paper'"):
        recipe("papr", layers=(4,))
    assert replace(paper, masks="part").level == "head"
    assert replace(paper, masks="none").level == "none"


def test_streams_that_a_model_does_not_read_are_refused(tmp_path: Path) -> None:
    from tests import pipelines

    model = MMDiT(pipelines.build("flux"), "flux", tiny.T5_LENGTH)
    with pytest.raises(UserError, match=r"unknown encoder stream 'clip'"):
        train(model, Pictures(), replace(CONFIG, streams="t5,clip"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_log(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = run(tmp_path, replace(CONFIG, train_steps=3, report_to="tensorboard"), held_out=[Pictures()[0]])
    events = accumulator.EventAccumulator(str(tmp_path / "train-magnet")).Reload()
    logged = [event.value for event in events.Scalars("loss")]
    np.testing.assert_allclose(logged, result.log.loss, rtol=1e-6)
    assert [event.step for event in events.Scalars("miou")] == [3]


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdit_probe.magnet.config.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"wandb: the package is not installed; pip install 'mmdit-probe\[track\]'"):
        replace(CONFIG, report_to="wandb")
