"""Report: "which layer grounds words in this model?" as one page; runs what is missing, small and resumable.

    Report(limit=8).run("scenes-sd3", out="report")          # report/index.html, report/explore.html

Every part is an experiment of its own, in a run folder of its own under `state/`, so that a killed report loses at most
one item and a part can be looked at alone. Few items decide little; the page says how many there were. Not here: the
measurements, and how the page looks (`pages.report`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from mmdit_probe.data import Sample, fingerprint, samples
from mmdit_probe.data.sources import NAMES
from mmdit_probe.errors import UserError, counted
from mmdit_probe.experiments.attention_budget import AttentionBudget
from mmdit_probe.experiments.experiment import Experiment, Study, request_of
from mmdit_probe.experiments.explore import Explore
from mmdit_probe.experiments.feature_pca import FeaturePCA
from mmdit_probe.experiments.options import Control, Input, Prompts, Sampling, prompts_of
from mmdit_probe.experiments.perturb import Perturb
from mmdit_probe.experiments.select_layers import SelectLayers
from mmdit_probe.experiments.target import knows_scenes
from mmdit_probe.experiments.text import Text, TextTable
from mmdit_probe.experiments.token_rows import unread
from mmdit_probe.experiments.value_norms import ValueNorms
from mmdit_probe.experiments.word_maps import WordMaps
from mmdit_probe.results import processes
from mmdit_probe.results.folder import AUTO
from mmdit_probe.results.selection import FILE, LayerSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.progress import Progress
    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.pages import Page, Section

PAGE, EXPLORER = "index.html", "explore.html"
SHOWN_PROMPTS = 3
"""Prompts whose maps are shown."""


@dataclass(frozen=True)
class Part:
    """A section: its title, and the experiment that it tells of, made once the parts before it are there."""

    name: str
    title: str
    make: Callable[[Path], Experiment]


@dataclass(frozen=True, kw_only=True)
class Report(Sampling, Experiment):
    """Which layer grounds words in a model, as one page: every analysis, small, with its controls and claims in
    words.
    """

    name = "report"
    examples = ("--model scenes-sd3 --out report",)
    tables = ("parts",)
    possible = ("random", "uniform")  # shuffled captions take pictures

    prompts: Prompts = None
    images: Annotated[
        str | Path | None,
        Input("Pictures for the PCA: a folder.", shown_default="scenes:val for embedded models", values=NAMES),
    ] = None
    limit: Annotated[int, Input("Prompts and pictures per analysis.", min=4)] = 8
    control: Control = "uniform"

    def gather(self, scenes: bool) -> tuple[list[str], list[Sample]]:
        if processes.world() > 1:
            raise UserError("report runs its analyses one after the other; start it in one process")
        pictures = [] if self.images is None else samples(str(self.images), self.limit)
        _ = self.reported_on
        found = prompts_of(self.prompts, self.limit, scenes, self.limit)
        Explore(prompt=found[:1]).gather(scenes)  # refused now what it would refuse after all other parts
        return found, pictures

    @property
    def reported_on(self) -> Literal["test", "train"]:
        """Scenes for the selected layers that none of the evidence was measured on.

        Raises:
            UserError: there are none.
        """
        named = [f"{source}:" for source in (self.prompts, self.images)]
        if not any(source.startswith("scenes:test:") for source in named):
            return "test"
        if not any(source.startswith("scenes:train:") for source in named):
            return "train"
        raise UserError("--prompts and --images take scenes of test and train: none are left to report on")

    def parts(self, scenes: bool, prompts: Sequence[str]) -> list[Part]:
        """What is measured, in order. Later parts read the folders of earlier ones."""
        how: dict[str, Any] = {"num_steps": self.num_steps, "guidance": self.guidance, "seed": self.seed}
        rows: dict[str, Any] = how | {"prompts": prompts, "control": self.control, "rows": "summary"}
        pictured: dict[str, Any] = {"images": self.images, "limit": self.limit, "seed": self.seed}
        pca = scenes or self.images is not None

        def select(state: Path) -> Experiment:
            read = [name for name in (*_READ, *(["pca"] if scenes else [])) if (state / name / "run.json").exists()]
            runs = [state / name for name in read]
            measured: dict[str, Any] = {"evidence": "segmentation", "limit": self.limit, "control": self.control}
            measured |= {"report": self.reported_on}
            return SelectLayers(runs=runs, **(measured if scenes else {}), **how)

        def layers(state: Path) -> tuple[int, ...] | None:
            file = state / "select-layers" / FILE
            return LayerSelection.read(file).layers if file.exists() else None

        return [
            Part("attention-budget", "Attention budget", lambda state: AttentionBudget(**rows)),
            Part("value-norms", "Contribution: norms of the values", lambda state: ValueNorms(**rows)),
            *([Part("pca", "PCA of the features", lambda state: FeaturePCA(**pictured, control=self.control))] * pca),
            Part("perturb", "Perturbation", lambda state: Perturb(prompts=prompts, shown=0, **how)),
            Part("select-layers", "Which layers ground words", select),
            Part("maps", "Word maps", lambda state: WordMaps(
                prompt=prompts[:SHOWN_PROMPTS], layers=layers(state), **how)),
            Part("explore", "Explore", lambda state: Explore(prompt=prompts[:1], layers=layers(state), **how)),
        ]  # fmt: skip

    def prepare(self, model: MMDiT, inputs: tuple[list[str], list[Sample]]) -> Study:
        scenes, (prompts, pictures) = knows_scenes(model), inputs
        request = request_of(
            model, prompts=prompts, images=None if self.images is None else str(self.images), limit=self.limit,
            control=self.control, num_steps=self.num_steps, guidance=self.guidance, seed=self.seed, scenes=scenes,
        )  # fmt: skip
        notes = [] if scenes or self.images else ["no pictures are given (--images): the PCA is left out"]
        notes += [line for table in model.token_tables(prompts) for line in unread(table)]
        notes += model.notes_on_words(prompts)
        contents = {} if self.images is None else {str(self.images): fingerprint(pictures)}
        return Study(model, request, self.parts(scenes, prompts), "analyses", facts={"contents": contents}, notes=notes)

    def run(
        self, target: Any = "scenes-sd3", out: Path | str | None = None, resume: bool = False,
        progress: bool | Progress = True,
    ) -> Result:  # fmt: skip
        """As `Experiment.run`; a report needs a folder, so that None is "auto"."""
        return super().run(target, AUTO if out is None else out, resume, progress)

    def measure(self, study: Study, task: Part, record: TaskRecord) -> None:
        place = record.workplace(task.name)
        assert place is not None  # `run` always has a folder
        started = time.perf_counter()
        result = task.make(place.parent).run(study.model, place, resume=True, progress=False)
        columns = {
            "part": np.array([task.name], object), "rows": np.array([len(result.table)]),
            "seconds": np.array([time.perf_counter() - started]),
        }  # fmt: skip
        record.write("parts", columns)
        record.files.append(place)

    def results(self, result: Result) -> dict[str, Result]:
        """The result of each part."""
        from mmdit_probe.experiments.result import Result as Read

        place = result.store.workplace("")
        assert place is not None  # `run` always has a folder
        return {name: Read.read(place / name) for name in result.table["part"]}

    def page(self, result: Result) -> Page:
        """The page of everything."""
        from mmdit_probe.pages import report

        request = result.request
        titles = {part.name: part.title for part in self.parts(request["scenes"], request["prompts"])}
        found = self.results(result)
        sections = [_section(titles[name], one) for name, one in found.items() if name != "explore"]
        summary = [
            *_answer(found["select-layers"]),
            f"{result.data['model']['family']}, {result.data['model']['layers']} layers x"
            f" {result.data['model']['heads']} heads; n = {counted(len(request['prompts']), 'prompt')}, at most"
            f" {request['limit']} pictures per analysis, {counted(request['num_steps'], 'step')}, guidance"
            f" {request['guidance']:g}. Layers are 0-based; I2T = image queries, text keys. Few items decide little:"
            " intervals and verdicts stand beside every number.",
        ]
        links = {f"Every layer, head and step of {request['prompts'][0]!r}": EXPLORER}
        title = f"Which layers ground words in {result.model_name}?"
        return report(title, summary, [*sections, _provenance(result, found)], links)

    def files(self, result: Result, folder: Path) -> None:
        self.page(result).save(folder / PAGE)
        explored = self.results(result)["explore"]
        assert isinstance(explored.experiment, Explore)
        explored.experiment.pages(explored)[0].save(folder / EXPLORER)

    def draw(self, result: Result) -> dict[str, Figure]:
        return {"report": self.results(result)["select-layers"].figure()}

    def tell(self, result: Result) -> list[Text]:
        table = TextTable(["analysis", "rows", "seconds"], left=("analysis",))
        for row in result.table.to_dict("records"):
            table.add(str(row["part"]), str(row["rows"]), f"{row['seconds']:.0f}")
        assert result.path is not None
        return [table, *_answer(self.results(result)["select-layers"]), f"open in a browser: {result.path / PAGE}"]

    def document(self, result: Result) -> dict[str, Any]:
        assert result.path is not None
        return {"page": result.path / PAGE, "explorer": result.path / EXPLORER, "parts": result.table}


_READ = ("attention-budget", "value-norms", "perturb")
"""Parts that hold evidence for the selection on any model."""


def _answer(selection: Result) -> list[str]:
    """What was selected, and how stable that is."""
    lines = [text for text in selection.texts() if isinstance(text, str)]
    return [line.split("; pass")[0] for line in lines if line.startswith(("stability", "selected"))][::-1]


def _section(title: str, result: Result) -> Section:
    from mmdit_probe.pages import Section

    texts = result.texts()
    lines = [text for text in texts if isinstance(text, str)]
    tables = [text.html() for text in texts if isinstance(text, TextTable)]
    answer = next((line for line in reversed(lines) if line.startswith("selected") or "comparison" in line), "")
    assert result.path is not None
    figures = {
        f"{title}: {file.stem.replace('_', ' ')}": file.read_bytes() for file in sorted(result.path.glob("*.png"))
    }
    return Section(title, lines, tables, figures, answer.split("; pass")[0])


def _provenance(result: Result, parts: dict[str, Result]) -> Section:
    """What a number needs beside it to be measured again."""
    from mmdit_probe.pages import Section

    model, environment = result.data["model"], result.data.get("environment", {})
    facts = {f"model {name}": value for name, value in model.items()} | {"device": result.data["device"]}
    facts |= {name: environment[name] for name in ("python", "platform") if name in environment}
    facts |= {name: version for name, version in environment.get("versions", {}).items() if version}
    table = TextTable(["what", "value"], left=("what", "value"))
    for name, value in facts.items():
        table.add(name, str(value))
    runs = TextTable(["part", "seconds", "options"], left=("part", "options"))
    for name, one in parts.items():
        options = {k: v for k, v in one.data["options"].items() if k not in ("prompts", "prompt") and v is not None}
        runs.add(name, f"{one.data['wall_seconds']:.0f}", ", ".join(f"{k}={v}" for k, v in options.items()))
    return Section("Provenance", [f"prompts: {'; '.join(result.request['prompts'])}"], [table.html(), runs.html()])
