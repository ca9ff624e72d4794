"""The layer-evidence analysis: a planted difference is found, an equal one is printed as such, and a run on the
embedded model writes what it says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmdit_probe.results.statistics import ABOVE, NOT_ABOVE

SCRIPT = Path(__file__).parents[2] / "analyses" / "layer_evidence.py"


def test_verdicts() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for control in ("none", "random"):
        for item in range(12):
            for layer in range(3):
                real = 1.0 if control == "none" and layer == 2 else 0.0
                for name, value in (("segmentation", real), ("value_gap", float(layer))):
                    value += 0.05 * rng.normal()
                    rows.append({"evidence": name, "control": control, "item": item, "layer": layer, "value": value})
    verdicts = runpy.run_path(str(SCRIPT))["verdicts"](pd.DataFrame(rows), (2,)).set_index("evidence")
    assert verdicts["layer"].tolist() == verdicts["best_layer"].tolist() == [2, 2]
    assert verdicts.loc["segmentation", "verdict"] == ABOVE
    assert verdicts.loc["value_gap", "verdict"] == NOT_ABOVE
    assert (verdicts["low"] <= verdicts["difference"]).all()


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["-n", "8", "--evidence", "word_mass,segmentation", "--out", "results", "--top", "2"]
    monkeypatch.setattr(sys, "argv", ["layer_evidence.py", *arguments])
    for _ in range(2):  # the second time from the run folder
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert len(list(Path("runs").glob("*/*/run.json"))) == 1
    text = Path("results/summary.md").read_text(encoding="utf-8")
    assert "Mean rank of the selected layers" in text and "| segmentation (test) | segmentation (val) |" in text
    names = {path.name for path in Path("results").iterdir()}
    assert names == {"evidence.png", "evidence.pdf", "summary.md"} | {
        f"{name}.csv" for name in ("by_item", "by_layer", "controls", "agreement", "stability")
    }
    shares = pd.read_csv("results/stability.csv").set_index("layer")["share"]
    assert shares.sum() == pytest.approx(2) and f"layer {shares.index[0]}: {shares.iloc[0]:.1%}" in text
    controls = pd.read_csv("results/controls.csv")
    uniform = controls[(controls["evidence"] == "word_mass") & (controls["control"] == "uniform")]
    assert uniform["control_value"].to_numpy() == pytest.approx(np.ones(len(uniform)), abs=1e-4)  # in its own units
    random = controls[(controls["evidence"] == "segmentation") & (controls["control"] == "random")]
    assert (random["verdict"] == ABOVE).any()


def test_the_committed_summary_tells_that_the_choice_was_level() -> None:
    folder = SCRIPT.parent / "results" / "layer_evidence"
    table = pd.read_csv(folder / "by_layer.csv")
    ranks = table[table["split"] == "val"].groupby("layer")["rank"].sum()
    best = ranks.index[ranks == ranks.min()].tolist()
    assert best == [0, 6]
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert "by ranks: layer 0 (level with layer 6: the lower number is taken)" in summary
    assert not re.search(r"\| 0\.0+ \|$", summary, re.M)  # no p value is 0
