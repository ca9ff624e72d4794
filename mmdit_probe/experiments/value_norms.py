"""ValueNorms: how long the values are that each kind of token brings into the joint attention; Fig. 4 and 28 of
arXiv:2509.18096.

    result = ValueNorms(limit=8).run("scenes-sd3")
    result.summary[["layer", "image", "text", "prompt", "gap", "gap_low", "gap_high"]]

"Text" is all text tokens, "prompt" those before the padding (the paper's third curve: bos, words, eos, template), and
the gap is prompt minus image. Means are taken over tokens, then steps, within a prompt first and over prompts second,
so that the interval is one over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.experiments.attention_budget import published
from mmdit_probe.experiments.text import Text, TextTable
from mmdit_probe.experiments.token_rows import TokenRows
from mmdit_probe.results.statistics import interval, measured
from mmdit_probe.specs import ALL_HEADS, HeadSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.observe.observer import RowObserver

PROMPT_SPANS = ("bos", "word", "eos", "template")
"""Text tokens that the paper calls prompt tokens: text without the trailing padding (and without null slots)."""

CURVES = ("image", "text", "prompt", "reference")
"""The last one where a call has reference pictures; so the group `vision`, where the text encoder is shown any."""
GROUPS = (*CURVES, "word", "bos", "eos", "template", "pad", "null", "unknown", "vision")
_CELL = ["branch", "layer", "head"]


@dataclass(frozen=True, kw_only=True)
class ValueNorms(TokenRows):
    """Mean L2 norm of the values that enter attention: image, text and each span kind, per layer and head.

    Writes value_norms.parquet, the same per item, the summaries per layer and per head, two figures and run.json into
    a run folder.
    """

    name = "value-norms"
    claimed = "prompt tokens have longer values than image tokens (gap over the image's norm) beyond the control"
    headlined = ("measure", "relative_gap")
    reads = (*_CELL, "token", "span", "norm", "n_token")
    examples = ("--layers all --limit 8", "--images scenes:val --sigma 0.515")

    def observer(self, sink: Any, heads: HeadSpec) -> RowObserver:
        from mmdit_probe.observe.norms import ValueNorm

        return ValueNorm(sink, heads=heads, rows="layer" if self.rows == "layer" else "head")

    def reduce(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Means over the tokens of each group of `GROUPS`, a column each: NaN where it has no tokens, and none of
        references where the calls have none."""
        table = rows.assign(total=rows["norm"].astype("float64") * rows["n_token"])
        members = {
            "image": table["token"] == "image",
            "text": table["token"] == "text",
            "prompt": table["span"].isin(PROMPT_SPANS),
        }
        members |= {kind: table["span"] == kind for kind in GROUPS if kind not in CURVES}
        rare = {"reference": table["token"] == "reference", "vision": members.pop("vision")}
        members |= {kind: chosen for kind, chosen in rare.items() if chosen.any()}
        columns = {}
        for name, chosen in members.items():
            sums = table[chosen].groupby(_CELL, observed=True)[["total", "n_token"]].sum()
            columns[name] = sums["total"] / sums["n_token"]
        return pd.DataFrame(columns).astype("float64").rename_axis(_CELL).reset_index()

    def summarise(self, result: Result) -> pd.DataFrame:
        return by_layer(self.by_item(result))

    def scores(self, result: Result) -> pd.DataFrame:
        wide = with_gap(self.by_item(result))
        wide = wide.assign(relative_gap=wide["gap"] / wide["image"])
        return wide.melt(["item", "control", "layer"], ["gap", "relative_gap"], "measure")

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        return {f"{self.stem}_by_layer": result.summary, f"{self.stem}_by_head": by_head(self.by_item(result))}

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.layers import value_norm_heads, value_norms

        title = f"{result.model_name}: {self.setting(result, int(result.summary.prompts.min()))}"
        figures = {self.stem: value_norms(result.summary, title=title, paper=published(result, "value_norm_by_layer"))}
        if self.rows == "head":
            figures[f"{self.stem}_by_head"] = value_norm_heads(result.frames[f"{self.stem}_by_head"], title=title)
        return figures

    def tell(self, result: Result) -> list[Text]:
        setting = self.setting(result, int(result.summary.prompts.min()))
        return [
            norm_table(result.summary, published(result, "value_norm_by_layer")),
            "L2 norm over all heads together; prompt: text without padding; gap: prompt minus image, with its 95 %"
            " interval over prompts.",
            f"Mean over tokens and steps (conditional branch): {setting}.",
        ]


def with_gap(by_item: pd.DataFrame) -> pd.DataFrame:
    """The rows over all heads together, with the gap: prompt minus image; text minus image where span kinds are
    unknown."""
    wide = by_item[by_item["head"] == ALL_HEADS]
    return wide.assign(gap=wide["prompt"].fillna(wide["text"]) - wide["image"])


def by_layer(by_item: pd.DataFrame) -> pd.DataFrame:
    """One row per layer, of the measurement itself and the norm over all heads together.

    Args:
        by_item: columns control, item, layer, head and the groups, of one branch.

    Returns: columns layer, prompts (n), one column per group of `GROUPS` that occurs (mean norm), `gap`, and
    `<name>_low`, `<name>_high` (95 % interval over prompts; NaN when n = 1) for the curves and the gap.
    """
    wide = with_gap(measured(by_item))
    layers = wide.groupby("layer")
    summary = layers[[name for name in (*GROUPS, "gap") if name in wide]].mean().dropna(axis=1, how="all")
    summary.insert(0, "prompts", layers.size())
    for name in (*CURVES, "gap"):
        if name in summary:
            bounds = [interval(part) for _, part in layers[name]]
            summary[f"{name}_low"], summary[f"{name}_high"] = ([b[k] for b in bounds] for k in (1, 2))
    return summary.reset_index()


def by_head(by_item: pd.DataFrame) -> pd.DataFrame:
    """Mean norm per layer and head (without the concatenation): columns layer, head, and the groups that occur."""
    own = measured(by_item)
    own = own[own["head"] != ALL_HEADS]
    groups = [name for name in GROUPS if name in own]
    return own.groupby(["layer", "head"])[groups].mean().dropna(axis=1, how="all").reset_index()


def norm_table(summary: pd.DataFrame, paper: pd.DataFrame | None = None) -> TextTable:
    """The per-layer table in text. `paper` adds the published curves."""
    groups = [name for name in GROUPS if name in summary]
    known = paper.set_index("layer") if paper is not None else None
    last: Sequence[str] = ["paper image / text / prompt"] if known is not None else []
    spare = [name for name in reversed(groups) if name not in CURVES]
    table = TextTable(["layer", *groups, "gap", "95 % interval", *last], spare=spare)
    for row in summary.to_dict("records"):
        bounds = "" if row["gap_low"] != row["gap_low"] else f"[{row['gap_low']:+.2f}, {row['gap_high']:+.2f}]"
        cells = [str(row["layer"]), *(f"{row[name]:.2f}" for name in groups), f"{row['gap']:+.2f}", bounds]
        if known is not None:
            of = known.loc[row["layer"]] if row["layer"] in known.index else None
            cells.append("" if of is None else f"{of.image} / {of.text} / {of.prompt}")
        table.add(*cells)
    return table
