"""`train-magnet` from the command line: an adapter that other commands take, resume, one-line refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmdit_probe import load
from mmdit_probe.cli.app import main
from mmdit_probe.errors import ProbeWarning, UserError
from mmdit_probe.experiments import TrainMagnet
from mmdit_probe.magnet.config import RECIPES
from mmdit_probe.magnet.inputs import gather
from mmdit_probe.magnet.pseudo import SelfLabelled
from mmdit_probe.models.adapters import read_metadata
from tests.data.test_training import folder

QUICK = ["--layers", "1", "--train-steps", "2", "--batch", "1", "--rank", "2", "--alpha", "3", "--out", "run"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_a_folder_trains_and_the_adapter_loads(tiny_directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(tiny_directory)]
    folder(Path("data")), folder(Path("held"))
    asked = ["train-magnet", "--dataset", "data", "--validation", "held", *model, *QUICK]
    assert run(*asked, "--json") == 0, capfd.readouterr().err
    document = json.loads(capfd.readouterr().out)
    assert document["steps"] == 2
    assert document["validation"][-1]["n"] == 2
    found = read_metadata("run/lora")
    assert found["mmdit_probe"]["alpha"] == 3
    assert found["mmdit_probe"]["alignment"] == "token"
    assert run(*asked, "--resume", "-q") == 0
    assert capfd.readouterr().out.strip() == "run"
    budget = ["attention-budget", "--prompts", "a cat", "--num-steps", "1", "--lora", "run/lora", "--out", "budget"]
    assert run(*budget, *model) == 0, capfd.readouterr().err
    assert json.loads(Path("budget/run.json").read_text(encoding="utf-8"))["model"]["id"].endswith("+run/lora")


def test_an_adapter_goes_on_from_another_one_merged(tiny_directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second training starts from the first one's model, and its run says so."""
    model = ["--model", str(tiny_directory)]
    folder(Path("data"))
    asked = ["train-magnet", "--dataset", "data", *model, *QUICK[:-2]]
    assert run(*asked, "--rate", "0.05", "--out", "first") == 0, capfd.readouterr().err
    assert run(*asked, "--lora", "first/lora", "--out", "second") == 0, capfd.readouterr().err
    first, second = (
        json.loads(Path(name, "run.json").read_text(encoding="utf-8"))["request"]["model"]
        for name in ("first", "second")
    )
    assert second["id"].endswith("+first/lora")
    assert second["weight_hash"] != first["weight_hash"]
    with pytest.warns(ProbeWarning, match=r"'second/lora' was trained on a model with the changes of 'first/lora'"):
        load(tiny_directory, lora="second/lora")


def test_a_recipe_gives_way_to_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainMagnet] = []

    def stop(self: TrainMagnet, *_: object, **__: object) -> None:
        seen.append(self)
        raise UserError("seen")

    monkeypatch.setattr(TrainMagnet, "run", stop)
    samples = ["--sample-prompts", "prompts.txt"]
    for line in ([], ["--recipe", "ours"], ["--recipe", "ours", "--train-steps", "3000", "--alignment", "head"]):
        assert run("train-magnet", "--layers", "4", *samples, *line) == 2
    plain, ours, changed = seen
    assert plain == TrainMagnet(layers="4", sample_prompts="prompts.txt")
    assert ours == replace(plain, **RECIPES["ours"])
    assert changed == replace(ours, train_steps=3000, alignment="head")  # 3000 is the plain default, and was asked for


def test_a_training_is_shown(tiny_directory: Path) -> None:
    folder(Path("data")), folder(Path("held"))
    asked = TrainMagnet(layers=(1,), dataset="data", validation="held", train_steps=2, batch=1, rank=2)
    result = asked.run(str(tiny_directory), out="run", progress=False)
    assert len(result.log) == 2 and result.document()["steps"] == 2 and result.path == Path("run")
    assert len(result.figure().axes) == 2 and "<img" in result._repr_html_()
    assert any(str(line).startswith("held-out mIoU") for line in result.texts())


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    """Of a training nobody heard of it."""
    for part in ("images", "labels"):
        (tmp_path / "set" / part).mkdir(parents=True)
        Image.new("L", (64, 64)).save(tmp_path / "set" / part / "a.png")
    Image.new("L", (64, 64)).save(tmp_path / "set/images/b.png")
    (tmp_path / "set/classes.txt").write_text("cat")
    assert gather(TrainMagnet(layers="1", dataset="set")).notes == ["left out: 1 picture without a label"]


def test_own_masks_need_names_before_pictures_are_labelled(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused when every picture had been labelled."""
    monkeypatch.setattr(SelfLabelled, "make", lambda *_, **__: pytest.fail("pictures were labelled"))
    asked = TrainMagnet(layers="1", masks="self", dataset=str(folder(Path("data"), names=False)), train_steps=1)
    with pytest.raises(UserError, match="2 masks and 0 names"):
        asked.run(load(tiny_directory), out="run", progress=False)


def test_refusals(tiny_directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All before weights are loaded: with SD3's that takes minutes."""
    model = ["--model", str(tiny_directory)]
    folder(Path("data")), folder(Path("bare"), names=False)
    on_disk = [*QUICK, "--dataset", "data"]
    for arguments, words in (
        (["--train-steps", "2"], "Give --layers 9"),
        ([*QUICK, "--masks", "clas"], "did you mean 'class'"),
        ([*QUICK, "--dataset", "nowhere"], "no folder 'nowhere'"),
        ([*QUICK, "--validation", "nowhere"], "no folder 'nowhere'"),
        ([*QUICK, "--validation", "scenes:train"], "'scenes:train' are the pictures that are trained on"),
        ([*QUICK, "--dataset", ".", "--validation", "../" + Path.cwd().name], "are the pictures that are trained on"),
        ([*QUICK[:-2], "--layers", "7"], "layer 7 does not exist"),
        ([*QUICK, "--refine", "pammr"], "did you mean 'pamr'"),
        ([*QUICK, "--captions", "new.json"], "scenes have captions of their own; --captions is for pictures on disk"),
        ([*QUICK, "--caption-model", "blip"], "Give --captions FILE.json"),
        ([*on_disk, "--prompt-kind", "mixed"], "prompt 'mixed' is for scenes"),
        ([*on_disk, "--sentences", "1"], "names of the masks; --sentences is read with --prompt-kind caption"),
        ([*on_disk, "--captions", "new.json", "--prompt-kind", "caption"], "no file 'new.json'; expected {"),
        ([*on_disk, "--validation", "bare"], "masks of 'bare' have no names"),
    ):
        assert run("train-magnet", *arguments, *model) == 2
        (error,) = capfd.readouterr().err.strip().splitlines()
        assert words in error
    assert not Path("run").exists()
