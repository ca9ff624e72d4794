"""Verdicts of tables with many rows: what stands alone does not stand among twenty, and few items decide nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mmdit_probe.experiments.feature_pca import summarise as components
from mmdit_probe.experiments.generate import summarise as guided
from mmdit_probe.experiments.head_triage import verdicts as heads
from mmdit_probe.experiments.perturb import CONTROL, EDIT, STOCK, summarise as perturbed
from mmdit_probe.experiments.scenes_quality import CLEAN, PLAIN, improvement

Values = dict[int, np.ndarray]


def spread(mean: float, n: int = 12) -> np.ndarray:
    """Normal quantiles around a mean: at 0.8 of n = 12 a t test gives p = .02."""
    return np.asarray(mean + stats.norm.ppf((np.arange(n) + 0.5) / n))


def of_heads(values: Values) -> str:
    rows = pd.DataFrame(
        {"train_item": item, "layer": 0, "stream": "all", "head": head, "word": "ring", "auc": 0.5 + 0.05 * value}
        for head, column in values.items() for item, value in enumerate(column)
    )  # fmt: skip
    return str(heads(rows)["verdict"][0])


def of_sinks(values: Values) -> str:
    rows = [
        {"item": item, "layer": layer, "head": 0, "maps": maps, "auc": 0.5 + value * (maps == CLEAN), "miou": np.nan,
         "miou_min_max": np.nan}
        for layer, column in values.items() for item, value in enumerate(0.1 * column) for maps in (PLAIN, CLEAN)
    ]  # fmt: skip
    return str(improvement(pd.DataFrame(rows))["verdict"][0])


def of_edits(values: Values) -> str:
    rows = []
    for layer, column in values.items():
        for item, value in enumerate(0.01 * column):
            for kind, at, facts in ((STOCK, -1, 0.9), (EDIT, layer, 0.6 - value), (CONTROL, layer, 0.6)):
                control = "budget" if kind == CONTROL else "none"
                rows.append({"item": item, "prompt": "", "seed": item, "control": control, "condition": kind,
                             "layer": at, "head": -1, "span": "all", "facts": facts})  # fmt: skip
    table = pd.DataFrame(rows).drop_duplicates(["item", "condition", "layer"])
    return str(perturbed(table).set_index("layer")["verdict"][0])


def of_guidance(values: Values) -> str:
    rows = []
    for layer, column in values.items():
        for item, value in enumerate(0.01 * column):
            for layers, scale, facts in (("", 0.0, 0.5), (str(layer), 2.0, 0.5 + value)):
                rows.append({"item": item, "prompt": "", "seed": item, "layers": layers, "scale": scale,
                             "control": "none", "facts": facts})  # fmt: skip
    table = guided(pd.DataFrame(rows).drop_duplicates(["item", "layers"])).set_index("layers")
    assert table.loc["", "verdict"] == "" and table.loc["0", "difference_low"] > 0
    return str(table.loc["0", "verdict"])


def test_no_change_is_exactly_none() -> None:
    """Of images without a moved pixel: neither guidance, edit nor their controls have a direction. Facts, a sample of
    yes and no, keep theirs; stock beside stock is none."""
    numbers = {"prompt": "", "change": 0.0, "relabelled": 0.0, "facts": 1.0}
    items = [{"item": item, "seed": item, **numbers} for item in range(8)]
    table = guided(
        pd.DataFrame(row | {"layers": layers, "scale": scale, "control": "none"} for row in items
                     for layers, scale in (("", 0.0), ("0", 2.0)))
    ).set_index(["layers", "outcome"])  # fmt: skip
    assert table.loc[("0", "change"), ["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]
    assert table.loc[("", "relabelled"), ["mean", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc[("0", "facts"), "difference_low"] < 0 < table.loc[("0", "facts"), "difference_high"]
    places = ((STOCK, -1, "none"), (EDIT, 0, "none"), (CONTROL, 0, "budget"))
    rows = perturbed(
        pd.DataFrame(row | {"condition": kind, "layer": layer, "control": control, "head": -1, "span": "all"}
                     for row in items for kind, layer, control in places)
    ).set_index("outcome")  # fmt: skip
    bounds = [f"{name}{end}" for name in ("", "control_", "beyond_") for end in ("low", "high")]
    assert rows.loc["change", bounds].tolist() == [0] * 6
    assert rows.loc["facts", "low"] < 0 < rows.loc["facts", "beyond_high"]


def of_components(values: Values) -> str:
    rows = [
        {"layer": layer, "kind": "query", "class": 0.5 + value, "class_shuffled": 0.5}
        for layer, column in values.items() for value in 0.1 * column
    ]  # fmt: skip
    row = components(pd.DataFrame(rows)).iloc[0]
    assert row["beyond_low"] > 0
    return "few" if np.isnan(row["p_holm"]) else "beyond" if row["p_holm"] <= 0.05 else "not beyond"


@pytest.mark.parametrize(
    ("verdict", "alone", "among", "few"),
    [
        (of_heads, "localises", "neither", "too few items"),
        (of_sinks, "better", "no difference shown", "too few items"),
        (of_edits, "beyond control", "not beyond control", "too few items"),
        (of_guidance, "higher", "no difference shown", "too few items"),
        (of_components, "beyond", "not beyond", "few"),
    ],
)
def test_verdicts(verdict: Callable[[Values], str], alone: str, among: str, few: str) -> None:
    nothing = {place: spread(0.0) for place in range(1, 21)}
    assert verdict({0: spread(0.8)}) == alone
    assert verdict({0: spread(0.8)} | nothing) == among
    assert verdict({0: spread(3.0, n=7)}) == few
