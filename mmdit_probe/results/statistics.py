"""Intervals over items, and whether a measurement is above its control.

    interval([0.1, 0.2, 0.3])                      # mean, low, high
    compare(table, ["layer"], "value")             # one row per layer and control, with a verdict

The table of a run holds its controls beside the measurement, told apart by the column `control` ("none" is the
measurement itself). A claim is about the difference of the two on the same items, so the bootstrap draws items, not
rows. Not here: how a control is made (`experiments.controls`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

NONE = "none"
"""Value of the column `control` in rows of the measurement itself."""

ABOVE, NOT_ABOVE, TOO_FEW = "above its control", "not above its control", "too few items"
FEWEST = 5
"""Items below which a bootstrap interval decides nothing."""


def interval(values: Any, draws: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over a sequence of items (percentiles, fixed seed)."""
    data = np.asarray(values, float)
    rng = np.random.default_rng(0)
    means = data[rng.integers(0, len(data), (draws, len(data)))].mean(1)
    return float(data.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def measured(table: pd.DataFrame, control: str = NONE) -> pd.DataFrame:
    """The rows of one control, by default those of the measurement itself; a table without controls as it is."""
    if "control" not in table:
        return table
    return table[table["control"] == control]


def compare(table: pd.DataFrame, cell: Sequence[str], value: str = "value") -> pd.DataFrame:
    """The measurement minus each of its controls, paired by item.

    Args:
        table: columns item, control, those of `cell`, and `value`; one row for each of them.
        cell: what is compared on its own, such as ["layer"].

    Returns: the columns of `cell`, control, n (items that have both), value, control_value (means), difference, low,
    high (95 % bootstrap interval over items) and verdict: "above its control" if the interval lies above 0, "not above
    its control" if not, "too few items" below five.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for place, part in table.dropna(subset=[value]).groupby(list(cell), sort=False, observed=True):
        wide = part.pivot(index="item", columns="control", values=value)
        for control in (name for name in dict.fromkeys(part["control"]) if name != NONE):
            if NONE not in wide:
                continue
            pairs = wide[[NONE, control]].dropna()
            if pairs.empty:
                continue
            difference, low, high = interval(pairs[NONE] - pairs[control])
            verdict = TOO_FEW if len(pairs) < FEWEST else ABOVE if low > 0 else NOT_ABOVE
            rows.append(
                dict(zip(cell, place, strict=True))
                | {"control": control, "n": len(pairs), "value": float(pairs[NONE].mean()),
                   "control_value": float(pairs[control].mean()), "difference": difference, "low": low, "high": high,
                   "verdict": verdict}
            )  # fmt: skip
    columns = [*cell, "control", "n", "value", "control_value", "difference", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=columns)
