"""`attention-budget` from the command line: what it writes, that it resumes, and what it says about bad requests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmdit_probe.cli.app import main
from mmdit_probe.results import read_table

QUICK = ["--num-steps", "2", "--guidance", "3", "--prompts", "a red ring"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def budget(tiny_directory: Path, capfd: pytest.CaptureFixture[str]):
    """Run the command on the tiny model: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["attention-budget", "--model", str(tiny_directory), *arguments])
        captured = capfd.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def refused(result: tuple[int, str, str]) -> str:
    """The message of a bad request: one line, exit code 2, and no run folder left behind."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    lines = [line for line in err.strip().splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert not Path("runs").exists()
    return lines[0]


def test_table_figure_summary_and_record(budget):
    code, out, _ = budget(*QUICK)
    assert code == 0
    (folder,) = Path("runs/attention-budget").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "attention_budget.parquet", "attention_budget_by_item.parquet", "attention_budget_by_layer.csv",
        "attention_budget.png", "attention_budget.pdf", "run.json",
    }  # fmt: skip
    assert str(folder) in out
    assert "to words" in out
    assert "n = 1 prompt, 2 of 2 steps, guidance 3.0." in " ".join(out.split())
    table = read_table(folder / "attention_budget.parquet")
    cell = ["step", "branch", "layer", "head", "query"]
    np.testing.assert_allclose(table.groupby(cell, observed=True).mass.sum(), 1, atol=1e-5)
    assert set(table.step) == {0, 1}
    assert set(table.branch) == {"cond", "uncond"}
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["request"]["items"] == [["a red ring", 0]]
    assert len(record["model"]["weight_hash"]) == 64
    np.testing.assert_allclose(record["sigmas"], sorted(set(table.sigma), reverse=True))


def test_json_is_one_document_and_quiet_prints_the_folder(budget):
    _, out, _ = budget(*QUICK, "--json", "--out", "one")
    document = json.loads(out)
    by_layer = pd.read_csv("one/attention_budget_by_layer.csv")
    assert [row["layer"] for row in document["layers"]] == list(by_layer.layer) == [0, 1, 2]
    np.testing.assert_allclose([row["I2T"] for row in document["layers"]], by_layer.I2T, atol=1e-6)
    assert document["layers"][0]["I2T_low"] is None  # no interval with one prompt
    assert budget(*QUICK, "--out", "two", "-q")[1] == "two\n"


def test_selected_layers_steps_and_heads_equal_the_same_cells_of_all(budget):
    assert budget(*QUICK, "--out", "all")[0] == 0
    assert budget(*QUICK, "--out", "some", "--layers", "0,2", "--steps", "last", "--heads", "1")[0] == 0
    every, some = (read_table(f"{name}/attention_budget.parquet") for name in ("all", "some"))
    assert (set(some.layer), set(some.step), set(some["head"])) == ({0, 2}, {1}, {1})
    same = every[every.layer.isin([0, 2]) & (every.step == 1) & (every["head"] == 1)].reset_index(drop=True)
    np.testing.assert_array_equal(same.mass, some.mass)


def test_a_prompt_has_the_same_numbers_alone_and_in_a_list(budget):
    Path("two.txt").write_text("a cat\n\n# a comment\na red ring\n", encoding="utf-8")
    assert budget(*QUICK[:4], "--prompts", "two.txt", "--out", "two")[0] == 0
    assert budget(*QUICK[:4], "--prompts", "a red ring", "--seed", "1", "--out", "one")[0] == 0
    two, one = read_table("two/attention_budget.parquet"), read_table("one/attention_budget.parquet")
    np.testing.assert_array_equal(two[two.item == 1].mass, one.mass)
    assert list(two[two.item == 1].seed.unique()) == [1]


def test_interrupted_run_resumes_without_repeating(budget, monkeypatch):
    from mmdit_probe.experiments import AttentionBudget

    Path("three.txt").write_text("a cat\na red ring\nblue grass\n", encoding="utf-8")
    request = [*QUICK[:4], "--prompts", "three.txt"]
    assert budget(*request, "--out", "whole")[0] == 0
    stock, measured = AttentionBudget.measure, []

    def interrupted(self, study, task, record):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(task[1].index)
        stock(self, study, task, record)

    monkeypatch.setattr(AttentionBudget, "measure", interrupted)
    code, _, err = budget(*request, "--out", "parts")
    assert code == 130
    assert "finished items are kept, continue with --resume" in err

    def counted(self, study, task, record):
        measured.append(task[1].index)
        stock(self, study, task, record)

    monkeypatch.setattr(AttentionBudget, "measure", counted)
    assert budget(*request, "--out", "parts", "--resume")[0] == 0
    assert measured == [0, 1, 2]
    pd.testing.assert_frame_equal(
        read_table("whole/attention_budget.parquet"), read_table("parts/attention_budget.parquet")
    )
    assert budget(*request, "--out", "parts", "--resume")[0] == 0  # finished: shown again
    assert measured == [0, 1, 2]


def test_pictures_with_sidecar_captions(budget):
    Path("photos").mkdir()
    for index, name in enumerate(("a.png", "b.jpg")):
        noise = np.random.default_rng(index).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(Path("photos") / name)
    Path("photos/a.txt").write_text("a cat\n", encoding="utf-8")
    code, out, _ = budget("--images", "photos", "--sigma", "0.25", "--out", "run")
    assert code == 0
    assert "n = 2 pictures, sigma 0.25." in out
    table = read_table("run/attention_budget.parquet")
    assert list(table.groupby("picture", observed=True).prompt.first()) == ["a cat", ""]
    assert set(table.sigma) == {0.25}
    assert set(table.branch) == {"cond"}


def test_no_t5_gives_null_slots_of_the_same_length(budget):
    assert budget(*QUICK, "--no-t5", "--out", "run")[0] == 0
    table = read_table("run/attention_budget.parquet")
    slots = table[(table.stream == "t5") & (table["query"] == "image")]
    assert set(slots.span) == {"null"}
    assert set(slots.n_key) == {10}
    assert pd.read_csv("run/attention_budget_by_layer.csv").I2T_null.min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "3"], "layer 3 does not exist: there are 3 layers, 0 to 2"),
        (["--layers", "nine"], "cannot read 'nine' as a layer; expected all, 9, 7-11 or 0,9"),
        (["--steps", "last-3"], "step 'last-3' does not exist: there are 2 steps"),
        (["--steps", "some"], "cannot read 'some' as a step"),
        (["--heads", "2"], "head 2 does not exist: there are 2 heads, 0 to 1"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--dtype", "float8"], "unknown dtype 'float8': did you mean 'float"),
        (["--model", "scenes-sd33"], "unknown model"),
        (["--model", "nobody/nothing"], "nobody/nothing is no directory here and the hub cannot be reached"),
        (["--prompts", "missing.txt"], "no prompts file 'missing.txt'"),
        (["--prompts", "scenes:vall"], "unknown prompt set 'scenes:vall': did you mean 'scenes:val'?"),
        (["--images", "nowhere"], "no folder 'nowhere'"),
        (["--images", "scenes:test1"], "unknown picture set 'scenes:test1': did you mean 'scenes:test'?"),
        (
            ["--images", "scenes:val", "--limit", "1", "--sigma", "1.5"],
            "--sigma is 1.5; expected a finite number",
        ),
        (["--limit", "0"], "--limit is 0; expected a whole number from 1 to 10000000"),
        (["--num-steps", "0"], "--num-steps is 0; expected a whole number from 1 to 1000"),
        (["--layer", "3"], "No such option: --layer"),
        (
            ["--prompts", "red " * 10 + "ring cat"],
            "prompt 'red red red red red red red red red r...' is longer than the text encoders: 'ring cat' fell off",
        ),
    ],
)
def test_bad_requests(budget, arguments, message):
    sampled = [] if "--images" in arguments else QUICK
    assert message in refused(budget(*sampled, *arguments))


def test_what_only_sampling_reads_is_refused_with_pictures(budget):
    for option in ("--num-steps", "--guidance"):
        message = f"{option} is of sampling; pictures are read at --sigma"
        assert message in refused(budget("--images", "scenes:val", option, "2"))


def test_unused_device_is_named(budget):
    import torch

    if not torch.cuda.is_available():
        said = refused(budget(*QUICK, "--device", "cuda"))
        assert "device 'cuda' is not available here" in said and "use device auto or cpu" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt; expected one per line"),
        (b"# only a comment\n\n", "holds no prompt"),
        (b"caf\xe9\n", "is not UTF-8 text"),
    ],
)
def test_bad_prompt_files(budget, content, message):
    Path("prompts.txt").write_bytes(content)
    assert message in refused(budget("--prompts", "prompts.txt"))


def test_bad_pictures(budget):
    Path("photos").mkdir()
    assert "no picture in 'photos'; expected files ending in .png" in refused(budget("--images", "photos"))
    Path("photos/broken.png").write_bytes(b"no picture at all")
    assert "broken.png' cannot be read as a picture (no picture format)" in refused(budget("--images", "photos"))


def test_model_that_is_no_pipeline(budget, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused(budget(*QUICK, "--model", str(tmp_path / "empty")))
    assert "is not a diffusers pipeline directory: it has no model_index.json" in message


def test_words_lost_by_one_encoder_are_a_remark(budget):
    code, _, err = budget(*QUICK[:4], "--prompts", "red red red red red red red red red red", "--out", "run")
    assert code == 0
    assert "fell off the end of t5; the other encoders read them" in " ".join(err.split())


def test_out_that_is_taken(budget):
    assert budget(*QUICK, "--out", "run")[0] == 0
    assert "holds a run already; continue it with --resume" in refused(budget(*QUICK, "--out", "run"))
    message = refused(budget(*QUICK, "--out", "run", "--resume", "--seed", "1"))
    assert 'it was made with items = [["a red ring", 0]], this request has [["a red ring", 1]]' in message
