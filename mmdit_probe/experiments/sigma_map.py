"""SigmaByLayer: at which noise level does which layer read nouns, colours, counts and relations?

    result = SigmaByLayer(limit=32, sigma="0.3,0.6,0.9").run("scenes-sd3")
    result.summary                     # per word kind, layer and sigma: what reading the stated word there is worth

A scene, noised, is denoised once with its true caption and once with a caption that states the opposite (another noun,
swapped colours, a wrong count, the opposite relation). A layer is worth what the loss rises if it alone reads the text
of the false caption (`edit.OtherText`), all other layers the true one; in rows of layer -1 every layer reads it. The
loss is the velocity's mean squared error over the image; its rise is told as a share of the loss itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError
from mmdit_probe.experiments.experiment import Experiment, Study, request_of
from mmdit_probe.experiments.options import Input
from mmdit_probe.experiments.text import Text, TextTable, signed
from mmdit_probe.options import Option
from mmdit_probe.results.statistics import HIGHER, NONE, compare, two_sided
from mmdit_probe.scenes import scene, split_of_world
from mmdit_probe.scenes.captions import describe, opposites, parse
from mmdit_probe.scenes.world import THINGS, Scene
from mmdit_probe.specs import Spec, layer_indices, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.models.mmdit import MMDiT

KINDS = ("noun", "colour", "count", "relation")
EVERY = -1
"""Value of the column `layer` in rows where every layer reads the false caption."""
UNEDITED = "unedited"

_CAPTIONS = {
    "colour": ("complex", "swapped_colours"), "count": ("numeracy", "wrong_count"),
    "relation": ("2d-spatial", "opposite_relation"),
}  # fmt: skip
"""Word kind -> (kind of caption that states it, its opposite)."""


@dataclass(frozen=True, kw_only=True)
class SigmaByLayer(Experiment):
    """Which layer reads nouns, colours, counts and relations at which noise level: loss with the opposite word there.

    Writes sigma_map.parquet (one row per scene, word kind, sigma and layer), the summary, one heat map per word kind
    and run.json into a run folder.
    """

    name = "sigma-map"
    examples = ("--limit 4",)
    tables = ("sigma_map",)

    layers: Annotated[Spec, Option("Joint-attention layers, 0-based: all, 4, 2-5 or 0,4.")] = "all"
    sigma: Annotated[str, Option("Noise levels by comma, above 0 (clean) to 1 (noise).")] = "0.1,0.3,0.5,0.7,0.9,1.0"
    limit: Annotated[int, Input("Scenes per word kind.", min=1)] = 32
    split: Annotated[Literal["train", "val", "test"], Input("Scenes split.")] = "val"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.levels()

    def levels(self) -> list[float]:
        """The noise levels.

        Raises:
            UserError: they are none above 0 and up to 1.
        """
        refusal = f"--sigma {self.sigma!r}: expected noise levels above 0 and up to 1, e.g. 0.3,0.6,0.9"
        return numbers(self.sigma, 1e-6, 1, refusal)

    def gather(self, scenes: bool) -> list[tuple[int, Scene, dict[str, tuple[str, str]]]]:
        if not scenes:
            raise UserError("a sigma map states the opposite of scenes' captions, which this model does not know")
        return first_stating(self.split, self.limit)

    def prepare(self, model: MMDiT, inputs: list[tuple[int, Scene, dict[str, tuple[str, str]]]]) -> Study:
        layers = layer_indices(self.layers, len(model.layers))
        request = request_of(
            model, layers=list(layers), sigmas=self.levels(), n_of_kind=self.limit, split=split_of_world(self.split),
            seed=self.seed,
        )  # fmt: skip
        return Study(model, request, inputs, "scenes", state=layers)

    def measure(self, study: Study, task: Any, record: TaskRecord) -> None:
        number, item, pairs = task
        for kind, pair in pairs.items():
            for sigma in self.levels():
                values = rises(study.model, item, pair, sigma, self.seed + number, study.state)
                columns = {"layer": np.array([EVERY, *study.state]), "value": np.array(values)}
                record.write("sigma_map", columns, item=number, control=NONE, kind=kind, sigma=f"{sigma:g}")

    def summarise(self, result: Result) -> pd.DataFrame:
        found = compare(self.scores(result), ["kind", "layer", "sigma"])
        return found.assign(verdict=two_sided(found))[
            ["kind", "layer", "sigma", "n", "difference", "low", "high", "p_holm", "verdict"]
        ]

    def scores(self, result: Result) -> pd.DataFrame:
        """The rises, beside 0 of the model that reads the true caption everywhere."""
        own = result.table[["item", "control", "kind", "layer", "sigma", "value"]]
        return pd.concat([own, own.assign(control=UNEDITED, value=0.0)], ignore_index=True)

    def compare(self, result: Result) -> pd.DataFrame:
        return pd.DataFrame()  # the summary is the comparison, cell by cell

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.layers import sigma_map

        title = (
            f"{result.model_name}: rise of the loss if one layer reads the opposite word; each kind on its own scale"
        )
        return {"sigma_map": sigma_map(result.summary, title=title)}

    def tell(self, result: Result) -> list[Text]:
        return [
            strongest(result.summary),
            "rise of the denoising loss, as a share of it, if this layer alone reads the text of a caption with the"
            " opposite word, 95 % interval over scenes; every layer: all of them read it. The largest was found on the"
            " same scenes, which its interval does not allow for.",
            f"Scenes that state the kind: {_counts(result.summary)}; verdicts corrected for many comparisons (Holm).",
        ]


def first_stating(split: str, limit: int) -> list[tuple[int, Scene, dict[str, tuple[str, str]]]]:
    """Numbers, scenes and what of `stated_and_opposite` is asked of each: every kind has its first `limit` scenes.

    Every scene can state a noun, one in six a count: scenes that serve all kinds alike would have few of the others.
    """
    left, found, number = dict.fromkeys(KINDS, limit), [], 0
    while any(left.values()):
        item = scene(split, number)
        pairs = {kind: pair for kind, pair in stated_and_opposite(item).items() if left[kind]}
        for kind in pairs:
            left[kind] -= 1
        if pairs:
            found.append((number, item, pairs))
        number += 1
    return found


def stated_and_opposite(item: Scene) -> dict[str, tuple[str, str]]:
    """Word kind -> (a true caption, the same with the opposite word), for the kinds that the scene can state."""

    caption = describe(item, "complex")
    facts = parse(caption)
    free = [noun for noun in THINGS if noun not in {group.noun for group in facts.groups}]
    renamed = [replace(group, noun=free[place % len(free)]) for place, group in enumerate(facts.groups)]
    found = {"noun": (caption, str(replace(facts, groups=tuple(renamed))))}
    for kind, (of, opposite) in _CAPTIONS.items():
        stated = describe(item, of)
        turned = opposites(stated)
        if opposite in turned:
            found[kind] = stated, turned[opposite]
    return found


def rises(
    model: MMDiT, item: Scene, pair: tuple[str, str], sigma: float, seed: int, layers: tuple[int, ...]
) -> list[float]:
    """Rise of the loss, as a share of it, if every layer, and then each one alone, reads the second caption."""
    from mmdit_probe.edit import OtherText
    from mmdit_probe.observe.probe import probe

    clean = model.encode_image(item.image)
    noised = model.noise(clean, sigma, seed)
    velocity, both = (noised - clean) / sigma, noised.repeat(2, 1, 1, 1)
    text = model.encode_prompt(list(pair))

    def losses() -> Any:
        return (model.denoise(both, sigma, text) - velocity).float().square().flatten(1).mean(1)

    stated, opposite = losses().tolist()
    found = [opposite / stated - 1]
    for layer in layers:
        with probe(model, edits=OtherText(layers=[layer])):
            found.append(float(losses()[0]) / stated - 1)
    return found


def strongest(summary: pd.DataFrame) -> TextTable:
    """Per word kind: the rise when every layer reads the opposite, at its largest, and the layers that weigh most."""
    columns = ["words", "every layer", "at sigma", "layer that weighs most", "at sigma", "layers that matter"]
    table = TextTable(columns, left=columns[-1:], spare=("at sigma",))
    for kind in (kind for kind in KINDS if kind in set(summary["kind"])):
        part = summary[summary["kind"] == kind]
        cells = [kind]
        for rows in (part[part["layer"] == EVERY], part[part["layer"] != EVERY]):
            top = rows.sort_values("difference").iloc[-1]
            value = signed(top["difference"], top["low"], top["high"])
            cells += [value if top["layer"] == EVERY else f"{top['layer']}: {value}", str(top["sigma"])]
        sure = part[(part["verdict"] == HIGHER) & (part["layer"] != EVERY)]["layer"]
        table.add(*cells, ", ".join(map(str, sorted(set(sure)))) or "none shown")
    return table


def _counts(summary: pd.DataFrame) -> str:
    counts = summary.groupby("kind", observed=True)["n"].max()
    return ", ".join(f"{kind} {counts[kind]}" for kind in KINDS if kind in counts)
