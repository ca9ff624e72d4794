"""`mmdit-probe attribute`: causal attribution of words to regions (captum), and where attention agrees with it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.options import SESSION, Controls, Layers, Selection, Session, with_session

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

NAME, TABLE = "attribute", "attribution"


class MethodName(StrEnum):
    """How a word's effect is found."""

    ABLATION = "ablation"
    GRADIENTS = "gradients"


class TargetName(StrEnum):
    """What a word's effect is on."""

    LOSS = "loss"
    MASS = "mass"


@with_session
def command(
    method: Annotated[
        MethodName, typer.Option(help="Feature ablation, or integrated gradients.")
    ] = MethodName.ABLATION,
    target: Annotated[
        TargetName, typer.Option(help="A region's denoising loss, or the mass of the word's own map in it, per layer.")
    ] = TargetName.LOSS,
    layers: Layers = "all",
    selection: Selection = None,
    n: Annotated[int, typer.Option("-n", help="Scenes.", min=2)] = 24,
    split: Annotated[str, typer.Option(help="Scenes split: train, val or test.")] = "val",
    sigma: Annotated[float, typer.Option(help="Noise level, above 0 (clean) to 1 (noise).")] = 0.7,
    control: Controls = "none",
    session: Session = SESSION,
) -> None:
    """By how much does each word lower the denoising loss in each region, and do I2T maps say the same, per layer?

    On scenes, where regions are known exactly. Control that is always there: the attention of the scene's next word.
    """
    from mmdit_probe.cli.session import check_layers, layers_of, load_model, open_folder, output_of
    from mmdit_probe.errors import UserError, unknown
    from mmdit_probe.scenes import SPLITS, scene

    output = output_of(session)
    check_layers(selection, layers)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    items = [scene(split, index) for index in range(n)]

    from mmdit_probe.experiments.attribute import attribute
    from mmdit_probe.experiments.controls import CONTROLS, parse, variants
    from mmdit_probe.results import TableWriter
    from mmdit_probe.specs import layer_indices

    controls = parse(control, [name for name in CONTROLS if name != "shuffled"])
    if not 0.0 < sigma <= 1.0:
        raise UserError(f"--sigma {sigma:g}: expected a noise level above 0, up to 1")
    loaded = load_model(session)
    which, heads = layers_of(selection, layers, "all", loaded)
    options = {
        "method": method.value,
        "target": target.value,
        "layers": list(layer_indices(which, len(loaded.layers))),
        "heads": heads,
        "n": n,
        "split": split,
        "sigma": sigma,
        "seed": session.seed,
        "controls": list(controls),
    }
    folder = open_folder(NAME, loaded, session, options)
    if not folder.complete:
        runs = variants(loaded, controls, n)
        several = [index for index, item in enumerate(items) if len(item.class_names) > 1]
        if not several:
            raise UserError(f"none of {n} scenes has two classes; attribution compares words: raise -n")
        with TableWriter(folder.path, TABLE) as writer:
            with output.progress("scenes", len(several) * len(runs), len(writer.done)) as advance:
                for place, variant in enumerate(runs):
                    for index in several:
                        if place * n + index in writer.done:
                            continue
                        frame = attribute(
                            variant.model, [items[index]], method=method.value, target=target.value, sigma=sigma,
                            seed=session.seed + index, layers=which, heads=heads, edits=variant.edits,
                        )  # fmt: skip
                        with writer.item(place * n + index) as rows:
                            rows.write(frame.assign(item=index, control=variant.name))
                        advance()
            folder.record()
    _report(folder, output)


def _report(folder: Any, output: Any) -> None:
    from mmdit_probe.cli.tables import plain, report_controls
    from mmdit_probe.experiments.attribute import agreement, by_scene
    from mmdit_probe.plots import attribute as plots
    from mmdit_probe.plots import save
    from mmdit_probe.results import read_table
    from mmdit_probe.results.statistics import compare

    request = folder.data["request"]
    long = read_table(folder.path / f"{TABLE}.parquet")
    table = agreement(long)
    table.to_csv(folder.path / "agreement.csv", index=False, float_format="%.6g")
    what = f"{Path(request['model']).name}: {request['target']}, {request['method']}"
    title = f"{what}, n = {table['n'].max()}, sigma {request['sigma']}"
    figures = save(plots.agreement(table, title=title), folder.path / NAME)
    comparison = compare(by_scene(long), ["layer"])
    claim = "attention and attribution agree (rank correlation within scenes) more than in the control"
    against = report_controls(folder, NAME, comparison, claim, lambda rows: rows)
    if not folder.complete:
        folder.finish()
    document = {
        "run": folder.path,
        "figures": figures,
        "model": folder.data["model"],
        "layers": plain(table),
        "controls": plain(comparison),
    }
    lines = [
        agreement_rows(table),
        "rank correlation over (word, region) pairs of I2T attention and attribution to the"
        f" {'loss of the region' if request['target'] == 'loss' else 'mass of the map in the region'}, 95 % bootstrap"
        " interval over scenes; control: the attention of the scene's next word.",
        *against,
        f"n = {table['n'].max()} scenes, sigma {request['sigma']}, {request['method']}; tables: {folder.path}",
    ]
    output.result(document, lines, folder.path)


def agreement_rows(table: pd.DataFrame) -> Table:
    """One row per layer for the terminal."""
    from mmdit_probe.cli.tables import bare_table

    result = bare_table(["layer", "rank correlation", "control", "verdict"])
    for row in table.to_dict("records"):
        result.add_row(
            str(row["layer"]), f"{row['rho']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            f"{row['control']:+.3f} [{row['control_low']:+.3f}, {row['control_high']:+.3f}]", str(row["verdict"]),
        )  # fmt: skip
    return result
