"""AttentionBudget: the same rows as the probe gives, written while the sampler runs, the model left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mmdit_probe.data import Sample
from mmdit_probe.errors import UserError
from mmdit_probe.experiments import AttentionBudget
from mmdit_probe.experiments.target import Named
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.mass import AttentionMass
from mmdit_probe.observe.probe import probe
from tests import tiny


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return MMDiT(tiny.pipeline("sd3"), "tiny", tiny.T5_LENGTH)


QUICK: dict[str, Any] = {"num_steps": 2, "guidance": 3.0, "prompts": "a cat"}
"""Of sampling; pictures have a noise level instead."""


def budget_of(options: dict[str, Any]) -> AttentionBudget:
    return AttentionBudget(**({"prompts": "a cat"} if "images" in options else QUICK) | options)


def table_of(target: Any, **options: Any) -> pd.DataFrame:
    return budget_of(options).run(target, progress=False).table


def study_of(model: MMDiT, **options: Any) -> Any:
    ask = budget_of(options)
    return ask.prepare(model, ask.gather(scenes=False))


class Kept:
    """A recorder that keeps what it gets, call by call."""

    def __init__(self) -> None:
        self.parts: list[pd.DataFrame] = []
        self.ticks = 0.0

    def advance(self, ticks: float = 1) -> None:
        self.ticks += ticks

    def write(self, table: str, columns: Any, **labels: Any) -> None:
        if table == "attention_budget":
            self.parts.append(pd.DataFrame({**dict.fromkeys(labels), **columns}).assign(**labels))


def kept(model: MMDiT, task: int, **options: Any) -> list[pd.DataFrame]:
    ask, record = budget_of(options), Kept()
    study = ask.prepare(model, ask.gather(scenes=False))
    ask.measure(study, study.tasks[task], record)  # type: ignore[arg-type]
    return record.parts


def test_rows_are_those_of_the_probe(model):
    table = table_of(model, prompts=["a cat", "a red ring"], seed=5)
    with probe(model, AttentionMass()) as run:
        model.generate("a red ring", steps=2, guidance=3.0, seed=6)
    second = table[table.item == 1].drop(columns=["control", "item"]).reset_index(drop=True)
    second["prompt"] = second["prompt"].cat.remove_unused_categories()
    pd.testing.assert_frame_equal(second, run[AttentionMass].table())


def test_rows_are_written_while_the_sampler_runs(model):
    parts = kept(model, 0)
    assert len(parts) >= 2  # not one heap at the end
    assert {step for part in parts for step in part.step} == {0, 1}
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True).astype(object), table_of(model).astype(object))


def test_text_length_is_that_of_the_session(model, tiny_directory: Path):
    table = table_of(Named(str(tiny_directory), max_sequence_length=6))
    per_query = ["step", "branch", "layer", "head", "query"]
    text = table[table.key == "text"].groupby(per_query, observed=True).n_key.sum()
    assert set(text) == {tiny.CLIP_LENGTH + 6}
    assert model.max_sequence_length == tiny.T5_LENGTH


def test_picture_is_noised_to_sigma_with_its_own_seed(model):
    pictures = [Sample(f"p{k}", Image.new("RGB", (64, 64), "red"), "a cat") for k in range(2)]
    rows = pd.concat(kept(model, 1, images=pictures, prompts=None, sigma=0.5, seed=3, layers="1"))
    latents = model.noise(model.encode_image(Image.new("RGB", (64, 64), "red")), 0.5, seed=4)
    with probe(model, AttentionMass(), layers=[1]) as run:
        model.denoise(latents, 0.5, model.encode_prompt("a cat"))
    np.testing.assert_array_equal(rows.mass, run[AttentionMass].table().mass)
    assert (set(rows.picture), set(rows.seed), set(rows.sigma)) == ({"p1"}, {4}, {0.5})


def test_request_tells_apart_what_changes_the_numbers(model):
    def request(**changes: object) -> dict[str, object]:
        return study_of(model, **changes).request

    assert request() == request(layers="0-2", steps=[0, 1])
    different = [{"seed": 1}, {"guidance": 1.0}, {"layers": 0}, {"steps": 0}, {"heads": 1}, {"rows": "layer"}]
    for changes in different:
        assert request(**changes) != request(), changes
    shorter = MMDiT(model.pipeline, "tiny", 6)
    assert study_of(shorter).request != request()
    before = request()
    with torch.no_grad():
        weight = model.transformer.proj_out.weight
        weight += 1
        changed = MMDiT(model.pipeline, "tiny", tiny.T5_LENGTH)
        assert study_of(changed).request != before
        weight -= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "no prompt is given"),
        ({"layers": 7}, "layer 7 does not exist: there are 3 layers"),
        ({"prompts": "red " * 20}, r"'red.*' and \d+ more words fell off|fell off"),
        ({"images": []}, "no picture is given"),
        (
            {"images": [Sample("p", Image.new("RGB", (64, 64)))], "prompts": ["a", "b"]},
            "2 prompts for 1 picture; expected none, one, or one per picture",
        ),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(UserError, match=message):
        table_of(model, **options)


def test_photos_without_a_caption_are_remarked_on(scenes_model, tmp_path: Path):
    from mmdit_probe.experiments.options import notes_on, samples_of

    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    photo, drawn = samples_of(tmp_path, None), samples_of("scenes:val", 1)
    unknown, bare = notes_on(scenes_model, photo, [one.prompt for one in photo])
    assert unknown == "scenes-sd3 was trained on drawn scenes alone: what it finds in other pictures means nothing"
    assert bare.startswith("no caption: 1 of 1 picture; the empty prompt was used")
    assert notes_on(scenes_model, drawn, [one.prompt for one in drawn]) == []
    assert notes_on(scenes_model, photo, ["a cat"]) == [unknown]


def test_pictures_in_a_list_are_single_ones(model, tmp_path: Path):
    """Of a folder in a list the first picture was read and the others were left out."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    for source in (tmp_path, "scenes:val"):
        with pytest.raises(UserError, match="is no single picture"):
            table_of(model, images=[source], prompts="a cat")
    table = table_of(model, images=[tmp_path / "b.png", "scenes:val:3"], prompts="a cat")
    assert list(dict.fromkeys(table["picture"])) == ["b.png", "scenes:val:3"]


def test_a_prompt_given_twice_is_one_and_keys_that_do_not_exist_take_nothing(model):
    """I2O of a model without other keys is 0, not 0 to .5; the mean over prompts takes the two seeds of one first."""
    result = AttentionBudget(**QUICK | {"prompts": ["a cat", "a red ring", "a cat"], "num_steps": 1}).run(
        model, progress=False
    )
    table = result.table[(result.table["branch"] == "cond") & (result.table["query"] == "image")]
    own = table[(table["layer"] == 1) & (table["key"] == "text")].groupby(["item", "head"])["mass"].sum()
    by_item = own.groupby("item").mean()
    row = result.summary.set_index("layer").loc[1]
    assert row["prompts"] == 2 and (row["I2O"], row["I2O_low"], row["I2O_high"]) == (0, 0, 0)
    assert row["I2T"] == pytest.approx((by_item[1] + by_item[[0, 2]].mean()) / 2, abs=1e-6)
