"""Make the figures again, but only those whose inputs have changed: what `make figures` runs.

    python figures/make.py                                     # embedded model
    python figures/make.py --model ... --device cuda --clip ... --dino ... --dataset voc20:VOCdevkit/VOC2012
    python figures/make.py --only fig05_blur --fresh           # measure one of them anew

A figure is up to date if all files that its script wrote are there unaltered, and the script, the drawing code that it
reaches, its options (of folders their files' sizes and times) and the model's weights are those it was made with:
`manifest.json` beside the figures remembers them. What was measured is kept in run folders, found again by request and
weights. Measuring code below the experiments is no part of it: after a change there, say `--fresh`. Each script runs in
a process of its own, several at a time.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from runs import OUT, below, shipped

import mmdit_probe
from mmdit_probe import assets, experiments
from mmdit_probe.errors import at_least, run_script
from mmdit_probe.models.names import device_name, model_name

HERE = Path(__file__).parent
MANIFEST = "manifest.json"
_LOCK = Lock()
DRAWING = ("mmdit_probe.plots", "mmdit_probe.data", "mmdit_probe.experiments")
"""Rooms whose modules count with everything that they import; of other rooms only what a script itself imports."""

OF_CLASS = {
    f"{experiments.__name__}.{name}": f"{experiments.__name__}.{module}" for name, module in experiments.MODULES.items()
}
"""Experiment as scripts import it -> its module."""


@dataclass(frozen=True)
class Figure:
    """A script and which of the options it takes beside --model, --device, --fresh and --out.

    Attributes:
        reads: patterns of files that it draws, in the folder of the figures or in the repository.
        last: it reads what the others wrote.
        only: the one model that it is about.
    """

    script: str
    takes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    last: bool = False
    only: str = ""


CHOICE = "analyses/results/segmentation_choice/*.json"

FIGURES = (
    Figure("fig08_segmentation", ("dataset", "lora"), (CHOICE,)),
    Figure("fig05_blur", ("clip", "dino")),
    Figure("fig06_guidance", ("clip",)),
    Figure("fig07_masks", ("dataset",), (CHOICE,)),
    Figure("fig09_token_maps"),
    Figure("fig02_attention_budget"),
    Figure("fig04_value_norms"),
    Figure("fig03_pca", ("images",)),
    Figure("fig_analyses"),
    Figure("fig10_magnet", ("lora", "dataset", "clip"), (CHOICE, "analyses/results/magnet_scenes/*")),
    Figure("fig_embedded_training", only="scenes-sd3"),
    Figure("fig_alignment_ablation", reads=("analyses/results/alignment_ablation/*.csv",), only="scenes-sd3"),
    Figure("paper_vs_measured", reads=("*.csv",), last=True),
    Figure("paper_findings", reads=("*.csv",), last=True),
)
"""In the order of their run time, longest first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_name, default="scenes-sd3")
    parser.add_argument("--device", type=device_name, default="auto")
    parser.add_argument("--dataset", help="for figures of masks: NAME:ROOT")
    parser.add_argument("--lora", help="adapter for MAGNET's rows and figures: a folder or a hub id")
    parser.add_argument("--images", help="for the PCA: folder of pictures")
    parser.add_argument("--clip", help="CLIP checkpoint for CLIP-T and CLIP-I")
    parser.add_argument("--dino", help="DINO checkpoint")
    parser.add_argument("--only", nargs="*", choices=[figure.script for figure in FIGURES], help="these scripts")
    parser.add_argument("--fresh", action="store_true", help="measure and draw everything anew")
    parser.add_argument("--jobs", type=at_least(1), help="scripts at a time [a core each for embedded models, else 1]")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    options = parser.parse_args()
    small = options.model in assets.names()
    jobs = options.jobs or (min(4, os.cpu_count() or 1) if small and options.device in ("auto", "cpu") else 1)
    weights = weights_of(options.model)
    chosen = [figure for figure in FIGURES if options.only is None or figure.script in options.only]
    chosen = [figure for figure in chosen if figure.only in ("", options.model)]
    failed: list[str] = []
    for last in (False, True):
        with ThreadPoolExecutor(jobs) as pool:
            stage = [figure for figure in chosen if figure.last == last]
            done = list(pool.map(lambda figure: make(figure, options, weights, jobs), stage))
            failed += [figure.script for figure, good in zip(stage, done, strict=True) if not good]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def make(figure: Figure, options: argparse.Namespace, weights: str, jobs: int) -> bool:
    """Run a script unless its figures are up to date. Returns: whether they are now."""
    folder = options.out / Path(options.model).name
    given = [part for name in figure.takes if getattr(options, name) for part in (f"--{name}", getattr(options, name))]
    inputs = digest(figure, folder, options.model, given, weights)
    if not options.fresh and weights and up_to_date(folder, figure.script, inputs):
        print(f"{figure.script}: up to date")
        return True
    line = [sys.executable, str(below(HERE / f"{figure.script}.py")), "--model", options.model]
    line += ["--device", options.device, "--out", str(below(options.out)), *given]
    line += ["--fresh"] if options.fresh else []
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    started = time.perf_counter()
    done = subprocess.run(line, env=os.environ | threads, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        print(f"{figure.script}: failed after {seconds:.0f} s\n{done.stdout}{done.stderr}", file=sys.stderr)
        return False
    files = [Path(path) for path in done.stdout.split("\n") if path and Path(path).is_file()]
    print(f"{figure.script}: {len(files)} files in {seconds:.0f} s")
    remember(folder, figure.script, inputs, files)
    return True


def digest(figure: Figure, folder: Path, model: str, arguments: list[str], weights: str) -> str:
    """SHA-256 over everything that a figure is made from."""
    files = [of for argument in arguments for of in stats_of(Path(argument.rpartition(":")[2]))]
    found = hashlib.sha256(json.dumps([model, [*arguments, *files], weights]).encode())
    numbers = sorted(Path(mmdit_probe.__file__).parent.glob("data/paper/*.csv"))
    for path in [*sources(HERE / f"{figure.script}.py"), *numbers, *read_files(figure, folder)]:
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def read_files(figure: Figure, folder: Path) -> list[Path]:
    roots = {pattern: HERE.parent if "/" in pattern else folder for pattern in figure.reads}
    found = {path for pattern, root in roots.items() for path in root.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.stem != figure.script)


def sources(script: Path) -> list[Path]:
    """The script, the modules beside it and of the drawing rooms that it reaches, and the others that it imports
    itself."""
    found: dict[str, Path] = {script.stem: script}
    todo = [script]
    while todo:
        path = todo.pop()
        for name in imported(path):
            here = HERE / f"{name}.py"
            drawing = here.is_file() or name.startswith(DRAWING)
            if name not in found and (drawing or (path == script and name.startswith(("mmdit_probe.", "training.")))):
                at = here if here.is_file() else module_file(name)
                if at is not None:
                    found[name] = at
                    todo += [at] if drawing else []
    return [found[name] for name in sorted(found)]


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports at its top, and of the drawing modules that its functions import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {name for node in ast.walk(tree) for name in _names(node) if name.startswith(DRAWING[0])}
    top = {name for node in tree.body for name in _names(node)}
    return {OF_CLASS.get(name, name) for name in top | inside}


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def module_file(name: str) -> Path | None:
    """Where a module of the package or of the training lies; None: it is a name in a module. Importing it to find out
    would load torch."""
    root = HERE if name.startswith("training.") else Path(mmdit_probe.__file__).parent
    place = root.parent.joinpath(*name.split("."))
    found = [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    return found[0] if found else None


def weights_of(model: str) -> str:
    """What tells a model's weights from others: for embedded models all that ships, for a folder its files' sizes and
    times, for a hub id the commit in the cache. Empty if unknown: then nothing counts as up to date."""
    if model in assets.names():
        return shipped()
    if Path(model).is_dir():
        return hashlib.sha256(json.dumps(stats_of(Path(model))).encode()).hexdigest()
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(model, "model_index.json")
    return Path(file).parent.name if isinstance(file, str) else ""


def stats_of(place: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a folder, or of one file; none of what is no path."""
    files = [path for path in (place, *sorted(place.rglob("*"))) if path.is_file()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def manifest_of(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def up_to_date(folder: Path, script: str, inputs: str) -> bool:
    """Whether the files of a script are there, unaltered, and made from these inputs."""
    entry = manifest_of(folder).get(script, {})
    return entry.get("inputs") == inputs and all(
        (folder / name).is_file() and checksum(folder / name) == value for name, value in entry["files"].items()
    )


def remember(folder: Path, script: str, inputs: str, files: list[Path]) -> None:
    """Write a script's entry of the manifest, atomically: scripts finish at the same time."""
    with _LOCK:
        folder.mkdir(parents=True, exist_ok=True)
        entry = {"inputs": inputs, "files": {path.name: checksum(path) for path in sorted(files)}}
        whole = dict(sorted((manifest_of(folder) | {script: entry}).items()))
        temporary = folder / f"{MANIFEST}.tmp"
        temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / MANIFEST)


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    run_script(main)
