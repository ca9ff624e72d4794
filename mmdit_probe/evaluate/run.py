"""The evaluation as a run folder: counts per image on disk, league table and figures from them.

    evaluate(plan, captures, folder, shard)         # resumes where a killed run stopped

An image is counted when its file is complete, and never twice.
"""

from __future__ import annotations

from collections.abc import Callable

from mmdit_probe.evaluate.captures import Captures
from mmdit_probe.evaluate.plan import Plan
from mmdit_probe.evaluate.shards import Shard
from mmdit_probe.results import RunFolder, TableWriter

TABLE = "counts"


def evaluate(
    plan: Plan,
    captures: Captures,
    folder: RunFolder,
    shard: Shard | None = None,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write `counts.parquet` of a plan into a run folder.

    Args:
        plan: what to do. captures: where forwards come from. folder: an open run folder.
        shard: this process among several. advance: called after every image.
    """
    part = shard or Shard()
    writer = TableWriter(folder.path, TABLE)
    part.barrier()  # every writer has cleaned up before any item is begun
    count = len(plan.dataset.samples)
    for index in part.mine(count):
        if index in writer.done:
            continue
        with writer.item(index) as item:
            item.write(plan.rows(captures, index))
        advance()
    part.collect(writer.path, list(part.mine(count)))
    if part.first:
        writer.finish()
    part.barrier()
