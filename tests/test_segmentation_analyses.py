"""The analyses of segmentation: the choice of settings end to end on a tiny model, presence by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mmdit_probe.errors import UserError
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


def test_presence_is_tested_against_random_weights_paired_by_picture() -> None:
    """Areas and their differences by ranks (Mann and Whitney's U) with every picture left out once."""
    presence, rng = script("analyses/presence.py"), np.random.default_rng(0)
    there = rng.random((12, 3)) < 0.5
    of = {"random weights: map's mean": rng.normal(size=(12, 3))}
    of["trained: map's mean"] = of["random weights: map's mean"] + there
    of["tagger: mine"] = there.astype(float)
    rows = [
        {"item": item, "what": what, "class": k, "value": values[item, k], "there": there[item, k]}
        for what, values in of.items() for item in range(12) for k in range(3)
    ]  # fmt: skip
    table = presence.Presence().summarise(SimpleNamespace(table=pd.DataFrame(rows))).set_index("what")

    def auc(values: np.ndarray, left: list[int]) -> float:
        centred, known = (values - values.mean(0))[left], there[left]
        return float(stats.mannwhitneyu(centred[known], centred[~known]).statistic / (known.sum() * (~known).sum()))

    def over(left: list[int]) -> float:
        return auc(of["trained: map's mean"], left) - auc(of["random weights: map's mean"], left)

    whole = list(range(12))
    without = np.array([over([k for k in whole if k != gone]) for gone in whole])
    reach = stats.t.ppf(0.975, 11) * np.sqrt(11 * without.var())
    row = table.loc["trained: map's mean"]
    assert row["auc"] == pytest.approx(auc(of["trained: map's mean"], whole))
    found = row[["over_random", "over_random_low", "over_random_high"]].tolist()
    assert found == pytest.approx([over(whole), over(whole) - reach, min(1.0, over(whole) + reach)])
    assert row["verdict"] == ("above its control" if over(whole) > reach else "not above its control")
    assert table.loc["random weights: map's mean", "verdict"] == table.loc["tagger: mine", "verdict"] == ""


def test_presence_reads_no_layers_that_were_chosen_for_other_weights(tiny_model: Any, tmp_path: Path) -> None:
    presence = script("analyses/presence.py")
    LayerSelection("tiny", "other weights", (1,), (1.0,), {}).save(tmp_path / "selection.json")
    asked = presence.Presence(n=1, selection=str(tmp_path / "selection.json"))
    with pytest.raises(UserError, match="was made on tiny"):
        asked.prepare(tiny_model, asked.gather(True))
