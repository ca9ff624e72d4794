"""The command, every stage in a few steps, what is measured on the way, what ships, and the ablation's script."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from mmdit_probe import load
from mmdit_probe.errors import UserError
from mmdit_probe.scenes import load_parser
from mmdit_probe.scenes.captions import KINDS
from tests.scripts import script
from training import flow, measure
from training.__main__ import main
from training.assemble import first_tower
from training.flow import Phase, train_transformer
from training.loop import read_progress, trained_state
from training.parser import load_trained_parser
from training.recipe import run_session
from training.session import Session
from training.text import load_trained_text
from training.transformer import AlignedTransformer, load_trained_transformer

TINY = ("--scenes", "24", "--held-out", "4", "--no-compile", "--device", "cpu")


@pytest.fixture(scope="module")
def tiny_curriculum():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "CURRICULUM", (Phase("single", 1, 4), Phase("pair", 1, 4), Phase("scenes", 1, 4, wrong=2)))
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_curriculum):
    """All stages after three steps, by the command."""
    folder = tmp_path_factory.mktemp("training")
    main(["all", "--workdir", str(folder), "--steps", "3", "--align", "all:features", *TINY])
    return folder


def session(workdir, **options):
    return Session(workdir=workdir, scenes=24, held_out=4, compiled=False, device="cpu", **options)


def test_one_command_trains_every_stage(workdir):
    steps = {path.name: read_progress(path).step for path in workdir.iterdir() if (path / "progress.json").exists()}
    assert steps == dict.fromkeys(("parser", "vae", "clip", "t5", "ssl", "transformer"), 3)
    curves = {name: set(pd.read_csv(workdir / name / "curves.csv")["name"]) for name in steps}
    assert curves["vae"] == {"loss", "pixel", "kl", "psnr", "read_right"}  # no label in the loss
    assert curves["ssl"] == {"loss", "explained", "probe", "pixels"}
    assert {"flow", "align"} <= curves["transformer"]
    assert {f"miou@{s}/layer{k}" for s in (0.5, 0.75) for k in range(8)} <= curves["transformer"]
    assert {"flow@0.5", "shuffled@0.5", "empty@0.5", "relation@0.85", "relation_wrong@0.85", "count_wrong@0.5",
            "things_right", "grounds_right", "relation", "opposite_relation"} <= curves["transformer"]  # fmt: skip


@pytest.mark.parametrize("align", ["none", "all:labels", "layer:4"])
def test_recipes_stand_side_by_side_and_heads_do_not_ship(workdir, tmp_path, align, monkeypatch):
    monkeypatch.setattr(flow, "Measurements", lambda *_: lambda *_: {})
    asked = session(workdir, stage="transformer", align=align)
    assert train_transformer(asked, tmp_path)
    names = set(trained_state(tmp_path))
    assert any(name.startswith("heads.") for name in names) == (align != "none")
    stock = load_trained_transformer(tmp_path)
    average = trained_state(tmp_path, average=True)
    assert all(torch.equal(tensor, average[f"transformer.{name}"]) for name, tensor in stock.state_dict().items())
    names_logged = set(pd.read_csv(tmp_path / "curves.csv")["name"])
    assert names_logged == {"loss", "flow", "excess"} | (set() if align == "none" else {"align"})


def test_a_transformer_that_was_stopped_is_the_one_that_was_not(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "Measurements", lambda *_: lambda *_: {})
    monkeypatch.setattr(Session, "seconds_left", lambda self: float("inf"))
    assert train_transformer(session(workdir, stage="transformer"), tmp_path / "whole")
    left = iter([1.0, 0.0])
    monkeypatch.setattr(Session, "seconds_left", lambda self: next(left))
    assert not train_transformer(session(workdir, stage="transformer", minutes=1), tmp_path / "cut")
    assert read_progress(tmp_path / "cut").step == 1
    monkeypatch.setattr(Session, "seconds_left", lambda self: float("inf"))
    assert train_transformer(session(workdir, stage="transformer"), tmp_path / "cut")
    whole, cut = (trained_state(tmp_path / name, average=True) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_text_gain_is_what_the_losses_say():
    """A transformer that restores a share of the noise, the share that its caption is worth here."""
    captions = [["a red ring", "", "", "a red ring left of a blue house", "two red rings", "", "", ""],
                ["a blue house", "", "", "a star", "a star", "", "", ""]]  # fmt: skip
    assert [KINDS[k] for k in (0, 3, 4)] == ["colour", "2d-spatial", "numeracy"]
    worth = {"": 0.0, "a red ring right of a blue house": 0.25}

    class Data:
        data = type("Pool", (), {"captions": captions})()

        def clean(self, rows, device):
            return torch.zeros(len(rows), 8, 4, 4)

    def model(latents, text, times):
        return latents / (times / 1000)[:, None, None, None] * text[:, None, None, None], []

    def encode(texts):
        return torch.tensor([worth.get(text, 0.5) for text in texts])

    numbers = measure.text_gain(model, Data(), encode, torch.device("cpu"), 2)
    # A share s of the noise restored leaves (1 - s)^2 of its square: a quarter, all of it, nine sixteenths.
    noise = torch.randn((2, 8, 4, 4), generator=torch.Generator().manual_seed(0))
    assert numbers["flow@0.5"] == pytest.approx(0.25 * float(noise.square().mean()), rel=1e-4)
    for sigma in measure.SIGMAS:
        assert numbers[f"shuffled@{sigma}"] == pytest.approx(0, abs=1e-3)
        assert numbers[f"empty@{sigma}"] == pytest.approx(300, rel=1e-4)
        assert numbers[f"relation_wrong@{sigma}"] == pytest.approx(125, rel=1e-4)
        assert numbers[f"count_wrong@{sigma}"] == pytest.approx(0, abs=1e-3)
    assert measure.turned(Data(), "relation", 5) == [(0, captions[0][3], "a red ring right of a blue house")]
    assert measure.turned(Data(), "count", 5) == [(0, "two red rings", "three red rings")]


def test_what_ships_goes_in_and_out(workdir, tmp_path):
    asked = session(workdir, stage="export", assets=tmp_path / "assets")
    (tmp_path / "assets").mkdir()
    assert run_session(asked)
    pipeline = load(str(tmp_path / "assets" / "scenes-sd3"), device="cpu").pipeline
    stock = load_trained_transformer(workdir / "transformer").half().state_dict()
    assert all(torch.equal(tensor.half(), stock[name]) for name, tensor in pipeline.transformer.state_dict().items())
    curves = pd.read_csv(tmp_path / "assets" / "scenes-sd3" / "training" / "transformer.csv")
    assert curves["step"].max() == 3
    back = session(tmp_path / "again", stage="import", assets=tmp_path / "assets")
    assert run_session(back) and read_progress(tmp_path / "again" / "transformer").step == 3


def test_what_ships_becomes_the_last_checkpoint_of_every_stage(tmp_path):
    run_session(Session(stage="import", workdir=tmp_path))
    shipped = load("scenes-sd3", dtype="float32").pipeline
    pair, t5 = load_trained_text(tmp_path)
    pairs = [
        (load_trained_transformer(tmp_path / "transformer"), shipped.transformer),
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
    assert trained_state(tmp_path / "transformer").keys() == AlignedTransformer().state_dict().keys()
    # The curves go on where those that ship end.
    curves = pd.read_csv(tmp_path / "transformer" / "curves.csv")
    assert curves["step"].max() == json.loads((tmp_path / "transformer" / "progress.json").read_text())["step"]
    with pytest.raises(UserError, match="holds a checkpoint already"):
        run_session(Session(stage="import", workdir=tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vae"], "holds no trained parser: run `python -m training parser` first"),
        (["export"], "holds no trained parser"),
        (["transformer", "--align", "all:features"], "holds no trained parser"),
        (["vaee"], "'vaee' is not one of 'parser', 'vae'"),
        (["vae", "--minutes", "-1"], "greater than or equal to 0"),
        (["vae", "--finish"], "give a time"),
        (["transformer", "--align", "layer:9"], "N of 0..7"),
    ],
)
def test_a_bad_request_is_one_line_and_code_two(tmp_path, capfd, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--workdir", str(tmp_path)])
    assert stopped.value.code == 2
    error = capfd.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and "\n" not in error


def test_the_command_runs_as_a_module():
    shown = subprocess.run(
        [sys.executable, "-m", "training", "--help"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    ).stdout  # fmt: skip
    assert all(option in shown for option in ("--minutes", "--finish", "--align", "--workdir", "--seed", "--fresh"))


def test_the_ablation_trains_measures_and_resumes(workdir, tmp_path, monkeypatch):
    ablation = script("analyses/alignment_ablation.py")
    asked, size = (
        session(workdir, steps=3),
        ablation.Size(n=2, n_evidence=4, num_steps=1, evidence=("word_mass", "segmentation")),
    )
    monkeypatch.setattr(flow, "Measurements", lambda *_: lambda *_: {"relation_wrong@0.85": 2.0})
    recipes = ("none", "layer:4")
    assert ablation.ablation(asked, [0], size, tmp_path, recipes)
    tables = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ablation.TABLES}
    assert list(dict.fromkeys(tables["maps"]["recipe"])) == ["random weights", *recipes]
    assert len(tables["maps"]) == 3 * 8 * 2 and len(tables["evidence"]) == 3 * 8 * 2
    assert set(tables["samples"]["score"]) >= {"relation", "opposite_relation", "count", "wrong_count"}
    pictures = pd.read_csv(next((workdir / "ablation" / "none-seed0").glob("pictures-*-n2.csv")))
    assert len(pictures) == 2 * len(ablation.CATEGORIES) and {"caption", "seed", "category"} < set(pictures)
    text = (tmp_path / "summary.md").read_text()
    assert "Of 1 transformers with one aligned layer" in text and "12 samples each" in text
    monkeypatch.setattr(ablation, "measure", lambda *_: pytest.fail("a run was measured again"))
    assert ablation.ablation(asked, [0], size, tmp_path / "again", recipes)
    assert (tmp_path / "again" / "summary.md").read_text() == text
    for name in ("maps", "evidence"):  # another machine measured seed 1, and layer:4 is not there
        other = tables[name].query("recipe == 'none'").assign(seed=1)
        pd.concat([tables[name], other]).query("recipe != 'layer:4'").to_csv(tmp_path / f"{name}.csv", index=False)
    assert ablation.ablation(asked, [0], size, tmp_path, ["layer:4"])
    maps = pd.read_csv(tmp_path / "maps.csv")
    assert list(dict.fromkeys(zip(maps["recipe"], maps["seed"], strict=True))) == [
        ("random weights", 0), ("none", 0), ("none", 1), ("layer:4", 0),
    ]  # fmt: skip
    pd.testing.assert_frame_equal(maps.query("seed == 0").reset_index(drop=True), tables["maps"])


def test_a_caption_that_comes_up_again_is_one_of_the_samples_n():
    """Ten captions, each four times with one result: ten shares of 0 or 1, whose interval is Wilson's of ten."""
    ablation = script("analyses/alignment_ablation.py")
    pictures = pd.DataFrame(
        {"category": "colour", "caption": f"c{k % 10}", "seed": k, **dict.fromkeys(ablation.SCORES, float(k % 10 < 7))}
        for k in range(40)
    ).assign(count=float("nan"))  # fmt: skip
    row = ablation.samples(pictures).set_index("score").loc[["facts", "count"]]
    wilson = stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert row.loc["facts", ["images", "n", "mean"]].tolist() == [40, 10, 0.7]
    assert row.loc["facts", ["low", "high"]].tolist() == pytest.approx([wilson.low, wilson.high])
    assert row.loc["count", ["images", "n"]].tolist() == [0, 0] and np.isnan(row.loc["count", "mean"])


def test_the_answer_counts_best_layers_at_the_aligned_one_and_the_next():
    ablation = script("analyses/alignment_ablation.py")
    best = {"random weights": 0, "none": 3, "layer:2": 2, "layer:4": 5, "layer:6": 4}
    stretched = best | {"layer:6": 7}
    frame = pd.DataFrame(
        [
            {"recipe": recipe, "seed": 0, "layer": layer, "min_max": kind, "evidence": "segmentation",
             "miou": 0.5 if layer == of[recipe] else 0.1, "value": 0.5 if layer == best[recipe] else 0.1}
            for kind, of in ((False, best), (True, stretched)) for recipe in of for layer in range(8)
        ]
    )  # fmt: skip
    evidence = frame[~frame["min_max"]]
    table = ablation.best_layers({"maps": frame, "evidence": evidence}).set_index("recipe")
    assert table["by_maps"].to_dict() == table["by_evidence"].to_dict() == best
    assert table["by_min_max"].to_dict() == stretched
    assert table["by_maps_follows"].dropna().to_dict() == {"layer:2": True, "layer:4": True, "layer:6": False}
    assert table["by_min_max_follows"].dropna().to_dict() == {"layer:2": True, "layer:4": True, "layer:6": True}
    assert np.isnan(table.loc["none", "aligned"]) and table.loc["layer:6", "aligned"] == 6
