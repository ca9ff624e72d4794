"""The loop of all stages: exact resume after a kill and after a time, the last descent of the learning rate."""

import json
import time

import pandas as pd
import pytest
import torch
from torch import nn

from mmdit_probe.errors import RunError, UserError
from training.loop import (
    FLOOR,
    REWARM,
    AverageOfWeights,
    Progress,
    Stage,
    adopt,
    constant_then_linear,
    low_precision,
    read_progress,
    run,
    trained_state,
    warmup_cosine,
)
from training.session import Session


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def stage(steps, stop=None, clock=None, rates=None, **options):
    """Four weights learning from noise; a step takes a second of `clock`, and `rates` keeps what each was taken at."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def loss(step):
        if step == stop:
            raise KeyboardInterrupt
        if clock is not None:
            clock[0] += 1
        if rates is not None:
            rates.append(optimizer.param_groups[0]["lr"])
        return (model(torch.randn(8, 4)) - 1).square().mean(), {"extra": float(step)}

    return Stage(
        "toy", steps, model, [optimizer], loss, lambda step: warmup_cosine(step, steps, 5),
        **{"average": AverageOfWeights(model, 0.9), "save_seconds": 7.0 if clock else 0.0} | options,
    )  # fmt: skip


def assert_equal_runs(one, other):
    for average in (False, True):
        first, second = (trained_state(folder, average=average) for folder in (one, other))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    pd.testing.assert_frame_equal(pd.read_csv(one / "curves.csv"), pd.read_csv(other / "curves.csv"))


def test_killed_and_resumed_equals_uninterrupted(tmp_path, clock):
    assert run(stage(40), tmp_path / "whole", Session(), log_every=5)
    with pytest.raises(KeyboardInterrupt):
        run(stage(40, stop=27, clock=clock), tmp_path / "cut", Session(), log_every=5)
    assert read_progress(tmp_path / "cut").step == 21  # the last of those that came every seven seconds
    assert run(stage(40), tmp_path / "cut", Session(), log_every=5)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_time_ends_a_run_with_a_checkpoint_that_goes_on_exactly(tmp_path, clock, capfd):
    run(stage(40), tmp_path / "whole", Session(), log_every=10)
    for steps in (13, 26, 39):  # between the entries of the curves, which go on from the sums of the checkpoint
        assert not run(stage(40, clock=clock), tmp_path / "cut", Session(minutes=13 / 60), log_every=10)
        assert read_progress(tmp_path / "cut").step == steps
    assert "the time is over at step 39 of 40" in " ".join(capfd.readouterr().err.split())
    assert run(stage(40, clock=clock), tmp_path / "cut", Session(minutes=13 / 60), log_every=10)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert not run(stage(50), tmp_path / "cut", Session(minutes=0))  # no time: nothing is done, nothing lost
    assert read_progress(tmp_path / "cut").step == 40


def finishing(**options):
    return Session(stage="vae", finish=True, **options)


def test_finish_brings_the_learning_rate_down_before_the_time_is_over(tmp_path, clock):
    rates = []
    toy = stage(1000, clock=clock, rates=rates)
    toy.name, toy.rate = "vae", lambda step: 1.0
    assert run(toy, tmp_path / "vae", finishing(minutes=100 / 60))
    # A fifth of 100 seconds is left after 80 steps of a second; nine tenths of it are 18 steps.
    assert read_progress(tmp_path / "vae").landing == (80, 18)
    expected = [0.01] * 80 + [0.01 * max(FLOOR, 1 - step / 18) for step in range(18)]
    assert rates == pytest.approx(expected)
    # Going on, the rate rises again from nothing.
    again = stage(1000, clock=clock, rates=rates)
    again.name, again.rate = "vae", lambda step: 1.0
    assert not run(again, tmp_path / "vae", Session(stage="vae", minutes=2 / 60))
    assert rates[98:] == pytest.approx([0.01 / REWARM, 0.02 / REWARM])


def test_a_descent_that_was_killed_goes_on_exactly(tmp_path, clock):
    for name, stop in (("whole", None), ("cut", 90)):
        toy = stage(1000, clock=clock, stop=stop)
        toy.name = "vae"
        if stop is None:
            run(toy, tmp_path / name, finishing(minutes=100 / 60))
        else:
            with pytest.raises(KeyboardInterrupt):
                run(toy, tmp_path / name, finishing(minutes=100 / 60))
            toy = stage(1000)
            toy.name = "vae"
            assert run(toy, tmp_path / name, Session(stage="vae"))
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_only_the_last_stage_of_all_comes_down_in_time():
    session = Session(stage="all", minutes=5, finish=True)
    assert session.lands("transformer") and not session.lands("vae")
    assert finishing(minutes=5).lands("vae") and not Session(stage="vae", minutes=5).lands("vae")
    with pytest.raises(UserError, match="give a time"):
        Session(finish=True)


def test_a_run_is_continued_with_its_own_recipe_only(tmp_path):
    run(stage(5, recipe={"align": "none"}), tmp_path, Session())
    with pytest.raises(UserError, match="holds a run with --seed 0: give the same"):
        run(stage(9, recipe={"align": "none"}), tmp_path, Session(seed=1))
    with pytest.raises(UserError, match="--align none"):
        run(stage(9, recipe={"align": "layer:4"}), tmp_path, Session())
    other = stage(9, recipe={"align": "none"})
    other.module = nn.Sequential(other.module)
    with pytest.raises(UserError, match="another network"):
        run(other, tmp_path, Session())
    assert run(stage(4, recipe={"align": "layer:4"}), tmp_path, Session(seed=1, fresh=True))
    assert read_progress(tmp_path).recipe == {"seed": 1, "scenes": 40000, "align": "layer:4"}


def test_seeds_give_other_runs(tmp_path):
    for seed in (0, 1):
        run(stage(5), tmp_path / str(seed), Session(seed=seed))
    first, second = (trained_state(tmp_path / str(seed)) for seed in (0, 1))
    assert not torch.equal(first["weight"], second["weight"])


def curves_up_to(step, path):
    path.write_text(f"step,name,value\n1,loss,2\n{step},loss,1\n")
    return path


def test_a_run_goes_on_from_weights_that_came_from_elsewhere(tmp_path):
    rates = []
    torch.manual_seed(1)
    found = nn.Linear(4, 4)
    for name in ("whole", "cut"):
        adopt(tmp_path / name, found, 20, curves_up_to(20, tmp_path / "curves.csv"))
        assert all(torch.equal(t, found.state_dict()[n]) for n, t in trained_state(tmp_path / name).items())
    run(stage(40, rates=rates), tmp_path / "whole", Session())
    # New optimisers start slowly, whatever the schedule says: here its own warm-up is long over.
    slow = [0.01 * warmup_cosine(step, 40, 5) * (step - 19) / REWARM for step in range(20, 40)]
    assert rates == pytest.approx(slow)
    with pytest.raises(KeyboardInterrupt):
        run(stage(40, stop=33), tmp_path / "cut", Session())
    run(stage(40), tmp_path / "cut", Session())
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert pd.read_csv(tmp_path / "cut" / "curves.csv")["step"].tolist()[:2] == [1, 20]
    with pytest.raises(UserError, match="holds a checkpoint already"):
        adopt(tmp_path / "cut", found, 20, tmp_path / "curves.csv")


def test_checkpoints_that_say_less_are_read(tmp_path):
    run(stage(20), tmp_path / "whole", Session())
    run(stage(10), tmp_path / "cut", Session())
    path = tmp_path / "cut" / "progress.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({name: known[name] for name in ("step", "updates", "renewed")}))
    assert read_progress(tmp_path / "cut") == Progress(step=10, updates=10)
    assert run(stage(20), tmp_path / "cut", Session(seed=0))


def test_bfloat16_only_where_the_processor_computes_in_it(monkeypatch):
    a = torch.ones(2, 2)
    for units, dtype in (({}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        with low_precision(torch.device("cpu")):
            assert (a @ a).dtype == dtype


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    broken = stage(10)
    broken.loss = lambda step: (torch.tensor(float("nan"), requires_grad=True), {})
    with pytest.raises(RunError, match="stage toy, step 0"):
        run(broken, tmp_path, Session())


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    """The loss was finite, the step made every weight NaN, and a checkpoint could be written of them."""
    broken = stage(4)
    weight = broken.module.weight
    broken.loss = lambda step: ((weight - weight.detach()).abs().sum().sqrt(), {})  # 0, with an infinite slope
    with pytest.raises(RunError, match="step 0: the gradient is"):
        run(broken, tmp_path, Session())
    assert torch.isfinite(weight).all() and not (tmp_path / "progress.json").exists()


def test_schedules_start_low_and_end_low():
    for schedule in (warmup_cosine, constant_then_linear):
        rates = [schedule(step, 1000, 100) for step in range(1000)]
        assert rates[0] <= 0.01 and max(rates) == pytest.approx(1, abs=1e-3) and rates[-1] < 0.1
