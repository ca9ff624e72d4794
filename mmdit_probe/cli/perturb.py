"""`mmdit-probe perturb`: edit one layer's I2T block at a time and see what the image loses, Fig. 5 and 18 of
arXiv:2509.18096."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.attention_budget import Guidance, Heads, Layers, Limit, NoT5, NumSteps, Prompts
from mmdit_probe.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Json, Lora, Model, Out, Quiet, Resume, Seed

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from mmdit_probe.edit.base import Edit

NAME, TABLE, IMAGES = "perturb", "perturb", "images"
DEFAULT_PROMPTS = 16


class Kind(StrEnum):
    """Edits of the block."""

    BLUR = "blur"
    GRID_BLUR = "grid-blur"
    ZERO = "zero"
    MEAN = "mean"


class Place(StrEnum):
    """What is edited at a time."""

    LAYERS = "layers"
    HEADS = "heads"
    SPANS = "spans"


class BorderRule(StrEnum):
    """What stands for tokens beyond the ends."""

    REFLECT = "reflect"
    SYMMETRIC = "symmetric"
    REPLICATE = "replicate"


class Stage(StrEnum):
    """Before or after the softmax."""

    PROBABILITIES = "probabilities"
    LOGITS = "logits"


class Branch(StrEnum):
    """Guidance branches to edit."""

    ALL = "all"
    COND = "cond"
    UNCOND = "uncond"


EditKind = Annotated[Kind, typer.Option("--edit", help="blur along text tokens (the paper), grid-blur, zero, mean.")]
By = Annotated[Place, typer.Option("--by", help="Edit whole layers, single heads, or span kinds one at a time.")]
BlurSigma = Annotated[float, typer.Option("--blur-sigma", help="Blur width in tokens; 0 is the no-op.", min=0)]
Kernel = Annotated[int, typer.Option(help="Taps of the blur, odd.", min=1)]
BorderOption = Annotated[BorderRule, typer.Option("--border", help="reflect (the paper) or symmetric (keeps mass).")]
Where = Annotated[Stage, typer.Option(help="Blur probabilities (the paper) or logits.")]
Streams = Annotated[str | None, typer.Option(help="Text tokens of these encoders only, e.g. clip. [default: all]")]
Renormalise = Annotated[bool, typer.Option("--renormalise", help="Rescale edited rows to a total of 1.")]
BranchOption = Annotated[Branch, typer.Option("--branch", help="Guidance branch to edit.")]
EditSteps = Annotated[str, typer.Option("--steps", help="Sampling steps to edit: all, 0,20, 0-4, last-8.")]


def build_edit(
    kind: Kind, sigma: float, kernel: int, border: str, where: str, streams: str | None, renormalise: bool, steps: str,
    branch: Branch = Branch.ALL,
) -> Edit:  # fmt: skip
    """The edit that the options describe; its layers are set later."""
    from mmdit_probe.edit import Blur, GridBlur, Mean, Scale

    address: dict[str, Any] = {
        "streams": tuple(streams.split(",")) if streams else None,
        "renormalise": renormalise,
        "steps": steps,
        "branches": None if branch is Branch.ALL else (branch.value,),
    }
    blur: dict[str, Any] = {"sigma": sigma, "kernel": kernel, "border": border, "where": where}
    if kind is Kind.BLUR:
        return Blur("image", "text", **blur, **address)
    if kind is Kind.GRID_BLUR:
        return GridBlur("image", "text", **blur, **address)
    return Scale("image", "text", factor=0.0, **address) if kind is Kind.ZERO else Mean("image", "text", **address)


def command(
    layers: Layers = "all",
    prompts: Prompts = None,
    limit: Limit = None,
    edit: EditKind = Kind.BLUR,
    by: By = Place.LAYERS,
    heads: Heads = "all",
    blur_sigma: BlurSigma = 9.0,
    kernel: Kernel = 5,
    border: BorderOption = BorderRule.REFLECT,
    where: Where = Stage.PROBABILITIES,
    streams: Streams = None,
    renormalise: Renormalise = False,
    steps: EditSteps = "all",
    branch: BranchOption = Branch.ALL,
    num_steps: NumSteps = 28,
    guidance: Guidance = 7.5,
    control: Annotated[bool, typer.Option("--control/--no-control", help="Random control of equal size.")] = True,
    clip: Annotated[str | None, typer.Option(help="CLIP checkpoint for CLIP-T and CLIP-I (folder or hub id).")] = None,
    dino: Annotated[str | None, typer.Option(help="DINO checkpoint for image similarity (folder or hub id).")] = None,
    sheet: Annotated[int, typer.Option(help="Keep the images of this many prompts for the contact sheet.")] = 4,
    batch: Annotated[int, typer.Option(help="Prompts sampled at once.", min=1)] = 8,
    no_t5: NoT5 = False,
    model: Model = DEFAULT_MODEL,
    lora: Lora = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Edit the I2T block of one layer at a time, sample with the same seeds, and measure what changes.

    Outcomes: change of the image; for models of the scenes world, which facts of the prompt the image still shows; with
    --clip and --dino, the paper's CLIP-T, CLIP-I and DINO similarity. The no-op row must be exactly 0.
    """
    from mmdit_probe import assets
    from mmdit_probe.cli.output import Output
    from mmdit_probe.data import prompts as texts

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    embedded = model in assets.names()
    source = ("scenes:val" if embedded else "everyday") if prompts is None else prompts
    asked = texts.resolve(source, limit or (DEFAULT_PROMPTS if prompts is None else None))
    change = build_edit(edit, blur_sigma, kernel, border.value, where.value, streams, renormalise, steps, branch)

    from mmdit_probe.cli.session import open_model
    from mmdit_probe.edit import perturb
    from mmdit_probe.edit.outcomes import Change, Clip, Dino, Outcome, Parser
    from mmdit_probe.results import RunFolder, TableWriter
    from mmdit_probe.specs import step_indices

    step_indices(steps, num_steps)
    outcomes: list[Outcome] = [Change()]
    if embedded:
        outcomes.append(Parser())
        clip = clip or ("scenes-clip" if "scenes-clip" in assets.names() else None)
    loaded = open_model(model, lora=lora, debug=debug, device=device, dtype=dtype, t5=not no_t5)
    if clip is not None:
        outcomes.append(Clip(assets.path(clip) if clip in assets.names() else clip, loaded.device))
    if dino is not None:
        outcomes.append(Dino(dino, loaded.device))
    plan = perturb.conditions(loaded, change, layers, by.value, heads, control, seed)
    sampling = perturb.Sampling(num_steps, guidance, seed, batch)
    request = {
        "model": loaded.name,
        "weight_hash": loaded.weight_hash,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "text_length": loaded.text_length,
        "edit": change.record(),
        "places": [[c.kind, c.layer, c.head, c.span] for c in plan],
        "outcomes": [name for outcome in outcomes for name in outcome.names],
        "checkpoints": {"clip": clip, "dino": dino},
        "num_steps": num_steps,
        "guidance": guidance,
        "batch": batch,
        "items": [[prompt, seed + index] for index, prompt in enumerate(asked)],
    }
    folder = RunFolder.open(NAME, request, out=out, resume=resume)
    if not folder.complete:
        facts = {"id": loaded.name, "family": loaded.family.name, "weight_hash": loaded.weight_hash}
        folder.record(model=facts, device=str(loaded.device), seed=seed, sigmas=loaded.sigmas(num_steps))
        kept = folder.path / IMAGES
        kept.mkdir(exist_ok=True)

        def keep(index: int, condition: perturb.Condition, image: Any) -> None:
            if index < sheet:
                image.save(kept / f"{index:03d}-{condition.name}.png")

        groups = perturb.chunks(asked, sampling)
        with TableWriter(folder.path, TABLE) as writer:
            done = len(writer.done) * len(plan)
            with output.progress("batches of images", len(groups) * len(plan), done) as advance:
                for number, indices in enumerate(groups):
                    if number not in writer.done:
                        with writer.item(number) as rows:
                            perturb.run_chunk(
                                loaded, asked, indices, plan, sampling, outcomes, rows, keep, advance
                            )  # fmt: skip
            folder.record()
    _report(folder, plan, output)


def _report(folder: Any, plan: Any, output: Any) -> None:
    """The table per place, the figures and the paths, from what is on disk."""
    from PIL import Image

    from mmdit_probe.cli.attention_budget import _plain
    from mmdit_probe.edit.perturb import CONTROL, EDIT, NO_OP, STOCK, summarise
    from mmdit_probe.plots import save
    from mmdit_probe.plots.perturb import contact_sheet, effects_by_layer, effects_grid
    from mmdit_probe.results import read_table

    path = folder.path / f"{TABLE}.parquet"
    table = read_table(path)
    summary = summarise(table)
    summary.to_csv(folder.path / f"{TABLE}_by_place.csv", index=False, float_format="%.6g")
    request = folder.data["request"]
    name = Path(request["model"]).name
    count = int(summary["n"].max())
    title = f"{name}: {request['edit']['edit'].lower()} of I2T, n = {count} prompts"
    figures = []
    whole = {(c.head, c.span) for c in plan if c.layer >= 0} == {(-1, "all")}
    order = ["facts", "clip_t", "change", "clip_i", "dino"]
    if whole:
        figures += save(effects_by_layer(summary, order[:4], title=title), folder.path / TABLE)
    else:
        main = "facts" if "facts" in set(summary["outcome"]) else "change"
        figures += save(effects_grid(summary, main, title=title), folder.path / TABLE)
    rows = sorted({int(file.name.split("-")[0]) for file in (folder.path / IMAGES).glob("*.png")})
    if rows and whole:
        prompts = [request["items"][row][0] for row in rows]
        for kind, label in ((EDIT, "sheet"), (CONTROL, "sheet_control")):
            columns = [c for c in plan if c.kind in (STOCK, kind)]
            if len(columns) > 1:
                cells = [
                    [Image.open(folder.path / IMAGES / f"{row:03d}-{c.name}.png") for c in columns] for row in rows
                ]
                heads = ["none" if c.kind == STOCK else f"layer {c.layer}" for c in columns]
                what = title if kind == EDIT else f"{name}: random change of equal size"
                figures += save(contact_sheet(cells, heads, prompts, title=what), folder.path / f"{TABLE}_{label}")
    if not folder.complete:
        folder.finish()
    no_op = float(table.loc[table["condition"] == NO_OP, "change"].abs().max())
    document = {
        "run": folder.path,
        "table": path,
        "figures": figures,
        "model": folder.data["model"],
        "no_op_change": no_op,
        "places": [{key: _plain(value) for key, value in row.items()} for row in summary.to_dict("records")],
    }
    lines = [
        "Difference from the unedited image of the same prompt and seed, mean [95 % bootstrap interval over prompts];"
        " control: a random change of equal size.",
        f"n = {count} prompts, {request['num_steps']} steps, guidance {request['guidance']};"
        f" no-op row: largest change {no_op:g}{'' if no_op == 0 else ' (must be 0: results are not paired)'}",
        f"tables and figures: {folder.path}",
    ]
    output.result(document, [effect_rows(summary), *lines], folder.path)


def effect_rows(summary: pd.DataFrame) -> Table:
    """The table per place for the terminal: image change and the best measure of alignment there is."""
    from rich import box
    from rich.table import Table

    from mmdit_probe.plots.perturb import LABELS

    known = list(dict.fromkeys(summary["outcome"]))
    aligned = next((name for name in ("facts", "clip_t") if name in known), None)
    shown = [name for name in (aligned, "change") if name is not None]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("place")
    for name in shown:
        for column in (LABELS[name], "control", "verdict"):
            table.add_column(column, justify="right")
    for place, part in summary.groupby(["layer", "head", "span"], sort=True):
        layer, head, span = int(str(place[0])), int(str(place[1])), str(place[2])
        rows = part.set_index("outcome")
        label = "no-op" if layer < 0 else f"layer {layer}"
        label += "" if head < 0 else f" head {head}"
        cells = [label + ("" if span == "all" else f" {span}")]
        for name in shown:
            row = rows.loc[name]
            cells.append(f"{row['effect']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")
            random = row.get("control")
            cells.append("" if random is None or random != random else f"{random:+.3f}")
            cells.append(str(row["verdict"]))
        table.add_row(*cells)
    return table
