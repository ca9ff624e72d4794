"""`mmdit-probe generate`: sample images, with perturbed I2T guidance if asked for; Eq. 7 and Fig. 6 of
arXiv:2509.18096."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.edited import EDITED, Edited
from mmdit_probe.cli.options import (
    SESSION,
    Batch,
    Clip,
    EditControls,
    Guidance,
    Limit,
    NumSteps,
    Prompts,
    Selection,
    Session,
    with_session,
)

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

NAME, TABLE, IMAGES = "generate", "images", "images"
DEFAULT_PROMPTS = 8


@with_session
def command(
    prompts: Prompts = None,
    limit: Limit = None,
    perturb_layers: Annotated[
        str | None,
        typer.Option(help="Layers whose I2T is perturbed in the extra forward: 9, 7-9.", show_default="none"),
    ] = None,
    perturb_scale: Annotated[str, typer.Option(help="Scale s of the guidance; several for a sweep: 1,2,4.")] = "2",
    each: Annotated[bool, typer.Option("--each", help="Perturb each layer on its own: a sweep over layers.")] = False,
    selection: Selection = None,
    control: EditControls = "none",
    start: Annotated[float, typer.Option(help="Guide from this part of the sampling, 0 to 1.", min=0, max=1)] = 0.0,
    stop: Annotated[float, typer.Option(help="Guide up to this part of the sampling.", min=0, max=1)] = 1.0,
    edited: Edited = EDITED,
    num_steps: NumSteps = 28,
    guidance: Guidance = 7.5,
    clip: Clip = None,
    batch: Batch = 8,
    session: Session = SESSION,
) -> None:
    """Sample images; with --perturb-layers, guided away from what the model says when those layers read blurred text.

    eps = eps_uncond + g (eps_cond - eps_uncond) + s (eps_cond - eps_perturbed), with g = --guidance, s =
    --perturb-scale. Stock images of the same seeds are sampled too; alignment is compared pairwise.
    """
    from mmdit_probe.cli.session import (
        check_streams,
        layers_of,
        load_model,
        open_folder,
        outcomes_of,
        output_of,
        prompts_of,
    )
    from mmdit_probe.errors import UserError

    output = output_of(session)
    asked = prompts_of(session, prompts, limit, DEFAULT_PROMPTS)
    if perturb_layers is not None and selection is not None:
        raise UserError("--perturb-layers and --selection both name layers; give one")
    if start > stop:
        raise UserError(f"--start {start:g} is after --stop {stop:g}: nothing would be guided")
    scales = _scales(perturb_scale)
    change = edited.build()

    from mmdit_probe.experiments import sweep
    from mmdit_probe.experiments.controls import CONTROLS, parse, variants
    from mmdit_probe.experiments.perturb import BUDGET, Sampling, chunks
    from mmdit_probe.results import TableWriter
    from mmdit_probe.specs import layer_indices

    controls = parse(control, [BUDGET, *CONTROLS])
    loaded = load_model(session)
    check_streams(loaded, edited.streams)
    layers: tuple[int, ...] = ()
    if selection is not None or perturb_layers is not None:
        which, heads = layers_of(selection, perturb_layers or "", "all", loaded)
        layers, change = layer_indices(which, len(loaded.layers)), change.at(heads=heads)
    sampled = variants(loaded, [name for name in controls if name in ("random", "uniform")])
    variants(loaded, controls, len(asked))  # refuses shuffled captions of one prompt
    outcomes, checkpoints = outcomes_of(session, loaded.device, clip)
    sets = [(layer,) for layer in layers] if each else [layers]
    plan = sweep.settings(sets if layers else [], scales, BUDGET in controls)
    sampling = Sampling(num_steps, guidance, session.seed, batch)
    options = {
        "edit": change.record() if layers else None,
        "settings": [[list(s.layers), s.scale, s.control] for s in plan],
        "controls": list(controls),
        "outcomes": [name for outcome in outcomes for name in outcome.names],
        "checkpoints": checkpoints,
        "num_steps": num_steps,
        "guidance": guidance,
        "range": [start, stop],
        "batch": batch,
        "items": [[prompt, session.seed + index] for index, prompt in enumerate(asked)],
    }
    folder = open_folder(NAME, loaded, session, options, sigmas=loaded.sigmas(num_steps))
    if not folder.complete:
        kept = folder.path / IMAGES
        kept.mkdir(exist_ok=True)

        def keep(index: int, setting: sweep.Setting, image: Any) -> None:
            image.save(kept / f"{index:03d}-{setting.name}.png")

        groups = chunks(asked, sampling)
        with TableWriter(folder.path, TABLE) as writer:
            total, done = len(groups) * len(plan) * len(sampled), len(writer.done) * len(plan)
            with output.progress("batches of images", total, done) as advance:
                for place, variant in enumerate(sampled):
                    here = [setting for setting in plan if place == 0 or not setting.control]
                    for number, indices in enumerate(groups, place * len(groups)):
                        if number not in writer.done:
                            with writer.item(number) as rows:
                                sweep.run_chunk(
                                    loaded, asked, indices, here, change, sampling, outcomes, rows,
                                    keep if place == 0 else lambda *_: None, advance,
                                    variant if place else None, "shuffled" in controls and place == 0,
                                    start=start, stop=stop,
                                )  # fmt: skip
            folder.record()
    _report(folder, plan, output)


def _scales(text: str) -> list[float]:
    from mmdit_probe.errors import UserError

    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = [math.nan]
    if not all(math.isfinite(scale) for scale in scales):
        raise UserError(f"--perturb-scale {text!r}: expected a number, or numbers separated by commas")
    return scales


def _report(folder: Any, plan: Any, output: Any) -> None:
    from PIL import Image

    from mmdit_probe.cli.tables import plain, report_controls
    from mmdit_probe.experiments.sweep import gains, summarise
    from mmdit_probe.plots import save
    from mmdit_probe.plots.perturb import guidance_sweep
    from mmdit_probe.plots.sheet import sheet
    from mmdit_probe.results import read_table
    from mmdit_probe.results.statistics import compare

    request = folder.data["request"]
    table = read_table(folder.path / f"{TABLE}.parquet")
    summary = summarise(table)
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
    figures = save(sheet(cells, columns, prompts, title=title), folder.path / "generate")
    if len(plan) > 1:
        figures += save(guidance_sweep(summary, title=f"{title}, n = {summary['n'].max()}"), folder.path / "sweep")
    comparison = compare(gains(table), ["layers", "scale", "outcome"])
    aligned = next((name for name in ("facts", "clip_t") if name in table), "")
    against = report_controls(
        folder, NAME, comparison, f"guidance adds more to the alignment ({aligned}) than in the control",
        lambda rows: rows[rows["outcome"] == aligned].drop(columns="outcome"),
    )  # fmt: skip
    if not folder.complete:
        folder.finish()
    document = {
        "run": folder.path,
        "images": folder.path / IMAGES,
        "figures": figures,
        "model": folder.data["model"],
        "settings": plain(summary),
        "controls": plain(comparison),
    }
    lines: list[Any] = [setting_rows(summary)]
    if len(plan) > 1:
        lines.append("in brackets: 95 % interval over prompts; differences are paired with stock by seed.")
    lines += against
    lines.append(f"{len(request['items'])} prompts, {request['num_steps']} steps; images: {folder.path / IMAGES}")
    output.result(document, lines, folder.path)


def setting_rows(summary: pd.DataFrame) -> Table:
    """One row per setting for the terminal."""
    from mmdit_probe.cli.tables import bare_table
    from mmdit_probe.plots.perturb import LABELS

    names = [name for name in ("facts", "clip_t", "change") if name in set(summary["outcome"])]
    places, columns = ["layers", "s", "perturbation"], []
    for name in names:
        columns += [LABELS[name], *(["difference from stock"] if name != "change" else [])]
    table = bare_table([*places, *columns], left=places)
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
