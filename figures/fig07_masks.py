"""Fig. 7 and 34 to 39 of arXiv:2509.18096, re-made: label maps of pictures, with class names and without.

    python figures/fig07_masks.py
    python figures/fig07_masks.py --model ... --dataset voc20:VOCdevkit/VOC2012

Writes `fig07_masks_open` (the classes of each picture are named) and `fig37_masks_unsupervised` (nothing is named; a
segment has the colour of the class it is matched to, or grey) under `figures/out/<model>/`, with a CSV of the share of
pixels that are right. Other data sets than scenes:val have their name in the file's name: coco-object is Fig. 34,
pc59 35, ade20k 36; without names coco-stuff-27 is 37, voc20 38, ade20k 39.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from runs import CHOICE, below, chosen, file_suffix, model_of, options_of, paper_layers, run, target, write

from mmdit_probe.data import Dataset, dataset
from mmdit_probe.data.labels import IGNORE
from mmdit_probe.errors import at_least, run_script
from mmdit_probe.evaluate.scores import assign, histogram
from mmdit_probe.experiments import Experiment, Result
from mmdit_probe.experiments.experiment import Study, request_of
from mmdit_probe.plots import style
from mmdit_probe.plots.league import refinement
from mmdit_probe.plots.segmentation import UNLABELLED, borders, class_colours, write_names
from mmdit_probe.plots.sheet import sheet
from mmdit_probe.results.selection import load_selection
from mmdit_probe.segment.record import PAPER_SIGMA, Reading
from mmdit_probe.segment.run import discover, segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.models.mmdit import MMDiT

OPEN = ("iseg", "tokenrank", "diffsegmenter")
BLIND = ("seg4diff-unsup", "diffseg", "diffcut")
REFINE, PIXELS = "centre+pamr", "pamr"
"""Refinement where none was chosen for the model, and that of segments, which have no scale to centre."""
FILES = {"open": "fig07_masks_open", "blind": "fig37_masks_unsupervised"}


@dataclass(frozen=True, kw_only=True)
class Masks(Experiment):
    """Label maps of a few pictures by several methods.

    Attributes:
        dataset, limit: the pictures. layers, selection: where methods read, by number or as selected.
        sigmas, noise_seeds: what they average over. refine: of named classes. options: method -> its options.
        own: the paper's methods alone.
    """

    name: ClassVar[str] = "masks"
    tables: ClassVar[tuple[str, ...]] = ("masks",)

    dataset: str = "scenes:val"
    limit: int = 6
    layers: tuple[int, ...] | None = None
    selection: str | None = None
    sigmas: Sequence[float] = (PAPER_SIGMA,)
    noise_seeds: int = 1
    refine: str = REFINE
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    own: bool = False

    def runs(self) -> list[tuple[str, str, str]]:
        """(kind, method, refinement) of every column."""
        named = [
            ("seg4diff", "none"),
            ("seg4diff", self.refine),
            *(() if self.own else [(m, self.refine) for m in OPEN]),
        ]
        unnamed = [(BLIND[0], "none"), *((method, PIXELS) for method in (BLIND[:1] if self.own else BLIND))]
        return [("open", *one) for one in named] + [("blind", *one) for one in unnamed]

    def gather(self, scenes: bool) -> Dataset:
        return dataset(self.dataset, self.limit)

    def prepare(self, model: MMDiT, inputs: Dataset) -> Study:
        how: dict[str, Any] = {"layers": self.layers}
        if self.selection is not None:
            found = load_selection(self.selection, model)
            how = {"layers": found.layers, "weights": dict(zip(found.layers, found.weights, strict=True))}
        how |= {"sigmas": tuple(self.sigmas), "seeds": tuple(range(self.noise_seeds))}
        request = request_of(
            model, dataset=self.dataset, pictures=[sample.fingerprint() for sample in inputs.samples], runs=self.runs(),
            options=self.options, **how,
        )  # fmt: skip
        tasks = list(enumerate(inputs.samples))
        return Study(model, request, tasks, "pictures", state=(inputs, Reading(**how)))

    def measure(self, study: Study, task: tuple[int, Any], record: TaskRecord) -> None:
        (number, sample), (data, reading) = task, study.state
        truth = sample.label()
        present = [index for index in range(len(data.classes)) if (truth == index).any()]
        maps, rows = {}, []
        for kind, method, refine in self.runs():
            how = {"method": method, "options": self.options.get(method), "refine": refine}
            if kind == "open":
                names = [data.classes[index] for index in present]
                labels = np.array(present)[segment(study.model, sample.image, names, reading, **how).labels]
            else:
                labels = matched(discover(study.model, sample.image, reading, **how).labels, truth, len(data.classes))
            maps[f"{kind} {method} {refine}"] = labels.astype(np.uint16)
            right = float((labels == truth)[truth != IGNORE].mean())
            rows.append(
                {"picture": sample.name, "kind": kind, "method": column_name(method, refine), "right": right}
            )  # fmt: skip
        record.arrays(f"{number:03d}", **maps)
        record.write("masks", pd.DataFrame(rows))

    def summarise(self, result: Result) -> pd.DataFrame:
        return result.table.groupby(["kind", "method"], observed=True, sort=False)["right"].mean().reset_index()

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        return {file: result.table[result.table["kind"] == kind].drop(columns="kind") for kind, file in FILES.items()}

    def draw(self, result: Result) -> dict[str, Figure]:
        data = self.gather(False)
        what = {"open": "classes named", "blind": "nothing named, segments matched to classes"}
        return {
            FILES[kind]: mask_sheet(
                [sample.image for sample in data.samples], [sample.label() for sample in data.samples],
                label_maps(result, kind), [one.name for one in data.classes],
                title=f"{result.model_name} on {self.dataset}: {words}, n = {len(data)} pictures",
            )
            for kind, words in what.items()
        }  # fmt: skip


def label_maps(result: Result, kind: str) -> dict[str, list[np.ndarray]]:
    """Column -> label map of each picture."""
    masks: Any = result.experiment
    stored = [result.store.load_arrays(f"{number:03d}") for number in range(len(result.request["pictures"]))]
    return {
        column_name(method, refine, refinement): [maps[f"{kind} {method} {refine}"].astype(np.int64) for maps in stored]
        for of, method, refine in masks.runs()
        if of == kind
    }


def column_name(method: str, refine: str, told: Callable[[str], str] = str) -> str:
    return method if refine == "none" else f"{method} + {told(refine)}"


def matched(found: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """The class of each pixel's segment after one assignment per picture; `IGNORE` for segments left over."""
    of = assign(histogram(truth, found, classes), "image")
    return np.where(of == classes, IGNORE, of)[found]


def settings(model: str) -> dict[str, Any]:
    """Where methods read: as chosen for this model, as the paper reads it, or the defaults."""
    found = chosen(model)
    if not found:
        return {"layers": tuple(paper_layers(model)) or None}
    return {
        "selection": str(below(CHOICE / found["selection"])), "sigmas": tuple(found["sigma"]),
        "refine": found["refine"], "noise_seeds": found["noise_seeds"], "options": found["options"],
    }  # fmt: skip


def measured(options: argparse.Namespace, *, lora: bool = True, own: bool = False) -> Result:
    """The label maps of the model, with its LoRA if one is named."""
    how = {"dataset": options.dataset, "limit": options.limit, "own": own, **settings(options.model)}
    return run(Masks(**how), model_of(options, lora=lora), options)


def main() -> None:
    parser = options_of(__doc__, run=False, more=False)
    parser.add_argument("--dataset", default="scenes:val")
    parser.add_argument("--limit", type=at_least(1), default=6, help="number of pictures")
    options = parser.parse_args()
    result = measured(options)
    for name, table in result.frames.items():
        stem = name + file_suffix(options.dataset)
        write(result.figure(name), target(options, result.model_name, stem), table)


def mask_sheet(
    pictures: Sequence[NDArray[np.uint8]], truths: Sequence[NDArray[Any]], found: Mapping[str, Sequence[NDArray[Any]]],
    names: Sequence[str], *, title: str = "",
) -> Figure:  # fmt: skip
    """Label maps beside the truth, after Fig. 7, 11 and 34 to 39: a row per picture, a column per method.

    Args:
        pictures: uint8 [H, W, 3]. truths: class ids [H, W] per picture, 255 where there is none.
        found: method -> class ids [H, W] per picture; 255, drawn grey, is no class. Under each map stands the share of
            the labelled pixels that are right.
        names: of the classes, for the legend.
    """
    seen = [index for index in range(len(names)) if any((truth == index).any() for truth in truths)]
    colours = np.full((len(names) + 1, 3), 221, np.uint8)
    colours[seen] = class_colours([names[index] for index in seen])  # few are told apart better than hundreds

    def enlarged(labels: NDArray[Any]) -> NDArray[Any]:
        return np.kron(labels, np.ones((-(-192 // len(labels)),) * 2, labels.dtype))  # so that borders are thin

    def paint(labels: NDArray[Any]) -> NDArray[np.uint8]:
        painted = colours[np.where(labels < len(names), labels, len(names))]
        painted[borders(labels)] = 0  # in grey print, classes of like lightness meet
        return painted

    def right(labels: NDArray[Any], truth: NDArray[Any]) -> str:
        return f"{float((labels == truth)[truth < UNLABELLED].mean()):.0%} right"

    rows = [[enlarged(labels) for labels in of_picture] for of_picture in zip(truths, *found.values(), strict=True)]
    cells = [[picture, *map(paint, row)] for picture, row in zip(pictures, rows, strict=True)]
    below = [
        ["", "", *(right(labels, truth) for labels in maps)]
        for truth, *maps in zip(truths, *found.values(), strict=True)
    ]
    legend = {names[index]: tuple(colours[index] / 255) for index in seen}
    if any((labels >= len(names)).any() for row in rows for labels in row):
        legend["no class"] = tuple(colours[-1] / 255)
    columns = ["picture", "truth", *(name.replace(" + ", "\n+ ", 1) for name in found)]
    drawn = sheet(cells, columns, below=below, legend=legend, title=title)
    side = min(0.95, style.PAGE / len(columns) - 0.06)
    for y, row in enumerate(rows):
        for labels, panel in zip(row, drawn.axes[y * len(columns) + 1 :], strict=False):
            write_names(panel, labels, names, side)
    return drawn


if __name__ == "__main__":
    run_script(main)
