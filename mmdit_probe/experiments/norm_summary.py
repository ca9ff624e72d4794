"""From the long value-norm table to one row per layer: Fig. 4 and 28 of arXiv:2509.18096.

    from mmdit_probe.experiments.norm_summary import by_layer, by_head
    by_layer(table)[["layer", "image", "text", "prompt", "gap", "gap_low", "gap_high"]]

"Text" is all text tokens, "prompt" those before the padding (the paper's third curve: bos, words, eos, template), and
the gap is prompt minus image. Means are taken over tokens, then steps, within a prompt first and over prompts second,
so that the interval is one over prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mmdit_probe.errors import UserError
from mmdit_probe.results.statistics import NONE, measured
from mmdit_probe.specs import ALL_HEADS

if TYPE_CHECKING:
    import pandas as pd

PROMPT_SPANS = ("bos", "word", "eos", "template")
"""Text tokens that the paper calls prompt tokens: text without the trailing padding (and without null slots)."""

CURVES = ("image", "text", "prompt")
GROUPS = (*CURVES, "word", "bos", "eos", "template", "pad", "null", "unknown")
COLUMNS = ["item", "control", "prompt", "seed", "step", "branch", "layer", "head", "token", "span", "norm", "n_token"]


def by_layer(table: pd.DataFrame | Iterable[pd.DataFrame], branch: str = "cond") -> pd.DataFrame:
    """One row per layer, of the norm over all heads together.

    Args:
        table: rows of `ValueNorm`, or parts of them that each hold complete prompts.
        branch: guidance branch to report.

    Returns: columns layer, prompts (n), one column per group of `GROUPS` that occurs (mean norm), `gap` (prompt minus
    image; text minus image where span kinds are unknown), and `<name>_low`, `<name>_high` (95 % Student interval over
    prompts; NaN when n = 1) for the three curves and the gap.
    """
    from mmdit_probe.experiments.budget_summary import student

    wide = by_item(table, branch)
    layers = wide.drop(columns="item").groupby("layer")
    mean, count = layers.mean(), layers.size()
    half = layers.std().div(count**0.5, axis=0).mul(student(count.to_numpy()), axis=0)
    summary = mean.dropna(axis=1, how="all")
    summary.insert(0, "prompts", count)
    for name in (*CURVES, "gap"):
        if name in summary:
            summary[f"{name}_low"], summary[f"{name}_high"] = mean[name] - half[name], mean[name] + half[name]
    return summary.reset_index()


def by_item(table: pd.DataFrame | Iterable[pd.DataFrame], branch: str = "cond") -> pd.DataFrame:
    """One row per prompt and layer, of the norm over all heads together: item, layer, the groups and `gap`."""
    return by_control(table, branch, {NONE}).drop(columns="control")


def by_control(
    table: pd.DataFrame | Iterable[pd.DataFrame], branch: str = "cond", controls: set[str] | None = None
) -> pd.DataFrame:
    """`by_item` with the column control: of the measurement and all its controls, or of some."""
    wide = _grouped(table, branch, controls)
    wide = wide[wide["head"] == ALL_HEADS].drop(columns="head")
    return wide.assign(gap=wide["prompt"].fillna(wide["text"]) - wide["image"])


def by_head(table: pd.DataFrame | Iterable[pd.DataFrame], branch: str = "cond") -> pd.DataFrame:
    """Mean norm per layer and head (without the concatenation): columns layer, head, and the groups that occur."""
    wide = _grouped(table, branch, {NONE})
    wide = wide[wide["head"] != ALL_HEADS].drop(columns=["item", "control"])
    return wide.groupby(["layer", "head"]).mean().dropna(axis=1, how="all").reset_index()


def _grouped(table: pd.DataFrame | Iterable[pd.DataFrame], branch: str, controls: set[str] | None) -> pd.DataFrame:
    """One row per control, item, layer and head, one column per group: the mean over tokens and steps."""
    import pandas as pd

    parts = [table] if isinstance(table, pd.DataFrame) else list(table)
    rows = []
    for number, part in enumerate(parts):
        there = dict.fromkeys(part["control"]) if "control" in part else {NONE: None}
        for control in there:
            chosen = measured(part[part["branch"] == branch], control)
            if chosen.empty or (controls is not None and control not in controls):
                continue
            if "item" in chosen:
                of_part = _one_part(chosen)
            else:
                of_part = _one_part(chosen.assign(item=chosen.groupby(["prompt", "seed"], observed=True).ngroup()))
                of_part["item"] += 1_000_000 * number  # such parts count their items from 0 each
            rows.append(of_part.assign(control=control))
    if not rows:
        raise UserError(f"the table has no rows of branch {branch!r}; expected cond or uncond of a guided run")
    return pd.concat(rows, ignore_index=True)


def _one_part(table: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    cell = ["item", "layer", "head"]
    weighted = table.assign(total=table["norm"] * table["n_token"])
    members = {
        "image": weighted["token"] == "image",
        "text": weighted["token"] == "text",
        "prompt": weighted["span"].isin(PROMPT_SPANS),
    }
    members |= {kind: weighted["span"] == kind for kind in GROUPS if kind not in CURVES}
    columns = {}
    for name, chosen in members.items():
        sums = weighted[chosen].groupby(cell, observed=True)[["total", "n_token"]].sum()
        # Every step has the same tokens, so the token mean over all steps is the step mean too.
        columns[name] = sums["total"] / sums["n_token"]
    return pd.DataFrame(columns).astype("float64").reset_index()
