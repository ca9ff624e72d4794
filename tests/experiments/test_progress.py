"""What a run shows on its way: the time left."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from mmdit_probe.experiments.progress import Progress


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
