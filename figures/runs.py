"""What the figure scripts share: a run folder in, files under `figures/out/<model>/` out.

A script names a command and its arguments. A finished run of the same request (same weights included) is drawn again
instead of being repeated; `--run` names a folder, `--fresh` measures anew.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmdit_probe.results.folder import read_record

OUT = Path(__file__).parent / "out"


def parse(document: str | None, command: str) -> argparse.Namespace:
    """The options that every figure script has."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-sd3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run", type=Path, help=f"run folder of {command}")
    parser.add_argument("--fresh", action="store_true", help="measure even if a finished run is there")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    return parser.parse_args()


def run_folder(options: argparse.Namespace, command: str, arguments: Sequence[str] = ()) -> Path:
    """The run to draw: the one named, or that of the request, measured now unless it is there."""
    if options.run:
        return options.run
    line = [sys.executable, "-m", "mmdit_probe", command, *arguments]
    line += ["--model", options.model, "--device", options.device, "-q"]
    line += [] if options.fresh else ["--resume"]
    return Path(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def model_of(folder: Path) -> str:
    """Name of the model that a run folder is about."""
    return str((read_record(folder) or {})["request"]["model"])


def target(options: argparse.Namespace, folder: Path, name: str) -> Path:
    """Where a figure goes, without suffix."""
    path = options.out / Path(model_of(folder)).name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def take(folder: Path, name: str, path: Path) -> None:
    """Copy a figure that the run folder already holds (images are kept there, not in tables)."""
    for suffix in (".png", ".pdf"):
        if (folder / name).with_suffix(suffix).exists():
            shutil.copyfile((folder / name).with_suffix(suffix), path.with_suffix(suffix))
            print(path.with_suffix(suffix))
