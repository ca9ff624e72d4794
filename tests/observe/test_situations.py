"""Every situation of the table is exact, labelled rightly, or refused by name."""

from __future__ import annotations

import pytest

from tests.observe.situations import SITUATIONS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    SITUATIONS[name].check()
