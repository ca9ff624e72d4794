"""`segment`, `discover` and their files, on a tiny random pipeline: any picture size, one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from mmdit_probe.cli.app import main


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (75, 130, 3)).astype(np.uint8)).save(path)
    return str(path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_segment_writes_what_it_says(
    picture: str, tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    code = run(
        "segment", picture, "--classes", "red ring; ring, cat, blue house", "--model", str(tiny_directory), "--layers",
        "all", "--fit", "aspect", "--refine", "centre+affinity:1+pamr:2", "--noise-seeds", "2", "--sigma", "0.3,0.5",
        "--out", str(out), "--json",
    )  # fmt: skip
    assert code == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "segmentation.json").read_text())
    assert document["names"] == ["red ring", "cat", "blue house"]
    labels = Image.open(out / "labels.png")
    assert labels.mode == "P" and labels.size == (130, 75)
    array = np.array(labels)
    for index, name in enumerate(document["names"]):
        assert document["areas"][name]["pixels"] == int((array == index).sum())
    assert sum(area["share"] for area in document["areas"].values()) == pytest.approx(1.0)
    shares = load_file(out / "probabilities.safetensors")["probabilities"]
    assert shares.shape == (3, 75, 130) and np.allclose(shares.sum(0), 1.0, atol=1e-4)
    assert np.array_equal(shares.argmax(0), array)
    assert len(list((out / "maps").glob("*.png"))) == 3 and (out / "overlay.png").is_file()
    assert (out / "sheet.png").is_file() and json.loads((out / "run.json").read_text())["status"] == "finished"


def test_crop_leaves_the_rest_unlabelled(
    picture: str, tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ("discover", picture, "--model", str(tiny_directory), "--layers", "0", "--tau", "0", "--fit", "crop")
    assert run(*arguments, "--out", str(out), "-q") == 0
    array = np.array(Image.open(out / "labels.png"))
    assert (array == 255).any() and (array[:, 65] != 255).all()
    assert capsys.readouterr().out.strip() == str(out)


def test_segments_take_the_name_that_fits_best(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdit_probe.segment import run as room
    from tests.segment import worlds

    regions = worlds.masks()
    blind, named = worlds.capture(regions, empty=True), worlds.capture(regions[[2, 0]])  # no name for the third region
    order = torch.tensor([0, 2, 1])
    maps = regions[order].repeat_interleave(worlds.TOKEN, 1).repeat_interleave(worlds.TOKEN, 2)
    found = room.Segmentation(maps.argmax(0).numpy().astype(np.uint16), maps, ["segment 1", "segment 2", "segment 3"],
                              blind)  # fmt: skip
    read = []

    def capture(model: Any, image: Any, classes: Any, reading: Any, **how: Any) -> Any:
        read.append(reading.reference)
        return named

    monkeypatch.setattr(room, "capture", capture)
    names = room.name_segments(None, found, ["lower right", "left; west"]).names  # type: ignore[arg-type]
    assert names[:2] == ["left", "lower right"] and names[2] in {"left 2", "lower right 2"}
    names = room.name_segments(None, found, ["left 2", "left"], reference="read").names  # type: ignore[arg-type]
    assert names[:2] == ["left", "left 2"] and names[2] in {"left 3", "left 2 2"}
    assert read == ["none", "read"]


def test_discover_names_segments(
    picture: str, tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("discover", picture, "--model", str(tiny_directory), "--layers", "0", "--method", "diffcut", "--names")
    assert run(*line, "red ring; ring, cat", "--out", str(tmp_path / "run"), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {name.rstrip("0123456789 ") for name in document["names"]} <= {"red ring", "cat"}
    assert document["request"]["names"] == [["red ring", "ring"], ["cat"]]
    assert run(*line, "cat", "--names-by", "diffseg") == 2
    assert "reads no names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes", "cat,"], "expected names separated by commas"),
        (["--classes", "cat", "--method", "seg4dif"], "did you mean 'seg4diff'"),
        (["--classes", "cat", "--method", "diffcut"], "takes no class names"),
        (["--classes", "cat", "--refine", "pammr"], "did you mean 'pamr'"),
        (["--classes", "cat", "--background", "class:dog"], "unknown background class 'dog'"),
        (["--classes", "cat", "--layers", "99"], "layer 99 does not exist"),
        (["--classes", "cat", "--heads", "9"], "head 9 does not exist"),
        (["--classes", "cat", "--sigma", "2"], "expected numbers in 0..1"),
        (["--classes", "cat", "--size", "60x64"], "multiples of 16"),
        (["--classes", "cat", "--set", "sofmax=text"], "did you mean 'softmax'"),
        (["--classes", "cat", "--set", "streams=t6"], "no tokens in the text stream 't6'; take clip, t5"),
        (["--classes", "cat", "--method", "iseg", "--set", "streams=t6"], "no tokens in the text stream 't6'"),
        (["--classes", "cat", "--resume"], "No such option: --resume"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, picture: str, tiny_directory: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = run("segment", picture, *arguments, "--model", str(tiny_directory), "--out", str(tmp_path / "run"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and words in error
    assert not (tmp_path / "run").exists()


def test_regions_of_another_program(picture: str, tiny_directory: Path, tmp_path: Path) -> None:
    """A PNG of masks, 0 for none: each mask takes its most frequent label; pixels of none keep theirs."""
    ids = np.zeros((75, 130), np.uint8)
    ids[:40, :50], ids[30:, 60:], ids[:10, 120:] = 1, 7, 200
    Image.fromarray(ids).save(tmp_path / "masks.png")
    given = ("--regions", str(tmp_path / "masks.png"))

    def made(name: str, *more: str) -> Path:
        line = ("segment", picture, "--classes", "red ring, cat", "--model", str(tiny_directory), "--layers", "0")
        assert run(*line, *more, "--out", str(tmp_path / name), "-q") == 0
        return tmp_path / name

    plain, voted = made("plain", "--refine", "centre"), made("voted", "--refine", "centre+vote", *given)
    before, found = (np.array(Image.open(folder / "labels.png")) for folder in (plain, voted))
    want = before.copy()
    for one in (1, 7, 200):
        want[ids == one] = np.bincount(before[ids == one]).argmax()
    assert np.array_equal(found, want) and (want != before).any()
    assert json.loads((voted / "run.json").read_text())["request"]["regions"] == given[1]
    corrclip = ("--method", "corrclip", "--set", "temperature=1")
    own, masks = (
        load_file(made(name, *corrclip, *more) / "probabilities.safetensors")["probabilities"]
        for name, more in (("own", ()), ("masks", given))
    )
    assert np.abs(own - masks).max() > 1e-3  # the method itself reads them, too


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        (np.zeros((10, 10), np.uint8), "regions int64 (10, 10): expected whole ids from 0 (0: no region), 75 x 130"),
        (np.zeros((75, 130, 3), np.uint8), "is a colour picture"),
        (None, "no label map"),
    ],
)
def test_regions_that_do_not_fit_are_refused_before_the_model_runs(
    regions: np.ndarray | None, words: str, picture: str, tiny_directory: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from mmdit_probe.experiments import target

    def loaded(*arguments: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(target, "as_model", loaded)
    if regions is not None:
        Image.fromarray(regions).save(tmp_path / "masks.png")
    line = (
        "segment",
        picture,
        "--classes",
        "cat",
        "--refine",
        "vote",
        "--model",
        str(tiny_directory),
        "--regions",
        str(tmp_path / "masks.png"),
    )
    assert run(*line) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("segment", str(tmp_path / "none.png"), "--classes", "cat") == 2
    assert "no picture" in capsys.readouterr().err
    assert run("segment", "scenes:val", "--classes", "cat") == 2
    assert "expected scenes:val:0" in capsys.readouterr().err
