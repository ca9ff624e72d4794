"""`--no-t5`, the paper's setting: what reads class names without T5, and that its results stay apart from those with
T5. The weights are the same and so is the length of the text: only the request can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from mmdit_probe.cli.app import main
from mmdit_probe.results import read_table
from tests.data.test_training import folder

SEGMENT = ["segment", "scenes:val:3", "--classes", "tree, ring, grass, sky", "--layers", "3"]
EVALUATE = ["evaluate", "--limit", "2", "--method", "seg4diff,tokenrank", "--layers", "3"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def request_of(path: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path, "run.json").read_text(encoding="utf-8"))["request"]
    return found


def test_segment_reads_class_names_in_the_other_encoders(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SEGMENT, "-q") == 0
    assert run(*SEGMENT, "-q", "--no-t5") == 0
    with_t5, without = (Path(line) for line in capsys.readouterr().out.split())
    shares = [load_file(path / "probabilities.safetensors")["probabilities"] for path in (with_t5, without)]
    assert np.isfinite(shares[1]).all() and np.abs(shares[0] - shares[1]).max() > 0.01
    assert request_of(without) == request_of(with_t5) | {"no_t5": True}
    assert with_t5.name.split("-")[-1] != without.name.split("-")[-1]
    assert json.loads((without / "segmentation.json").read_text())["request"]["no_t5"]
    # What is left of the words are CLIP's: reading only these changes nothing.
    assert run(*SEGMENT, "--no-t5", "--set", "streams=clip", "-q", "-o", "clip") == 0
    only_clip = load_file("clip/probabilities.safetensors")["probabilities"]
    np.testing.assert_array_equal(only_clip, shares[1])


def test_segment_takes_the_length_of_the_zeroed_slots(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's layout: as many zeroed slots as CLIP has positions. Zeros take attention, so their number counts."""
    for length in ("12", "48"):
        assert run(*SEGMENT, "--no-t5", "--max-sequence-length", length, "-q", "-o", length) == 0
        assert request_of(length)["text_length"] == 24 + int(length)
    few, many = (load_file(f"{length}/probabilities.safetensors")["probabilities"] for length in ("12", "48"))
    assert np.abs(few - many).max() > 1e-4


def test_discover_names_segments_without_t5(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["discover", "scenes:val:3", "--layers", "3", "--no-t5", "--names", "tree, ring, sky", "--json"]
    assert run(*line, "-o", "run") == 0
    names = json.loads(capsys.readouterr().out)["names"]
    assert names and {name.rstrip("0123456789 ") for name in names} <= {"tree", "ring", "sky"}
    assert request_of("run")["no_t5"]


def test_evaluate_with_and_without_t5_share_neither_cache_nor_run(capsys: pytest.CaptureFixture[str]) -> None:
    kept = [*EVALUATE, "--cache", "kept"]
    assert run(*kept, "-o", "with") == 0
    captures = set(Path("kept").glob("*.safetensors"))
    assert run(*kept, "--no-t5", "-o", "without") == 0
    added = set(Path("kept").glob("*.safetensors")) - captures
    assert len(added) == len(captures) == 2
    assert run(*EVALUATE, "--no-t5", "-o", "uncached") == 0
    tables = {name: read_table(Path(name, "counts.parquet")) for name in ("with", "without", "uncached")}
    pixels = {name: table["pixels"].to_numpy().astype(int) for name, table in tables.items()}
    cached, direct = (tables[name].drop(columns="pixels") for name in ("without", "uncached"))
    pd.testing.assert_frame_equal(cached, direct)
    # The cache holds float16: pixels on a border may fall to the other side.
    assert np.abs(pixels["without"] - pixels["uncached"]).sum() < 1e-3 * pixels["without"].sum()
    assert not tables["with"].equals(tables["without"])
    assert request_of("without") == request_of("with") | {"no_t5": True}
    capsys.readouterr()
    assert run(*EVALUATE, "--resume", "-o", "without") == 2
    assert "it was made with no_t5 = true, this request has null" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("attention-budget", ["--prompts", "a cat", "--num-steps", "1"]),
        ("diagnose", ["--images", "scenes:val", "--limit", "1", "--layers", "1", "--prompts", "a cat"]),
        ("score", ["--prompts", "a cat", "--num-steps", "1"]),
        ("train-magnet", ["--dataset", "data", "--layers", "1", "--train-steps", "1", "--batch", "1", "--rank", "2"]),
    ],
)
def test_runs_with_and_without_t5_are_not_continued_into_each_other(
    command: str, options: list[str], tiny_directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder(Path("data"))
    line = [command, "--model", str(tiny_directory), *options, "-q"]
    assert run(*line, "--no-t5", "--max-sequence-length", "6", "-o", "run") == 0, capfd.readouterr().err
    assert request_of("run")["no_t5"] and request_of("run")["max_sequence_length"] == 6
    assert run(*line, "--no-t5", "--max-sequence-length", "6", "-o", "run", "--resume") == 0
    for other, name in ((["--no-t5"], "max_sequence_length"), (["--max-sequence-length", "6"], "no_t5")):
        capfd.readouterr()
        assert run(*line, *other, "-o", "run", "--resume") == 2
        assert f"cannot continue 'run': it was made with {name} = " in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [*SEGMENT, "--set", "streams=t5"],
        [*SEGMENT, "--method", "iseg", "--set", "streams=t5"],
        [*EVALUATE, "--set", "tokenrank.streams=t5"],
    ],
)
def test_words_are_not_read_in_an_encoder_that_is_left_out(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--no-t5", "-o", "run") == 2
    message = "error: streams=t5 reads class names in T5, which --no-t5 leaves out; take streams=clip, or drop one\n"
    assert capsys.readouterr().err == message
    assert not Path("run").exists()
