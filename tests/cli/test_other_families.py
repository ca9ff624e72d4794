"""Commands on pipelines of other families than SD3, from a local directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmdit_probe.cli.app import main
from mmdit_probe.results import read_table
from tests.pipelines import build


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ("flux", "aura_flow", "cogvideox"):
        found[name] = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(found[name], safe_serialization=True)
    return found


def exit_code(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(("name", "branches"), [("flux", {"cond"}), ("aura_flow", {"cond", "uncond"})])
def test_the_budget_of_another_family(name: str, branches: set[str], directories: dict[str, Path]) -> None:
    options = ["--num-steps", 2, "--steps", 0, "--guidance", 3, "--prompts", "a red ring", "--device", "cpu"]
    assert exit_code("attention-budget", "--model", directories[name], *options, "--out", "run", "--quiet") == 0
    table = read_table(Path("run/attention_budget.parquet"))
    assert set(table["layer"]) == {0, 1, 2, 3} and set(table["branch"]) == branches
    assert set(table.query("key == 'text'")["span"]) == {"word", "eos", "pad"}
    assert set(table["sigma"]) == {1.0} and set(table["prompt"]) == {"a red ring"}
    sums = table.groupby(["branch", "layer", "head", "query"])["mass"].sum()
    np.testing.assert_allclose(sums, 1.0, atol=1e-5)
    record = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    assert record["model"]["family"] == name and len(record["sigmas"]) == 2


def test_word_maps_of_a_video(directories: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-steps", 1, "--guidance", 1, "--device", "cpu", "--model", directories["cogvideox"]]
    asked = ["maps", "a red ring", "--words", "ring", *options, "--out", "run"]
    assert exit_code(*asked, "--num-frames", 9, "--size", "32x48") == 0
    assert "peak (frame, row, column)" in capsys.readouterr().out
    assert len(list(Path("run/images/000").glob("*.png"))) == 9
    for path in (Path("run/images/000.gif"), Path("run/overlays/000-00-ring.gif")):
        with Image.open(path) as gif:
            assert gif.size == (48, 32) and gif.is_animated
    assert np.load("run/arrays/maps-000.npz")["maps"].shape == (1, 3, 2, 3)
    request = json.loads(Path("run/run.json").read_text(encoding="utf-8"))["request"]
    assert request["num_frames"] == 9 and request["size"] == [32, 48]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--size", "32by48"], "expected height x width in pixels, such as 480x720"),
        (["--num-frames", 5], "makes pictures, no videos: leave num_frames out"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: list[Any], told: str, directories: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("maps", "a ring", *options, "--model", directories["flux"], "--device", "cpu") == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_pictures_of_another_family(directories: dict[str, Path]) -> None:
    Path("pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save("pictures/a.png")
    Path("pictures/a.txt").write_text("a red ring", encoding="utf-8")
    options = ["--images", "pictures", "--sigma", 0.5, "--prompts", "a red ring", "--device", "cpu", "--quiet"]
    assert exit_code("attention-budget", "--model", directories["aura_flow"], *options, "--out", "run") == 0
    table = read_table(Path("run/attention_budget.parquet"))
    assert set(table["sigma"]) == {0.5} and "word" in set(table["span"])


def test_a_pipeline_that_makes_no_image_of_a_text_is_refused(
    tmp_path: Path, directories: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((directories["flux"] / "model_index.json").read_text())
    Path("other").mkdir()
    Path("other/model_index.json").write_text(json.dumps(index | {"_class_name": "FluxFillPipeline"}), encoding="utf-8")
    assert exit_code("attention-budget", "--model", "other") == 2
    error = [line for line in capfd.readouterr().err.strip().splitlines() if not line.startswith("loading ")]
    assert len(error) == 1 and "FluxFillPipeline" in error[0] and "give the pipeline to `probe`" in error[0]
    assert exit_code("attention-budget", "--model", directories["flux"], "--no-t5", "--device", "cpu") == 2
    assert "one text encoder only" in capfd.readouterr().err
