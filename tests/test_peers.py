"""The comparison with other tools: ours agree with float64 and change nothing; a tool that is missing is left out."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import script


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return script("benchmarks/peers.py")


@pytest.mark.parametrize("blocks", ["sd3-medium", "flux"])
def test_ours_are_compared_with_float64_and_the_missing_are_named(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: str
) -> None:
    clones = {"sd3-medium": ("Seg4Diff", "ConceptAttention"), "flux": ("AttLine",)}[blocks]
    monkeypatch.setattr(peers, "OF_BLOCKS", {blocks: (*peers.OURS, *clones)})
    subject = peers.Subject(blocks, 16, "float32", "cpu", tmp_path, heads=2)
    rows, absent = peers.measure(subject, "cpu", 1, "cpu")
    assert tuple(row["way"] for row in rows) == peers.OURS and tuple(absent) == clones
    assert all("Error: " in why for why in absent.values())
    of = {row["way"]: row for row in rows}
    assert all(of[way]["unchanged"] for way in peers.OURS if way != "explicit") and of["explicit"]["difference"] < 1e-5
    assert max(of[way]["error"] for way in ("masses", "maps", "explicit")) < 5e-6
    cell = {"blocks": blocks, "tokens": 16, "heads": 2, "dtype": "float32", "ways": rows, "absent": absent}
    text = peers.markdown({"machine": "m", "torch": "t", "threads": 1, "clock": "cpu", "rows": [cell]})
    assert f"## {blocks}, 16 image tokens, float32, 2 heads" in text and f"* left out: {clones[0]} (" in text


def test_a_wrong_map_is_noticed(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdit_probe.attention import exact

    subject = peers.Subject("flux", 16, "float32", "cpu", tmp_path, heads=1)
    right = exact.attend
    monkeypatch.setattr(exact, "attend", lambda call: (right(call)[0], right(call)[1] + 1e-2))
    assert peers.examined(subject, "maps")["error"] == pytest.approx(1 - 0.99005, rel=1e-2)
