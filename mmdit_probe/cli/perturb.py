"""`mmdit-probe perturb`: edit one layer's I2T block at a time and see what the image loses, Fig. 5 and 18 of
arXiv:2509.18096."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.edited import EDITED, Branch, Edited
from mmdit_probe.cli.options import (
    SESSION,
    Batch,
    Clip,
    EditControls,
    Guidance,
    Heads,
    Layers,
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

NAME, TABLE, IMAGES = "perturb", "perturb", "images"
DEFAULT_PROMPTS = 16


class Place(StrEnum):
    """What is edited at a time."""

    LAYERS = "layers"
    HEADS = "heads"
    SPANS = "spans"


By = Annotated[Place, typer.Option("--by", help="Edit whole layers, single heads, or span kinds one at a time.")]
Renormalise = Annotated[bool, typer.Option("--renormalise", help="Rescale edited rows to a total of 1.")]
BranchOption = Annotated[Branch, typer.Option("--branch", help="Guidance branch to edit.")]
EditSteps = Annotated[str, typer.Option("--steps", help="Sampling steps to edit: all, 0,20, 0-4, last-8.")]


@with_session
def command(
    layers: Layers = "all",
    prompts: Prompts = None,
    limit: Limit = None,
    edited: Edited = EDITED,
    by: By = Place.LAYERS,
    heads: Heads = "all",
    selection: Selection = None,
    renormalise: Renormalise = False,
    steps: EditSteps = "all",
    branch: BranchOption = Branch.ALL,
    num_steps: NumSteps = 28,
    guidance: Guidance = 7.5,
    control: EditControls = "budget",
    clip: Clip = None,
    dino: Annotated[str | None, typer.Option(help="DINO checkpoint for image similarity (folder or hub id).")] = None,
    sheet: Annotated[int, typer.Option(help="Keep the images of this many prompts for the contact sheet.", min=0)] = 4,
    batch: Batch = 8,
    session: Session = SESSION,
) -> None:
    """Edit the I2T block of one layer at a time, sample with the same seeds, and measure what changes.

    Outcomes: change of the image; for models of the scenes world, which facts of the prompt the image still shows; with
    --clip and --dino, the paper's CLIP-T, CLIP-I and DINO similarity. The no-op row must be exactly 0.
    """
    from mmdit_probe.cli.session import (
        check_layers,
        check_streams,
        layers_of,
        load_model,
        open_folder,
        outcomes_of,
        output_of,
        prompts_of,
    )

    output = output_of(session)
    check_layers(selection, layers, heads)
    asked = prompts_of(session, prompts, limit, DEFAULT_PROMPTS)
    change = edited.build(renormalise, steps, branch)

    from mmdit_probe.experiments import perturb
    from mmdit_probe.experiments.controls import CONTROLS, parse, variants
    from mmdit_probe.results import TableWriter
    from mmdit_probe.specs import step_indices

    step_indices(steps, num_steps)
    controls = parse(control, [perturb.BUDGET, *CONTROLS])
    loaded = load_model(session)
    check_streams(loaded, edited.streams)
    which, of_heads = layers_of(selection, layers, heads, loaded)
    plan = perturb.conditions(loaded, change, which, by.value, of_heads, perturb.BUDGET in controls, session.seed)
    sampled = variants(loaded, [name for name in controls if name in ("random", "uniform")])
    variants(loaded, controls, len(asked))  # refuses shuffled captions of one prompt
    outcomes, checkpoints = outcomes_of(session, loaded.device, clip, dino)
    sampling = perturb.Sampling(num_steps, guidance, session.seed, batch)
    options = {
        "edit": change.record(),
        "places": [[c.kind, c.layer, c.head, c.span] for c in plan],
        "heads": of_heads,
        "controls": list(controls),
        "outcomes": [name for outcome in outcomes for name in outcome.names],
        "checkpoints": checkpoints,
        "num_steps": num_steps,
        "guidance": guidance,
        "batch": batch,
        "items": [[prompt, session.seed + index] for index, prompt in enumerate(asked)],
    }
    folder = open_folder(NAME, loaded, session, options, sigmas=loaded.sigmas(num_steps))
    if not folder.complete:
        kept = folder.path / IMAGES
        kept.mkdir(exist_ok=True)

        def keep(index: int, condition: perturb.Condition, image: Any) -> None:
            if index < sheet:
                image.save(kept / f"{index:03d}-{condition.name}.png")

        groups = perturb.chunks(asked, sampling)
        with TableWriter(folder.path, TABLE) as writer:
            total, done = len(groups) * len(plan) * len(sampled), len(writer.done) * len(plan)
            with output.progress("batches of images", total, done) as advance:
                for place, variant in enumerate(sampled):
                    # The random change of equal size is the measurement's own control.
                    conditions = [c for c in plan if place == 0 or c.kind in (perturb.STOCK, perturb.EDIT)]
                    for number, indices in enumerate(groups, place * len(groups)):
                        if number not in writer.done:
                            with writer.item(number) as rows:
                                perturb.run_chunk(
                                    loaded, asked, indices, conditions, sampling, outcomes, rows,
                                    keep if place == 0 else lambda *_: None, advance,
                                    variant if place else None, "shuffled" in controls and place == 0,
                                )  # fmt: skip
            folder.record()
    _report(folder, plan, output)


def _report(folder: Any, plan: Any, output: Any) -> None:
    """The table per place, the figures and the paths, from what is on disk."""
    from PIL import Image

    from mmdit_probe.cli.tables import plain, report_controls
    from mmdit_probe.experiments.perturb import BUDGET, CONTROL, EDIT, NO_OP, STOCK, losses, summarise
    from mmdit_probe.plots import save
    from mmdit_probe.plots.perturb import effects_by_layer, effects_grid
    from mmdit_probe.plots.sheet import sheet
    from mmdit_probe.results import read_table
    from mmdit_probe.results.statistics import compare

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
    if whole:
        order = ["facts", "clip_t", "change", "clip_i", "dino"]
        figures += save(effects_by_layer(summary, order, title=title), folder.path / TABLE)
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
                figures += save(sheet(cells, heads, prompts, title=what), folder.path / f"{TABLE}_{label}")
    comparison = compare(losses(table), ["layer", "head", "span", "outcome"])
    main = next(name for name in ("facts", "clip_t", "change") if name in table)
    against = report_controls(
        folder, TABLE, comparison,
        f"editing the place costs more ({main}: {'rise' if main == 'change' else 'drop'}) than in the control",
        lambda rows: rows[(rows["outcome"] == main) & (rows["control"] != BUDGET)].drop(columns="outcome"),
    )  # fmt: skip
    if not folder.complete:
        folder.finish()
    no_op = float(table.loc[table["condition"] == NO_OP, "change"].abs().max())
    document = {
        "run": folder.path,
        "table": path,
        "figures": figures,
        "model": folder.data["model"],
        "no_op_change": no_op,
        "places": plain(summary),
        "controls": plain(comparison),
    }
    lines = [
        "Difference from the unedited image of the same prompt and seed, mean [95 % interval over prompts];"
        " control: a random change of equal size.",
        f"n = {count} prompts, {request['num_steps']} steps, guidance {request['guidance']};"
        f" no-op row: largest change {no_op:g}{'' if no_op == 0 else ' (must be 0: results are not paired)'}",
        *against,
        f"tables and figures: {folder.path}",
    ]
    output.result(document, [effect_rows(summary), *lines], folder.path)


def effect_rows(summary: pd.DataFrame) -> Table:
    """The table per place for the terminal: image change and the best measure of alignment there is."""
    from mmdit_probe.cli.tables import bare_table
    from mmdit_probe.plots.perturb import LABELS

    known = list(dict.fromkeys(summary["outcome"]))
    aligned = next((name for name in ("facts", "clip_t") if name in known), None)
    shown = [name for name in (aligned, "change") if name is not None]
    columns = [column for name in shown for column in (LABELS[name], "control", "verdict")]
    table = bare_table(["place", *columns], left=("place",))
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
