"""`mmdit-probe diagnose`: sinks and outlier channels: which single tokens take the mass, per layer and head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.options import Layers, Limit, NoT5
from mmdit_probe.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Json, Lora, Model, Out, Quiet, Resume, Seed

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

NAME = "diagnose"
DEFAULT_PICTURES = 8


def command(
    images: Annotated[
        str | None, typer.Option(help="Pictures: a folder, or scenes:train|val|test. [default: scenes:val if embedded]")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="One prompt for all pictures [default: their captions].")] = None,
    layers: Layers = "all",
    sigma: Annotated[float, typer.Option(help="Noise level, 0 clean to 1 noise.", min=0, max=1)] = 0.515,
    limit: Limit = None,
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
    """Which single tokens take the attention (sinks), what word maps look like without them, and outlier channels.

    A sink is a key that takes more than ten times the uniform share from image queries.
    """
    from mmdit_probe import assets
    from mmdit_probe.cli.output import Output
    from mmdit_probe.data import images as pictures
    from mmdit_probe.errors import UserError

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    if images is None and model not in assets.names():
        raise UserError("no pictures are given; name a folder with --images")
    chosen = pictures.resolve(images or "scenes:val", limit or (DEFAULT_PICTURES if images is None else None))

    from mmdit_probe import TextMaps, probe
    from mmdit_probe.cli.session import open_model
    from mmdit_probe.observe.sinks import Channels, KeyMass
    from mmdit_probe.results import RunFolder, TableWriter
    from mmdit_probe.specs import layer_indices

    loaded = open_model(model, lora=lora, debug=debug, device=device, dtype=dtype, t5=not no_t5)
    wanted = layer_indices(layers, len(loaded.layers))
    captions = [picture.prompt if prompts is None else prompts for picture in chosen]
    request = {
        "model": loaded.name,
        "weight_hash": loaded.weight_hash,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "text_length": loaded.text_length,
        "layers": list(wanted),
        "sigma": sigma,
        "items": [
            [picture.name, text, seed + k] for k, (picture, text) in enumerate(zip(chosen, captions, strict=True))
        ],
    }
    folder = RunFolder.open(NAME, request, out=out, resume=resume)
    if not folder.complete:
        facts = {"id": loaded.name, "family": loaded.family.name, "weight_hash": loaded.weight_hash}
        folder.record(model=facts, device=str(loaded.device), seed=seed)
        with (
            TableWriter(folder.path, "keys") as keys,
            TableWriter(folder.path, "channels") as channels,
            output.progress("pictures", len(chosen), len(keys.done)) as advance,
        ):
            for number, (picture, text) in enumerate(zip(chosen, captions, strict=True)):
                if number in channels.done:
                    continue
                latents = loaded.encode_image(picture.open(loaded.default_size))
                noised = loaded.noise(latents, sigma, seed + number)
                with probe(loaded, KeyMass(), Channels(), TextMaps(), layers=wanted) as run:
                    loaded.denoise(noised, sigma, loaded.encode_prompt([text]), seeds=seed + number)
                with keys.item(number) as item:
                    item.write(run[KeyMass].table())
                with channels.item(number) as item:
                    item.write(run[Channels].table())
                if number == 0:
                    _draw_maps(folder, loaded, picture, text, run, wanted)
                advance()
        folder.record()
    _report(folder, output)


def _draw_maps(folder: Any, model: Any, picture: Any, text: str, run: Any, layers: tuple[int, ...]) -> None:
    """Maps of the first picture in the layer where sinks take most: as they are, and words only."""
    import numpy as np

    from mmdit_probe import TextMaps
    from mmdit_probe.observe.sinks import KeyMass, top_keys, without_sinks
    from mmdit_probe.plots import save
    from mmdit_probe.plots.sinks import sink_maps

    top = top_keys(run[KeyMass].table()).groupby("layer")["sink_mass"].mean()
    layer = int(str(top.idxmax()))
    table = model.token_tables([text])[0]
    words = table.positions(kind="word")
    if not words:
        return
    maps = run[TextMaps].maps(layer)[0]  # [h, w, T]
    others = [p for kind in ("bos", "eos", "pad") for p in table.positions(kind=kind)[:1]]
    shown = [*others, *words][:10]
    names = [f"{table.tokens[p].word or table.tokens[p].kind.upper()}\n{table.tokens[p].stream}" for p in shown]
    removed = np.full((*maps.shape[:2], len(shown)), np.nan)
    clean = without_sinks(maps, words)
    for k, position in enumerate(shown):
        if position in words:
            removed[..., k] = clean[..., words.index(position)].numpy()
    title = f"layer {layer}, where sinks take most: {text}"
    image = picture.open(model.default_size)
    save(sink_maps(image, maps[..., shown].numpy(), names, removed, title=title), folder.path / f"{NAME}_maps")


def _report(folder: Any, output: Any) -> None:
    from mmdit_probe.observe.sinks import SINK, top_keys
    from mmdit_probe.plots import save
    from mmdit_probe.plots.sinks import sinks
    from mmdit_probe.results import read_table

    request = folder.data["request"]
    top = top_keys(read_table(folder.path / "keys.parquet"))
    channels = read_table(folder.path / "channels.parquet")
    outliers = channels.groupby(["layer", "kind", "token"], observed=True).agg(
        ratio=("ratio", "mean"), channel=("channel", lambda values: int(values.mode().iloc[0]))
    )
    outliers = outliers.reset_index()
    top.to_csv(folder.path / "sinks.csv", index=False, float_format="%.6g")
    outliers.to_csv(folder.path / "outlier_channels.csv", index=False, float_format="%.6g")
    count = len(request["items"])
    title = f"{Path(request['model']).name}: attention of image queries on sinks, n = {count}, sigma {request['sigma']}"
    figures = save(sinks(top, title=title), folder.path / NAME)
    figures += sorted(folder.path.glob(f"{NAME}_maps.*"))
    if not folder.complete:
        folder.finish()
    document = {
        "run": folder.path,
        "figures": figures,
        "model": folder.data["model"],
        "sinks": top.to_dict("records"),
        "outlier_channels": outliers.to_dict("records"),
    }
    worst = outliers.sort_values("ratio").iloc[-1]
    lines = [
        sink_rows(top),
        f"a sink: a key above {SINK:g} times the uniform share of image queries' attention; kind: of the largest key.",
        f"largest outlier channel: layer {worst['layer']}, {worst['kind']} of {worst['token']} tokens, channel"
        f" {worst['channel']}, {worst['ratio']:.1f} times the median channel.",
        f"n = {count} pictures, sigma {request['sigma']}; tables and figures: {folder.path}",
    ]
    output.result(document, lines, folder.path)


def sink_rows(top: pd.DataFrame) -> Table:
    """One row per layer for the terminal: mass on sinks by head, and what the largest key is."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("layer", "mass on sinks", "head with most", "its largest key", "kind"):
        table.add_column(column, justify="right")
    for layer, part in top.groupby("layer"):
        row = part.sort_values("sink_mass").iloc[-1]
        table.add_row(
            str(layer), f"{part['sink_mass'].mean():.3f}", f"{row['head']}: {row['sink_mass']:.3f}",
            f"{row['largest']:.3f}", f"{row['kind']} ({row['kind_share']:.0%})",
        )  # fmt: skip
    return table
