"""`--offload` and `--quantize` of every command on a model: handed on to `load`, and part of the run's record."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mmdit_probe import MMDiT
from mmdit_probe.cli.app import COMMANDS, main
from mmdit_probe.experiments import experiment
from mmdit_probe.models import load as loading, names

ONE = ["--limit", 1, "--num-steps", 1]
LINES: dict[str, list[Any]] = {
    "maps": ["a red ring", "--num-steps", 1],
    "explore": ["a red ring", "--num-steps", 1],
    "report": ["--limit", 4, "--num-steps", 1],
    "attention-budget": ONE,
    "contribution-budget": ONE,
    "diagnose": ["--limit", 2],
    "value-norms": ONE,
    "pca": ["--limit", 2],
    "perturb": ["--layers", 0, *ONE],
    "generate": ONE,
    "attribute": ["--limit", 2, "--layers", 0],
    "swap-test": ["--layers", 0, *ONE],
    "block-operations": ["--layers", 0, *ONE],
    "sigma-map": ["--limit", 2, "--layers", 0, "--sigma", "0.5"],
    "select-layers": ["--evidence", "word_mass", "--limit", 4, "--num-steps", 1],
    "head-triage": ["--limit", 4, "--train-limit", 4, "--layers", 0],
    "segment": ["scenes:val:0", "--classes", "ring,house"],
    "discover": ["scenes:val:0"],
    "evaluate": ["--limit", 1],
    "train-magnet": ["--layers", 4, "--train-steps", 1, "--batch", 1, "--limit", 2, "--validate-limit", 0],
    "score": ["--limit", 1, "--categories", "colour", "--num-steps", 1],
}
"""A short run of each command on the embedded model."""


class Stopped(Exception):
    """The run has begun: its record is there."""


def run(name: str, *options: Any) -> Any:
    """What the record says of the model."""
    with pytest.raises(SystemExit) as ended:
        main([name, *map(str, LINES[name]), *options, "--device", "cpu", "--out", "run", "--quiet"])
    assert ended.value.code in (0, 1)
    return json.loads(Path("run/run.json").read_text(encoding="utf-8"))["model"]


def test_every_command_is_among_them() -> None:
    assert set(LINES) == {command.name for command in COMMANDS}


@pytest.mark.parametrize("name", LINES)
def test_a_command_hands_them_on_and_records_them(
    name: str, scenes_model: MMDiT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    real = loading.load

    def load(source: str, **options: Any) -> MMDiT:
        asked.append((options["offload"], options["quantize"]))
        # Training leaves an adapter in the model.
        found = real(source, device="cpu") if name == "train-magnet" else copy.copy(scenes_model)
        found.name, found.offload, found.quantize = f"{source}+int8", options["offload"], options["quantize"]
        return found

    def stop(*_: Any) -> None:
        raise Stopped

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(experiment, "_work", stop)
    monkeypatch.setitem(names.QUANTIZERS, "int8", "json")  # nothing is quantised here: any package that is installed
    told = run(name, "--offload", "group", "--quantize", "int8")
    assert asked == [("group", "int8")]
    assert (told["offload"], told["quantize"]) == ("group", "int8") and told["id"] == "scenes-sd3+int8"


@pytest.mark.parametrize("name", LINES)
def test_a_command_runs_on_a_quantised_model(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if find_spec(names.QUANTIZERS["int8"]) is None:
        pytest.skip(f"{names.QUANTIZERS['int8']} is not installed")
    monkeypatch.chdir(tmp_path)
    told = run(name, "--quantize", "int8")
    assert told["quantize"] == "int8" and told["id"] == "scenes-sd3+int8"
    assert json.loads(Path("run/run.json").read_text(encoding="utf-8"))["status"] == "finished"
