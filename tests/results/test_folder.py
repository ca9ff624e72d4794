"""Run folders: complete provenance, the right run resumed, nothing overwritten."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmdit_probe.errors import RunError, UserError, brief
from mmdit_probe.experiments import ValueNorms
from mmdit_probe.experiments.result import Result
from mmdit_probe.results import RunFolder, latest_run, peak_memory, provenance
from mmdit_probe.results.folder import check_out, read_record, short_hash
from mmdit_probe.results.provenance import is_running, this_process

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


def test_a_run_that_was_asked_for_in_other_words_is_the_same(tmp_path):
    """A default that is stated, and a whole number for a float; beside a folder whose record no one can read."""

    def said(request):
        return {"layers": "all", **request}

    first = RunFolder.open("demo", {"seed": 0, "sigma": 1.0}, root=tmp_path)
    (tmp_path / "demo" / "other").mkdir()
    (tmp_path / "demo" / "other" / "run.json").write_text("{}", encoding="utf-8")
    again = {"seed": 0, "sigma": 1, "layers": "all"}
    assert latest_run("demo", again, root=tmp_path) is None
    assert latest_run("demo", again, root=tmp_path, said=said) == first.path
    assert RunFolder.open("demo", again, out=first.path, resume=True, said=said).path == first.path
    with pytest.raises(UserError, match="made with layers = null"):
        RunFolder.open("demo", again, out=first.path, resume=True)
    assert latest_run("demo", again | {"layers": "1"}, root=tmp_path, said=said) is None


def test_out_is_never_overwritten(tmp_path):
    out = tmp_path / "run"
    RunFolder.open("demo", REQUEST, out=out)
    with pytest.raises(UserError, match="holds a run already; continue it with --resume"):
        RunFolder.open("demo", REQUEST, out=out, resume=False)
    with pytest.raises(UserError, match="holds a run already; choose another --out"):  # no command to be continued
        RunFolder.open("demo", REQUEST, out=out)
    with pytest.raises(UserError, match="holds a run of demo, not of value-norms"):
        ValueNorms().run(None, out=out, resume=True)  # before there is a model
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


def status(path):
    return json.loads((path / "run.json").read_text())["status"]


def test_the_end_of_the_block_is_the_status(tmp_path):
    with RunFolder.open("demo", REQUEST, root=tmp_path) as folder:
        assert status(folder.path) == "running"
    assert status(folder.path) == "finished"
    for error, expected, reason in (
        (KeyboardInterrupt(), "interrupted", None),
        (RunError("the disk is full"), "failed", "the disk is full"),
        (ValueError("a bug"), "failed", "ValueError: a bug"),
    ):
        with pytest.raises(type(error)), RunFolder.open("demo", REQUEST, root=tmp_path) as folder:
            raise error
        data = json.loads((folder.path / "run.json").read_text())
        assert (data["status"], data.get("reason")) == (expected, reason)
        again = RunFolder.open("demo", REQUEST, root=tmp_path, resume=True)
        assert again.path == folder.path and "reason" not in again.data
        again.finish()


def test_ended_in_the_block_or_before_stays_as_it_is(tmp_path):
    with RunFolder.open("demo", REQUEST, root=tmp_path) as folder:
        folder.fail("no picture could be read")
    assert status(folder.path) == "failed"
    with RunFolder.open("demo", REQUEST, root=tmp_path, resume=True) as folder:
        folder.finish(n=3)
    with pytest.raises(ValueError), RunFolder.open("demo", REQUEST, root=tmp_path, resume=True):  # while drawing, say
        raise ValueError
    assert status(folder.path) == "finished" and read_record(folder.path)["n"] == 3


def test_a_killed_run_reads_as_interrupted(tmp_path):
    script = (
        "import sys, time; from mmdit_probe.results import RunFolder;"
        "RunFolder.open('demo', {}, out=sys.argv[1]); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "run"], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"open\n"
        assert read_record(tmp_path / "run")["status"] == "running"
        with pytest.raises(UserError, match=f"process {writer.pid} on .* is writing .*; wait for it"):
            RunFolder.open("demo", {}, out=tmp_path / "run", resume=True)
        writer.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    assert read_record(tmp_path / "run")["status"] == "interrupted"
    assert status(tmp_path / "run") == "running"  # what the killed process left
    (tmp_path / "run" / "images").mkdir()
    for name in ("run.json", "images/000.png"):
        (tmp_path / "run" / f"{name}.12345678.partial").write_text("{")
    with RunFolder.open("demo", {}, out=tmp_path / "run", resume=True):
        pass
    assert [path.name for path in (tmp_path / "run").rglob("*.*")] == ["run.json"]


HOLD = (
    "import sys; from mmdit_probe.results import RunFolder;"
    "folder = RunFolder.open('demo', {}, out=sys.argv[1]); print('open', flush=True); sys.stdin.read()"
)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_one_process_writes_a_folder_whatever_its_record_says(tmp_path):
    """The clock was set, or two began at once: both wrote the run's tables and record."""
    run, streams = tmp_path / "run", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, run], **streams) as writer:
        assert writer.stdout.readline() == b"open\n"
        record = json.loads((run / "run.json").read_text())
        record["process"]["started"] -= 3600
        for left in (record, None):
            (run / "run.json").unlink()
            if left is not None:
                (run / "run.json").write_text(json.dumps(left))
            with pytest.raises(UserError, match=r"another process is writing '.*run'; wait for it"):
                RunFolder.open("demo", {}, out=run, resume=True)
        writer.kill()
    folder = RunFolder.open("demo", {}, out=run, resume=True)
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder.open("demo", {}, out=run, resume=False)
    folder.finish()
    assert RunFolder.open("demo", {}, out=run, resume=True).complete
    with subprocess.Popen([sys.executable, "-c", HOLD.replace("])", "], resume=True)"), run], **streams) as another:
        assert another.stdout.readline() == b"open\n"  # this process, which lives, has let it go
        another.stdin.close()


def test_a_run_that_was_killed_on_another_machine_can_be_continued(tmp_path):
    """Nobody can tell whether its process is there: the message says how to."""
    run = RunFolder.open("demo", {}, out=tmp_path / "run")
    run.finish()
    run.record(status="running", process={"pid": 7, "host": "elsewhere", "started": 0.0})
    with pytest.raises(UserError, match=r'7 on elsewhere .*if it is gone: set "status" to "interrupted" in run.json'):
        RunFolder.open("demo", {}, out=run.path, resume=True)
    run.record(status="interrupted")
    RunFolder.open("demo", {}, out=run.path, resume=True).finish()


def test_a_process_is_told_from_a_later_one_of_the_same_number():
    process = this_process()
    assert is_running(process)
    assert not is_running(process | {"started": process["started"] - 100})
    assert is_running(process | {"host": "elsewhere", "pid": 2**22})


def test_killed_before_the_first_record(tmp_path):
    (tmp_path / "run.json.12345678.partial").write_text("{")
    RunFolder.open("demo", REQUEST, out=tmp_path).finish()


def test_a_full_disk_at_the_first_record_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"writing '.*run\.json' failed: No space left on device"):
        RunFolder.open("demo", REQUEST, out=tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    monkeypatch.undo()
    with (
        pytest.raises(RunError, match="measured nothing"),
        RunFolder.open("demo", REQUEST, out=tmp_path / "run") as run,
    ):
        monkeypatch.setattr(os, "fsync", full)  # also full when the failure is recorded: the first error is shown
        raise RunError("measured nothing")
    monkeypatch.undo()
    assert RunFolder.open("demo", REQUEST, out=tmp_path / "run", resume=True).path == run.path


def test_the_latest_run_is_taken(tmp_path):
    paths = []
    for created in ("2026-03-01T12:00:00+01:00", "2026-03-01T13:30:00+02:00", "2026-03-01T11:45:00+01:00"):
        folder = RunFolder.open("demo", REQUEST, root=tmp_path)
        folder.record(created=created)
        paths.append(folder.path)
    assert latest_run("demo", REQUEST, root=tmp_path) == paths[1]  # 11:30 UTC; the others 11:00 and 10:45
    assert RunFolder.open("demo", REQUEST, root=tmp_path, resume=True).path == paths[1]
    newest = RunFolder.open("demo", REQUEST, root=tmp_path)
    assert latest_run("demo", REQUEST, root=tmp_path) == newest.path


def test_the_hash_is_of_every_option():
    request = {"a": 1, "b": {"c": [1, 2]}, "inputs": {"x.png": "12"}}
    others = [
        {**request, "a": 2},
        {**request, "b": {"c": [2, 1]}},
        {**request, "inputs": {"x.png": "13"}},
        {**request, "d": False},
        {name: value for name, value in request.items() if name != "a"},
    ]
    assert len({short_hash(one) for one in (request, *others)}) == 6


def test_other_inputs_are_another_run(tmp_path):
    before, now = {"a.png": "3fc9", "b.png": "aa01"}, {"a.png": "3fc9", "b.png": "77e0", "c.png": "3fc9"}
    with RunFolder.open("demo", {"inputs": before}, out=tmp_path / "run") as first:
        pass
    with pytest.raises(UserError, match=r'with inputs: b.png = "aa01", this request has "77e0" \(and 1 more differ\)'):
        RunFolder.open("demo", {"inputs": now}, out=tmp_path / "run", resume=True)
    assert RunFolder.open("demo", {"inputs": now}, root=tmp_path, resume=True).path != first.path


def test_another_command_is_refused(tmp_path):
    RunFolder.open("demo", REQUEST, out=tmp_path / "run")
    with pytest.raises(UserError, match="holds a run of demo, not of other"):
        RunFolder.open("other", REQUEST, out=tmp_path / "run", resume=True)


def test_versions_of_the_record(tmp_path):
    old = {"command": "demo", "request": REQUEST, "created": "2026-01-01T00:00:00+00:00", "status": "running"}
    (tmp_path / "run.json").write_text(json.dumps(old))  # version 1 named no process
    assert read_record(tmp_path)["status"] == "interrupted"
    RunFolder.open("demo", REQUEST, out=tmp_path, resume=True).finish()
    assert read_record(tmp_path)["version"] == 1  # its tables stay as they were
    assert RunFolder.open("demo", REQUEST, out=tmp_path / "new").data["version"] == 3
    (tmp_path / "run.json").write_text(json.dumps(old | {"version": 4}))
    with pytest.raises(UserError, match="run record of version 4; this mmdit-probe reads up to 3: update it"):
        read_record(tmp_path)


SOUND: dict[str, Any] = {"command": "demo", "request": {}, "status": "failed", "created": "2026-01-01T00:00:00"}


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("command", None, "no 'command'"), ("command", 5, "its 'command' is 5"), ("request", [1], "its 'request' is"),
        ("status", "done", "its 'status' is \"done\""), ("status", [], "its 'status'"), ("created", "no", "'created'"),
        ("created", 5, "its 'created' is 5"), ("wall_seconds", "x", "its 'wall_seconds'"),
        ("process", "x", "its 'process'"), ("process", {"pid": "1", "host": "a", "started": 0}, "its 'process'"),
        ("process", {"pid": 1, "host": "a"}, "its 'process'"),
        ("model", "x", "its 'model' is"), ("model", {"id": 5}, "its 'model'"),
    ],
)  # fmt: skip
def test_an_entry_that_no_run_writes_is_named(tmp_path: Path, entry: str, value: Any, said: str) -> None:
    broken = {name: of for name, of in SOUND.items() if name != entry} | ({} if value is None else {entry: value})
    (tmp_path / "run.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match="is not a run record: it") as refused:
        RunFolder.open("demo", {}, out=tmp_path, resume=True)
    assert said in str(refused.value)


@pytest.mark.parametrize("process", [{"pid": -1}, {"pid": 2**70}, {"pid": os.getpid()}])
def test_a_process_that_cannot_be_is_gone(tmp_path: Path, process: dict[str, int]) -> None:
    here = process | {"host": platform.node(), "started": 0}
    (tmp_path / "run.json").write_text(json.dumps(SOUND | {"status": "running", "process": here}))
    assert read_record(tmp_path)["status"] == "interrupted"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"request": 1}', '{"request": {}, "version": 0}', "[" * 100_000])
def test_broken_records(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="is not a run record"):
        read_record(tmp_path)


def test_imports_where_unix_modules_are_missing():
    script = (
        "import sys, psutil; sys.modules |= dict.fromkeys(['resource', 'fcntl', 'pwd', 'grp'])\n"
        "import mmdit_probe.results.folder, mmdit_probe.results.processes\n"
        "assert not {'torch', 'pandas', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_folder_of_someone_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no run\.json"):
        RunFolder.open("demo", REQUEST, out=tmp_path)


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; choose another folder with --out"):
        RunFolder.open("demo", REQUEST, out=tmp_path / "file")
    with pytest.raises(UserError, match=r"file' is no place for it, it is a file; choose another folder"):
        check_out(tmp_path / "file" / "new" / "run")


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    """A run that is there is only shown."""
    RunFolder.open("demo", REQUEST, out=tmp_path / "mine").finish()

    def refused(dir: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(UserError, match="no place for it, nothing may be written there"):
        check_out(tmp_path / "new" / "run")
    assert check_out(tmp_path / "mine", resume=True)["status"] == "finished"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'runs': .* is no place for it, nothing may be written there"):
        check_out("auto")
    assert check_out("auto", resume=True) is None


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a system without /proc")
def test_a_place_whose_permissions_say_more_than_it_takes():
    """An administrator may write into `/proc`, by its permissions: it was refused after the model was loaded."""
    with pytest.raises(UserError, match="'/proc' is no place for it, nothing may be written there"):
        check_out("/proc/run")


def test_looking_whether_a_run_can_be_written_leaves_nothing(tmp_path):
    check_out(tmp_path / "new" / "run")
    check_out(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_called_like_a_picture(tmp_path):
    for name in ("maps.png", "run.JSON", "table.csv"):
        with pytest.raises(UserError, match=r"called like a file.*" + name.partition(".")[0]):
            RunFolder.open("demo", REQUEST, out=tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert RunFolder.open("demo", REQUEST, out=tmp_path / "sigma_0.5").path.is_dir()


def test_peak_memory_is_this_process_and_not_its_parent():
    held = bytearray(200 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    script = "from mmdit_probe.results import peak_memory; print(peak_memory()['resident'])"
    child = int(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True).stdout)
    assert child < len(held) < peak_memory()["resident"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such call")
@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("freebsd", 1024)])
def test_peak_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch, system: str, unit: int) -> None:
    """getrusage(2): kibibytes, but bytes on macOS."""
    import resource

    monkeypatch.setattr(provenance, "Path", lambda place: Path("/nowhere"))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7))
    assert peak_memory()["resident"] == 7 * unit


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*too long; choose another folder$"):
        RunFolder.open("demo", REQUEST, out=tmp_path / ("x" * 300))


@pytest.mark.parametrize("wrong", [3, 0.5, ["run"], ["run"] * 99])
def test_what_is_no_path_is_refused_by_its_value(wrong: Any) -> None:
    for use in (read_record, check_out, Result.read):
        with pytest.raises(UserError, match=f"^{re.escape(brief(wrong))} is no folder; expected its path"):
            use(wrong)
