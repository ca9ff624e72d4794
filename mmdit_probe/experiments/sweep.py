"""Sweeps: the same prompts and seeds sampled under several conditions, and what the images lose or gain.

What perturb and generate have in common. A condition is stock sampling, an edit of every forward, or guidance away from
an edited forward (Eq. 7); all images of a prompt start from the same noise, so every number is paired. The controls of
`experiments.controls` run the same conditions on random weights, under uniform attention, or read the same images
against another item's caption. Not here: the edits (`edit`), what an image shows (`experiments.outcomes`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.experiments import controls
from mmdit_probe.experiments.experiment import (
    Experiment,
    Study,
    one_per_item,
    read_of_videos,
    request_of,
    scheduled,
)
from mmdit_probe.experiments.options import (
    EditControl,
    Filmed,
    Input,
    Output,
    Prompts,
    Referring,
    Sampling,
    prompts_of,
)
from mmdit_probe.experiments.target import knows_scenes
from mmdit_probe.experiments.token_rows import cut_off
from mmdit_probe.models.names import check_checkpoint, contents_of
from mmdit_probe.options import Option
from mmdit_probe.results.clip import Clip, still, stills
from mmdit_probe.results.statistics import NONE, measured
from mmdit_probe.scenes.captions import CONTRASTS, STATED

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from mmdit_probe.experiments.controls import Variant
    from mmdit_probe.experiments.outcomes import Outcome
    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.models.mmdit import MMDiT

STOCK = "stock"
BUDGET, NOISE = "budget", "noise"
"""Values of the column `control` in rows of the controls of equal size: coherent, and white noise."""
EQUAL: dict[str, Literal["rotation", "noise"]] = {BUDGET: "rotation", NOISE: "noise"}
"""Control -> kind of `EqualBudget`."""
AGAINST_STOCK = ("change", "relabelled", "clip_i", "dino")
"""Outcomes that already compare with the unedited image; the others are reported as differences from its value."""

MEANING = ("facts", "things_right", "grounds_right", *STATED, "clip_t", "dino", "clip_i", "relabelled", "change")
"""Outcomes in the order in which they are told: what the image says of its prompt first, how far it moved last."""

DISTANCES = ("change",)
"""Outcomes that are 0 where no pixel moved, and then exactly."""

HARM_IS_RISE = ("change", "relabelled", *CONTRASTS.values())
"""Outcomes whose rise is harm; of the others it is the drop."""


@dataclass(frozen=True)
class Condition:
    """One way to sample.

    Attributes:
        name: a file name's worth of it. labels: its columns in the table.
        edit: acts in every forward; with a scale, in the extra forward that guidance leads away from.
        control: "none", or which control of equal size it is.
    """

    name: str
    labels: Mapping[str, Any]
    edit: Any = None
    scale: float = 0.0
    control: str = NONE


@dataclass(frozen=True)
class PromptGroup:
    """A task: some prompts under one variant of the model."""

    variant: Variant
    indices: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Sweep(Sampling, Filmed, Referring, Experiment):
    """Prompts under conditions, one row per image."""

    prompts: Prompts = None
    limit: Annotated[
        int | None,
        Input("Use the first LIMIT prompts.", min=1, shown_default="{0.default_prompts}, or all of --prompts"),
    ] = None
    control: EditControl = NONE
    batch: Annotated[int, Output("Prompts sampled at once.", min=1)] = 8

    default_prompts = 16
    possible = (*EQUAL, *controls.CONTROLS)
    distances = DISTANCES

    @abstractmethod
    def conditions(self, model: MMDiT, prompts: Sequence[str]) -> list[Condition]:
        """Everything to sample, stock first."""

    @abstractmethod
    def keeps(self, index: int) -> bool:
        """Whether the images of a prompt are kept."""

    def gather(self, scenes: bool) -> list[str]:
        asked = prompts_of(self.prompts, self.limit, scenes, self.default_prompts)
        if "shuffled" in self.chosen_controls():
            controls.others(asked)
        return asked

    def prepare(self, model: MMDiT, inputs: list[str]) -> Study:
        chosen, plan = self.chosen_controls(), self.conditions(model, inputs)
        outcomes, checkpoints = self.outcomes(model)
        request = request_of(
            model,
            conditions=[[c.name, dict(c.labels), c.scale, None if c.edit is None else c.edit.record()] for c in plan],
            controls=list(chosen),
            outcomes=[name for outcome in outcomes for name in outcome.names],
            checkpoints=checkpoints,
            num_steps=self.num_steps,
            guidance=self.guidance,
            batch=self.batch,
            items=[[prompt, self.seed + index] for index, prompt in enumerate(inputs)],
            **self.extra_request(),
        )
        groups = [range(first, min(first + self.batch, len(inputs))) for first in range(0, len(inputs), self.batch)]
        sampled = controls.variants(model, [name for name in chosen if name in ("random", "uniform")])
        tasks = [PromptGroup(variant, indices) for variant in sampled for indices in groups]
        notes = model.notes_on_words(inputs) + cut_off(model, inputs) + read_of_videos(model)
        return Study(
            model, request, tasks, "batches of images", len(plan), notes=notes, state=(inputs, plan, outcomes),
            facts=scheduled(model, self.num_steps)
            | {"remarks": notes, "contents": contents_of(*checkpoints.values())},
        )  # fmt: skip

    @abstractmethod
    def outcomes(self, model: MMDiT) -> tuple[list[Outcome], dict[str, str | None]]:
        """What is measured of the images, and the checkpoints it takes."""

    def extra_request(self) -> dict[str, Any]:
        """Options of the subclass that decide the numbers and are in no condition."""
        return {}

    def measure(self, study: Study, task: PromptGroup, record: TaskRecord) -> None:
        from mmdit_probe.experiments.outcomes import measure

        prompts, plan, outcomes = study.state
        own = task.variant.name == NONE
        texts = [prompts[index] for index in task.indices]
        seeds = [self.seed + index for index in task.indices]
        stock: list[Image | Clip] = []
        for condition in plan:
            if condition.control != NONE and not own:
                continue  # a change of equal size is the measurement's own control
            images = self.sample(task.variant, condition, texts, seeds)
            stock = stock or images
            for control, read in self._read(task, condition, prompts, texts):
                columns = {
                    "item": np.array(task.indices, np.int64),
                    "prompt": np.array(read, dtype=object),
                    "seed": np.array(seeds, np.int64),
                    **measure(outcomes, read, stills(images), stills(stock)),
                }
                labels = {name: value for name, value in condition.labels.items() if name != "control"}
                record.write(self.tables[0], columns, control=control, **labels)
            if own:
                for index, image in zip(task.indices, images, strict=True):
                    if self.keeps(index):
                        record.picture(f"{index:03d}-{condition.name}", image)
            record.advance()

    def _read(
        self, task: PromptGroup, condition: Condition, prompts: Sequence[str], texts: list[str]
    ) -> Iterable[tuple[str, list[str]]]:
        """(control, texts that the images are read against) of the rows of a condition."""
        own = task.variant.name == NONE
        yield (condition.control if own else task.variant.name), texts
        if own and condition.control == NONE and "shuffled" in self.chosen_controls():
            moved = controls.others(prompts)
            yield "shuffled", [moved[index] for index in task.indices]

    def sample(self, variant: Variant, condition: Condition, texts: list[str], seeds: list[int]) -> list[Image | Clip]:
        """Images, or videos, of a condition."""
        from mmdit_probe.edit.guidance import perturbed_guidance
        from mmdit_probe.observe.probe import probe

        options: dict[str, Any] = {"steps": self.num_steps, "guidance": self.guidance, "seed": seeds}
        edits = [*variant.edits, *([condition.edit] if condition.edit is not None and condition.scale == 0 else [])]
        with ExitStack() as stack:
            if edits:
                stack.enter_context(probe(variant.model, edits=edits))
            if condition.scale == 0:
                return variant.model.generate(texts, **options)
            guided = stack.enter_context(perturbed_guidance(variant.model, condition.edit))
            return guided.generate(texts, scale=condition.scale, **options, **self.guided_options())

    def sign(self, outcome: str) -> float:
        return -1.0 if outcome in HARM_IS_RISE else 1.0

    def files(self, result: Result, folder: Path) -> None:
        self.write_videos(result, folder)

    def rows(self, result: Result) -> pd.DataFrame:
        """The table with the images of one prompt averaged, where a prompt was given several times."""
        request = result.request
        labels = dict.fromkeys(("control", *request["conditions"][0][1]))
        return one_per_item(result.table, request["items"], [*labels])

    def guided_options(self) -> dict[str, Any]:
        """Options of guided sampling beside the scale."""
        return {}


@dataclass(frozen=True, kw_only=True)
class JudgedSweep(Sweep):
    """A sweep whose images are judged by the scenes parser, CLIP and DINO."""

    clip: Annotated[
        str | None,
        Option(
            "CLIP checkpoint for CLIP-T and CLIP-I: a folder, a hub id, or none.",
            shown_default="scenes-clip for embedded models",
        ),
    ] = None
    dino: Annotated[str | None, Option("DINO checkpoint for image similarity (folder or hub id).")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_checkpoint("--clip", self.clip, "scenes-clip", "none")
        check_checkpoint("--dino", self.dino)

    def outcomes(self, model: MMDiT) -> tuple[list[Outcome], dict[str, str | None]]:
        from mmdit_probe.experiments.outcomes import outcomes_of

        return outcomes_of(knows_scenes(model), model.device, self.clip, self.dino)


def outcome_names(table: pd.DataFrame, row: Sequence[str]) -> list[str]:
    """The columns of a sweep's table that are outcomes."""
    return [str(name) for name in table.columns if name not in row]


def aligned_outcome(table: pd.DataFrame) -> str | None:
    """The best measure of alignment with the prompt that is defined somewhere.

    Args:
        table: a sweep's, with a column per outcome, or a summary with columns outcome and n.
    """
    if "outcome" in table:
        names = set(table.loc[table["n"] > 0, "outcome"])
    else:
        names = {str(name) for name in table.columns if table[name].notna().any()}
    return next((name for name in ("facts", "clip_t") if name in names), None)


def own_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the measurement itself, its controls of equal size among them."""
    return table[table["control"].isin([NONE, *EQUAL])]


def effects(table: pd.DataFrame, row: Sequence[str]) -> pd.DataFrame:
    """The measurement's own rows with every outcome as a paired effect: what compares with the unedited image as it is,
    the others minus the value of the unedited image of the same prompt and seed.

    Args:
        row: the columns that are no outcomes, `condition` among them, which is "stock" for the unedited images.
    """
    return _paired(own_rows(table), measured(table), row)


def gains(table: pd.DataFrame, row: Sequence[str], place: Sequence[str]) -> pd.DataFrame:
    """The paired effects of the measurement and of its controls, for `results.statistics.compare`: columns item,
    control, those of `place`, outcome, value. Controls of equal size are paired with the measurement's own unedited
    images, the others with theirs; another item's caption has no effect on outcomes that read no text.

    Args:
        row: as `effects` takes it. place: the columns that say what was done.
    """
    parts = []
    for control in dict.fromkeys(table["control"]):
        own = table[table["control"] == control]
        part = _paired(own, measured(table) if control in EQUAL else own, row)
        names = [name for name in outcome_names(part, row) if control != "shuffled" or name not in AGAINST_STOCK]
        parts.append(part.melt(["item", "control", *place], names, "outcome"))
    return pd.concat(parts, ignore_index=True)


def _paired(table: pd.DataFrame, unedited: pd.DataFrame, row: Sequence[str]) -> pd.DataFrame:
    stock = unedited[unedited["condition"] == STOCK].set_index("item")
    result = table[table["condition"] != STOCK].copy()
    for name in outcome_names(table, row):
        if name in ("clip_i", "dino"):
            result[name] = result[name] - 1.0  # the unedited image has cosine 1 with itself
        elif name not in AGAINST_STOCK:
            result[name] = result[name] - result["item"].map(stock[name])
    return result


def sheet_cells(result: Result, names: Sequence[str], rows: Iterable[int]) -> list[list[Image | None]]:
    """Kept images, of videos the middle frame: one row per prompt, one column per condition."""
    store, kept = result.store, set(result.store.picture_names())
    cells = [[f"{row:03d}-{name}" for name in names] for row in rows]
    return [[still(store.load_picture(one)) if one in kept else None for one in row] for row in cells]
