"""The training code: exact resume, the training forward against the stock one, and the curriculum's arithmetic."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mmdit_probe import load
from mmdit_probe.errors import UserError
from mmdit_probe.scenes import KINDS, load_parser, scene
from training.assemble import first_tower
from training.loop import (
    REWARM,
    AverageOfWeights,
    Stage,
    adopt,
    constant_then_linear,
    low_precision,
    run,
    trained_state,
    warmup_cosine,
)
from training.parser import load_trained_parser
from training.pool import pool
from training.recipe import run_stage
from training.text import Restorer, draw_captions, load_trained_text
from training.transformer import (
    AlignedTransformer,
    ClipPair,
    ExplicitJointAttention,
    Phase,
    TextEncoders,
    alignment_loss,
    draw_sigmas,
    load_trained_transformer,
    optimizers,
    phase_at,
)


def stage(steps, stop=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)

    def loss(step):
        if step == stop:
            raise KeyboardInterrupt
        return (model(torch.randn(8, 4)) - 1).square().mean(), {"extra": float(step)}

    return Stage(
        "toy",
        steps,
        model,
        [torch.optim.AdamW(model.parameters(), lr=0.01)],
        loss,
        lambda step: warmup_cosine(step, steps, 5),
        save_every=10,
        average=AverageOfWeights(model, 0.9),
    )


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    run(stage(40), tmp_path / "whole", log_every=5)
    with pytest.raises(KeyboardInterrupt):
        run(stage(40, stop=27), tmp_path / "cut", log_every=5)
    run(stage(40), tmp_path / "cut", log_every=5)
    for average in (False, True):
        whole, cut = (trained_state(tmp_path / name, average=average) for name in ("whole", "cut"))
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
    curves = []
    for name in ("whole", "cut"):
        with (tmp_path / name / "curves.csv").open() as file:
            curves.append([(r["step"], r["name"]) for r in csv.DictReader(file)])
    assert curves[0] == curves[1]


def curves_up_to(step, path):
    path.write_text(f"step,name,value\n1,loss,2\n{step},loss,1\n")
    return path


def test_a_run_goes_on_from_weights_that_came_from_elsewhere(tmp_path):
    rates = []

    def watched(stop=None):
        toy = stage(40, stop)
        step = toy.optimizers[0].step
        toy.optimizers[0].step = lambda: (rates.append(toy.optimizers[0].param_groups[0]["lr"]), step())[1]
        return toy

    torch.manual_seed(1)
    found = nn.Linear(4, 4)
    for name in ("whole", "cut"):
        adopt(tmp_path / name, found, 20, curves_up_to(20, tmp_path / "curves.csv"))
        assert all(torch.equal(t, found.state_dict()[n]) for n, t in trained_state(tmp_path / name).items())
    run(watched(), tmp_path / "whole")
    # New optimisers start slowly, whatever the schedule says: here its own warm-up is long over.
    slow = [0.01 * warmup_cosine(step, 40, 5) * (step - 19) / REWARM for step in range(20, 40)]
    assert rates == pytest.approx(slow)
    with pytest.raises(KeyboardInterrupt):
        run(watched(stop=33), tmp_path / "cut")
    run(watched(), tmp_path / "cut")
    whole, cut = (trained_state(tmp_path / name, average=True) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    with (tmp_path / "cut" / "curves.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)][:2] == [1, 20]
    with pytest.raises(UserError, match="holds a checkpoint already"):
        adopt(tmp_path / "cut", found, 20, tmp_path / "curves.csv")


def test_what_ships_becomes_the_last_checkpoint_of_every_stage(tmp_path):
    run_stage("import", tmp_path)
    shipped = load("scenes-sd3", dtype="float32").pipeline
    pair, t5 = load_trained_text(tmp_path)
    pairs = [
        (load_trained_transformer(tmp_path), shipped.transformer),
        (first_tower(pair), shipped.text_encoder),
        (pair.second, shipped.text_encoder_2),
        (t5, shipped.text_encoder_3),
        (load_trained_parser(tmp_path), load_parser()),
    ]
    for found, wanted in pairs:
        state = wanted.state_dict()
        assert state.keys() == found.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    vae = shipped.vae.state_dict()
    assert all(torch.equal(tensor, vae[name]) for name, tensor in trained_state(tmp_path / "vae").items())
    # The curves go on where those that ship end.
    curves = pd.read_csv(tmp_path / "transformer" / "curves.csv")
    assert curves["step"].max() == json.loads((tmp_path / "transformer" / "progress.json").read_text())["step"]
    with pytest.raises(UserError, match="holds a checkpoint already"):
        run_stage("import", tmp_path)


def test_bfloat16_only_where_the_processor_computes_in_it(monkeypatch):
    a = torch.ones(2, 2)
    for units, dtype in (({}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        with low_precision(torch.device("cpu")):
            assert (a @ a).dtype == dtype


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    broken = stage(10)
    broken.loss = lambda step: (torch.tensor(float("nan"), requires_grad=True), {})
    with pytest.raises(FloatingPointError, match="stage toy, step 0"):
        run(broken, tmp_path)


def test_schedules_start_low_and_end_low():
    for schedule in (warmup_cosine, constant_then_linear):
        rates = [schedule(step, 1000, 100) for step in range(1000)]
        assert rates[0] <= 0.01 and max(rates) == pytest.approx(1, abs=1e-3) and rates[-1] < 0.1


def live_model():
    torch.manual_seed(0)
    model = AlignedTransformer()
    for name, parameter in model.named_parameters():
        if "text_embedder" not in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def test_training_forward_is_the_stock_forward():
    model = live_model()
    encode = TextEncoders(ClipPair().eval(), Restorer().encoder.eval(), torch.device("cpu"))
    text = encode(["a red ring on grass", ""])
    latents, time = torch.randn(2, 8, 8, 8), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        # The pooled text has no weight in the network, so any value must do.
        stock = model.transformer(latents, text, torch.randn(2, 128), time).sample
        assert torch.allclose(model(latents, text, time)[0], stock, atol=1e-5)
        model.transformer.set_attn_processor(ExplicitJointAttention())
        velocity, logits = model(latents, text, time)
    assert torch.allclose(velocity, stock, atol=1e-4) and logits.shape == (2, 64, 22)
    assert not torch.allclose(stock, torch.zeros_like(stock), atol=1e-2)


def test_dropped_encoders_are_zero_rows():
    encode = TextEncoders(ClipPair().eval(), Restorer().encoder.eval(), torch.device("cpu"))
    kept = encode(["a red ring"])
    assert kept.shape == (1, 48, 128) and (kept.abs().sum(-1) > 0).all()
    without_t5 = encode(["a red ring"], {"clip_l": 0.0, "clip_g": 0.0, "t5": 1.0})
    assert torch.equal(without_t5[:, :24], kept[:, :24]) and (without_t5[:, 24:] == 0).all()
    without_g = encode(["a red ring"], {"clip_l": 0.0, "clip_g": 1.0, "t5": 0.0})
    assert (without_g[:, :24, 64:] == 0).all() and torch.equal(without_g[:, :24, :64], kept[:, :24, :64])


def test_every_parameter_has_exactly_one_optimizer():
    model = live_model()
    owned = [id(p) for o in optimizers(model, 1e-3, 1e-3) for g in o.param_groups for p in g["params"]]
    assert len(owned) == len(set(owned)) and set(owned) == {id(p) for p in model.parameters()}


def test_alignment_loss_is_lowest_at_the_reading():
    torch.manual_seed(0)
    reading = torch.cat([torch.rand(2, 15, 4, 4).softmax(1), torch.rand(2, 7, 4, 4).softmax(1)], dim=1)
    best = reading.log().flatten(2).transpose(1, 2)
    entropy = -(reading * reading.log()).sum(1).mean()
    assert alignment_loss(best, reading) == pytest.approx(float(entropy), rel=1e-5)
    assert alignment_loss(best + torch.randn_like(best), reading) > entropy + 0.1


def test_noise_levels_are_shifted_by_three():
    torch.manual_seed(0)
    sigmas = draw_sigmas(20000)
    assert float(sigmas.median()) == pytest.approx(0.75, abs=0.01)
    assert float(sigmas.min()) > 0 and float(sigmas.max()) < 1


def test_phases_follow_each_other():
    curriculum = (Phase("single", 3, 8), Phase("scenes", 2, 4))
    assert [phase_at(step, curriculum).pool for step in range(7)] == ["single"] * 3 + ["scenes"] * 4


def test_pool_holds_the_scenes_and_their_captions(tmp_path):
    data = pool(tmp_path, "val", 4, workers=1)
    again = pool(tmp_path, "val", 4, workers=1)
    assert len(data) == 4 and np.array_equal(data.images[2], scene("val", 2).image)
    assert np.array_equal(again.classes, data.classes) and again.captions == data.captions
    torch.manual_seed(0)
    drawn = draw_captions(data, [0, 1, 2, 3] * 50, empty=0.5)
    assert 60 < drawn.count("") < 140
    assert {text for text in drawn if text} <= {text for row in data.captions for text in row}
    assert len(data.captions[0]) == len(KINDS)


def test_a_stage_without_its_predecessors_is_refused(tmp_path):
    from training.recipe import run_stage

    with pytest.raises(UserError, match="holds no trained parser"):
        run_stage("vae", tmp_path)
    with pytest.raises(UserError, match="did you mean 'vae'"):
        run_stage("vaee", tmp_path)
