"""Batches through three stages: in order, whichever thread does them; beside each other where that saves time."""

from __future__ import annotations

import threading

import pytest

from mmdit_probe.evaluate.overlap import overlapped


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_in_order_and_forwards_stay_in_the_callers_thread(workers: int) -> None:
    batches, threads, sizes = [], set(), iter([1, 3, 3, 3, 3])

    def run(batch: list[int]) -> int:
        threads.add(threading.get_ident())
        batches.append(list(batch))
        return sum(batch)

    found = list(overlapped(range(8), lambda item: item * 10, run, lambda one, total: (one, total), lambda: next(sizes),
                            workers))  # fmt: skip
    assert batches == [[0], [10, 20, 30], [40, 50, 60], [70]] and threads == {threading.get_ident()}
    assert found == [(0, 0), (10, 60), (20, 60), (30, 60), (40, 150), (50, 150), (60, 150), (70, 70)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_before_an_item_that_cannot_be_opened_are_handed_on(workers: int) -> None:
    def open_one(item: int) -> int:
        if item == 5:
            raise OSError("no picture 5")
        return item

    found, rows = [], overlapped(range(9), open_one, sum, lambda one, _: one, lambda: 2, workers)
    with pytest.raises(OSError, match="picture 5"):
        found += [next(rows) for _ in range(2)]
        for one in rows:
            found.append(one)
    assert found == [0, 1, 2, 3][: 4 if not workers else 2] or found == [0, 1, 2, 3]


def test_the_next_batch_is_opened_and_the_last_one_finished_beside_a_forward() -> None:
    """A forward that waits for both would never go on if they came before or after it."""
    opened, finished = threading.Event(), threading.Event()

    def run(batch: list[int]) -> None:
        if batch == [0]:
            assert opened.wait(20)
        if batch == [1]:
            assert finished.wait(20)

    def open_one(item: int) -> int:
        if item == 1:
            opened.set()
        return item

    def finish(item: int, _: None) -> int:
        if item == 0:
            finished.set()
        return item

    assert list(overlapped(range(2), open_one, run, finish, lambda: 1, workers=1)) == [0, 1]
