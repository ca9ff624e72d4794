"""Several CPU processes under a launcher: what they share, and how the rest ends when one is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmdit_probe.errors import RunError, UserError
from mmdit_probe.results import processes

ROOT = Path(__file__).parents[2]

TALK = """
import json, sys
from pathlib import Path
from mmdit_probe.errors import UserError
from mmdit_probe.results import RunFolder, processes

out = Path(sys.argv[1])
rank, world = processes.rank(), processes.world()
with processes.joined(), processes.from_first(lambda: RunFolder.open("demo", {}, out=out / "run")) as folder:
    parts = processes.gather({index: rank for index in processes.share(range(5))})
    try:
        processes.from_first(lambda: (_ for _ in ()).throw(UserError("refused by process 0")))
    except UserError as error:
        refused = str(error)
    folder.record(rank=rank)
    processes.barrier()
    if rank == 1:
        folder.record(second=True)
    processes.barrier()
    second = '"second"' in (out / "run" / "run.json").read_text()
    (out / f"{rank}.txt").write_text(str(rank))
    written = []
    if rank == 0:  # as on a machine that does not see the other's disk
        exists, Path.exists = Path.exists, lambda path: path.name != "1.txt" and exists(path)
        processes.write_bytes = lambda path, data: written.append([path.name, data.decode()])
    processes.collect([out / f"{rank}.txt"])
    if rank == 0:
        Path.exists = exists
    processes.barrier()
(out / f"{rank}.json").write_text(json.dumps([world, parts, refused, second, str(folder.path), written]))
"""

LOSE = """
import os, signal, sys, time
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.results import processes

how = sys.argv[1]
try:
    with processes.joined():
        if processes.rank() == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if processes.rank() == 1:
            raise UserError("picture 7 cannot be read")
        if how == "raised":
            processes.gather(0)
        time.sleep(60)  # at work; the launcher tells it
except (UserError, RunError) as error:
    print(f"{processes.rank()}: {error}", flush=True)
    sys.exit(error.exit_code)
"""


def launch(tmp_path: Path, script: str, argument: Path | str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, tmp_path / "script.py", argument], env=environment, capture_output=True, text=True, timeout=120
    )


def test_two_processes_share_and_tell(tmp_path: Path) -> None:
    done = launch(tmp_path, TALK, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop(), second.pop()) == ([["1.txt", "1"]], [])
    assert first == second == [
        2, [{"0": 0, "2": 0, "4": 0}, {"1": 1, "3": 1}], "refused by process 0", False, str(tmp_path / "run"),
    ]  # fmt: skip
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["rank"]) == ("finished", 0)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows ends processes in another way")
@pytest.mark.parametrize("how", ["killed", "raised"])
def test_the_rest_ends_with_our_message(tmp_path: Path, how: str) -> None:
    done = launch(tmp_path, LOSE, how)
    assert done.returncode != 0
    lines = done.stdout.splitlines()
    lost = "0: process 1 of 2 ended; its own message says why; finished items are kept, continue with --resume"
    assert lost in lines
    assert ("1: picture 7 cannot be read" in lines) == (how == "raised")
    assert "Gloo" not in done.stderr and "Connection" not in done.stderr


def test_one_process_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys; from pathlib import Path; from mmdit_probe.results import processes as p\n"
        "with p.joined():\n"
        "    p.barrier(); p.collect([Path('a')])\n"
        "    assert p.gather(3) == [3] and p.from_first(lambda: 4) == 4 and p.share([1, 2]) == [1, 2]\n"
        "assert p.local_device('auto') == 'auto' and 'torch' not in sys.modules"
    )
    without = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, "-c", script], check=True, env=without | {"PYTHONPATH": str(ROOT)})


def test_shares_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        found.append(list(processes.share(range(10, 20))))
    assert found == [[10, 13, 16, 19], [11, 14, 17], [12, 15, 18]]


def test_the_lost_process_is_waited_for_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    looks: list[int] = []

    def running(process: dict[str, int]) -> bool:
        looks.append(process["pid"])
        return len(looks) < 4  # process 2 is gone at the second look

    monkeypatch.setattr(processes, "_members", [{"pid": number} for number in range(3)])
    monkeypatch.setattr(processes, "is_running", running)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RunError, match="process 2 of 3 ended; its own message says why"):
            processes._lost()
        monkeypatch.setattr(processes, "is_running", lambda process: True)
        with pytest.raises(RunError, match="one of 3 processes ended"):
            processes._lost(wait=0.0)
        with pytest.raises(RunError, match="was told to end"):
            processes._lost(told=True, wait=0.0)
        monkeypatch.setattr(processes, "_members", [{"pid": number} for number in range(2)])
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(RunError, match="process 1 of 2 ended"):  # there is no other that it could be
            processes._lost(wait=0.0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert looks == [1, 2, 1, 2]


def test_processes_talk_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AssertionError, match="inside `with processes"):
        processes.gather(0)


def test_a_block_leaves_the_signal_as_it_was() -> None:
    """But one that ended because another process was lost ignores the launcher's until the message is out."""
    mine = signal.getsignal(signal.SIGTERM)
    try:
        for inside, after in ((None, mine), (signal.SIG_IGN, signal.SIG_IGN)):
            with processes._ended_by_launcher():
                assert signal.getsignal(signal.SIGTERM) is not mine
                if inside is not None:
                    signal.signal(signal.SIGTERM, inside)
            assert signal.getsignal(signal.SIGTERM) is after
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_errors_of_the_first_process_are_raised() -> None:
    def refuse() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        processes.from_first(refuse)
