"""Two runs of one experiment side by side, paired by item: two models, with and without a LoRA, two dtypes.

    found = compare_runs("runs/base", "runs/tuned", margin=0.05)
    found.table                 # per cell (layer, outcome, ...): second minus first, 95 % interval, verdict
    found.figure(); found.save("runs/compare/mine")

Every experiment says what its numbers per item are (`Experiment.scores`); the items of both runs must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError, counted
from mmdit_probe.experiments.experiment import cell_of
from mmdit_probe.experiments.result import Result
from mmdit_probe.experiments.store import other_sampling
from mmdit_probe.experiments.text import Text, paired_table
from mmdit_probe.models.names import other_parts
from mmdit_probe.results import RunFolder, atomic
from mmdit_probe.results.folder import differences
from mmdit_probe.results.statistics import NONE, compare, judged, measured, two_sided
from mmdit_probe.specs import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ITEMS = ("items", "n", "split", "seed", "prompts", "images")
"""Entries of a request that say what was measured on: where both runs have them they must be equal."""

SHOWN = 40
"""Rows in the terminal's table."""


@dataclass(frozen=True)
class Comparison:
    """Two runs, paired.

    Attributes:
        first, second: the runs. margin: of non-inferiority, or None.
        table: the columns of a cell, n, first, second (means), difference (second minus first), low, high, p_holm and
            verdict: of `results.statistics.two_sided`; with a margin of `judged`, in the sense of `Experiment.sign`.
        differs: the entries of the requests that differ, such as model or dtype.
    """

    first: Result
    second: Result
    margin: float | None
    table: pd.DataFrame
    differs: list[str]

    @cached_property
    def title(self) -> str:
        """What was compared."""
        return (
            f"{self.first.experiment.name}: {self.second.model_name} minus {self.first.model_name}"
            f" ({'; '.join(self.differs) or 'the same request'}), n = {self.table['n'].max()}"
        )

    def figure(self) -> Figure:
        """The differences with their intervals."""
        from mmdit_probe.plots.layers import run_differences

        signs = {self.first.experiment.sign(str(name)) for name in self.table.get("outcome", [""])}
        margins = () if self.margin is None else {-self.margin * sign for sign in signs}
        return run_differences(self.table, self.title, margins)

    def texts(self) -> list[Text]:
        """What the command prints."""
        cell = [name for name in cell_of(self.table) if name not in _NUMBERS]
        cell = [name for name in cell if self.table[name].nunique() > 1] or cell[:1]
        table = paired_table(self.table.head(SHOWN), cell, {"first": "first", "second": "second"})
        rest = len(self.table) - SHOWN
        told = f" {counted(rest, 'more row is', 'more rows are')} in comparison.csv." if rest > 0 else ""
        margin = "" if self.margin is None else f" Margin of 'no worse': {self.margin:g}."
        return [
            f"{self.title}.", table,
            "Paired over items, 95 % interval; verdicts are corrected for many comparisons (Holm)." + margin + told,
        ]  # fmt: skip

    def save(self, out: Path | str | None = None) -> Path:
        """Write comparison.csv, the figure and the record into a run folder, by default `runs/compare/<...>`."""
        from mmdit_probe.plots import save

        request = {"runs": [str(run.path or run.model_name) for run in (self.first, self.second)]}
        with RunFolder.open("compare", request | {"margin": self.margin}, out=out) as folder:
            folder.record(experiment=self.first.experiment.name, differs=self.differs, seed=self.first.experiment.seed)
            csv = self.table.to_csv(index=False, float_format="%.6g")
            atomic.write_text(folder.path / "comparison.csv", csv)
            save(self.figure(), folder.path / "comparison")
        return folder.path


_NUMBERS = ("n", "n_undefined", "first", "second", "difference", "low", "high", "p_holm", "verdict")


def compare_runs(first: Path | str | Result, second: Path | str | Result, margin: float | None = None) -> Comparison:
    """Two runs of one experiment, paired by item.

    Args:
        first, second: run folders, or results at hand. margin: the largest loss that does not matter, above 0.

    Raises:
        UserError: no runs, runs of two experiments or of other items, or an experiment without numbers per item.
    """
    one, two = (run if isinstance(run, Result) else Result.read(run) for run in (first, second))
    name = one.experiment.name
    if two.experiment.name != name:
        raise UserError(f"a run of {name} and one of {two.experiment.name}; expected two runs of one experiment")
    if margin is not None and number("--margin", margin) <= 0:
        raise UserError(f"--margin {margin!r}: expected the largest loss that does not matter, above 0")
    found = list(differences(one.request, two.request))
    for entry, was, now in found:
        if _whole_entry(entry) in ITEMS and was is not None and now is not None:
            raise UserError(f"the runs have other {entry}: {_short(was)} and {_short(now)}; pairs need the same items")
    scores = [measured(run.experiment.scores(run)) for run in (one, two)]
    if any(not len(table) for table in scores):
        raise UserError(f"{name} has no numbers per item that two runs could be compared by")
    renamed = one.request.get("model") != two.request.get("model")  # then other weights are told by the name
    differs = [
        f"{entry}: {_short(was)} -> {_short(now)}" for entry, was, now in found
        if entry != "weight_hash" or not renamed
    ]  # fmt: skip
    if not any(entry == "num_steps" for entry, *_ in found) and (other := other_sampling(one.data, two.data)):
        differs.append(_short(other))
    if not renamed and (other := other_parts(one.data["model"], two.data["model"])):
        differs.append(other)
    how = one.experiment
    return Comparison(one, two, margin, _paired(scores[0], scores[1], margin, how.sign, how.distances), differs)


def _paired(
    first: pd.DataFrame, second: pd.DataFrame, margin: float | None, sign: Callable[[str], float] = lambda outcome: 1.0,
    distances: Sequence[str] = (),
) -> pd.DataFrame:  # fmt: skip
    cell = cell_of(first)
    if margin is not None:  # a loss is a fall: where less is better, the values are turned round and back
        first, second = (_turned(table, ["value"], sign) for table in (first, second))
    both = pd.concat([second.assign(control=NONE), first.assign(control="first")], ignore_index=True)
    family = "outcome" if "outcome" in cell else None
    table = compare(both, cell, family=family, margin=margin, distances=distances).drop(columns="control")
    if table.empty:
        raise UserError(
            "the runs have no cell (layer, outcome, ...) in common; run both with the same layers and outcomes"
        )
    table = table.rename(columns={"value": "second", "control_value": "first"})
    if margin is None:
        return table.assign(verdict=two_sided(table))[[*cell, *_NUMBERS]]
    table = _turned(table.assign(verdict=judged(table.assign(margin=margin))), [*_NUMBERS[2:5], "low", "high"], sign)
    table[["low", "high"]] = np.sort(table[["low", "high"]], axis=1)
    return table[[*cell, *_NUMBERS]]


def _turned(table: pd.DataFrame, columns: Sequence[str], sign: Callable[[str], float]) -> pd.DataFrame:
    """The table with these columns of each row times its outcome's sign."""
    signs = table["outcome"].map(sign) if "outcome" in table else sign("")
    return table.assign(**{name: table[name] * signs + 0.0 for name in columns})  # -0.0 would be printed


def _whole_entry(name: str) -> str:
    """The entry of a request that a name from `results.folder.differences` belongs to, which may tell a part of it."""
    return name.removeprefix("number of ").partition(":")[0]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
