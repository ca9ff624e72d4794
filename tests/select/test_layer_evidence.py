"""The control analysis: a planted difference is found, an equal one is printed as such."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pandas as pd

SCRIPT = Path(__file__).parents[2] / "analyses" / "layer_evidence.py"


def test_verdicts() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for kind in ("trained", "control"):
        for item in range(12):
            for layer in range(3):
                real = 1.0 if kind == "trained" and layer == 2 else 0.0
                for name, value in (("segmentation", real), ("value_gap", float(layer))):
                    value += 0.05 * rng.normal()
                    rows.append({"evidence": name, "model": kind, "item": item, "layer": layer, "value": value})
    verdicts = runpy.run_path(str(SCRIPT))["verdicts"](pd.DataFrame(rows)).set_index("evidence")
    assert verdicts.loc["segmentation", "layer"] == 2
    assert verdicts.loc["segmentation", "verdict"] == "differs from control"
    assert verdicts.loc["value_gap", "verdict"] == "as control"
    assert (verdicts["low"] <= verdicts["difference"]).all()
