"""What holds for every experiment: the library and the command give the same, in memory and in a folder; an interrupted
run goes on; another request is refused; several processes give the table of one."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import mmdit_probe.experiments
from mmdit_probe import load
from mmdit_probe.cli.adapter import named as command_model
from mmdit_probe.cli.app import COMMANDS, main
from mmdit_probe.cli.options import Session
from mmdit_probe.errors import ProbeWarning, UserError
from mmdit_probe.experiments import (
    OF_COMMAND,
    AttentionBudget,
    Attribute,
    BlockOperations,
    ContributionBudget,
    Diagnose,
    Discover,
    Evaluate,
    Experiment,
    Explore,
    FeaturePCA,
    Generate,
    HeadTriage,
    Perturb,
    Report,
    Result,
    Score,
    Segment,
    SelectLayers,
    SigmaByLayer,
    SwapTest,
    TrainMagnet,
    ValueNorms,
    WordMaps,
    experiment_of,
    read,
    target as naming,
)
from mmdit_probe.experiments.compare_runs import ITEMS
from mmdit_probe.experiments.experiment import plain
from mmdit_probe.experiments.reading import Network
from mmdit_probe.experiments.text import TextTable, records
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.options import described
from mmdit_probe.results.folder import RunFolder
from mmdit_probe.results.selection import LayerSelection
from tests import tiny
from tests.tables import unexplained

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red ring", "a cat", "a blue house"]
SCENES = {"images": "scenes:val", "limit": 2, "prompts": "a red ring"}
EXPERIMENTS: dict[str, tuple[type[Experiment], dict[str, Any]]] = {
    "attention-budget": (AttentionBudget, {"num_steps": 1, "guidance": 2.0, "layers": "0-1"}),
    "value-norms": (ValueNorms, {**SCENES, "layers": "0-1", "control": "uniform"}),
    "pca": (FeaturePCA, {**SCENES, "limit": 4, "kinds": "key", "components": 2, "batch": 2, "control": "uniform"}),
    "diagnose": (Diagnose, {**SCENES, "layers": "0-1"}),
    "attribute": (Attribute, {"limit": 4, "layers": "4", "target": "mass"}),
    "perturb": (Perturb, {"num_steps": 1, "guidance": 1.0, "layers": "1", "edit": "zero", "batch": 2}),
    "generate": (Generate, {"num_steps": 1, "perturb_layers": "1", "perturb_scale": "0.5", "batch": 2}),
    "select-layers": (SelectLayers, {"evidence": "word_mass,segmentation", "limit": 4}),
    "score": (Score, {"num_steps": 1, "guidance": 1.0, "batch": 2}),
    "evaluate": (Evaluate, {"limit": 2, "method": "seg4diff,diffcut", "layers": "4"}),
    "contribution-budget": (ContributionBudget, {"num_steps": 1, "guidance": 1.0, "layers": "1"}),
}
"""Command -> experiment and a setting that takes a moment. Those without pictures read a file of prompts."""

QUICK = {"num_steps": 1, "guidance": 1.0}
ELSEWHERE: dict[str, tuple[Any, dict[str, Any]]] = {
    "swap-test": (SwapTest, {"limit": 2, "layers": "4", "num_steps": 1, "batch": 2}),
    "block-operations": (BlockOperations, {"prompts": PROMPTS[:2], "operations": "silence", **QUICK}),
    "head-triage": (HeadTriage, {"limit": 2, "train_limit": 2, "layers": "4"}),
    "sigma-map": (SigmaByLayer, {"limit": 2, "layers": "4", "sigma": "0.5"}),
    "maps": (WordMaps, {"prompt": PROMPTS[0], **QUICK}),
    "explore": (Explore, {"prompt": PROMPTS[0], **QUICK}),
    "report": (Report, {"prompts": PROMPTS[:1], "limit": 4, "control": "none", **QUICK}),
    "segment": (Segment, {"image": np.zeros((64, 64, 3), np.uint8), "classes": "cat, red ring", "layers": "0"}),
    "discover": (Discover, {"image": np.zeros((64, 64, 3), np.uint8), "layers": "0"}),
    "train-magnet": (TrainMagnet, {"layers": "1", "train_steps": 2, "batch": 1, "rank": 2, "limit": 2}),
}
"""Those that have files of tests of their own, with a setting that takes a moment."""

OF_SCENES = ("attribute", "select-layers", "evaluate", "swap-test", "head-triage", "sigma-map", "train-magnet")
"""Those that measure on models of the scenes world only."""


class Setting:
    """One experiment on its model, and what it gives in memory."""

    def __init__(self, name: str, ask: Experiment, model: MMDiT) -> None:
        self.name, self.ask, self.model = name, ask, model
        self.memory = ask.run(model, progress=False)

    def arguments(self) -> list[str]:
        """The same request on the command line."""
        line = [self.name, "--model", self.model.name]
        defaults = {field.name: field.default for field in fields(self.ask)}
        for field in described(self.ask):
            value = getattr(self.ask, field.name)
            if defaults[field.name] in (value, MISSING):
                continue
            line += [field.flag, str(value)]
        return line


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def loaded(tiny_directory: Path) -> MMDiT:
    return load(str(tiny_directory))


@pytest.fixture(scope="module")
def settings(prompts_file: Path, loaded: MMDiT, scenes_model: MMDiT) -> Callable[[str], Setting]:
    known: dict[str, Setting] = {}

    def of(name: str) -> Setting:
        if name not in known:
            kind, options = EXPERIMENTS[name]
            if "prompts" not in options and name not in OF_SCENES:
                options = options | {"prompts": str(prompts_file)}
            known[name] = Setting(name, kind(**options), scenes_model if name in OF_SCENES else loaded)
        return known[name]

    return of


@pytest.fixture(params=EXPERIMENTS)
def setting(request: pytest.FixtureRequest, settings: Callable[[str], Setting]) -> Setting:
    return settings(request.param)


def same_tables(one: Result, two: Result) -> None:
    """All tables of two results, value by value."""
    for name in one.experiment.tables:
        assert one.store.has(name) == two.store.has(name)
        if one.store.has(name):
            tables = (result.store.table(name) for result in (one, two))
            pd.testing.assert_frame_equal(*tables, check_categorical=False)
    pd.testing.assert_frame_equal(one.summary, two.summary, check_categorical=False)
    pd.testing.assert_frame_equal(one.claims, two.claims, check_categorical=False)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_experiment_is_here() -> None:
    assert {*EXPERIMENTS, *ELSEWHERE} == {one.name for one in COMMANDS} > set(OF_COMMAND)
    assert all(kind.name == name for name, (kind, _) in (EXPERIMENTS | ELSEWHERE).items())


def test_the_command_and_the_library_give_the_same(
    setting: Setting, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tables, summary, claims and figures of the command are those in memory, and `save` writes its files."""
    with pytest.raises(SystemExit) as stopped:
        main([*setting.arguments(), "--out", str(tmp_path / "command"), "--json"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 0, err
    command = read(tmp_path / "command")
    assert plain(asdict(command.experiment)) == plain(asdict(setting.ask))
    assert command.request == plain(setting.memory.request)
    same_tables(setting.memory, command)
    document = json.loads(out)
    own = json.loads(json.dumps(records(setting.memory.experiment.document(setting.memory)), default=str))
    for name, value in own.items():
        if name not in ("images", "selection"):  # paths of a folder
            assert document[name] == value, name
    assert setting.memory.save(tmp_path / "saved") == tmp_path / "saved"
    same_tables(setting.memory, read(tmp_path / "saved"))
    written = {
        place: {name for name in files(tmp_path / place) if ".parquet/" not in name} for place in ("command", "saved")
    }
    assert written["command"] == written["saved"]
    assert {f"{name}.{kind}" for name in setting.memory.figures for kind in ("png", "pdf")} <= written["command"]
    for name in written["command"]:
        if name.endswith((".csv", ".md", ".png")):
            assert (tmp_path / "command" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name
    record = json.loads((tmp_path / "saved" / "run.json").read_text())
    assert record["status"] == "finished" and record["command"] == setting.name


@pytest.mark.parametrize("name", [*EXPERIMENTS, *ELSEWHERE])
def test_every_result_has_the_same_members(
    name: str, settings: Callable[[str], Setting], tiny_directory: Path, tmp_path: Path
) -> None:
    """Those of `segment`, `discover` and `train-magnet` had no table; a training could not be saved."""
    if name in EXPERIMENTS:
        result = settings(name).memory
    else:
        kind, options = ELSEWHERE[name]
        model = load("scenes-sd3" if name in OF_SCENES else str(tiny_directory))  # a training changes it
        result = kind(**options).run(model, out=tmp_path / "run", progress=False)
    assert len(result.table) and len(result.summary)
    assert all(isinstance(frame, pd.DataFrame) for frame in (result.table, result.summary, result.claims))
    assert result.figures and all(isinstance(one, Figure) for one in result.figures.values())
    assert result.figure() is result.figures[next(iter(result.figures))]
    html = result._repr_html_()
    assert html.startswith('<img alt="') and all(isinstance(one, str | TextTable) for one in result.texts())
    json.dumps(records(result.document()), default=str, allow_nan=False)
    if name in EXPERIMENTS:  # what `save` writes is looked at above
        return
    assert result.save(tmp_path / "saved") == tmp_path / "saved"
    record = json.loads((tmp_path / "saved" / "run.json").read_text())
    assert (record["command"], record["status"]) == (name, "finished")
    written = {one for one in files(tmp_path / "run") if ".parquet/" not in one}
    assert {one for one in files(tmp_path / "saved") if ".parquet/" not in one} == written


@pytest.mark.parametrize("name", OF_COMMAND)
def test_every_run_takes_the_same(name: str) -> None:
    """A third argument was `progress` of `Segment`, and is `resume` of all others."""
    parameters = inspect.signature(getattr(mmdit_probe.experiments, OF_COMMAND[name]).run).parameters
    assert [*parameters] == ["self", "target", "out", "resume", "progress"]


def test_a_labelled_picture_is_there_and_one_cut_short_is_written(tiny_directory: Path, tmp_path: Path) -> None:
    kind, options = ELSEWHERE["segment"]
    model, run = load(str(tiny_directory)), tmp_path / "run"
    first = kind(**options).run(model, run, progress=False)
    with pytest.raises(UserError, match="holds a run already"):
        kind(**options).run(model, run, progress=False)
    before = (run / "run.json").read_bytes()
    again = kind(**options).run(model, run, True, False)
    assert again.path == first.path == run and (run / "run.json").read_bytes() == before
    (run / "run.json").write_bytes(before.replace(b'"finished"', b'"interrupted"'))
    (run / "labels.png").unlink()
    kind(**options).run(model, run, True, False)
    assert (run / "labels.png").is_file() and json.loads((run / "run.json").read_text())["status"] == "finished"
    with pytest.raises(UserError, match="another"):
        kind(**options | {"seed": 7}).run(model, run, True, False)


def test_an_interrupted_run_goes_on_and_another_request_is_refused(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is pressed in the second task, after its rows: they do not count, those of the first are not repeated."""
    ask, stock, measured = setting.ask, type(setting.ask).measure, list[str]()

    def interrupted(self: Experiment, study: Any, task: Any, record: Any) -> None:
        stock(self, study, task, record)
        if measured:
            raise KeyboardInterrupt
        measured.append(repr(task))

    def counted(self: Experiment, study: Any, task: Any, record: Any) -> None:
        measured.append(repr(task))
        stock(self, study, task, record)

    monkeypatch.setattr(type(ask), "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask.run(setting.model, out=tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    with pytest.warns(ProbeWarning, match=r"run' is not finished \(interrupted\): it holds the items that are done"):
        read(tmp_path / "run")
    monkeypatch.setattr(type(ask), "measure", counted)
    whole = ask.run(setting.model, out=tmp_path / "run", resume=True, progress=False)
    same_tables(setting.memory, whole)
    assert len(measured) == len(list((tmp_path / "run" / f"{ask.tables[0]}.parquet").iterdir())) > 1
    before = len(measured)
    again = ask.run(setting.model, out=tmp_path / "run", resume=True, progress=False)  # finished: opened as it is
    same_tables(whole, again)
    assert len(measured) == before

    message = r"cannot continue .* it was made with (items|prompts|seeds?|conditions: .*: seed) = .*, this request has"
    with pytest.raises(UserError, match=message):
        replace(ask, seed=1).run(setting.model, out=tmp_path / "run", resume=True, progress=False)
    with pytest.raises(UserError, match="holds a run already; continue it with --resume"):
        ask.run(setting.model, out=tmp_path / "run", progress=False)
    same_tables(whole, read(tmp_path / "run"))


def test_what_is_kept_in_memory_has_nothing_to_resume() -> None:
    with pytest.raises(UserError, match="resume=True continues a run folder: name it with out="):
        AttentionBudget().run("a model that is not read", resume=True)


def test_every_column_is_explained(setting: Setting) -> None:
    assert unexplained(setting.memory) == set()


def test_a_notebook_shows_figure_and_tables(setting: Setting) -> None:
    html = setting.memory._repr_html_()
    assert html.startswith('<img alt="') and "data:image/png;base64," in html
    shown = [text for text in setting.memory.texts() if isinstance(text, TextTable)]
    assert shown and html.count("<table>") == len(shown)
    assert setting.memory.figure() is setting.memory.figures[next(iter(setting.memory.figures))]
    with pytest.raises(UserError, match="unknown figure 'nope'"):
        setting.memory.figure("nope")
    assert type(setting.ask).__name__ in repr(setting.memory)


def test_as_many_components_are_told_as_there_are(settings: Callable[[str], Setting]) -> None:
    """The share of two, or of one, stood under "3 components"."""
    assert settings("pca").memory.texts()[0].columns[2] == "2 components"  # type: ignore[union-attr]


def test_what_a_notebook_shows_is_escaped() -> None:
    result = AttentionBudget(prompts="a cat", num_steps=1).run(MMDiT(tiny.pipeline(), '<i>"tiny"'), progress=False)
    html = result._repr_html_()
    assert "<i>" not in html and "&lt;i&gt;&quot;tiny&quot;" in html
    table = TextTable(["a|b"], [["<b>x</b>"]], title="<i>")
    assert "<b>" not in table.html() and "&lt;b&gt;x&lt;/b&gt;" in table.html() and "<i>" not in table.html()
    assert "a\\|b" in table.markdown()


def test_targets(loaded: MMDiT, tiny_directory: Path) -> None:
    """A stock pipeline of one's own, an MMDiT, a folder as text or path, and a name."""
    ask = AttentionBudget(prompts="a red ring", num_steps=1, guidance=1.0)
    targets = [loaded, tiny.pipeline(), str(tiny_directory), tiny_directory]
    results = [ask.run(target, progress=False) for target in targets]
    for result in results[1:]:
        pd.testing.assert_frame_equal(results[0].table, result.table)
    assert results[1].model_name == "StableDiffusion3Pipeline"
    named = replace(ask, layers=np.array([4])).run("scenes-sd3", progress=False)
    assert named.model_name == "scenes-sd3" and set(named.table["layer"]) == {4}
    with pytest.raises(UserError, match="cannot probe int: expected a model's name, a diffusers folder, a hub id"):
        ask.run(3)
    with pytest.raises(UserError, match=r"unknown model .*'scenes-sd33': did you mean 'scenes-sd3'"):
        ask.run("scenes-sd33", progress=False)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AttentionBudget, {"num_steps": 0}, "--num-steps is 0; expected a whole number from 1 to 1000"),
        (AttentionBudget, {"seed": -1}, "--seed is -1; expected a whole number from 0"),
        (AttentionBudget, {"guidance": float("nan")}, "--guidance is nan; expected a finite number"),
        (AttentionBudget, {"rows": "heads"}, "unknown --rows 'heads': did you mean 'head'"),
        (AttentionBudget, {"steps": "last-29"}, "step 'last-29' does not exist: there are 28 steps"),
        (AttentionBudget, {"control": "shuffled"}, "shuffled captions need pictures"),
        (ValueNorms, {"limit": 0}, "--limit is 0; expected a whole number from 1"),
        (Segment, {"image": "a", "classes": "a", "selection": "s", "layers": "all"}, "leave --layers and --heads out"),
        (Segment, {"image": "a", "classes": "a", "heads": "0-"}, "cannot read '0-' as a head"),
        (BlockOperations, {"layers": "4-"}, "cannot read '4-' as a layer"),
        (SigmaByLayer, {"layers": "a"}, "cannot read 'a' as a layer"),
        (Generate, {"perturb_layers": "4-"}, "cannot read '4-' as a layer"),
        (Generate, {"enhance": "x"}, "cannot read 'x' as a layer"),
        (HeadTriage, {"layers": ""}, "cannot read '' as a layer"),
        (ValueNorms, {"selection": "s.json", "layers": 1}, "--selection names layers and heads already"),
        (FeaturePCA, {"components": 0}, "--components is 0"),
        (FeaturePCA, {"kinds": "keys"}, "unknown kind of feature 'keys': did you mean 'key'"),
        (FeaturePCA, {"sigma": 1.5}, "--sigma is 1.5; expected a finite number from 0 to 1"),
        (Diagnose, {"control": "randm"}, "unknown control 'randm': did you mean 'random'"),
        (Attribute, {"sigma": 0.0}, "--sigma is 0.0; expected a finite number above 0"),
        (Attribute, {"limit": 1}, "--limit is 1; expected a whole number from 2"),
        (Perturb, {"kernel": 4}, "--kernel is 4; expected an odd number"),
        (Perturb, {"sweep": "token"}, "unknown --sweep 'token'"),
        (Perturb, {"branch": "uncond", "guidance": 1.0}, "--branch uncond: --guidance 1 runs without that branch"),
        (Perturb, {"control": "budgets"}, "unknown control 'budgets': did you mean 'budget'"),
        (Generate, {"start": 0.9, "stop": 0.1}, "--start 0.9 is after --stop 0.1"),
        (Generate, {"perturb_scale": "two"}, "--perturb-scale 'two': expected a number"),
        (Generate, {"perturb_layers": 1, "selection": "s.json"}, "--perturb-layers and --selection both name layers"),
        (Generate, {"perturb_scale": []}, "--perturb-scale []: expected a number"),
        (Generate, {"sweep": "layer"}, "--sweep is of perturbed guidance: name its layers"),
        (Generate, {"control": "random,noise"}, "--control is of perturbed guidance"),
        (AttentionBudget, {"sigma": 0.3}, "--sigma is of pictures (--images)"),
        (ValueNorms, {"images": "scenes:val", "steps": "0"}, "--steps is of sampling; pictures are read at --sigma"),
        (Perturb, {"edit": "zero", "where": "logits"}, "--where is of blurs; with --edit zero leave it out"),
        (WordMaps, {"prompt": "a", "sigma": 0.3}, "--sigma is of photos (--images)"),
        (WordMaps, {"images": "a.png", "guidance": 2.0}, "--guidance is of pictures that are drawn"),
        (ValueNorms, {"images": "scenes:val", "num_steps": 4}, "--num-steps is of sampling"),
        (WordMaps, {"images": "a.png", "steps": [0]}, "--steps is of pictures that are drawn"),
        (WordMaps, {"images": "a.png", "images_per_prompt": 2}, "--images-per-prompt is of pictures that are drawn"),
        (SelectLayers, {"rule": "rank"}, "unknown rule 'rank': did you mean 'ranks'"),
        (SelectLayers, {"split": "val", "report": "val"}, "--split and --report are both 'val'"),
        (SelectLayers, {"limit": 3}, "--limit is 3; expected a whole number from 4"),
        (Report, {"control": "shuffled"}, "unknown control 'shuffled'"),
        (Score, {"baseline": "bas"}, "unknown variant 'bas': did you mean 'base'"),
        (Score, {"map_sigma": "2"}, "--map-sigma '2': expected noise levels in 0..1"),
        (Score, {"lora": ["nowhere/at/all"]}, "no LoRA 'nowhere/at/all'"),
    ],
)
def test_options_are_refused_when_they_are_given(kind: type[Experiment], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        kind(**options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("ask", "read"),
    [
        (Score(export=Path("pictures")), {"export": Path("pictures")}),
        (Evaluate(protocol="predicted", tags=Path("tags.json"), cache=Path("kept")), {"tags": Path("tags.json")}),
        (AttentionBudget(layers=range(2)), {"layers": [0, 1]}),
        (AttentionBudget(layers=np.array([2, 4])), {"layers": [2, 4]}),
        (AttentionBudget(layers={3}, heads={3: (0, 1)}), {"layers": [3], "heads": {3: [0, 1]}}),
        (Generate(perturb_layers=1, perturb_scale=(1.0, 2.0)), {"perturb_scale": [1.0, 2.0]}),
    ],
)
def test_options_come_back_from_a_record(ask: Experiment, read: dict[str, Any]) -> None:
    """As `run.json` holds them; paths were refused, and ranges read as their Python text."""
    record = json.loads(json.dumps(plain(asdict(ask)), default=str))
    again = experiment_of(ask.name, record)
    assert {name: getattr(again, name) for name in read} == read
    assert plain(asdict(again)) == plain(asdict(ask))


@pytest.mark.parametrize(
    ("command", "record", "read"),
    [
        ("maps", {"prompt": "a", "image": None, "stream": "clip"}, {"images": None, "streams": "clip"}),
        ("perturb", {"by": "heads", "sheet": 2}, {"sweep": "head", "shown": 2}),
        ("generate", {"perturb_layers": "1", "each": True}, {"sweep": "layer"}),
        ("pca", {"fit": "image"}, {"basis": "image"}),
        ("score", {"n": 3, "maps": "0.5"}, {"limit": 3, "map_sigma": "0.5"}),
        ("head-triage", {"split": "val", "train": 9}, {"report": "val", "train_limit": 9}),
        (
            "evaluate",
            {"reference": "read", "options": ["seg4diff.stream=t5", "seg4diff.softmax=text"]},
            {"as_reference": "read", "options": ["seg4diff.streams=t5", "seg4diff.softmax=text"]},
        ),
        ("select-layers", {"heads": 2, "prompts": 5}, {"top_heads": 2, "perturb_limit": 5}),
    ],
)
def test_records_of_earlier_versions_are_read(command: str, record: dict[str, Any], read: dict[str, Any]) -> None:
    again = experiment_of(command, record)
    assert {name: getattr(again, name) for name in read} == read


def test_a_selection_of_another_model_is_refused_where_maps_are_read(tmp_path: Path) -> None:
    """By the words and checks of the other commands, also of layers and heads, which `segment` did not look at."""
    path = LayerSelection("mine", "0" * 64, (2, 0), (0.75, 0.25), {2: (1,)}).save(tmp_path / "selection.json")
    asked = Segment(image="scenes:val:0", classes="cat", selection=path)
    read = asked.reading(Network("mine", "0" * 64, range(3), 2))
    assert (read.reading.layers, read.reading.weights, read.heads) == ((2, 0), {2: 0.75, 0: 0.25}, {2: (1,)})
    for network, says in (
        (Network("other", "1" * 64, range(3), 2), "was made on mine .* this is other .* run select-layers on it"),
        (Network("mine", "0" * 64, range(2), 2), "names layers .*mine has 2 layers of 2 heads"),
        (Network("mine", "0" * 64, range(3), 1), "mine has 3 layers of 1 heads"),
    ):
        with pytest.raises(UserError, match=says):
            asked.reading(network)


def test_texts_of_pictures_may_stand_in_a_file(tmp_path: Path) -> None:
    """The name of the file was taken for the text."""
    (tmp_path / "texts.txt").write_text("a cat\n# a remark\n\na red ring\n", encoding="utf-8")
    told = {"images": "scenes:val", "limit": 2, "prompts": str(tmp_path / "texts.txt")}
    for ask in (Diagnose(**told), FeaturePCA(**told)):  # type: ignore[arg-type]
        assert ask.texts(ask.gather(True), 0)[0] == ["a cat", "a red ring"]
    drawn = WordMaps(prompt=str(tmp_path / "texts.txt"), images="scenes:val", limit=2)
    assert drawn.gather(True)[0] == AttentionBudget(**told).gather(True)[0] == ["a cat", "a red ring"]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="2 prompts for 3 pictures"):
        replace(drawn, limit=3).gather(True)


def test_a_number_that_is_written_twice_counts_once() -> None:
    assert Generate(perturb_layers=1, perturb_scale="2,2.0,1").scales() == [2.0, 1.0]
    assert Score(map_sigma="0.5,0.50").sigmas() == [0.5]
    assert Evaluate(sigma="0.3,0.30,0.5").sigmas() == Evaluate(sigma=[0.3, 0.5, 0.3]).sigmas() == [0.3, 0.5]


TOGETHER = """
import os, signal, sys
from mmdit_probe import load
from mmdit_probe.errors import ProbeError, UserError
from mmdit_probe.experiments import AttentionBudget, Perturb
from mmdit_probe.results import processes

folder, out, lose = sys.argv[1], sys.argv[2], sys.argv[3] == "lose"
prompts = ["a red ring", "a cat", "a blue house"]
asks = {
    "budget": AttentionBudget(prompts=prompts, num_steps=1, guidance=2.0, layers="0-1"),
    "perturb": Perturb(prompts=prompts, num_steps=1, guidance=1.0, layers="1", edit="zero", batch=1),
}
model = load(folder)
if lose:
    stock = Perturb.measure

    def killed(self, study, task, record):
        stock(self, study, task, record)
        if processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Perturb.measure = killed
    del asks["budget"]
else:
    try:
        asks["budget"].run(model, progress=False)
    except UserError as error:
        assert "name one with out=" in str(error)
    else:
        raise AssertionError("several processes wrote into memory")
try:
    for name, ask in asks.items():
        ask.run(model, out=f"{out}/{name}", progress=False)
except ProbeError as error:
    print(f"{processes.rank()}: {error}", flush=True)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes in another way")
def test_two_processes_give_the_table_of_one(tiny_directory: Path, tmp_path: Path) -> None:
    """And when one is lost the other ends with our message; what was finished stays and the run goes on."""
    (tmp_path / "script.py").write_text(TOGETHER)

    def launch(out: Path, how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        line = [*command, tmp_path / "script.py", tiny_directory, out, how]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)

    done = launch(tmp_path / "two", "share")
    assert done.returncode == 0, done.stderr
    model = load(str(tiny_directory))
    for name in ("budget", "perturb"):
        two = read(tmp_path / "two" / name)
        same_tables(two.experiment.run(model, progress=False), two)
        assert two.data["status"] == "finished"
    lost = launch(tmp_path / "lost", "lose")
    assert lost.returncode != 0
    message = "0: process 1 of 2 ended; its own message says why; finished items are kept, continue with --resume"
    assert message in lost.stdout.splitlines(), lost.stderr
    whole = two.experiment.run(model, out=tmp_path / "lost" / "perturb", resume=True, progress=False)
    same_tables(two, whole)
    assert np.isfinite(whole.table["change"]).all()


@pytest.mark.parametrize("alone", [True, False])
def test_only_the_process_of_a_command_leaves_imports_out_of_garbage_collection(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook what is frozen might be the user's own."""
    frozen: list[bool] = []
    monkeypatch.setattr(naming.gc, "freeze", lambda: frozen.append(True))
    with naming._uncollected(alone):
        assert not naming.gc.isenabled()
    assert naming.gc.isenabled() and frozen == [True] * alone
    assert command_model(Session()).alone and not naming.named("scenes-sd3").alone


@pytest.mark.parametrize(
    "ask",
    [SigmaByLayer(limit=1), Attribute(limit=2), HeadTriage(limit=4, train_limit=4), SelectLayers(evidence="word_mass"),
     Score(categories="none", map_sigma="0.5", clip="none")],
)  # fmt: skip
def test_scenes_of_another_world_are_another_request(
    ask: Experiment, tiny_model: MMDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenes are named by number: with other pixels under the same numbers no run goes on, nor is it compared. Of the
    first world requests say nothing: those of its runs are as they were."""
    inputs: list[Any] = []
    now = ask.prepare(tiny_model, inputs).request
    monkeypatch.setattr("mmdit_probe.scenes.world.WORLD_VERSION", 2)
    then = ask.prepare(tiny_model, inputs).request
    split = "test" if isinstance(ask, HeadTriage) else "val"
    assert (now["split"], then["split"]) == (split, f"{split} of world 2") and "split" in ITEMS


def test_a_run_that_holds_no_table_says_so(tmp_path: Path) -> None:
    """It was an unknown command, of which "generate" was said to be meant."""
    with RunFolder.open("segment", {"image": "a.png"}, out=tmp_path / "cat") as folder:
        folder.record(options={}, model={"id": "m"})
    with RunFolder.open("train-magnet", {"rate": 1}, out=tmp_path / "lora"):
        pass
    for name, command in {"cat": "segment", "lora": "train-magnet"}.items():
        with pytest.raises(UserError, match=rf"{name}' holds a run of {command}, which is not read back as a table"):
            read(tmp_path / name)
