"""AttentionBudget: how much of their attention image and text queries give to which kind of key, per layer; Fig. 2 of
arXiv:2509.18096.

    result = AttentionBudget(layers="all", limit=8).run("scenes-sd3")
    result.summary[["layer", "I2T", "I2T_uniform", "I2T_word", "outlier"]]

Blocks are named query -> key: I2T is what image queries spend on text keys. Averages are taken over steps and heads
within a prompt first and over prompts second, so the interval is one over prompts. Mass alone does not tell which
layer grounds words (the paper's layer 9 is no outlier here); it is evidence, not a choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.data import paper_table
from mmdit_probe.experiments.text import Text, TextTable, share
from mmdit_probe.experiments.token_rows import TokenRows
from mmdit_probe.results.statistics import EQUAL, Interval, interval, measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.observe.observer import RowObserver
    from mmdit_probe.specs import HeadSpec

BLOCKS = {
    "I2I": ("image", "image"), "I2T": ("image", "text"), "I2O": ("image", "other"),
    "T2I": ("text", "image"), "T2T": ("text", "text"), "T2O": ("text", "other"),
}  # fmt: skip
"""Block name -> (query, key). `other` keys (registers, learned pads) are the fifth mass, seen from either modality."""

REFERENCE_BLOCKS = {
    "I2R": ("image", "reference"), "T2R": ("text", "reference"), "R2I": ("reference", "image"),
    "R2T": ("reference", "text"), "R2R": ("reference", "reference"), "R2O": ("reference", "other"),
}  # fmt: skip
"""The blocks of editing models, whose sequence holds reference pictures; there where a table has any."""

SPANS = ("word", "bos", "eos", "template", "pad", "null", "unknown")
"""Kinds of text token that the I2T mass is split into; `vision` too, where the text encoder is shown any."""

FRAMES = {"I2I_same_frame": "same frame", "I2I_other_frames": "other frames"}
"""Of a video, the parts of I2I: keys of the query's own frame and of other frames."""

OUTLIER_Z = 3.5
"""Robust z-score beyond which a layer is marked; the usual limit of Iglewicz and Hoaglin (1993)."""

OUTLIER_MEASURES = ("I2T", "T2I", "I2T_word")
PAPER_MODEL = "stable-diffusion-3-medium"
"""Part of the names of the one model whose published numbers are shipped."""

_CELL = ["branch", "layer", "query", "key", "span"]


@dataclass(frozen=True, kw_only=True)
class AttentionBudget(TokenRows):
    """Share of attention that image and text queries give to image and text keys, per layer, exact.

    Writes attention_budget.parquet (one row per prompt, step, branch, layer, head and kind of key), the same per item,
    the per-layer summary, the figure and run.json into a run folder.
    """

    name = "attention-budget"
    claimed = "image queries give words more attention than they do in the control"
    headlined = ("measure", "I2T_word")
    reads = (*_CELL, "stream", "mass", "uniform")
    examples = ("--layers all", "--layers 2-5 --images scenes:val --control random,shuffled")

    def observer(self, sink: Any, heads: HeadSpec) -> RowObserver:
        from mmdit_probe.observe.mass import AttentionMass

        return AttentionMass(sink, heads=heads, rows="layer" if self.rows == "layer" else "head")

    def reduce(self, rows: pd.DataFrame) -> pd.DataFrame:
        groups = rows.astype({"mass": "float64", "uniform": "float64"}).groupby(_CELL, observed=True, sort=False)
        # Every head has a row for each stream of a span: those add up, and what is left is averaged.
        return groups[["mass", "uniform"]].mean().mul(groups["stream"].nunique(), axis=0).reset_index()

    def summarise(self, result: Result) -> pd.DataFrame:
        return summarise(self.by_item(result))

    def scores(self, result: Result) -> pd.DataFrame:
        return blocks(self.by_item(result)).melt(["item", "control", "layer"], ["I2T", "I2T_word"], "measure")

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        return {f"{self.stem}_by_layer": result.summary}

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots import attention_budget

        setting = self.setting(result, int(result.summary.prompts.min()))
        return {
            self.stem: attention_budget(
                result.summary, title=f"{result.model_name}: {setting}", paper=published(result, "budget_by_layer")
            )
        }

    def tell(self, result: Result) -> list[Text]:
        setting = self.setting(result, int(result.summary.prompts.min()))
        return [
            budget_table(result.summary, published(result, "budget_by_layer")),
            "I2T = image queries, text keys; shares of the query's attention, in brackets what uniform attention"
            f" gives; 'to ...' splits I2T{', same + other frames = I2I' if _split(result.summary) else ''}"
            f"{'; R = reference pictures' if 'I2R' in result.summary else ''}.",
            f"Mean over heads and steps (conditional branch): {setting}.",
        ]


def published(result: Result, name: str) -> pd.DataFrame | None:
    """The paper's numbers of a table, for the model they are of."""
    return paper_table(name) if PAPER_MODEL in result.data["model"]["id"] else None


def summarise(by_item: pd.DataFrame) -> pd.DataFrame:
    """One row per layer, of the measurement itself.

    Args:
        by_item: columns control, item, layer, query, key, span, mass, uniform of one branch.

    Returns: columns
        layer, prompts: layer index, number of prompts n;
        I2I, I2T, I2O, T2I, T2T, T2O: mean mass (share of the query modality's attention, 0..1);
        I2T_<span>: the part of I2T on each kind of text token;
        I2I_same_frame, I2I_other_frames: the parts of I2I, of a video only;
        I2R, T2R, R2I, R2T, R2R, R2O, and I2R_<number> where there are several: of models with reference pictures;
        <name>_uniform: the same under uniform attention, n_key / N;
        <name>_low, <name>_high: 95 % interval over prompts for all but I2T_<span>, and for I2T_word (NaN when n = 1);
        outlier: measures whose robust z-score over layers exceeds 3.5, with their sign, such as "I2T+ T2I-".
    """
    own = measured(by_item)
    layers = blocks(own).groupby("layer")
    values = layers.mean(numeric_only=True)
    uniform = blocks(own, "uniform").groupby("layer").mean(numeric_only=True)
    summary = pd.DataFrame({"layer": values.index, "prompts": layers.size().to_numpy()}, index=values.index)
    names = [str(name) for name in values]
    spans = [name for name in names if name.startswith("I2T_")]
    rest = [name for name in names if name not in (*BLOCKS, *FRAMES, *spans, "item")]
    for name in (*BLOCKS, *_split(values), *spans, *rest):
        summary[name] = values[name]
        summary[f"{name}_uniform"] = uniform[name]
        if name not in spans or name == "I2T_word":
            bounds = [mass_interval(part) for _, part in layers[name]]
            summary[f"{name}_low"], summary[f"{name}_high"] = ([b[k] for b in bounds] for k in (1, 2))
    marks = pd.DataFrame({name: _mark(name, robust_z(values[name].to_numpy())) for name in OUTLIER_MEASURES})
    summary["outlier"] = marks.apply(lambda row: " ".join(filter(None, row)), axis=1).to_numpy()
    return summary.reset_index(drop=True)


def mass_interval(masses: pd.Series) -> Interval:
    """A mean mass with its interval. One that is the same in every item is exact, not sampled: that of all keys, under
    uniform attention, or of keys that are none."""
    same = np.ptp(masses) <= EQUAL * masses.max()
    return interval(masses.clip(0, 1), kind="mean" if same else "share")


def blocks(by_item: pd.DataFrame, value: str = "mass") -> pd.DataFrame:
    """One row per control, item and layer: those columns, the blocks, I2T_<span>, of a video the parts of I2I, and of
    several references I2R_<number>."""
    cell = ["control", "item", "layer"]
    columns = {}
    numbers = sorted(by_item.loc[by_item["key"] == "reference", "span"].astype(str).unique(), key=int)
    for name, (query, key) in (BLOCKS | (REFERENCE_BLOCKS if numbers else {})).items():
        chosen = by_item[(by_item["query"] == query) & (by_item["key"] == key)]
        columns[name] = chosen.groupby(cell, observed=True)[value].sum()
    into_text = by_item[(by_item["query"] == "image") & (by_item["key"] == "text")]
    for kind in (*SPANS, *(("vision",) if (by_item["span"] == "vision").any() else ())):
        columns[f"I2T_{kind}"] = into_text[into_text["span"] == kind].groupby(cell, observed=True)[value].sum()
    into = by_item[(by_item["query"] == "image") & (by_item["key"] == "reference")]
    for number in numbers if len(numbers) > 1 else ():
        columns[f"I2R_{number}"] = into[into["span"] == number].groupby(cell, observed=True)[value].sum()
    into_image = by_item[(by_item["query"] == "image") & (by_item["key"] == "image")]
    for name, span in FRAMES.items():
        if len(part := into_image[into_image["span"] == span]):
            columns[name] = part.groupby(cell, observed=True)[value].sum()
    return pd.DataFrame(columns).astype("float64").fillna(0.0).reset_index()


def robust_z(values: np.ndarray) -> np.ndarray:
    """Robust z-scores `0.6745 (x - median) / MAD`, 0 where the median absolute deviation is 0. (L,) -> (L,)."""
    away = values - np.median(values)
    scale = np.median(np.abs(away))
    return 0.6745 * away / scale if scale > 0 else np.zeros_like(away)


def budget_table(summary: pd.DataFrame, paper: pd.DataFrame | None = None) -> TextTable:
    """The per-layer table in text. `paper` adds the published shares."""
    from mmdit_probe.plots.style import LABELS

    spans = [kind for kind in LABELS if f"I2T_{kind}" in summary and summary[f"I2T_{kind}_uniform"].max() > 0]
    numbers = [name for name in summary.columns.astype(str) if name.removeprefix("I2R_").isdigit()]
    blocks = [name for name in (*BLOCKS, *REFERENCE_BLOCKS, *numbers) if name in summary and name[2] != "O"]
    masses = [name for name in (*blocks, "I2O") if summary[f"{name}_uniform"].max() > 0]
    rest = [f"to {LABELS[kind]}" for kind in spans]
    masses[1:1] = _split(summary)
    columns = ["layer", *(FRAMES.get(name, "other" if name == "I2O" else name) for name in masses), *rest]
    known = paper.set_index("layer") if paper is not None else None
    columns += ["paper I2T", "paper T2I"] if known is not None else []
    spare = ["R2R", "R2T", "R2I", "T2R", "T2T", "I2I", *(name for name in reversed(rest) if name != "to words")]
    table = TextTable([*columns, "outlier"], left=("outlier",), spare=spare)
    for row in summary.to_dict("records"):
        cells = [str(row["layer"])]
        cells += [f"{share(row[name])} ({share(row[f'{name}_uniform'])})" for name in masses]
        cells += [share(row[f"I2T_{kind}"]) for kind in spans]
        if known is not None:
            of = known.loc[row["layer"]] if row["layer"] in known.index else None
            cells += ["", ""] if of is None else [share(of.i2t_share), share(of.t2i_share)]
        table.add(*cells, str(row["outlier"]))
    return table


def _split(table: pd.DataFrame) -> list[str]:
    """The parts of I2I that a table has: none but of a video."""
    return [name for name in FRAMES if name in table]


def _mark(name: str, scores: np.ndarray) -> list[str]:
    return [f"{name}{'+' if z > 0 else '-'}" if abs(z) > OUTLIER_Z else "" for z in scores]
