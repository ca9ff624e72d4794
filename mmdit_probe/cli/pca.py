"""`mmdit-probe pca`: what the image tokens' q, k, v and outputs carry, as colours and as numbers; Fig. 3 and 29 of
arXiv:2509.18096."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.options import (
    SESSION,
    Caption,
    Controls,
    Layers,
    Limit,
    Pictures,
    Selection,
    Session,
    with_session,
)

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

NAME, TABLE = "pca", "pca"
DEFAULT_PICTURES = 24


class Fit(StrEnum):
    """What one basis is fitted to."""

    JOINT = "joint"
    IMAGE = "image"


class SolverName(StrEnum):
    """How the joint basis is fitted."""

    EXACT = "exact"
    INCREMENTAL = "incremental"


@with_session
def command(
    images: Pictures = None,
    prompts: Caption = None,
    layers: Layers = "all",
    selection: Selection = None,
    kinds: Annotated[str, typer.Option(help="Features: query,key,value,output.")] = "query,key,value,output",
    components: Annotated[int, typer.Option(help="Components kept and scored; three are drawn.", min=1)] = 16,
    fit: Annotated[Fit, typer.Option(help="One basis for all pictures, or one per picture.")] = Fit.JOINT,
    solver: Annotated[
        SolverName, typer.Option(help="Streaming fit: exact (D x D per layer), or scikit-learn's IncrementalPCA.")
    ] = SolverName.EXACT,
    sigma: Annotated[float, typer.Option(help="Noise level, 0 clean to 1 noise (the paper's t=8: 0.515).")] = 0.515,
    limit: Limit = None,
    shown: Annotated[int, typer.Option(help="Pictures in the figure.", min=1)] = 2,
    batch: Annotated[int, typer.Option(help="Pictures per denoising call.", min=1)] = 8,
    control: Controls = "none",
    session: Session = SESSION,
) -> None:
    """PCA of the image tokens' query, key, value and attention output per layer, to RGB, explained variance and scores.

    On scenes: how well a linear probe on the components predicts the class mask of held-out images, how well classes
    separate without one (silhouette), both beside the same with another scene's mask, and how much is mere position.
    """
    from mmdit_probe.cli.session import (
        check_layers,
        check_sigma,
        layers_of,
        load_model,
        open_folder,
        output_of,
        pictures_of,
    )

    output = output_of(session)
    check_layers(selection, layers)
    check_sigma(sigma)
    chosen = pictures_of(session, images, limit, DEFAULT_PICTURES)

    import shutil

    from mmdit_probe.experiments.controls import parse, variants
    from mmdit_probe.experiments.pca_items import pca_of_pictures
    from mmdit_probe.observe.pca import PCA
    from mmdit_probe.results import TableWriter
    from mmdit_probe.specs import layer_indices

    wanted = [kind.strip() for kind in kinds.split(",")]
    PCA(wanted, components)
    controls = parse(control)
    loaded = load_model(session)
    which, heads = layers_of(selection, layers, "all", loaded)
    captions = [picture.prompt if prompts is None else prompts for picture in chosen]
    options = {
        "layers": list(layer_indices(which, len(loaded.layers))),
        "heads": heads,
        "kinds": wanted,
        "components": components,
        "fit": fit.value,
        "solver": solver.value,
        "sigma": sigma,
        "items": [[p.name, text, session.seed + k] for k, (p, text) in enumerate(zip(chosen, captions, strict=True))],
        "shown": shown,
        "controls": list(controls),
    }
    runs = variants(loaded, controls, len(chosen))
    features = "heads concatenated, q and k after norm and rotary embedding, conditional rows"
    each = fit is Fit.IMAGE or len(chosen) == 1
    basis = "one basis per picture" if each else f"one basis for all pictures, {solver.value}, streaming"
    folder = open_folder(NAME, loaded, session, options, features=features, basis=basis)
    if not folder.complete:
        batches = 2 * -(-len(chosen) // batch)
        with (
            TableWriter(folder.path, TABLE) as table,
            TableWriter(folder.path, f"{TABLE}_variance") as variance,
            output.progress("batches", batches * len(runs), batches * len(table.done)) as advance,
        ):
            for number, variant in enumerate(runs):
                if number in table.done:
                    continue
                state = folder.path / "state" / variant.name
                result = pca_of_pictures(
                    variant.model, chosen, variant.texts(captions), layers=which, kinds=wanted, components=components,
                    each=each, solver=solver.value, heads=heads, sigma=sigma, seed=session.seed,
                    shown=shown, batch=batch, edits=variant.edits, state=state, advance=advance,
                )  # fmt: skip
                if number == 0:
                    _draw(folder, result.maps, [p.open(loaded.default_size) for p in chosen[:shown]])
                for writer, frame in ((variance, result.variance), (table, result.table)):
                    if not frame.empty:
                        with writer.item(number) as item:
                            item.write(frame.assign(control=variant.name))
                shutil.rmtree(state)
        shutil.rmtree(folder.path / "state", ignore_errors=True)
        folder.record()
    _report(folder, output)


def _draw(folder: Any, maps: Any, images: Any) -> None:
    from mmdit_probe.plots import save
    from mmdit_probe.plots.pca import pca_maps

    request = folder.data["request"]
    title = f"{Path(request['model']).name}: PCA of image tokens, {request['fit']} basis, sigma {request['sigma']}"
    each = request["fit"] == "image"
    save(pca_maps(maps, images, request["kinds"], each=each, title=title), folder.path / f"{TABLE}_maps")


def _report(folder: Any, output: Any) -> None:
    from mmdit_probe.cli.tables import plain, report_controls
    from mmdit_probe.experiments.pca_items import summarise
    from mmdit_probe.plots import save
    from mmdit_probe.plots.pca import pca_scores
    from mmdit_probe.results import read_table
    from mmdit_probe.results.statistics import compare

    request = folder.data["request"]
    table = read_table(folder.path / f"{TABLE}.parquet")
    summary = summarise(table)
    summary.to_csv(folder.path / f"{TABLE}_by_layer.csv", index=False, float_format="%.6g")
    title = f"{Path(request['model']).name}: {request['components']} components, n = {summary['n'].max()} pictures"
    figures = [folder.path / f"{TABLE}_maps{suffix}" for suffix in (".png", ".pdf")]
    figures += save(pca_scores(summary, title=title), folder.path / f"{TABLE}_scores")
    names = [name for name in ("class", "silhouette", "coordinates") if name in summary]
    comparison = compare(
        table.melt(["item", "control", "layer", "kind"], names, "measure"), ["layer", "kind", "measure"]
    )
    claimed = names[0]
    against = report_controls(
        folder, TABLE, comparison, f"the components predict the {claimed} beyond the control",
        lambda rows: rows[rows["measure"] == claimed].drop(columns="measure"),
    )  # fmt: skip
    if not folder.complete:
        folder.finish()
    document: dict[str, Any] = {
        "run": folder.path,
        "model": folder.data["model"],
        "layers": plain(summary),
        "controls": plain(comparison),
        "figures": figures,
    }
    lines: list[Any] = [score_rows(summary)]
    if "class" in summary:
        lines.append(
            "class: recall of a linear probe on held-out tokens; silhouette: of the classes, without a probe; in both"
            " the control is another scene's classes; position: share of the components' variance that the mean map"
            " explains; coordinates: R2 of row and column."
        )
    lines += against
    lines.append(
        f"{len(request['items'])} pictures, sigma {request['sigma']}, {folder.data['basis']}; tables and figures:"
        f" {folder.path}"
    )
    output.result(document, lines, folder.path)


def score_rows(summary: pd.DataFrame) -> Table:
    """The per-layer table for the terminal."""
    from mmdit_probe.cli.tables import bare_table
    from mmdit_probe.results.statistics import NOT_ABOVE

    has_classes = "class" in summary
    columns = ["layer", "feature", "3 components"]
    columns += ["class", "control", "beyond control", "silhouette", "control"] if has_classes else []
    columns += ["position"] if "position" in summary else []
    table = bare_table([*columns, "coordinates"])
    for row in summary.to_dict("records"):
        cells = [str(row["layer"]), str(row["kind"]), f"{row['explained_3']:.2f}"]
        if has_classes:
            beyond = f"{row['beyond']:+.3f} [{row['beyond_low']:+.3f}, {row['beyond_high']:+.3f}]"
            cells += [
                f"{row['class']:.3f} [{row['class_low']:.3f}, {row['class_high']:.3f}]",
                f"{row['class_shuffled']:.3f}",
                beyond if row["beyond_low"] > 0 else f"{beyond} {NOT_ABOVE}",
                f"{row['silhouette']:+.3f}",
                f"{row['silhouette_shuffled']:+.3f}",
            ]
        cells += [f"{row['position']:.3f}"] if "position" in summary else []
        table.add_row(*cells, f"{row['coordinates']:.3f}")
    return table
