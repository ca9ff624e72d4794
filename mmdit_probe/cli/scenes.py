"""`mmdit-probe scenes`: look at the embedded world, train the models that ship, and measure them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmdit_probe.cli.options import (
    SESSION,
    Debug,
    Device,
    Guidance,
    Json,
    NumSteps,
    Out,
    Quiet,
    Session,
    session_without,
)

app = typer.Typer(help="The embedded world: look at scenes, train the shipped models.", rich_markup_mode=None)


class StageName(StrEnum):
    """Training stages in their order; "all" runs those that are not finished; "import" is in place of training them."""

    PARSER = "parser"
    VAE = "vae"
    CLIP = "clip"
    T5 = "t5"
    TRANSFORMER = "transformer"
    EXPORT = "export"
    IMPORT = "import"
    ALL = "all"


@app.command()
def show(
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    n: Annotated[int, typer.Option("-n", help="How many scenes.", min=1, max=60)] = 12,
    start: Annotated[int, typer.Option(help="Index of the first scene.", min=0)] = 0,
    kind: Annotated[str | None, typer.Option(help="Caption kind; a mixture by default.")] = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a contact sheet: scenes with captions, class, instance and part masks (PNG and PDF)."""
    from mmdit_probe.cli.output import Output
    from mmdit_probe.plots import save
    from mmdit_probe.plots.scenes import contact_sheet
    from mmdit_probe.results import RunFolder
    from mmdit_probe.scenes import describe, scene

    items = [scene(split, index) for index in range(start, start + n)]
    texts = [describe(item, kind) for item in items]
    folder = RunFolder.open("scenes-show", {"split": split, "n": n, "start": start, "kind": kind}, out=out)
    paths = save(contact_sheet(items, texts), folder.path / "scenes")
    folder.finish()
    document = {"run": folder.path, "figures": paths, "captions": texts}
    lines = [f"{split} {item.index}: {text or '(empty)'}" for item, text in zip(items, texts, strict=True)]
    Output(quiet=quiet, as_json=as_json, debug=debug).result(document, [*lines, f"written: {paths[0]}"], folder.path)


@app.command()
def train(
    stage: Annotated[StageName, typer.Option(help="Which stage; a stage needs those before it.")] = StageName.ALL,
    workdir: Annotated[Path, typer.Option(help="Where pools, checkpoints and curves are kept.")] = Path(".training"),
    steps: Annotated[int | None, typer.Option(help="Steps of the stage, in place of the recipe's.", min=1)] = None,
    assets: Annotated[
        Path | None, typer.Option(help="Where `export` writes and `import` reads; the package's own assets by default.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of from the last checkpoint.")] = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Train what the package ships, stage by stage, resuming exactly; `export` writes the assets, `import` starts from
    them."""
    from mmdit_probe.cli.output import Output
    from training.recipe import run_stage

    Output(debug=debug)
    names = [s for s in StageName if s not in (StageName.IMPORT, StageName.ALL)] if stage is StageName.ALL else [stage]
    for name in names:
        run_stage(name.value, workdir, steps=steps, assets=assets, resume=not fresh, device=device)


def noise_levels(text: str) -> list[float]:
    """Noise levels in 0..1 from "0.3,0.5"."""
    from mmdit_probe.errors import UserError

    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise UserError(f"--sigma '{text}': expected noise levels in 0..1, e.g. 0.5 or 0.3,0.5")
    return levels


@app.command()
@session_without("no_t5", "max_sequence_length")  # the report compares the maps of all encoders' words
def score(
    n: Annotated[int, typer.Option("-n", help="Captions per category, and scenes.", min=1)] = 200,
    guidance: Guidance = 7.5,
    num_steps: NumSteps = 28,
    sigma: Annotated[str, typer.Option(help="Noise levels at which real scenes are probed, e.g. 0.3,0.5.")] = "0.5",
    split: Annotated[str, typer.Option(help="val or test.")] = "val",
    session: Session = SESSION,
) -> None:
    """Measure a model that knows the world: what its images show (read by the parser), where its words look."""
    from mmdit_probe.cli.session import load_model, output_of
    from mmdit_probe.experiments.scenes_report import score_model

    output = output_of(session)
    loaded = load_model(session)
    request = {
        "n": n,
        "guidance": guidance,
        "num_steps": num_steps,
        "sigmas": noise_levels(sigma),
        "split": split,
        "seed": session.seed,
    }
    with output.progress("measurements", total=8) as advance:
        report = score_model(loaded, request, out=session.out, resume=session.resume, advance=advance)
    output.result(report.document, report.lines, report.path)
