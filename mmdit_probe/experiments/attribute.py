"""Attribute: causal attribution of words to regions (captum), and where attention agrees with it.

    result = Attribute(limit=24).run("scenes-sd3")
    result.summary                     # per layer: rank correlation of attention and attribution, with a control

Control that is always there: the attention of the scene's next word. Not here: the attribution itself
(`experiments.word_attribution`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mmdit_probe.errors import UserError, counted
from mmdit_probe.experiments import controls
from mmdit_probe.experiments.experiment import Experiment, Study, plain, request_of
from mmdit_probe.experiments.options import Control, Input, LayersAndHeads
from mmdit_probe.experiments.text import Text, TextTable, signed
from mmdit_probe.options import Option
from mmdit_probe.scenes import scene, split_of_world

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.controls import Variant
    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.scenes.world import Scene


@dataclass(frozen=True, kw_only=True)
class Attribute(LayersAndHeads, Experiment):
    """By how much does each word lower the denoising loss in each region, and do I2T maps say the same, per layer?

    On scenes, where regions are known exactly. Control that is always there: the attention of the scene's next word.
    """

    name = "attribute"
    examples = ("--limit 8", "--method gradients --target mass --limit 16")
    tables = ("attribution",)
    possible = ("random", "uniform")
    claimed = "attention and attribution agree (rank correlation within scenes) more than in the control"

    method: Annotated[Literal["ablation", "gradients"], Option("Feature ablation, or integrated gradients.")] = (
        "ablation"
    )
    target: Annotated[
        Literal["loss", "mass"],
        Option("A region's denoising loss, or the mass of the word's own map in it, per layer."),
    ] = "loss"
    limit: Annotated[int, Input("Scenes.", min=2)] = 24
    split: Annotated[Literal["train", "val", "test"], Input("Scenes split.")] = "val"
    sigma: Annotated[float, Option("Noise level, above 0 (clean) to 1 (noise).", above=0, max=1)] = 0.7
    control: Control = "none"

    def gather(self, scenes: bool) -> list[tuple[int, Scene]]:
        if not scenes:
            raise UserError("attribution compares words with the regions of scenes, which this model does not know")
        items = [(index, scene(self.split, index)) for index in range(self.limit)]
        several = [(index, item) for index, item in items if len(item.class_names) > 1]
        if not several:
            raise UserError(f"none of {self.limit} scenes has two classes; attribution compares words: raise --limit")
        return several

    def prepare(self, model: MMDiT, inputs: list[tuple[int, Scene]]) -> Study:
        layers, heads = self.places(model)
        chosen = self.chosen_controls()
        request = request_of(
            model, method=self.method, target=self.target, layers=list(layers), heads=plain(heads), n=self.limit,
            split=split_of_world(self.split), sigma=self.sigma, seed=self.seed, controls=list(chosen),
        )  # fmt: skip
        tasks = [(variant, index, item) for variant in controls.variants(model, chosen) for index, item in inputs]
        return Study(model, request, tasks, "scenes", state=(layers, heads))

    def measure(self, study: Study, task: tuple[Variant, int, Scene], record: TaskRecord) -> None:
        from mmdit_probe.experiments.word_attribution import attribute

        (variant, index, item), (layers, heads) = task, study.state
        frame = attribute(
            variant.model, [item], method=self.method, target=self.target, sigma=self.sigma, seed=self.seed + index,
            layers=layers, heads=heads, edits=variant.edits,
        )  # fmt: skip
        record.write("attribution", frame.assign(item=index), control=variant.name)

    def summarise(self, result: Result) -> pd.DataFrame:
        from mmdit_probe.experiments.word_attribution import agreement

        return agreement(result.table)

    def scores(self, result: Result) -> pd.DataFrame:
        from mmdit_probe.experiments.word_attribution import by_scene

        return by_scene(result.table)

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        return {"agreement": result.summary}

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.layers import agreement

        what = f"{result.model_name}: {self.target}, {self.method}"
        count = result.summary["n"].max()
        title = f"{what}, n = {counted(count, 'scene')}, sigma {self.sigma:g}"
        return {"attribute": agreement(result.summary, title=title)}

    def tell(self, result: Result) -> list[Text]:
        of = "loss of the region" if self.target == "loss" else "mass of the map in the region"
        return [
            agreement_table(result.summary),
            f"rank correlation over (word, region) pairs of I2T attention and attribution to the {of}, 95 % interval"
            " over scenes; control: the attention of the scene's next word.",
            f"n = {counted(result.summary['n'].max(), 'scene')}, sigma {self.sigma:g}, {self.method}.",
        ]


def agreement_table(table: pd.DataFrame) -> TextTable:
    """One row per layer in text."""
    result = TextTable(["layer", "rank correlation", "control", "verdict"], left=("verdict",))
    for row in table.to_dict("records"):
        values: dict[Any, Any] = row
        result.add(
            str(values["layer"]), signed(values["rho"], values["low"], values["high"]),
            signed(values["control"], values["control_low"], values["control_high"]), str(values["verdict"]),
        )  # fmt: skip
    return result
