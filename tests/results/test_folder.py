"""Run folders: complete provenance, the right run resumed, nothing overwritten."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mmdit_probe.errors import UserError
from mmdit_probe.results import RunFolder, latest_run, peak_memory
from mmdit_probe.results.folder import read_record, short_hash

REQUEST = {"layers": "all", "seed": 0}


def test_record_says_how_it_was_made(tmp_path):
    folder = RunFolder.open("demo", REQUEST, root=tmp_path)
    folder.record(model={"id": "tiny"}, sigmas=[1.0, 0.5])
    folder.finish()
    data = json.loads((folder.path / "run.json").read_text())
    assert data["status"] == "finished"
    assert data["request"] == REQUEST
    assert data["environment"]["versions"]["torch"]
    assert data["peak_memory_bytes"]["resident"] > 1_000_000
    assert data["wall_seconds"] >= 0
    assert {"argv", "created", "model", "sigmas"} <= data.keys()


def test_name_is_time_and_hash_of_the_request(tmp_path):
    first, second = RunFolder.open("demo", REQUEST, root=tmp_path), RunFolder.open("demo", REQUEST, root=tmp_path)
    assert first.path.parent == tmp_path / "demo"
    assert short_hash(REQUEST) in first.path.name
    assert first.path != second.path
    assert short_hash({"seed": 0, "layers": "all"}) == short_hash(REQUEST)


def test_resume_finds_the_run_of_the_same_request(tmp_path):
    first = RunFolder.open("demo", REQUEST, root=tmp_path)
    RunFolder.open("demo", {"seed": 1}, root=tmp_path)
    again = RunFolder.open("demo", REQUEST, root=tmp_path, resume=True)
    assert (again.path, again.complete) == (first.path, False)
    again.finish()
    finished = RunFolder.open("demo", REQUEST, root=tmp_path, resume=True)
    assert (finished.path, finished.complete) == (first.path, True)
    assert RunFolder.open("demo", {"seed": 2}, root=tmp_path, resume=True).path != first.path
    assert latest_run("nothing", REQUEST, root=tmp_path) is None


def test_out_is_never_overwritten(tmp_path):
    out = tmp_path / "run"
    RunFolder.open("demo", REQUEST, out=out)
    with pytest.raises(UserError, match="holds a run already; continue it with --resume"):
        RunFolder.open("demo", REQUEST, out=out)
    assert not RunFolder.open("demo", REQUEST, out=out, resume=True).complete


def test_resume_of_another_request_names_the_difference(tmp_path):
    RunFolder.open("demo", REQUEST, out=tmp_path / "run")
    with pytest.raises(UserError, match="it was made with seed = 0, this request has 1"):
        RunFolder.open("demo", {"layers": "all", "seed": 1}, out=tmp_path / "run", resume=True)


def test_a_finished_run_stays_finished_when_resumed(tmp_path):
    RunFolder.open("demo", REQUEST, out=tmp_path / "run").finish()
    folder = RunFolder.open("demo", REQUEST, out=tmp_path / "run", resume=True)
    assert folder.complete
    assert read_record(folder.path)["status"] == "finished"


def test_folder_of_someone_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no run\.json"):
        RunFolder.open("demo", REQUEST, out=tmp_path)


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .* choose another folder with --out"):
        RunFolder.open("demo", REQUEST, out=tmp_path / "file")


def test_broken_record(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not a run record"):
        read_record(tmp_path)


def test_peak_memory_is_this_process_and_not_its_parent():
    held = bytearray(200 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    script = "from mmdit_probe.results import peak_memory; print(peak_memory()['resident'])"
    child = int(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True).stdout)
    assert child < len(held) < peak_memory()["resident"]
