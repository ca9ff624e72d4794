"""The selection file: round trip, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdit_probe.errors import UserError
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results.selection import LayerSelection, load_selection
from tests import tiny


def test_round_trip_from_file_and_folder(tmp_path: Path) -> None:
    model = MMDiT(tiny.pipeline())
    selection = LayerSelection(
        model.name, model.weight_hash, (2, 0), (0.75, 0.25), {2: (1,)}, ({"evidence": "x", "layer": 2, "value": 1.0},),
        {"rule": "ranks"},
    )  # fmt: skip
    path = selection.save(tmp_path / "selection.json")
    assert load_selection(path) == load_selection(tmp_path, model) == selection


def test_equal_weights_by_default() -> None:
    assert LayerSelection("m", "h", (3, 1)).weights == (0.5, 0.5)


@pytest.mark.parametrize(
    "bad",
    [
        {"layers": ()},
        {"layers": (1, 1)},
        {"layers": (1, 2), "weights": (0.5, 0.6)},
        {"layers": (1,), "weights": (0.5, 0.5)},
        {"layers": (-1,)},
        {"layers": (1.5,)},
        {"layers": (True,)},
        {"layers": (1, 2), "weights": (1.0, 0.0)},
        {"layers": (1, 2), "weights": (float("nan"), 0.5)},
        {"layers": (1, 2), "heads": {3: (0,)}},
        {"layers": (1, 2), "heads": {1: ()}},
        {"layers": (1, 2), "heads": {1: (0, 0)}},
        {"layers": (1, 2), "heads": {1: (-1,)}},
    ],
)
def test_what_is_no_selection(bad: dict) -> None:
    with pytest.raises(UserError, match="selection"):
        LayerSelection("m", "h", **bad)


def test_other_weights_and_missing_layers_are_refused(tmp_path: Path) -> None:
    model = MMDiT(tiny.pipeline())
    path = LayerSelection("other", "0" * 64, (2,)).save(tmp_path / "s.json")
    with pytest.raises(UserError, match="run select-layers on it"):
        load_selection(path, model)
    assert load_selection(path, model, any_weights=True).layers == (2,)
    for selection in (
        LayerSelection("m", model.weight_hash, (9,)),
        LayerSelection("m", model.weight_hash, (1,), heads={1: (5,)}),
    ):
        with pytest.raises(UserError, match="3 layers of 2 heads"):
            load_selection(selection.save(tmp_path / "t.json"), model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"layers": [1]}',
        '{"model": "m", "weight_hash": "h", "layers": "x"}',
        '{"model": "m", "weight_hash": "h", "layers": [1.7]}',
        '{"model": "m", "weight_hash": "h", "layers": [1], "heads": {"1": ["0"]}}',
        '{"model": "m", "weight_hash": "h", "layers": [1], "weights": [NaN]}',
        '{"model": "m", "weight_hash": "h", "layers": [1], "weights": [1' + "0" * 400 + "]}",
        '{"model": "m", "weight_hash": "h", "layers": [1], "heads": {"Infinity": [1]}}',
        '{"model": "m", "weight_hash": "h", "layers": [1], "how": [1]}',
        '{"model": "m", "weight_hash": "h", "layers": [1], "evidence": [1]}',
        '{"version": "two", "model": "m", "weight_hash": "h", "layers": [1]}',
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(UserError, match="layer selection"):
        load_selection(path)
    with pytest.raises(UserError, match="select-layers"):
        load_selection(tmp_path / "none.json")


def test_versions(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"model": "m", "weight_hash": "h", "layers": [1]}')  # before there were versions
    assert load_selection(path).layers == (1,)
    path.write_text('{"version": 2, "model": "m", "weight_hash": "h", "layers": [1]}')
    with pytest.raises(UserError, match=r"version 2; this mmdit-probe reads up to 1: update it"):
        load_selection(path)
