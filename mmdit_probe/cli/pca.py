"""`mmdit-probe pca`: what the image tokens' q, k, v and outputs carry, as colours and as numbers; Fig. 3 and 29 of
arXiv:2509.18096."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.attention_budget import Layers, Limit, NoT5
from mmdit_probe.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Json, Lora, Model, Out, Quiet, Resume, Seed

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

NAME, TABLE = "pca", "pca"
DEFAULT_PICTURES = 24


class Fit(StrEnum):
    """What one basis is fitted to."""

    JOINT = "joint"
    IMAGE = "image"


def command(
    images: Annotated[
        str | None,
        typer.Option(help="Pictures: a folder, a file, or scenes:train|val|test. [default: scenes:val if embedded]"),
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="One prompt for all pictures [default: their captions].")] = None,
    layers: Layers = "all",
    kinds: Annotated[str, typer.Option(help="Features: query,key,value,output.")] = "query,key,value,output",
    components: Annotated[int, typer.Option(help="Components kept and scored; three are drawn.", min=1)] = 16,
    fit: Annotated[Fit, typer.Option(help="One basis for all pictures, or one per picture (maps only).")] = Fit.JOINT,
    sigma: Annotated[float, typer.Option(help="Noise level, 0 clean to 1 noise (the paper's t=8: 0.515).")] = 0.515,
    limit: Limit = None,
    shown: Annotated[int, typer.Option(help="Pictures in the figure.", min=1)] = 2,
    batch: Annotated[int, typer.Option(help="Pictures per denoising call.", min=1)] = 8,
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
    """PCA of the image tokens' query, key, value and attention output per layer, to RGB, explained variance and scores.

    On scenes: how well a linear probe on the components predicts the class mask of held-out images (control: another
    scene's mask), and how much of the components is mere position.
    """
    from mmdit_probe import assets
    from mmdit_probe.cli.output import Output
    from mmdit_probe.data import images as pictures
    from mmdit_probe.errors import UserError

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    if images is None and model not in assets.names():
        raise UserError("no pictures are given; name a folder with --images")
    chosen = pictures.resolve(images or "scenes:val", limit or (DEFAULT_PICTURES if images is None else None))

    import pandas as pd

    from mmdit_probe.cli.session import open_model
    from mmdit_probe.observe.pca import PCA
    from mmdit_probe.observe.pca_run import pca_of_pictures
    from mmdit_probe.results import RunFolder, TableWriter
    from mmdit_probe.specs import layer_indices

    wanted = [kind.strip() for kind in kinds.split(",")]
    PCA(wanted, components)
    loaded = open_model(model, lora=lora, debug=debug, device=device, dtype=dtype, t5=not no_t5)
    request = {
        "model": loaded.name,
        "weight_hash": loaded.weight_hash,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "layers": list(layer_indices(layers, len(loaded.layers))),
        "kinds": wanted,
        "components": components,
        "fit": fit.value,
        "sigma": sigma,
        "text_length": loaded.text_length,
        "items": [[p.name, p.prompt if prompts is None else prompts, seed + k] for k, p in enumerate(chosen)],
        "shown": shown,
    }
    folder = RunFolder.open(NAME, request, out=out, resume=resume)
    if not folder.complete:
        facts = {"id": loaded.name, "family": loaded.family.name, "weight_hash": loaded.weight_hash}
        features = "heads concatenated, q and k after norm and rotary embedding, conditional rows"
        folder.record(model=facts, device=str(loaded.device), seed=seed, features=features)
        with output.progress("batches", 2 * -(-len(chosen) // batch)) as advance:
            result = pca_of_pictures(
                loaded, chosen, [] if prompts is None else [prompts], layers=layers, kinds=wanted,
                components=components, each=fit is Fit.IMAGE, sigma=sigma, seed=seed, shown=shown, batch=batch,
                advance=advance,
            )  # fmt: skip
        _draw(folder, result.maps, [p.open(loaded.default_size) for p in chosen[:shown]])
        for name, frame in ((TABLE, result.table), (f"{TABLE}_variance", result.variance)):
            if not frame.empty:
                with TableWriter(folder.path, name) as writer, writer.item(0) as item:
                    item.write(pd.DataFrame(frame))
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
    from mmdit_probe.cli.attention_budget import _plain
    from mmdit_probe.observe.pca_run import summarise
    from mmdit_probe.plots import save
    from mmdit_probe.plots.pca import pca_scores
    from mmdit_probe.results import read_table

    request = folder.data["request"]
    variance = read_table(folder.path / f"{TABLE}_variance.parquet")
    first = variance[variance["component"] < 3].groupby(["layer", "kind"], observed=True)["share"].sum().reset_index()
    path = folder.path / f"{TABLE}.parquet"
    figures = [folder.path / f"{TABLE}_maps{suffix}" for suffix in (".png", ".pdf")]
    document: dict[str, Any] = {"run": folder.path, "model": folder.data["model"]}
    lines: list[Any] = []
    if path.exists():
        summary = summarise(read_table(path))
        summary = summary.merge(first.rename(columns={"share": "explained_3"}), on=["layer", "kind"])
        summary.to_csv(folder.path / f"{TABLE}_by_layer.csv", index=False, float_format="%.6g")
        title = f"{Path(request['model']).name}: {request['components']} components, n = {summary['n'].max()} held out"
        figures += save(pca_scores(summary, title=title), folder.path / f"{TABLE}_scores")
        document["layers"] = [{k: _plain(v) for k, v in row.items()} for row in summary.to_dict("records")]
        lines.append(score_rows(summary))
        if "class" in summary:
            lines.append(
                "class: recall of a linear probe on held-out pictures; control: with another scene's classes;"
                " position: share of the components' variance that the mean map explains."
            )
    else:
        document["explained_3"] = first.to_dict("records")
    document["figures"] = figures
    if not folder.complete:
        folder.finish()
    count = len(request["items"])
    lines.append(
        f"{count} pictures, sigma {request['sigma']}, {request['fit']} basis; tables and figures: {folder.path}"
    )
    output.result(document, lines, folder.path)


def score_rows(summary: pd.DataFrame) -> Table:
    """The per-layer table for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    has_classes = "class" in summary
    columns = ["layer", "feature", "3 components", *(["class", "control", "beyond control"] if has_classes else [])]
    for name in (*columns, "position", "coordinates"):
        table.add_column(name, justify="right")
    for row in summary.to_dict("records"):
        cells = [str(row["layer"]), str(row["kind"]), f"{row['explained_3']:.2f}"]
        if has_classes:
            cells += [
                f"{row['class']:.3f} [{row['class_low']:.3f}, {row['class_high']:.3f}]",
                f"{row['class_shuffled']:.3f}",
                f"{row['beyond']:+.3f} [{row['beyond_low']:+.3f}, {row['beyond_high']:+.3f}]",
            ]
        table.add_row(*cells, f"{row['position']:.3f}", f"{row['coordinates']:.3f}")
    return table
