"""The attention-budget library call: the same rows as the probe gives, streamed to a sink, the model left alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from mmdit_probe.experiments.budget_items import Budget, attention_budget
from PIL import Image

from mmdit_probe.data import Sample
from mmdit_probe.errors import UserError
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.mass import AttentionMass
from mmdit_probe.observe.probe import probe
from tests import tiny


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return MMDiT(tiny.pipeline("sd3"), "tiny", tiny.T5_LENGTH)


QUICK = {"num_steps": 2, "guidance": 3.0}


class Kept:
    """A sink that keeps what it gets, call by call."""

    def __init__(self) -> None:
        self.parts: list[pd.DataFrame] = []

    def write(self, columns: dict[str, np.ndarray]) -> None:
        self.parts.append(pd.DataFrame(columns))


def test_rows_are_those_of_the_probe(model):
    table = attention_budget(model, ["a cat", "a red ring"], seed=5, **QUICK)
    assert table is not None
    with probe(model, AttentionMass()) as run:
        model.generate("a red ring", steps=2, guidance=3.0, seed=6)
    second = table[table.item == 1].drop(columns="item").reset_index(drop=True)
    second["prompt"] = second["prompt"].cat.remove_unused_categories()
    pd.testing.assert_frame_equal(second, run[AttentionMass].table())


def test_a_sink_gets_the_rows_while_the_sampler_runs(model):
    sink = Kept()
    assert attention_budget(model, "a cat", sink=sink, **QUICK) is None
    assert len(sink.parts) >= 2  # not one heap at the end
    assert {step for part in sink.parts for step in part.step} == {0, 1}
    table = attention_budget(model, "a cat", **QUICK)
    pd.testing.assert_frame_equal(pd.concat(sink.parts, ignore_index=True), table)


def test_text_length_is_set_for_this_measurement_only(model):
    table = attention_budget(model, "a cat", max_sequence_length=6, **QUICK)
    per_query = ["step", "branch", "layer", "head", "query"]
    text = table[table.key == "text"].groupby(per_query).n_key.sum()
    assert set(text) == {tiny.CLIP_LENGTH + 6}
    assert model.max_sequence_length == tiny.T5_LENGTH


def test_picture_is_noised_to_sigma_with_its_own_seed(model):
    pictures = [Sample(f"p{k}", Image.new("RGB", (64, 64), "red"), "a cat") for k in range(2)]
    budget = Budget.of_pictures(model, pictures, sigma=0.5, seed=3, layers="1")
    sink = Kept()
    budget.measure(budget.items[1], sink)
    rows = pd.concat(sink.parts)
    latents = model.noise(model.encode_image(Image.new("RGB", (64, 64), "red")), 0.5, seed=4)
    with probe(model, AttentionMass(), layers=[1]) as run:
        model.denoise(latents, 0.5, model.encode_prompt("a cat"))
    np.testing.assert_array_equal(rows.mass, run[AttentionMass].table().mass)
    assert (set(rows.picture), set(rows.seed), set(rows.sigma)) == ({"p1"}, {4}, {0.5})


def test_request_tells_apart_what_changes_the_numbers(model):
    def request(**changes: object) -> dict[str, object]:
        return Budget.of_prompts(model, ["a cat"], **{**QUICK, **changes}).request  # type: ignore[arg-type]

    assert request() == request(layers="0-2", steps=[0, 1])
    different = [{"seed": 1}, {"guidance": 1.0}, {"layers": 0}, {"steps": 0}, {"heads": 1}, {"max_sequence_length": 6}]
    for changes in different:
        assert request(**changes) != request(), changes
    before = request()
    with torch.no_grad():
        weight = model.transformer.proj_out.weight
        weight += 1
        changed = MMDiT(model.pipeline, "tiny", tiny.T5_LENGTH)
        assert Budget.of_prompts(changed, ["a cat"], **QUICK).request != before
        weight -= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: attention_budget(m, []), "no prompt is given"),
        (lambda m: attention_budget(m, "a cat", layers=7), "layer 7 does not exist: there are 3 layers"),
        (lambda m: attention_budget(m, "red " * 20), r"'red.*' and \d+ more words fell off|fell off"),
        (lambda m: Budget.of_pictures(m, []), "no picture is given"),
        (
            lambda m: Budget.of_pictures(m, [Sample("p", Image.new("RGB", (64, 64)))], ["a", "b"]),
            "2 prompts for 1 pictures; expected none, one, or one per picture",
        ),
    ],
)
def test_refusals(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)
