"""The controls: uniform attention is uniform for every observer, the random twin is that of `load`, captions move on,
and a claim that its control shows as well is named so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe import AttentionMass, load, probe
from mmdit_probe.cli.app import main
from mmdit_probe.edit.control import Uniform
from mmdit_probe.errors import UserError
from mmdit_probe.experiments import AttentionBudget, Diagnose, FeaturePCA, Perturb
from mmdit_probe.experiments.controls import others, parse, random_model, variants
from mmdit_probe.models.load import random_twin
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results import read_table
from mmdit_probe.results.statistics import ABOVE, NOT_ABOVE, TOO_FEW, compare, measured
from tests import pipelines


def test_uniform_attention_is_what_counts_give(pipe: Any) -> None:
    model = MMDiT(pipe)
    text = model.encode_prompt(["a red ring"])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with probe(model, AttentionMass(), edits=Uniform()) as run:
        uniform = model.denoise(latents, 0.5, text)
    table = run[AttentionMass].table()
    np.testing.assert_allclose(table["mass"], table["uniform"], atol=1e-6)
    assert not torch.allclose(uniform, model.denoise(latents, 0.5, text))


def test_random_weights_and_moved_captions(pipe: Any) -> None:
    model = MMDiT(pipe, "tiny")
    plain, random, shuffled = variants(model, ["random", "shuffled"])
    expected = MMDiT(type(pipe)(**{**pipe.components, "transformer": random_twin(pipe.transformer, 0)}))
    assert random.model.weight_hash == expected.weight_hash != model.weight_hash
    assert plain.model is shuffled.model is model
    assert shuffled.texts(["a", "b", "c"]) == ["b", "c", "a"] and plain.texts(["a", "b"]) == ["a", "b"]
    with pytest.raises(UserError, match="1 of 1 have 'a'"):
        shuffled.texts(["a"])


@pytest.mark.parametrize(
    "texts", [["a", "a", "b", "c"], ["a", "b", "b", "a"], ["", "", "", "a", "b", "c"], list("aabbcc"), list("abcabca")]
)
def test_no_item_keeps_its_caption(texts: list[str]) -> None:
    """The next item's may be the same one, of pictures without a caption or of one scene: the control was no other."""
    moved = others(texts)
    assert sorted(moved) == sorted(texts) and all(one != other for one, other in zip(moved, texts, strict=True))


def test_captions_that_are_mostly_one_are_not_exchanged(pipe: Any) -> None:
    for texts in (["a", "a", "b"], ["", ""]):
        with pytest.raises(UserError, match=f"2 of {len(texts)} have '{texts[0]}'"):
            others(texts)
    model, given = MMDiT(pipe, "tiny"), {"images": "scenes:val", "limit": 3, "prompts": "a cat", "control": "shuffled"}
    for experiment in (AttentionBudget(**given), FeaturePCA(**given), Diagnose(**given)):
        with pytest.raises(UserError, match="3 of 3 have 'a cat'"):
            experiment.prepare(model, experiment.gather(False))
    with pytest.raises(UserError, match="2 of 2 have 'a cat'"):
        Perturb(prompts=["a cat"] * 2, control="shuffled").gather(False)


@pytest.mark.parametrize("name", ["krea2", "flux2"])
def test_random_weights_leave_the_pipelines_settings_alone(name: str) -> None:
    """A distilled pipeline's control was sampled with guidance."""
    stock = pipelines.build(name)
    stock.register_to_config(is_distilled=True)
    twin = random_model(MMDiT(stock, "tiny")).pipeline
    assert twin.config == stock.config and twin.config.is_distilled is True


def test_the_random_model_of_an_embedded_one_is_its_twin() -> None:
    twin, made = load("scenes-sd3-random"), random_model(load("scenes-sd3"))
    assert twin.weight_hash == made.weight_hash and twin.name == made.name


def test_names() -> None:
    assert parse("none") == ()
    assert parse("uniform, random") == ("random", "uniform")
    with pytest.raises(UserError, match="did you mean 'random'"):
        parse("randm")
    with pytest.raises(UserError, match="shuffled"):
        parse("shuffled", ["random", "uniform"])


def planted(gap: float, n: int = 20) -> pd.DataFrame:
    """Items differ much, the measurement from its control by `gap` and little noise: only pairing shows it."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=n)
    rows = []
    for item in range(n):
        rows.append({"item": item, "control": "none", "layer": 0, "value": base[item] + gap + 0.01 * rng.normal()})
        rows.append({"item": item, "control": "random", "layer": 0, "value": base[item] + 0.01 * rng.normal()})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("gap", "n", "verdict"), [(0.1, 20, ABOVE), (0.0, 20, NOT_ABOVE), (-0.1, 20, NOT_ABOVE),
                                                   (0.1, 4, TOO_FEW)])  # fmt: skip
def test_verdicts_are_paired(gap: float, n: int, verdict: str) -> None:
    (row,) = compare(planted(gap, n), ["layer"]).to_dict("records")
    assert row["verdict"] == verdict and row["n"] == n
    assert row["difference"] == pytest.approx(gap, abs=0.01)
    assert row["low"] <= row["difference"] <= row["high"]
    assert compare(measured(planted(gap, n)), ["layer"]).empty


def test_command(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Control rows lie beside the measurement, leave its summary alone, and decide what is printed."""
    monkeypatch.chdir(tmp_path)
    arguments = ["value-norms", "--model", str(tiny_directory), "--images", "scenes:val", "--limit", "8"]
    Path("texts.txt").write_text("a red ring\na cat\n" * 4, encoding="utf-8")
    arguments += ["--prompts", "texts.txt", "--layers", "0-1"]
    for out, control in (("plain", "none"), ("controls", "random,shuffled,uniform")):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--control", control, "--out", out, *(["--json"] if out == "controls" else [])])
        text, err = capfd.readouterr()
        assert stopped.value.code == 0, err
    rows = json.loads(text)["controls"]
    assert {(row["layer"], row["control"]) for row in rows} == {
        (layer, name) for layer in (0, 1) for name in ("random", "shuffled", "uniform")
    }
    table = read_table("controls/value_norms.parquet")
    assert table.groupby("control", observed=True)["item"].nunique().to_dict() == dict.fromkeys(
        ["none", "random", "shuffled", "uniform"], 8
    )
    # Two captions by turns: what one gains by the exchange the other loses, and that is said.
    assert all(row["verdict"] == NOT_ABOVE for row in rows if row["control"] == "shuffled")
    assert NOT_ABOVE in Path("controls/value_norms_controls.md").read_text(encoding="utf-8")
    plain, beside = (pd.read_csv(f"{out}/value_norms_by_layer.csv") for out in ("plain", "controls"))
    pd.testing.assert_frame_equal(plain, beside)
    with pytest.raises(SystemExit) as stopped:
        main(["attention-budget", "--model", str(tiny_directory), "--prompts", "a cat", "--control", "shuffled"])
    assert stopped.value.code == 2
    assert "shuffled captions need pictures" in capfd.readouterr().err
