"""Items in batches, through three stages that may overlap: open one, run several, finish one.

    list(overlapped("abc", str.upper, "-".join, lambda one, run: one + run, size=lambda: 2, workers=0))
    # ["AA-B", "BA-B", "CC"]

The middle stage stays in the caller's thread. With workers, the items of the next batch are opened and those of the
last one finished meanwhile: of use where the middle stage waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Opened = TypeVar("Opened")
Ran = TypeVar("Ran")
Done = TypeVar("Done")


def overlapped(
    items: Iterable[Item],
    open_one: Callable[[Item], Opened],
    run: Callable[[Sequence[Opened]], Ran],
    finish: Callable[[Opened, Ran], Done],
    size: Callable[[], int],
    workers: int,
) -> Iterator[Done]:
    """What `finish` gives of every item, in order.

    Args:
        size: of the next batch. workers: threads for the other stages; 0 does everything in turn.
    """
    left = iter(items)
    if not workers:
        while batch := [open_one(item) for item in islice(left, size())]:
            ran = run(batch)
            yield from (finish(one, ran) for one in batch)
        return
    with ThreadPoolExecutor(workers) as pool:
        finishing: list[Future[Done]] = []
        opening = [pool.submit(open_one, item) for item in islice(left, size())]
        while opening:
            batch = [future.result() for future in opening]
            opening = [pool.submit(open_one, item) for item in islice(left, size())]
            ran = run(batch)
            yield from (future.result() for future in finishing)
            finishing = [pool.submit(finish, one, ran) for one in batch]
        yield from (future.result() for future in finishing)
