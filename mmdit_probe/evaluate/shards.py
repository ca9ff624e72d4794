"""One evaluation over several processes or machines: who does which image, and how the parts come together.

    accelerate launch --multi_gpu --num_processes 2 -m mmdit_probe evaluate --dataset scenes:val ...
    torchrun --nproc_per_node 2 -m mmdit_probe evaluate --dataset scenes:val ...

Both work on GPUs and on CPUs: `--multi_gpu` is accelerate's word for several processes of one launcher; without GPUs
they are CPU processes. `accelerate launch --cpu --num_processes 2` starts one process only (it leaves the rest to MPI);
`alone_under_launcher` recognises that.

Process r of w takes images r, r + w, ... All write into one run folder when they share a disk; otherwise their finished
items travel to process 0 at the end. Counts are integers, so the merged table is that of one process, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shard:
    """This process among all. `rank` 0 opens, merges and reports."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, count: int) -> range:
        """Indices of this process."""
        return range(self.rank, count, self.world)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def share(self, value: Any) -> Any:
        """Process 0's value, in every process."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def merged(self, values: dict[str, Any]) -> dict[str, Any]:
        """The entries of every process, in every process."""
        if self.world == 1:
            return values
        import torch.distributed as dist

        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, values)
        return {key: value for box in boxes for key, value in box.items()}

    def collect(self, parts: Path, mine: list[int]) -> None:
        """Bring items that process 0 does not see on its disk to it."""
        if self.world == 1:
            return
        import torch.distributed as dist

        self.barrier()
        here = self.share({path.name for path in parts.glob("*.parquet")} if self.first else None)
        files = {f"{index:06d}.parquet" for index in mine} - here
        sent = {name: (parts / name).read_bytes() for name in files if (parts / name).is_file()}
        gathered: list[Any] = [None] * self.world if self.first else []
        dist.gather_object(sent, gathered if self.first else None, dst=0)
        for received in gathered:
            for name, data in received.items():
                temporary = parts / f"{name}.received"
                temporary.write_bytes(data)
                os.replace(temporary, parts / name)


def local_device(device: str) -> str:
    """The device of this process: with several processes, "auto" and "cuda" are its own GPU of the machine."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or device not in ("auto", "cuda"):
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def alone_under_launcher() -> bool:
    """Whether accelerate was asked for several processes and started this one only."""
    asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    return asked and "WORLD_SIZE" not in os.environ


@contextmanager
def shard_of() -> Iterator[Shard]:
    """The shard that the launcher's environment names (RANK, WORLD_SIZE); a single process without one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Shard()
        return
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")  # counts and file names travel, never tensors of the model
    try:
        yield Shard(dist.get_rank(), world)
    finally:
        if started:
            dist.destroy_process_group()
