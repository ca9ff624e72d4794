"""The analyses of segmentation: the choice of settings end to end on a tiny model, presence by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmdit_probe.results.selection import LayerSelection
from tests.scripts import script


def test_choice_writes_what_evaluate_takes(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = script("analyses/segmentation_choice.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choice, "SIGMAS", (0.3,))
    monkeypatch.setattr(choice, "SOFTMAX", ("joint",))
    monkeypatch.setattr(choice, "REFINE", ("none", "centre"))
    monkeypatch.setattr(choice, "OPTIONS", {"diffcut": ({"tau": 0.5}, {"tau": 0.7}), "tokenrank": ({"bounces": 1},)})
    out = tmp_path / "out"
    line = ["choice", "--model", str(tiny_directory), "-n", "1", "--report-limit", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", line)
    choice.main()
    settings = json.loads((out / "settings.json").read_text())
    selection = LayerSelection.read(out / settings["selection"])
    assert settings["chosen_on"] == "scenes:train" and settings["weight_hash"] == selection.weight_hash
    assert set(settings["options"]) == {"seg4diff", "diffcut", "tokenrank"} and settings["refine"] in ("none", "centre")
    assert "heads" not in settings["options"]["seg4diff"] and sum(selection.weights) == pytest.approx(1.0)
    gains = pd.read_csv(out / "gains.csv")
    assert (gains["n"] == 2).all() and np.allclose(gains["miou_after"] - gains["miou_before"], gains["gain"], atol=1e-4)
    assert (gains["low"] <= gains["high"]).all() and (out / "gains.md").read_text().count("|") > 50


def test_area_under_the_curve_by_hand() -> None:
    presence = script("analyses/presence.py")
    there = np.array([[True, False], [False, True]])
    assert presence.area(np.array([[2.0, 1.0], [0.0, 3.0]]), there) == 1.0
    assert presence.area(np.array([[1.0, 1.0], [1.0, 1.0]]), there) == 0.5
    assert presence.area(np.array([[0.0, 1.0], [2.0, 3.0]]), there) == 0.5
    flat, peaked = presence.statistics_of(np.stack([np.ones((2, 2)), np.array([[4.0, 0.0], [0.0, 0.0]])]))[
        "peak over mean"
    ]
    assert flat == 1.0 and peaked == 4.0
