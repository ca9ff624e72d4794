"""What every analysis is: options, tasks, one loop, a result.

    result = AttentionBudget(layers="all", limit=8).run("scenes-sd3")
    result.table, result.summary, result.claims
    result.figure()
    result.save("runs/mine")

A subclass is a frozen dataclass of its options, stated once with type, default, help and range; the command line is
made from it. It says what is read from outside (`gather`), what will be done (`prepare`), what is measured per task
(`measure`), and how that is summed up, claimed, drawn and told. The loop over tasks, with progress, resume, interrupts
and processes, stands here and nowhere else. Not here: where rows go (`experiments.store`), how options become a command
(`cli.adapter`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError
from mmdit_probe.experiments import controls
from mmdit_probe.experiments.options import check_places, shared, sources_of
from mmdit_probe.experiments.progress import Progress
from mmdit_probe.experiments.store import FolderStore, MemoryStore, Store, TaskRecord
from mmdit_probe.experiments.text import Text, TextTable
from mmdit_probe.options import LAST_SEED, Option, check
from mmdit_probe.results import processes
from mmdit_probe.results.folder import AUTO, check_out
from mmdit_probe.results.selection import load_selection
from mmdit_probe.results.statistics import NONE, compare

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.models.mmdit import MMDiT


@dataclass
class Study:
    """What a run will do, settled before its first forward.

    Attributes:
        model: under the probe.
        request: every option and input that decides the numbers, as JSON values; equal requests give equal tables.
        tasks: the units of work, in order; a killed run loses the one it was at.
        unit: what the progress bar counts. ticks: how many of them a task has.
        facts: what else the record says (scheduler, sigmas, ...; contents: path that the request names -> what tells
            what it holds, where the run goes on with nothing else). notes: remarks for the person who asked.
        state: whatever `measure` needs beside the task.
    """

    model: Any
    request: dict[str, Any]
    tasks: Sequence[Any]
    unit: str = "items"
    ticks: int = 1
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    state: Any = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Base of every analysis.

    Class attributes:
        name: of the command, and of the folder that its runs lie in.
        tables: what `measure` writes; a task counts when its rows of the first are on disk.
        columns: table -> columns that an earlier version did not write: a kept run's tasks without them are done again.
        claimed: what is said of the measurement beside its controls, where no option decides the words.
        possible: the controls that make sense, where there is the option `control`.
        distances: outcomes of the scores that are distances (`results.statistics.kind_of`).
        headlined: column of the claims and its value, of the rows that the terminal shows; None: all.
        early: whether the first table can be told from the first tasks, before all are done.
        examples: command lines below the help text, without the command.
    """

    name: ClassVar[str]
    tables: ClassVar[tuple[str, ...]]
    columns: ClassVar[Mapping[str, Sequence[str]]] = {}
    claimed: ClassVar[str]
    possible: ClassVar[tuple[str, ...]] = tuple(controls.CONTROLS)
    distances: ClassVar[tuple[str, ...]] = ()
    headlined: ClassVar[tuple[str, str] | None] = None
    early: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ()

    seed: Annotated[int, Option("Seed of the first item; item k uses seed + k.", min=0, max=LAST_SEED)] = 0

    def __post_init__(self) -> None:
        check(self)
        check_places(self)
        self.chosen_controls()

    def chosen_controls(self) -> tuple[str, ...]:
        """The controls asked for.

        Raises:
            UserError: one is unknown, or makes no sense here.
        """
        return controls.parse(getattr(self, "control", NONE), self.possible)

    def gather(self, scenes: bool) -> Any:
        """Read what is named in the options from outside, before any weights are loaded.

        Args:
            scenes: whether the model knows the scenes world, which decides what is read by default.
        """

    def load(self, target: Any, shown: Progress) -> Any:
        """What `prepare` and `describe` get as the model: an `MMDiT`, unless the experiment says otherwise."""
        from mmdit_probe.experiments.target import as_model

        return as_model(target, shown)

    def describe(self, model: Any) -> dict[str, Any]:
        """What the record says of the model and the machine."""
        return described(model)

    def prepare(self, model: Any, inputs: Any) -> Study:
        """Settle what will be done; `inputs` is what `gather` returned."""
        raise NotImplementedError

    def said(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """A request of now or of a kept run with all said that it leaves to defaults: those of one measurement are
        equal."""
        return request

    def begin(self, study: Study, tasks: Sequence[Any]) -> None:
        """Told once which tasks `measure` will get, in this order, so that several can be worked on together."""

    def measure(self, study: Study, task: Any, record: TaskRecord) -> None:
        """Do one task: rows, pictures and arrays go to `record`."""
        raise NotImplementedError

    def finish(self, study: Study, store: Store) -> None:
        """What is left to do when all tasks are done."""

    def summarise(self, result: Result) -> pd.DataFrame:
        """The table that a reader wants first, with n and intervals; by default the first table itself."""
        return result.table

    def scores(self, result: Result) -> pd.DataFrame:
        """What is compared with controls, and with other runs; empty if nothing is.

        Returns: columns item, control, value, and those of a cell (layer, outcome, ...), one row for each of them.
        """
        return pd.DataFrame()

    def sign(self, outcome: str) -> float:
        """1 where more of an outcome of the scores is better, -1 where less is ("" for scores without outcomes)."""
        return 1.0

    def compare(self, result: Result) -> pd.DataFrame:
        """The claim against each control, from `results.statistics.compare`, each outcome corrected on its own; empty
        without controls."""
        scores = self.scores(result)
        family = "outcome" if "outcome" in scores else None
        if scores.empty:
            return scores
        return compare(scores, cell_of(scores), family=family, distances=self.distances)

    def claim(self, result: Result) -> str:
        """What the values of `compare` say, in words."""
        return self.claimed

    def headline(self, claims: pd.DataFrame) -> pd.DataFrame:
        """The rows of `compare` that the terminal shows."""
        if self.headlined is None:
            return claims
        column, value = self.headlined
        return claims[claims[column] == value].drop(columns=column)

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        """What is written beside the tables, by file name without suffix."""
        table = self.tables[0]
        return {table if result.summary is result.table else f"{table}_by_layer": result.summary}

    def files(self, result: Result, folder: Path) -> None:
        """Write what is neither table nor figure into a run folder."""

    def draw(self, result: Result) -> dict[str, Figure]:
        """The figures by file name without suffix, the main one first."""
        raise NotImplementedError

    def tell(self, result: Result) -> list[Text]:
        """What the terminal and a notebook show: tables and lines."""
        raise NotImplementedError

    def document(self, result: Result) -> dict[str, Any]:
        """What `--json` prints beside run folder, model and figures."""
        return {"layers": result.summary, "controls": result.claims}

    def run(
        self, target: Any = "scenes-sd3", out: Path | str | None = None, resume: bool = False,
        progress: bool | Progress = True,
    ) -> Result:  # fmt: skip
        """Measure.

        Args:
            target: name of an embedded model, a diffusers folder, a hub id, an `MMDiT`, or one's own stock pipeline.
            out: run folder to write into; "auto" stands for `runs/<name>/<time>-<hash>`; None keeps all in memory.
            resume: continue the run of the same request in `out`, with "auto" the latest one; a finished one is opened
                as it is.
            progress: whether to show it, on stderr.

        Raises:
            UserError: bad options, inputs or model. RunError: a failure on the way; finished tasks stay.
        """
        from mmdit_probe.experiments.result import Result
        from mmdit_probe.experiments.target import knows_scenes, named

        began = time.monotonic()
        if resume and out is None:
            raise UserError('resume=True continues a run folder: name it with out=, or out="auto" for the latest one')
        shown = progress if isinstance(progress, Progress) else Progress(quiet=not progress)
        check_out(out, resume, self.name)
        target = named(target, self)
        inputs = self.gather(knows_scenes(target))
        model = self.load(target, shown)
        study = self.prepare(model, inputs)
        if told := _selected_here(self, model):
            study.notes = [*study.notes, told]
            study.facts["remarks"] = [*study.facts.get("remarks", []), told]
        for note in study.notes:
            shown.note(note)
        facts = self.describe(model) | study.facts | {"options": plain(asdict(self))}
        facts |= {"seed": self.seed, "processes": processes.world()}
        with processes.joined():
            if out is None:
                store: Store = MemoryStore(self.name, study.request, facts)
            else:
                place = None if out == AUTO else Path(out)
                store = FolderStore.open(
                    self.name, study.request, facts, out=place, resume=resume, said=self.said, columns=self.columns
                )
            with store:
                if not store.complete:
                    _work(self, study, store, shown, began)
                result = Result(self, store)
                if isinstance(store, FolderStore) and store.first:
                    result.write(store.folder)
        return result


def _selected_here(experiment: Experiment, model: Any) -> str:
    """A remark where layers were selected on what is measured: they stand out there, if only by chance."""
    from mmdit_probe.experiments.target import knows_scenes

    if (selection := getattr(experiment, "selection", None)) is None:
        return ""
    measured = sources_of(asdict(experiment), knows_scenes(model))
    source = shared(measured, load_selection(selection).how.get("selected_on", []))
    return source and f"the layers were selected on {source}, too: report on others, such as scenes:test"


EARLY = 5.0
"""Seconds since a run began, loading included, after which what is done so far is told, where an experiment can."""


def _work(experiment: Experiment, study: Study, store: Store, shown: Progress, began: float) -> None:
    """The loop over tasks that are not done, of which this process takes its share."""
    told = not experiment.early
    with store.writing(experiment.tables):
        mine = store.mine(len(study.tasks))
        left = [number for number in mine if number not in store.done]
        experiment.begin(study, [study.tasks[number] for number in left])
        with shown.bar(study.unit, len(mine) * study.ticks, (len(mine) - len(left)) * study.ticks) as advance:
            for number in left:
                with store.task(number, advance, study.ticks) as record:
                    experiment.measure(study, study.tasks[number], record)
                if not told and time.monotonic() - began > EARLY and number != left[-1]:
                    told = True
                    _tell_early(
                        experiment, store, shown, f"so far: {left.index(number) + 1} of {len(left)} {study.unit}"
                    )
    experiment.finish(study, store)


def _tell_early(experiment: Experiment, store: Store, shown: Progress, title: str) -> None:
    """The first table, of the tasks done so far, above the bar."""
    from mmdit_probe.experiments.result import Result

    table = experiment.tell(Result(experiment, store))[0]
    if isinstance(table, TextTable):
        shown.early(replace(table, title=title))


def cell_of(scores: pd.DataFrame) -> list[str]:
    """The columns of scores that say what is compared on its own."""
    return [str(name) for name in scores.columns if name not in ("item", "control", "value")]


def one_per_item(table: pd.DataFrame, items: Sequence[Sequence[Any]], labels: Sequence[str]) -> pd.DataFrame:
    """The rows of items that differ by nothing but their seed as those of one, their numbers averaged: a prompt that is
    measured twice is one of the n that an interval is over, not two.

    Args:
        table: columns item, `labels` and numbers. items: of the request, by number: texts and a seed each. labels: the
            columns that tell the rows of an item apart.
    """
    first: dict[tuple[Any, ...], int] = {}
    own = [
        first.setdefault(tuple(part for part in item if not isinstance(part, int)), number)
        for number, item in enumerate(items)
    ]
    if len(first) == len(items):
        return table
    keys = ["item", *labels]
    values = [name for name in table.select_dtypes("number").columns if name not in (*keys, "seed")]
    table = table.assign(item=np.array(own)[table["item"].to_numpy(int)])
    return table.groupby(keys, sort=False, observed=True)[values].mean().reset_index()


def request_of(model: MMDiT, **options: Any) -> dict[str, Any]:
    """A request: the weights that are measured, how text is encoded, and every option that decides the numbers."""
    return {
        "model": model.name,
        "weight_hash": model.weight_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text_length": model.text_length,
        **text_of(model),
        **pictures_of(model),
        **options,
    }


def text_of(model: MMDiT) -> dict[str, Any]:
    """What a request says of how text is encoded where that is not the model's own way: neither weights nor prompts
    tell."""
    left_out = hasattr(model.pipeline, "text_encoder_3") and model.pipeline.text_encoder_3 is None
    length = {} if model.max_sequence_length == model.own_length else {"max_sequence_length": model.max_sequence_length}
    return ({"no_t5": True} if left_out else {}) | length


def pictures_of(model: MMDiT) -> dict[str, Any]:
    """What a request says of the pictures that an editing model is given, where there are any, and of the size of what
    is made, where that is not the model's own."""
    hashes = [hashlib.sha256(one.tobytes()).hexdigest()[:16] for one in model.references]
    sizes = [f"{one.height} x {one.width}" for one in model.references]
    given = {"references": list(zip(sizes, hashes, strict=True))} if hashes else {}
    size = {} if model.size is None else {"size": list(model.size)}
    return given | size | ({"num_frames": model.num_frames} if model.makes_videos else {})


def read_of_videos(model: MMDiT) -> list[str]:
    """The remark of what scores pictures: which of a video's frames it is given."""
    return ["scores and outcomes are those of each video's middle frame"] if model.makes_videos else []


def described(model: MMDiT) -> dict[str, Any]:
    """What a record says of a model and the machine it is on."""
    return {
        "model": {
            "id": model.name,
            "family": model.family.name,
            "weight_hash": model.weight_hash,
            "parts": model.parts,
            "dtype": str(model.dtype).removeprefix("torch."),
            **model.memory,
            "layers": len(model.layers),
            "heads": model.heads,
            "text_length": model.text_length,
        },
        "device": str(model.device),
    }


def scheduled(model: MMDiT, num_steps: int) -> dict[str, Any]:
    """What a record says of the sampling."""
    scheduler = model.scheduler
    return {
        "scheduler": {"class": type(scheduler).__name__, **dict(scheduler.config)},
        "sigmas": model.sigmas(num_steps),
    }


def plain(value: Any) -> Any:
    """Options as JSON values: paths as text, rows of numbers (tuples, ranges, sets, arrays of one axis) as lists."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | range | set | frozenset):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist") and getattr(value, "ndim", 2) < 2:  # pictures have more axes
        return value.tolist()
    return str(value) if isinstance(value, Path) else value
