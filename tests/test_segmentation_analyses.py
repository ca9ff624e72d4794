"""The analyses of segmentation: the choice of settings end to end on a tiny model, presence by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from mmdit_probe.results.selection import LayerSelection


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "analyses" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_choice_writes_what_evaluate_takes(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = script("segmentation_choice")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choice, "SIGMAS", (0.3,))
    monkeypatch.setattr(choice, "SOFTMAX", ("joint",))
    monkeypatch.setattr(choice, "REFINE", ("none", "centre"))
    monkeypatch.setattr(choice, "OPTIONS", {"diffcut": ({"tau": 0.5}, {"tau": 0.7}), "tokenrank": ({"bounces": 1},)})
    out = tmp_path / "out"
    line = ["choice", "--model", str(tiny_directory), "-n", "1", "--report-n", "2", "--out", str(out)]
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
    presence = script("presence")
    there = np.array([[True, False], [False, True]])
    assert presence.area(np.array([[2.0, 1.0], [0.0, 3.0]]), there) == 1.0
    assert presence.area(np.array([[1.0, 1.0], [1.0, 1.0]]), there) == 0.5
    assert presence.area(np.array([[0.0, 1.0], [2.0, 3.0]]), there) == 0.5
    flat, peaked = presence.statistics_of(np.stack([np.ones((2, 2)), np.array([[4.0, 0.0], [0.0, 0.0]])]))[
        "peak over mean"
    ]
    assert flat == 1.0 and peaked == 4.0
