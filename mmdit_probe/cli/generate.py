"""`mmdit-probe generate`: sample images, with perturbed I2T guidance if asked for; Eq. 7 and Fig. 6 of
arXiv:2509.18096."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.attention_budget import Guidance, Limit, NoT5, NumSteps, Prompts
from mmdit_probe.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Json, Lora, Model, Out, Quiet, Resume, Seed
from mmdit_probe.cli.perturb import BlurSigma, BorderOption, BorderRule, EditKind, Kernel, Kind, Stage, Streams, Where

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

NAME, TABLE, IMAGES = "generate", "images", "images"
DEFAULT_PROMPTS = 8


def command(
    prompts: Prompts = None,
    limit: Limit = None,
    perturb_layers: Annotated[
        str | None, typer.Option(help="Layers whose I2T is perturbed in the extra forward: 9, 7-9. [default: none]")
    ] = None,
    perturb_scale: Annotated[str, typer.Option(help="Scale s of the guidance; several for a sweep: 1,2,4.")] = "2",
    each: Annotated[bool, typer.Option("--each", help="Perturb each layer on its own: a sweep over layers.")] = False,
    selection: Annotated[Path | None, typer.Option(help="Layer selection to perturb, from select-layers.")] = None,
    control: Annotated[bool, typer.Option("--control", help="Also guide by a random change of equal size.")] = False,
    start: Annotated[float, typer.Option(help="Guide from this part of the sampling, 0 to 1.", min=0, max=1)] = 0.0,
    stop: Annotated[float, typer.Option(help="Guide up to this part of the sampling.", min=0, max=1)] = 1.0,
    edit: EditKind = Kind.BLUR,
    blur_sigma: BlurSigma = 9.0,
    kernel: Kernel = 5,
    border: BorderOption = BorderRule.REFLECT,
    where: Where = Stage.PROBABILITIES,
    streams: Streams = None,
    num_steps: NumSteps = 28,
    guidance: Guidance = 7.5,
    clip: Annotated[str | None, typer.Option(help="CLIP checkpoint for CLIP-T (folder or hub id).")] = None,
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
    """Sample images; with --perturb-layers, guided away from what the model says when those layers read blurred text.

    eps = eps_uncond + g (eps_cond - eps_uncond) + s (eps_cond - eps_perturbed), with g = --guidance, s =
    --perturb-scale. Stock images of the same seeds are sampled too; alignment is compared pairwise.
    """
    from mmdit_probe import assets
    from mmdit_probe.cli.output import Output
    from mmdit_probe.cli.perturb import build_edit
    from mmdit_probe.data import prompts as texts
    from mmdit_probe.errors import UserError

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    embedded = model in assets.names()
    source = ("scenes:val" if embedded else "everyday") if prompts is None else prompts
    asked = texts.resolve(source, limit or (DEFAULT_PROMPTS if prompts is None else None))
    if perturb_layers is not None and selection is not None:
        raise UserError("--perturb-layers and --selection both name layers; give one")
    scales = _scales(perturb_scale)
    change = build_edit(edit, blur_sigma, kernel, border.value, where.value, streams, False, "all")

    from mmdit_probe.cli.session import open_model
    from mmdit_probe.edit import sweep
    from mmdit_probe.edit.outcomes import Change, Clip, Outcome, Parser
    from mmdit_probe.edit.perturb import Sampling, chunks
    from mmdit_probe.results import RunFolder, TableWriter
    from mmdit_probe.select import load_selection
    from mmdit_probe.specs import layer_indices

    loaded = open_model(model, lora=lora, debug=debug, device=device, dtype=dtype, t5=not no_t5)
    layers: tuple[int, ...] = ()
    if selection is not None:
        layers = tuple(sorted(load_selection(selection, loaded).layers))
    elif perturb_layers is not None:
        layers = layer_indices(perturb_layers, len(loaded.layers))
    outcomes: list[Outcome] = [Change(), *([Parser()] if embedded else [])]
    if clip is not None:
        outcomes.append(Clip(clip, loaded.device))
    sets = [(layer,) for layer in layers] if each else [layers]
    plan = sweep.settings(sets if layers else [], scales, control)
    sampling = Sampling(num_steps, guidance, seed, batch)
    request = {
        "model": loaded.name,
        "weight_hash": loaded.weight_hash,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "text_length": loaded.text_length,
        "edit": change.record() if layers else None,
        "settings": [[list(s.layers), s.scale, s.control] for s in plan],
        "outcomes": [name for outcome in outcomes for name in outcome.names],
        "clip": clip,
        "num_steps": num_steps,
        "guidance": guidance,
        "range": [start, stop],
        "items": [[prompt, seed + index] for index, prompt in enumerate(asked)],
    }
    folder = RunFolder.open(NAME, request, out=out, resume=resume)
    if not folder.complete:
        facts = {"id": loaded.name, "family": loaded.family.name, "weight_hash": loaded.weight_hash}
        folder.record(model=facts, device=str(loaded.device), seed=seed, sigmas=loaded.sigmas(num_steps))
        kept = folder.path / IMAGES
        kept.mkdir(exist_ok=True)

        def keep(index: int, setting: sweep.Setting, image: Any) -> None:
            image.save(kept / f"{index:03d}-{setting.name}.png")

        groups = chunks(asked, sampling)
        with TableWriter(folder.path, TABLE) as writer:
            with output.progress("batches of images", len(groups) * len(plan), len(writer.done) * len(plan)) as advance:
                for number, indices in enumerate(groups):
                    if number not in writer.done:
                        with writer.item(number) as rows:
                            sweep.run_chunk(
                                loaded, asked, indices, plan, change, sampling, outcomes, rows, keep, advance,
                                start=start, stop=stop,
                            )  # fmt: skip
            folder.record()
    _report(folder, plan, output)


def _scales(text: str) -> list[float]:
    from mmdit_probe.errors import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--perturb-scale {text!r}: expected a number, or numbers separated by commas") from error


def _report(folder: Any, plan: Any, output: Any) -> None:
    from PIL import Image

    from mmdit_probe.cli.attention_budget import _plain
    from mmdit_probe.edit.sweep import summarise
    from mmdit_probe.plots import save
    from mmdit_probe.plots.perturb import contact_sheet, guidance_sweep
    from mmdit_probe.results import read_table

    request = folder.data["request"]
    summary = summarise(read_table(folder.path / f"{TABLE}.parquet"))
    summary.to_csv(folder.path / "by_setting.csv", index=False, float_format="%.6g")
    prompts = [prompt for prompt, _ in request["items"]][:8]
    name = Path(request["model"]).name
    cells = [
        [Image.open(folder.path / IMAGES / f"{row:03d}-{setting.name}.png") for setting in plan]
        for row in range(len(prompts))
    ]
    columns = [
        "stock"
        if s.scale == 0
        else f"{'random, ' if s.control else ''}layer {'+'.join(map(str, s.layers))}\ns = {s.scale:g}"
        for s in plan
    ]
    title = f"{name}: {'perturbed guidance, ' if len(plan) > 1 else ''}g = {request['guidance']:g}"
    figures = save(contact_sheet(cells, columns, prompts, title=title), folder.path / "generate")
    if len(plan) > 1:
        figures += save(guidance_sweep(summary, title=f"{title}, n = {summary['n'].max()}"), folder.path / "sweep")
    if not folder.complete:
        folder.finish()
    document = {
        "run": folder.path,
        "images": folder.path / IMAGES,
        "figures": figures,
        "model": folder.data["model"],
        "settings": [{str(k): _plain(v) for k, v in row.items()} for row in summary.to_dict("records")],
    }
    lines: list[Any] = [setting_rows(summary)]
    if len(plan) > 1:
        lines.append("in brackets: 95 % bootstrap interval over prompts; differences are paired with stock by seed.")
    lines.append(f"{len(request['items'])} prompts, {request['num_steps']} steps; images: {folder.path / IMAGES}")
    output.result(document, lines, folder.path)


def setting_rows(summary: pd.DataFrame) -> Table:
    """One row per setting for the terminal."""
    from rich import box
    from rich.table import Table

    from mmdit_probe.plots.perturb import LABELS

    names = [name for name in ("facts", "clip_t", "change") if name in set(summary["outcome"])]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("layers", "s", "perturbation"):
        table.add_column(column)
    for name in names:
        table.add_column(LABELS[name], justify="right")
        if name != "change":
            table.add_column("difference from stock", justify="right")
    for place, part in summary.groupby(["layers", "scale", "control"], observed=True, sort=True):
        layers, scale, control = str(place[0]), float(str(place[1])), bool(place[2])
        rows = part.set_index("outcome")
        cells = [layers or "-", f"{scale:g}", "none" if scale == 0 else "random" if control else "edit"]
        for name in names:
            row = rows.loc[name]
            cells.append(f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
            if name != "change":
                cells.append(
                    ""
                    if scale == 0
                    else f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
                )
        table.add_row(*cells)
    return table
