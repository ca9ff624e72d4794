"""One run in several processes: who does which item, what they tell each other, and what happens when one ends.

    torchrun --nproc_per_node 2 -m mmdit_probe evaluate ...
    accelerate launch --multi_gpu --num_processes 2 -m mmdit_probe evaluate ...      # the same, also without GPUs

    with processes.joined():
        with processes.from_first(lambda: RunFolder.open(...)) as folder:
            for item in processes.share(range(len(items))): ...
            processes.collect(files)                                  # to process 0, where it does not see them
            counts = processes.gather(counts)

Process r of w takes items r, r + w, ... Small Python objects travel (over gloo, on any machine), never tensors of the
model. A process that is lost ends the others with one line that names it. Without a launcher (RANK, WORLD_SIZE) there
is one process, every function is trivial, and torch is not imported. Not here: training's gradients (accelerate).
"""

from __future__ import annotations

import atexit
import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mmdit_probe.errors import ProbeError, RunError, first_line
from mmdit_probe.results.atomic import write_bytes
from mmdit_probe.results.provenance import is_running, this_process

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)
"""How long a process waits for the others: one may have hours of work left. A lost one is noticed at once."""

KEPT = "finished items are kept, continue with --resume"

_group: Any = None
_store: Any = None
_blocks = 0
"""The group of `joined`, over gloo."""
_members: list[dict[str, Any]] = []
"""`this_process` of every rank."""


def rank() -> int:
    """Number of this process, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def world() -> int:
    """How many processes there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every `world()`-th, from number `rank()`. Order and number may be unequal by one."""
    return items[rank() :: world()]


def local_device(device: str) -> str:
    """The device of this process: with several processes, "auto" and "cuda" are its own GPU of the machine."""
    if world() == 1 or device not in ("auto", "cuda"):
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def alone_under_launcher() -> bool:
    """Whether accelerate was asked for several processes and started this one only (--cpu leaves the rest to MPI)."""
    asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    return asked and "WORLD_SIZE" not in os.environ


@contextmanager
def joined() -> Iterator[None]:
    """The block in which the processes of one launcher may talk. Nested blocks are one.

    Raises:
        RunError: the processes do not find each other; another process ended (also where the launcher saw it first and
            tells this one to end).
    """
    global _group, _members
    if world() == 1 or _group is not None:
        yield
        return
    import torch.distributed as dist

    started = not dist.is_initialized()
    try:
        if started:
            dist.init_process_group(
                "gloo", store=_fresh_store(), rank=rank(), world_size=world(), timeout=PATIENCE
            )  # fmt: skip
        _group = dist.group.WORLD if started else dist.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise RunError(f"the {world()} processes do not find each other: {first_line(error)}") from error
    try:
        with _ended_by_launcher():
            _members = gather(this_process())
            yield
    finally:
        _group, _members = None, []
        if started:
            dist.destroy_process_group()


def _fresh_store() -> Any:
    """The launcher's store, under a prefix of this block: addresses that an earlier block left in it are stale."""
    global _store, _blocks
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if _store is None:
        _store, _, _ = next(rendezvous("env://", rank(), world(), timeout=PATIENCE))
    _blocks += 1
    return dist.PrefixStore(f"mmdit-probe-{_blocks}", _store)


def end_in_time() -> None:
    """Sees to it that the default group, made by whoever (accelerate), ends before the interpreter does.

    Left to the interpreter's end, gloo's threads free tensors that Python has a hand in, and now and then abort the
    process after all its work is done (pytorch/pytorch#179291).
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        atexit.register(_end_group)


def _end_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    gather(None)


def gather(value: T) -> list[T]:
    """The values of all processes by rank, in every process; small Python objects."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    with _talking():
        dist.all_gather_object(values, value, group=_group)
    return values


def from_first(make: Callable[[], T]) -> T:
    """What process 0 makes (and pickles), in every process; where it refuses, its error in every process."""
    if world() == 1:
        return make()
    import torch.distributed as dist

    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = make()
        except ProbeError as error:
            told[1] = error
    with _talking():
        dist.broadcast_object_list(told, src=0, group=_group)
    if told[1] is not None:
        raise told[1]
    return told[0]  # type: ignore[no-any-return]


def collect(files: Iterable[Path]) -> None:
    """Bring files of this process to process 0, under the same paths, where it does not see them on its disk."""
    if world() == 1:
        return
    import torch.distributed as dist

    own = list(files)
    wanted = [path for paths in gather(own) for path in paths]
    missing = from_first(lambda: {path for path in wanted if not path.exists()})
    sent = {path: path.read_bytes() for path in own if path in missing}
    received: list[Any] = [None] * world()
    with _talking():
        dist.gather_object(sent, received if rank() == 0 else None, dst=0, group=_group)
    for path, data in ((path, data) for one in received if one for path, data in one.items()):
        write_bytes(path, data)


@contextmanager
def _talking() -> Iterator[None]:
    """The transport's complaint about a lost process as our own."""
    if _group is None:
        raise AssertionError("processes talk inside `with processes.joined()` only")
    try:
        yield
    except RuntimeError:  # torch's errors of all transports
        _lost()


@contextmanager
def _ended_by_launcher() -> Iterator[None]:
    """A launcher that lost a process sends SIGTERM to the rest: the same message, wherever this one was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _lost(told=True))
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, before)


def _lost(told: bool = False, wait: float = 10.0) -> NoReturn:
    """Ends this process because another one ended: names it, once its process is gone from this machine.

    Args:
        told: by SIGTERM, which somebody else than the launcher may have sent.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, on its way: the message comes first
    others = [number for number in range(len(_members)) if number != rank()]
    until = time.monotonic() + wait
    while not (gone := [number for number in others if not is_running(_members[number])]):
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    if not gone and not told:
        gone = others if len(others) == 1 else []  # on another machine, or slow to end
    if told and not gone:
        raise RunError(f"this process was told to end (SIGTERM); {KEPT}") from None
    who = f"process {gone[0]} of {world()}" if gone else f"one of {world()} processes"
    raise RunError(f"{who} ended; its own message says why; {KEPT}") from None
