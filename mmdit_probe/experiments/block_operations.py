"""BlockOperations: remove a block, silence its text, double its text, one layer at a time; after arXiv:2601.02211.

    result = BlockOperations(layers="all", limit=32).run("scenes-sd3")
    result.summary                     # per operation, layer and outcome: paired difference from stock, verdict

That paper reads from such operations which blocks matter to what, and keeps doubling as "enhance", a way to better
alignment without further training or forwards (`Generate(enhance=...)` samples with it). An operation on a block is no
change of one attention block, so it has no control of equal size; a block that hurts when it is removed need not be one
that reads text: compare the columns. Not here: the operations (`edit.blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError, counted
from mmdit_probe.experiments.sweep import DISTANCES, STOCK, Condition, JudgedSweep, aligned_outcome, gains
from mmdit_probe.experiments.text import Text, TextTable, signed
from mmdit_probe.options import Option
from mmdit_probe.results.statistics import compare, measured, two_sided
from mmdit_probe.specs import Spec, layer_indices, named_of, step_indices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.models.mmdit import MMDiT

OPERATIONS = ("remove", "silence", "double")
ALL_OPERATIONS = ",".join(OPERATIONS)
PLACE = ["condition", "layer"]
ROW = ["item", "prompt", "seed", "control", *PLACE]


@dataclass(frozen=True, kw_only=True)
class BlockOperations(JudgedSweep):
    """Remove a block, silence its text (zeros) or double it, one layer at a time, and sample with the same seeds.

    Outcomes as in perturb: what the image still shows of the prompt, and how far it moves.
    """

    name = "block-operations"
    examples = ("--limit 16", "--operations remove,double --layers 2-5 --limit 16")
    tables = ("blocks",)
    claimed = "the operation raises the outcome (edited minus stock) more than in the control"

    layers: Annotated[Spec, Option("Joint-attention layers, 0-based: all, 4, 2-5 or 0,4.")] = "all"
    operations: Annotated[str, Option("Some of remove, silence, double, by comma.")] = ALL_OPERATIONS
    steps: Annotated[Spec, Option("Sampling steps concerned: all, 0,20, 0-4, last-8.")] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        step_indices(self.steps, self.num_steps)
        self.wanted()
        if set(self.chosen_controls()) & {"budget", "noise"}:
            raise UserError("operations on blocks have no control of equal size; expected random, shuffled or none")

    def wanted(self) -> list[str]:
        """The operations asked for."""
        return named_of("operation", self.operations, OPERATIONS)

    def conditions(self, model: MMDiT, prompts: Sequence[str]) -> list[Condition]:
        from mmdit_probe.edit import RemoveBlock, ScaleText

        kinds: dict[str, Any] = {"remove": RemoveBlock(), "silence": ScaleText(factor=0.0), "double": ScaleText()}
        plan = [Condition(STOCK, {"condition": STOCK, "layer": -1})]
        for name in self.wanted():
            for layer in layer_indices(self.layers, len(model.layers)):
                edit = kinds[name].at(layers=[layer], steps=self.steps)
                plan.append(Condition(f"{name}-layer{layer}", {"condition": name, "layer": layer}, edit))
        return plan

    def keeps(self, index: int) -> bool:
        return index < 2

    def summarise(self, result: Result) -> pd.DataFrame:
        return summarise(self.rows(result))

    def scores(self, result: Result) -> pd.DataFrame:
        return gains(self.rows(result), ROW, PLACE)

    def headline(self, claims: pd.DataFrame) -> pd.DataFrame:
        told = claims[claims["outcome"] == (aligned_outcome(claims) or "change")]
        return told.rename(columns={"condition": "kind"}).drop(columns="outcome")

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.perturb import block_effects

        title = f"{result.model_name}: operations on single blocks, n = {counted(result.summary['n'].max(), 'prompt')}"
        names = [name for name in (aligned_outcome(result.table), "change") if name]
        return {"blocks": block_effects(result.summary, names, title=title)}

    def tell(self, result: Result) -> list[Text]:
        from mmdit_probe.plots.perturb import LABELS

        main = aligned_outcome(result.table) or "change"
        part = result.summary[result.summary["outcome"] == main]
        table = TextTable(["layer", *(c for name in self.wanted() for c in (name, "verdict"))], title=LABELS[main])
        for layer, rows in part.groupby("layer"):
            of = rows.set_index("condition")
            cells = [
                cell
                for name in self.wanted()
                for row in (of.loc[name],)
                for cell in (signed(row["difference"], row["low"], row["high"]), str(row["verdict"]))
            ]
            table.add(str(layer), *cells)
        return [
            table,
            "Difference from the stock image of the same prompt and seed, 95 % interval over prompts; verdicts are"
            " corrected for many comparisons (Holm).",
            f"n = {counted(part['n'].max(), 'prompt')}, {counted(self.num_steps, 'step')}, guidance {self.guidance:g},"
            f" operations at steps {self.steps}.",
        ]


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """The measurement beside its stock images: columns condition, layer, outcome, n, difference, low, high, p_holm and
    verdict (higher, lower, no difference shown, too few items)."""
    own = gains(measured(table), ROW, PLACE)
    paired = pd.concat([own, own.assign(control=STOCK, value=0.0)], ignore_index=True)
    found = compare(paired, [*PLACE, "outcome"], family="outcome", distances=DISTANCES)
    return found.assign(verdict=two_sided(found))[
        [*PLACE, "outcome", "n", "difference", "low", "high", "p_holm", "verdict"]
    ]
