"""What the figure scripts share: a run folder in, files under `figures/out/<model>/` out.

A script names a command and its arguments. A finished run of the same request (same weights included) is drawn again
instead of being repeated; `--run` names a folder, `--fresh` measures anew, and what follows ` -- ` goes to the command:

    python figures/fig05_blur.py --model ... -- --limit 4 --num-steps 8 --dino facebook/dinov2-base
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mmdit_probe.data import paper_table
from mmdit_probe.plots import save
from mmdit_probe.results.folder import read_record

OUT = Path(__file__).parent / "out"
PAPER_MODEL = "stable-diffusion-3-medium"
PAPER_TEXT = ("--no-t5", "--max-sequence-length", "77", "--steps", "last-8")
"""The paper's text (77 CLIP and 77 zeroed T5 slots) and its step t = 8, for commands that have these options."""
CHOICE = Path(__file__).parents[1] / "analyses" / "results" / "segmentation_choice"
"""Where `analyses/segmentation_choice.py` writes what segments best on training scenes."""
PAPER_NAMES = {PAPER_MODEL: "SD3-medium", "stable-diffusion-3.5": "SD3.5-medium", "flux.1-dev": "FLUX.1-dev"}
"""Part of a model's name -> its name in the paper's list of layers."""


def chosen(model: str) -> dict[str, Any]:
    """The segmentation settings chosen for this model; empty for a model that none were chosen for."""
    file = CHOICE / "settings.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if found.get("model") == model else {}


def options_of(document: str | None, command: str) -> argparse.ArgumentParser:
    """A parser with the options that every figure script has."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-sd3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run", type=Path, help=f"run folder of {command}")
    parser.add_argument("--fresh", action="store_true", help="measure even if a finished run is there")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help=f"further arguments of {command}")
    return parser


def parse(document: str | None, command: str) -> argparse.Namespace:
    """The options that every figure script has."""
    return options_of(document, command).parse_args()


def run_folder(options: argparse.Namespace, command: str, arguments: Sequence[str] = ()) -> Path:
    """The run to draw: the one named, or that of the request, measured now unless it is there."""
    if options.run:
        return Path(options.run)
    line = [sys.executable, "-m", "mmdit_probe", command, *arguments]
    line += ["--model", options.model, "--device", options.device, "-q", *options.arguments]
    line += [] if options.fresh else ["--resume"]
    return Path(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def model_of(folder: Path) -> str:
    """Name of the model that a run folder is about."""
    return str((read_record(folder) or {})["request"]["model"])


def is_paper_model(model: str) -> bool:
    """Whether the paper's own numbers are about this model."""
    return PAPER_MODEL in model


def published(name: str, model: str) -> pd.DataFrame | None:
    """A table of the paper to draw over the measured values; None for models that it is not about."""
    return paper_table(name) if is_paper_model(model) else None


def paper_layers(model: str) -> list[int]:
    """The layers that the paper names as the experts of a model; none for models that it does not speak of."""
    layers = paper_table("vital_layers")
    named = [name for part, name in PAPER_NAMES.items() if part in model.lower()]
    return [int(at) for at in layers.loc[layers["model"].isin(named) & (layers["role"] == "expert"), "layer"]]


def target(options: argparse.Namespace, model: str, name: str) -> Path:
    """Where a figure goes, without suffix."""
    path = Path(options.out) / Path(model).name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(figure: object, path: Path, table: pd.DataFrame | None = None) -> None:
    """Write a figure as PNG and PDF, the plotted numbers as CSV, and print the paths: `make.py` reads them."""
    print(*save(figure, path), sep="\n")  # type: ignore[arg-type]
    if table is not None:
        table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
        print(path.with_suffix(".csv"))


def take(folder: Path, name: str, path: Path) -> None:
    """Copy a figure that the run folder already holds: of pictures and maps, which are kept there and not in tables."""
    for suffix in (".png", ".pdf"):
        if (folder / name).with_suffix(suffix).exists():
            shutil.copyfile((folder / name).with_suffix(suffix), path.with_suffix(suffix))
            print(path.with_suffix(suffix))
