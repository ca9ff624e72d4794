"""What a run shows on its way: the time left."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from mmdit_probe.experiments.progress import Progress
from mmdit_probe.experiments.store import MemoryStore


# Each longer than the half minute that rich looks back by itself.
@pytest.mark.parametrize(("spent", "left"), [([100.0], "0:06:40"), ([100.0, 200.0], "0:07:30")])
def test_the_time_left_is_known_after_one_item_however_long_it_takes(spent: list[float], left: str) -> None:
    clock, progress = [0.0], Progress()
    written = StringIO()
    progress.console = Console(file=written, force_terminal=True, width=80, get_time=lambda: clock[0])
    with progress.bar("prompts", total=5) as advance:
        for seconds in spent:
            clock[0] += seconds
            advance()
    assert f"{len(spent)}/5" in written.getvalue() and left in written.getvalue()


def test_parts_of_an_item_are_told_and_add_up_to_one() -> None:
    told: list[float] = []
    store = MemoryStore("any", {}, {})
    for parts in (3, 0):
        with store.task(0, told.append) as record:
            for _ in range(parts):
                record.advance(0.333)
    assert told[:3] == [0.333] * 3 and told[3:] == [pytest.approx(0.001), 1]
    progress, written = Progress(), StringIO()
    progress.console = Console(file=written, force_terminal=True, width=80)
    with progress.bar("prompts", total=5) as advance:
        for part in told:
            advance(part)
    assert "2/5" in written.getvalue()
