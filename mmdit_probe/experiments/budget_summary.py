"""From the long attention-mass table to one row per layer: the attention budget of arXiv:2509.18096, Fig. 2b and 2c.

    >>> from mmdit_probe.experiments.budget_summary import summarise       # doctest: +SKIP
    >>> summarise(table)[["layer", "I2T", "I2T_uniform", "I2T_word", "outlier"]]

Blocks are named query -> key: I2T is what image queries spend on text keys. Averages are taken over steps and heads
within a prompt first and over prompts second, so the interval is one over prompts. Mass alone does not tell which
layer grounds words (the paper's layer 9 is no outlier here); this table is evidence, not a choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mmdit_probe.errors import UserError
from mmdit_probe.results.statistics import NONE, measured

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

BLOCKS = {
    "I2I": ("image", "image"), "I2T": ("image", "text"), "I2O": ("image", "other"),
    "T2I": ("text", "image"), "T2T": ("text", "text"), "T2O": ("text", "other"),
}  # fmt: skip
"""Block name -> (query, key). `other` keys (registers, learned pads) are the fifth mass, seen from either modality."""

SPANS = ("word", "bos", "eos", "template", "pad", "null", "unknown")
"""Kinds of text token that the I2T mass is split into."""

OUTLIER_Z = 3.5
"""Robust z-score beyond which a layer is marked; the usual limit of Iglewicz and Hoaglin (1993)."""

OUTLIER_MEASURES = ("I2T", "T2I", "I2T_word")

COLUMNS = [
    "item",
    "control",
    "prompt",
    "seed",
    "step",
    "branch",
    "layer",
    "head",
    "query",
    "key",
    "span",
    "mass",
    "uniform",
]
"""What is needed of the long table. `item` may be absent (then prompt and seed tell prompts apart), `control` too."""


def per_prompt(table: pd.DataFrame, branch: str = "cond") -> pd.DataFrame:
    """Mean over steps and heads, for each prompt, layer, query, key and span kind (encoder streams are added up).

    Args:
        table: rows of `AttentionMass`, any part of the whole that holds complete prompts.
        branch: guidance branch, `cond` or `uncond`.

    Returns: columns item, layer, query, key, span, mass, uniform.

    Raises:
        UserError: the table has no rows of that branch.
    """
    table = table[table["branch"] == branch]
    if table.empty:
        raise UserError(f"the table has no rows of branch {branch!r}; expected cond or uncond of a guided run")
    if "item" not in table:
        table = table.assign(item=table.groupby(["prompt", "seed"], observed=True).ngroup())
    cell = ["item", "layer", "query", "key", "span"]
    by_call = table.groupby([*cell, "step", "head"], observed=True)[["mass", "uniform"]].sum()
    return by_call.groupby(cell, observed=True).mean().reset_index()


def summarise(table: pd.DataFrame | Iterable[pd.DataFrame], branch: str = "cond") -> pd.DataFrame:
    """One row per layer, of the measurement itself; its controls are `by_item`'s.

    Args:
        table: rows of `AttentionMass`, or parts of them that each hold complete prompts (row groups of a table on
            disk).
        branch: guidance branch to report.

    Returns: columns
        layer, prompts: layer index, number of prompts n;
        I2I, I2T, I2O, T2I, T2T, T2O: mean mass (share of the query modality's attention, 0..1);
        I2T_<span>: the part of I2T on each kind of text token;
        <name>_uniform: the same under uniform attention, n_key / N;
        <name>_low, <name>_high: 95 % Student interval over prompts for the six blocks and I2T_word (NaN when n = 1);
        outlier: measures whose robust z-score over layers exceeds 3.5, with their sign, such as "I2T+ T2I-".
    """
    import pandas as pd

    long = _reduced(table, branch, {NONE})
    layers = _measures(long, "mass").groupby(level="layer")
    mean, spread, count = layers.mean(), layers.std(), layers.size()
    summary = pd.DataFrame({"layer": mean.index, "prompts": count.to_numpy()}, index=mean.index)
    half = spread.div(count**0.5, axis=0).mul(student(count.to_numpy()), axis=0)
    uniform = _measures(long, "uniform").groupby(level="layer").mean()
    for name in mean.columns:
        summary[name] = mean[name]
        summary[f"{name}_uniform"] = uniform[name]
        if name in BLOCKS or name == "I2T_word":
            summary[f"{name}_low"], summary[f"{name}_high"] = mean[name] - half[name], mean[name] + half[name]
    marks = pd.DataFrame({name: _mark(name, robust_z(mean[name].to_numpy())) for name in OUTLIER_MEASURES})
    summary["outlier"] = marks.apply(lambda row: " ".join(filter(None, row)), axis=1).to_numpy()
    return summary.reset_index(drop=True)


def by_item(table: pd.DataFrame | Iterable[pd.DataFrame], branch: str = "cond") -> pd.DataFrame:
    """One row per item, control and layer: columns item, control, layer, the six blocks and I2T_<span>.

    Args:
        table, branch: as in `summarise`.
    """
    long = _reduced(table, branch, None)
    wide = _measures(long, "mass", ["control", "item", "layer"])
    return wide.reset_index()


def _reduced(table: pd.DataFrame | Iterable[pd.DataFrame], branch: str, controls: set[str] | None) -> pd.DataFrame:
    """`per_prompt` of every part and control (all of them if None), with the columns part and control."""
    import pandas as pd

    found = []
    for number, part in enumerate([table] if isinstance(table, pd.DataFrame) else table):
        there = dict.fromkeys(part["control"]) if "control" in part else {NONE: None}
        for control in there:
            if controls is None or control in controls:
                found.append(per_prompt(measured(part, control), branch).assign(part=number, control=control))
    if not found:
        raise UserError("the table has no rows")
    return pd.concat(found, ignore_index=True)


def robust_z(values: np.ndarray) -> np.ndarray:
    """Robust z-scores `0.6745 (x - median) / MAD`, 0 where the median absolute deviation is 0. (L,) -> (L,)."""
    import numpy as np

    away = values - np.median(values)
    scale = np.median(np.abs(away))
    return 0.6745 * away / scale if scale > 0 else np.zeros_like(away)


def _measures(long: pd.DataFrame, value: str, cell: Sequence[str] = ("part", "item", "layer")) -> pd.DataFrame:
    """Rows of `cell`, one column per block and per I2T span."""
    import pandas as pd

    cell = list(cell)
    columns = {}
    for name, (query, key) in BLOCKS.items():
        chosen = long[(long["query"] == query) & (long["key"] == key)]
        columns[name] = chosen.groupby(cell, observed=True)[value].sum()
    into_text = long[(long["query"] == "image") & (long["key"] == "text")]
    for kind in SPANS:
        columns[f"I2T_{kind}"] = into_text[into_text["span"] == kind].groupby(cell, observed=True)[value].sum()
    return pd.DataFrame(columns).astype("float64").fillna(0.0)


def student(count: np.ndarray) -> np.ndarray:
    """Two-sided 95 % quantile of Student's t for each n (NaN for n = 1)."""
    import numpy as np
    from scipy.stats import t

    return np.where(count > 1, t.ppf(0.975, np.maximum(count - 1, 1)), np.nan)


def _mark(name: str, scores: np.ndarray) -> list[str]:
    return [f"{name}{'+' if z > 0 else '-'}" if abs(z) > OUTLIER_Z else "" for z in scores]
