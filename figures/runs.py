"""What the figure scripts share: an experiment in, files under `figures/out/<model>/` out.

A script names an experiment. A finished run of the same request (same weights included) is drawn again instead of being
repeated: those of an embedded model with the options that a script has by itself are kept in `measured/`, which ships
as archives, all others in `runs/`. `--run`, where one run is drawn, names its folder, `--fresh` measures anew, and
`--set` passes further options of the experiment:

    python figures/fig05_blur.py --model ... --set limit=4 --set num_steps=8 --set dino=facebook/dinov2-base
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mmdit_probe import assets
from mmdit_probe.data import paper_table
from mmdit_probe.experiments.experiment import plain
from mmdit_probe.experiments.target import Named
from mmdit_probe.models.names import device_name, model_name
from mmdit_probe.plots import save
from mmdit_probe.results.folder import short_hash

if TYPE_CHECKING:
    from mmdit_probe.experiments.experiment import Experiment
    from mmdit_probe.experiments.result import Result

OUT = Path(__file__).parent / "out"
MEASURED = Path(__file__).parent / "measured"
"""Run folders by experiment, options and weights, and one archive of each: its tables, arrays and record, and images
that a figure shows."""
PACKED = (".json", ".npz", ".parquet")
PICTURED = ("perturb",)
"""Experiments whose figures show images of the run folder."""
ELSEWHERE = ("out", "fresh", "device", "model", "only")
"""Options of a script that leave its measurement where it is kept."""
PAPER_MODEL = "stable-diffusion-3-medium"
PAPER_LENGTH = 77
"""The paper's text on its own model: T5 off, 77 CLIP tokens and 77 zeroed T5 slots."""
PAPER_STEP = "last-8"
"""The paper's step t = 8 of 28, counted from the clean end; sigma 0.515."""
CHOICE = Path(__file__).parents[1] / "analyses" / "results" / "segmentation_choice"
"""Where `analyses/segmentation_choice.py` writes what segments best on training scenes."""
TRAINED_ON = {"coco": "COCO", "sa1b": "SA-1B", "sa-1b": "SA-1B"}
"""Word in an adapter's name or record -> the paper's name of its data."""
PAPER_NAMES = {PAPER_MODEL: "SD3-medium", "stable-diffusion-3.5": "SD3.5-medium", "flux.1-dev": "FLUX.1-dev"}
"""Part of a model's name -> its name in the paper's list of layers."""
WEIGHTS = (".json", ".safetensors", ".txt", ".model", ".csv")
"""Suffixes of what decides the numbers of an embedded model."""


def below(place: Path) -> Path:
    """A place as it is seen from the working folder, if it is below: a record that is kept tells no other folders."""
    return place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place


def chosen(model: str) -> dict[str, Any]:
    """The segmentation settings chosen for this model; empty for a model that none were chosen for."""
    file = CHOICE / "settings.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if found.get("model") == model else {}


class Parser(argparse.ArgumentParser):
    """Also says, as `plain`, whether the options that decide numbers are those that a script has by itself."""

    def parse_args(self, *args: Any) -> argparse.Namespace:  # type: ignore[override]
        options = super().parse_args(*args)
        given = {name for name, value in vars(options).items() if value != self.get_default(name)}
        options.plain = options.model in assets.names() and given <= {*ELSEWHERE}
        return options


def options_of(document: str | None, *, run: bool = True, more: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that every figure script has, and those that most read: a run folder (`run`), and
    options of the experiment (`more`)."""
    parser = Parser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_name, default="scenes-sd3")
    parser.add_argument("--lora", help="adapter to load onto the model: a folder or a hub id")
    parser.add_argument("--device", type=device_name, default="auto")
    if run:
        parser.add_argument("--run", type=Path, help="run folder to draw")
    parser.add_argument("--fresh", action="store_true", help="measure even if a finished run is there")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    if more:
        parser.add_argument(
            "--set", action="append", default=[], metavar="NAME=VALUE",
            help="further option of the experiment; repeatable",
        )  # fmt: skip
    return parser


def model_of(options: argparse.Namespace, *, lora: bool = True) -> Named:
    """The model to measure; the paper's own with the paper's text. `lora`: with the adapter, if one is named."""
    how: dict[str, Any] = {"device": options.device}
    how |= {"lora": options.lora} if lora and options.lora else {}
    if is_paper_model(options.model):
        return Named(options.model, how | {"t5": False}, PAPER_LENGTH)
    return Named(options.model, how)


def measured(options: argparse.Namespace, experiment: type[Experiment], **how: Any) -> Result:
    """The result to draw: that of the run folder named, or of the experiment, measured now unless it is there.

    Args:
        how: options of the experiment; those of `--set` come after them.
    """
    from mmdit_probe.experiments.result import Result

    if options.run:
        return Result.read(options.run)
    return run(experiment(**how | given(options, experiment)), model_of(options), options)


def run(experiment: Experiment, target: Any, options: argparse.Namespace) -> Result:
    """A finished run of the same request, or a new one, which is kept in `measured/` or `runs/`."""
    if not options.plain:
        return experiment.run(target, out="auto", resume=not options.fresh)
    asked, how = _asked(experiment), {k: v for k, v in target.options.items() if k not in ELSEWHERE}
    if asked.get("selection"):  # wherever the clone lies
        asked["selection"] = hashlib.sha256(Path(asked["selection"]).read_bytes()).hexdigest()
    of = {"options": asked, "target": plain(how), "weights": shipped()}
    place = MEASURED / target.name / f"{experiment.name}-{short_hash(of)}"
    archive = place.with_suffix(".tar.xz")
    if options.fresh:
        shutil.rmtree(place, ignore_errors=True)
        archive.unlink(missing_ok=True)
    elif archive.exists() and not place.exists():
        shutil.unpack_archive(archive, place, filter="data")
    result = experiment.run(target, out=place, resume=True)
    if not archive.exists():
        with tarfile.open(archive, "w:xz") as packed:
            kept = [path for path in place.rglob("*") if path.suffix in PACKED and path.is_file()]
            if experiment.name in PICTURED:
                kept += place.glob("images/*.png")
            for path in sorted(kept):
                packed.add(path, path.relative_to(place).as_posix(), filter=_nobody)
    return result


def _asked(experiment: Experiment) -> dict[str, Any]:
    """The options that are not left to their defaults: those that come to be later change nothing of earlier runs."""
    named = {field.name: (getattr(experiment, field.name), field.default) for field in fields(experiment)}
    asked: dict[str, Any] = plain({name: value for name, (value, default) in named.items() if value != default})
    return asked


def _nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """An entry of an archive without its owner."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def shipped() -> str:
    """SHA-256 over all weights that ship, with their configurations and vocabularies."""
    files = sorted(path for path in assets.path("scenes-sd3").parent.rglob("*") if path.suffix in WEIGHTS)
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


def given(options: argparse.Namespace, experiment: type[Experiment]) -> dict[str, Any]:
    """What `--set` says, by the types of the experiment's options.

    Raises:
        UserError: no option of the experiment.
    """
    from mmdit_probe.errors import check_known
    from mmdit_probe.options import described
    from mmdit_probe.segment.settings import split_option, value_of

    known = {field.name: field for field in described(experiment)}
    found = {}
    for name, text in map(split_option, options.set):
        check_known(f"option of {experiment.__name__}", name, known)
        found[name] = value_of(text, known[name].type, known[name].option.values)
    return found


def is_paper_model(model: str) -> bool:
    """Whether the paper's own numbers are about this model."""
    return PAPER_MODEL in model


def paper_step(options: argparse.Namespace) -> dict[str, Any]:
    """The paper's step, for its own model."""
    return {"steps": PAPER_STEP} if is_paper_model(options.model) else {}


def published(name: str, model: str) -> pd.DataFrame | None:
    """A table of the paper to draw over the measured values; None for models that it is not about."""
    return paper_table(name) if is_paper_model(model) else None


def paper_layers(model: str) -> list[int]:
    """The layers that the paper names as the experts of a model; none for models that it does not speak of."""
    layers = paper_table("vital_layers")
    named = [name for part, name in PAPER_NAMES.items() if part in model.lower()]
    return [int(at) for at in layers.loc[layers["model"].isin(named) & (layers["role"] == "expert"), "layer"]]


def as_measured(**settings: object) -> str:
    """How a value was measured, for tables that are compared with the paper's: "sigma: 0.515; layers: 9"."""
    return "; ".join(f"{name}: {value}" for name, value in settings.items())


def text_of(request: Mapping[str, Any]) -> str:
    """How a run read its text."""
    return f"T5 {'off' if request.get('no_t5') else 'on'}, length {request.get('max_sequence_length') or 'own'}"


def protocol_of(result: Result) -> str:
    """How a sampled run was measured: text, steps, guidance, heads, prompts."""
    request, asked = result.request, result.experiment.prompts  # type: ignore[attr-defined]
    steps, heads = request["steps"], len(request["heads"])
    of = "own" if isinstance(asked, list | tuple) else "default" if asked is None else Path(asked).stem.lower()
    return as_measured(
        text=text_of(request), mode=request["mode"], guidance=f"{request['guidance']:g}",
        step=f"{steps[0] if len(steps) == 1 else f'{len(steps)} steps'} of {request['num_steps']}",
        heads="all" if heads == result.data["model"]["heads"] else heads, prompts=f"{len(request['items'])} of {of}",
    )  # fmt: skip


def adapter_of(name: str | None) -> str:
    """An adapter and the data that it was trained on, as far as its record or its name say: "me/lora on COCO"."""
    from mmdit_probe.models.adapters import KEY, read_metadata

    if name is None:
        return "none"
    record = read_metadata(name)[KEY] if Path(name).exists() else {}
    said = str(record.get("data", {}).get("data", name)).lower()
    known = {data for word, data in TRAINED_ON.items() if word in said}
    return f"{name} on {known.pop() if len(known) == 1 else 'other data'}"


def target(options: argparse.Namespace, model: str, name: str) -> Path:
    """Where a figure goes, without suffix."""
    path = Path(options.out) / Path(model).name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def file_suffix(dataset: str) -> str:
    """What the file names of a data set end in: nothing for scenes:val, else its name."""
    return "" if dataset == "scenes:val" else f"_{dataset.split(':')[0]}"


def write(figure: object, path: Path, table: pd.DataFrame | None = None) -> None:
    """Write a figure as PNG and PDF, the plotted numbers as CSV, and print the paths: `make.py` reads them."""
    print(*save(figure, path), sep="\n")  # type: ignore[arg-type]
    if table is not None:
        write_table(table, path)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write numbers alone, and print the path."""
    table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
    print(path.with_suffix(".csv"))
