"""ContributionBudget: what each kind of text token, and each word, really writes into the image tokens, per layer.

    result = ContributionBudget(layers="all", limit=8).run("scenes-sd3")
    result.summary.query("group == 'word'")[["layer", "relative", "relative_low", "relative_high", "mass"]]

The norm of W_O sum_j a_ij v_j over a group of keys, as a share of the norm of the whole attention update, beside the
mass that the same keys get. A layer where words take much attention need not be one where they write much: a BOS token
with short values takes mass and writes little. Not here: the measurement (`observe.contribution`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.experiments.attention_budget import mass_interval
from mmdit_probe.experiments.text import Text, TextTable, bounded, share
from mmdit_probe.experiments.token_rows import TokenRows
from mmdit_probe.results.statistics import interval, measured
from mmdit_probe.specs import ALL_HEADS, HeadSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.observe.observer import RowObserver

_CELL = ["branch", "layer", "head", "key", "span", "word"]
_UPDATE = ["step", "sigma", "branch", "layer", "head"]
"""What one whole update of the image tokens has of its own."""
_READ = ["norm", "cosine", "share", "mass"]
_VALUES = ["norm", "relative", "cosine", "share", "mass"]
_ENDS = ["relative_low", "relative_high", "mass_low", "mass_high"]


@dataclass(frozen=True, kw_only=True)
class ContributionBudget(TokenRows):
    """What text writes into image tokens, per layer, head, span kind and word: norm and direction, exact.

    Writes contribution_budget.parquet (one row per prompt, step, branch, layer, head and group of keys), the same per
    item, the summaries per layer, per head and per word, the figure and run.json into a run folder.
    """

    name = "contribution-budget"
    claimed = "words write more into image tokens (norm, as a share of the whole update's) than in the control"
    headlined = ("span", "word")
    reads = (*dict.fromkeys([*_UPDATE, *_CELL]), "stream", *_READ)
    examples = ("--layers all --limit 8",)

    def observer(self, sink: Any, heads: HeadSpec) -> RowObserver:
        from mmdit_probe.observe.contribution import Contribution

        return Contribution(sink, heads=heads, rows="layer" if self.rows == "layer" else "head")

    def reduce(self, rows: pd.DataFrame) -> pd.DataFrame:
        table = rows[rows["stream"] == ""].astype(dict.fromkeys(_READ, "float64"))
        update = table[table["key"] == "all"].groupby(_UPDATE, observed=True)["norm"].mean().rename("update")
        table = table.join(update, on=_UPDATE)
        table["relative"] = table["norm"] / table["update"]
        return table.groupby(_CELL, observed=True, sort=False)[_VALUES].mean().reset_index()

    def summarise(self, result: Result) -> pd.DataFrame:
        by_item = self.by_item(result)
        return summarise(by_item[by_item["head"] == ALL_HEADS], ["layer", "group"])

    def scores(self, result: Result) -> pd.DataFrame:
        table = grouped(self.by_item(result))
        table = table[(table["head"] == ALL_HEADS) & table["group"].isin(["text", "word"])]
        return table.assign(value=table["relative"], span=table["group"])[["item", "control", "layer", "span", "value"]]

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        by_item = self.by_item(result)
        words = by_item[(by_item["word"] != "") & (by_item["head"] == ALL_HEADS)]
        return {
            f"{self.stem}_by_layer": result.summary,
            f"{self.stem}_by_head": summarise(by_item[by_item["head"] != ALL_HEADS], ["layer", "head", "group"]),
            f"{self.stem}_by_word": summarise(words.assign(group=words["word"].astype(str)), ["layer", "group"]),
        }

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.layers import contribution_budget

        title = f"{result.model_name}: {self.setting(result, int(result.summary['n'].max()))}"
        heads = result.frames[f"{self.stem}_by_head"]
        return {self.stem: contribution_budget(result.summary, heads, title=title)}

    def tell(self, result: Result) -> list[Text]:
        return [
            contribution_table(result.summary),
            "|W_O sum a v| over the keys of a kind as a share of the whole attention update's norm, 95 % interval over"
            " prompts; in brackets their mass. Shares of a partition need not add up: contributions may oppose.",
            f"Mean over image tokens and steps, conditional: {self.setting(result, int(result.summary['n'].max()))}.",
        ]


def grouped(by_item: pd.DataFrame) -> pd.DataFrame:
    """The rows of whole groups, with their name in `group`: all, image, other, text, reference, the span kind, or
    "reference 0" and so on."""
    rows = by_item[by_item["word"] == ""]
    kind, key = rows["span"].astype(str), rows["key"].astype(str)
    kind = kind.where(key != "reference", "reference " + kind)
    return rows.assign(group=kind.where(rows["span"] != "all", key))


def summarise(by_item: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means over items of the measurement itself.

    Args:
        by_item: rows of one guidance branch; with a column `group` or as `grouped` takes them. by: layer, head, group.

    Returns: the columns `by`, n, norm, relative (norm over the norm of the whole update), cosine (with that update),
    share (along it), mass, and relative_low, relative_high, mass_low, mass_high (95 % intervals over items).
    """
    own = measured(by_item)
    own = own if "group" in own else grouped(own)
    rows: list[dict[str, Any]] = []
    for place, part in own.groupby(by, observed=True):
        items = part.groupby("item")[_VALUES].mean()
        means = {name: float(items[name].mean()) for name in _VALUES}
        mass = mass_interval(items["mass"])
        ends = dict(zip(_ENDS, (*interval(items["relative"])[1:], *mass[1:]), strict=True))
        rows.append(dict(zip(by, place, strict=True)) | {"n": len(items)} | means | ends)
    return pd.DataFrame(rows, columns=[*by, "n", *_VALUES, *_ENDS])


_NOTHING = dict.fromkeys([*_VALUES, *_ENDS], 0.0)
"""Of a group that a prompt does not have: no keys write nothing."""


def contribution_table(summary: pd.DataFrame) -> TextTable:
    """The per-layer table in text."""
    from mmdit_probe.plots.style import LABELS

    there = summary.groupby("group", observed=True)["norm"].max()
    groups = [name for name in ("image", "text", "reference", *LABELS) if there.get(name, 0) > 0]
    heads = [LABELS.get(name, name) for name in groups]
    table = TextTable(["layer", *heads, "cosine of words"], spare=heads[3:])
    for layer, part in summary.groupby("layer"):
        rows = {str(row["group"]): row for row in part.to_dict("records")}
        cells = [
            f"{bounded(row['relative'], row['relative_low'], row['relative_high'], 2)} ({share(row['mass'])})"
            if name in ("text", "word") else f"{row['relative']:.2f} ({share(row['mass'])})"
            for name in groups
            for row in (rows.get(name, _NOTHING),)
        ]  # fmt: skip
        table.add(str(layer), *cells, f"{rows['word']['cosine']:+.2f}" if "word" in rows else "")
    return table
