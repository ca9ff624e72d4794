"""`mmdit-probe diagnose`: sinks and outlier channels: which single tokens take the mass, per layer and head."""

from __future__ import annotations

from contextlib import ExitStack
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

NAME = "diagnose"
DEFAULT_PICTURES = 8


@with_session
def command(
    images: Pictures = None,
    prompts: Caption = None,
    layers: Layers = "all",
    selection: Selection = None,
    sigma: Annotated[float, typer.Option(help="Noise level, 0 clean to 1 noise.", min=0, max=1)] = 0.515,
    limit: Limit = None,
    control: Controls = "none",
    session: Session = SESSION,
) -> None:
    """Which single tokens take the attention (sinks), what word maps are without them, and outlier channels.

    A sink is a key that takes more than ten times the uniform share from image queries. On scenes: how good the maps
    of the prompt's classes are before and after sinks (but no content words) are removed and the rest renormalised.
    """
    from mmdit_probe.cli.session import check_layers, layers_of, load_model, open_folder, output_of, pictures_of

    output = output_of(session)
    check_layers(selection, layers)
    chosen = pictures_of(session, images, limit, DEFAULT_PICTURES)

    from mmdit_probe import probe
    from mmdit_probe.experiments.controls import parse, variants
    from mmdit_probe.experiments.sink_quality import map_scores
    from mmdit_probe.observe.sinks import Channels, KeyMass, SinkFree
    from mmdit_probe.results import TableWriter
    from mmdit_probe.specs import heads_at, layer_indices

    controls = parse(control)
    loaded = load_model(session)
    which, heads = layers_of(selection, layers, "all", loaded)
    wanted = layer_indices(which, len(loaded.layers))
    kept = {(layer, head) for layer in wanted for head in heads_at(heads, layer, loaded.heads)}
    captions = [picture.prompt if prompts is None else prompts for picture in chosen]
    options = {
        "layers": list(wanted),
        "heads": heads,
        "sigma": sigma,
        "controls": list(controls),
        "items": [
            [picture.name, text, session.seed + k]
            for k, (picture, text) in enumerate(zip(chosen, captions, strict=True))
        ],
    }
    runs = variants(loaded, controls, len(chosen))
    scenes = all(picture.name.startswith("scenes:") for picture in chosen)
    folder = open_folder(NAME, loaded, session, options)
    if not folder.complete:
        with ExitStack() as stack:
            names = ["keys", *(["map_quality"] if scenes else []), "channels"]  # an item counts when the last is there
            writers = {name: stack.enter_context(TableWriter(folder.path, name)) for name in names}
            done = writers["channels"].done
            advance = stack.enter_context(output.progress("pictures", len(chosen) * len(runs), len(done)))
            for place, variant in enumerate(runs):
                for number, (picture, text) in enumerate(zip(chosen, variant.texts(captions), strict=True)):
                    index, model = place * len(chosen) + number, variant.model
                    if index in done:
                        continue
                    latents = model.encode_image(picture.open(model.default_size))
                    noised = model.noise(latents, sigma, session.seed + number)
                    encoded = model.encode_prompt([text])
                    with probe(model, KeyMass(), Channels(), SinkFree(), layers=wanted, edits=variant.edits) as run:
                        model.denoise(noised, sigma, encoded, seeds=session.seed + number)
                    found = {"keys": run[KeyMass].table(), "channels": run[Channels].table()}
                    if scenes:
                        item = _scene_of(picture.name)
                        found["map_quality"] = map_scores(run[SinkFree], item, encoded.tokens[0], wanted)
                    for name, writer in writers.items():
                        frame = found[name]
                        if "head" in frame:
                            pairs = zip(frame["layer"], frame["head"], strict=True)
                            frame = frame[[head < 0 or (layer, head) in kept for layer, head in pairs]]
                        with writer.item(index) as rows:
                            rows.write(frame.assign(item=number, control=variant.name))
                    if index == 0:
                        _draw_maps(folder, model, picture, text, run, encoded.tokens[0])
                    advance()
        folder.record()
    _report(folder, output)


def _scene_of(name: str) -> Any:
    from mmdit_probe.scenes import scene

    _, split, index = name.split(":")
    return scene(split, int(index))


def _draw_maps(folder: Any, model: Any, picture: Any, text: str, run: Any, table: Any) -> None:
    """Maps of the first picture in the layer where sinks take most: as they are, and with sinks removed."""
    from mmdit_probe.observe.sinks import KeyMass, SinkFree, top_keys
    from mmdit_probe.plots import save
    from mmdit_probe.plots.sinks import sink_maps

    top = top_keys(run[KeyMass].table()).groupby("layer")["sink_mass"].mean()
    layer = int(str(top.idxmax()))
    words = table.positions(kind="word")
    if not words:
        return
    plain, clean = (maps[0].mean(0) for maps in run[SinkFree].maps(layer))  # [h, w, T]
    others = [p for kind in ("bos", "eos", "pad") for p in table.positions(kind=kind)[:1]]
    shown = [*others, *words][:10]
    names = [f"{table.tokens[p].word or table.tokens[p].kind.upper()}\n{table.tokens[p].stream}" for p in shown]
    title = f"layer {layer}, where sinks take most: {text}"
    image = picture.open(model.default_size)
    figure = sink_maps(image, plain[..., shown].numpy(), names, clean[..., shown].numpy(), title=title)
    save(figure, folder.path / f"{NAME}_maps")


def _report(folder: Any, output: Any) -> None:
    from mmdit_probe.cli.tables import plain, report_controls
    from mmdit_probe.experiments.sink_quality import MEAN, improvement
    from mmdit_probe.observe.sinks import OUTLIER, SINK, sink_mass, top_keys
    from mmdit_probe.plots import save
    from mmdit_probe.plots.sinks import sinks
    from mmdit_probe.results import read_items, read_table
    from mmdit_probe.results.statistics import compare, measured

    request = folder.data["request"]
    columns = [
        "item", "control", "prompt", "seed", "step", "branch", "layer", "head", "query", "token", "span", "stream",
        "mass", "uniform",
    ]  # fmt: skip
    top = top_keys(measured(read_table(folder.path / "keys.parquet", columns)))
    top.to_csv(folder.path / "sinks.csv", index=False, float_format="%.6g")
    by_item = sink_mass(read_items(folder.path / "keys.parquet", columns))
    comparison = compare(by_item, ["layer"])
    claim = "sinks take more of the image queries' attention than in the control"
    against = report_controls(folder, NAME, comparison, claim, lambda rows: rows)
    outliers = _outliers(measured(read_table(folder.path / "channels.parquet")))
    outliers.to_csv(folder.path / "outlier_channels.csv", index=False, float_format="%.6g")
    count = len(request["items"])
    title = f"{Path(request['model']).name}: attention of image queries on sinks, n = {count}, sigma {request['sigma']}"
    figures = save(sinks(top, title=title), folder.path / NAME)
    figures += sorted(folder.path.glob(f"{NAME}_maps.*"))
    document = {
        "run": folder.path,
        "figures": figures,
        "model": folder.data["model"],
        "sinks": plain(top),
        "outlier_channels": plain(outliers),
        "controls": plain(comparison),
    }
    worst = outliers.sort_values("ratio").iloc[-1]
    lines: list[Any] = [
        sink_rows(top),
        f"a sink: a key above {SINK:g} times the uniform share of image queries' attention; kind: of the largest key.",
    ]
    quality = folder.path / "map_quality.parquet"
    if quality.exists():
        gain = improvement(read_table(quality))
        gain.to_csv(folder.path / "map_quality_by_head.csv", index=False, float_format="%.6g")
        document["map_quality"] = plain(gain)
        lines.append(quality_rows(gain[gain["head"] == MEAN]))
        lines.append(
            "maps of the classes that the prompt names, mean over heads, as they are -> with sinks other than words"
            " removed and the rest renormalised; difference paired over pictures [95 % bootstrap interval]."
        )
    lines += [
        *against,
        f"largest outlier channel: layer {worst['layer']}, {worst['kind']} of {worst['token']} tokens, channel"
        f" {worst['channel']} (in {worst['channel_share']:.0%} of pictures), {worst['ratio']:.1f}"
        f" [{worst['ratio_low']:.1f}, {worst['ratio_high']:.1f}] times the median channel;"
        f" {int((outliers['ratio'] > OUTLIER).sum())} of {len(outliers)} (layer, kind, tokens) exceed {OUTLIER:g}.",
        f"n = {count} pictures, sigma {request['sigma']}; tables and figures: {folder.path}",
    ]
    if not folder.complete:
        folder.finish()
    output.result(document, lines, folder.path)


def _outliers(channels: pd.DataFrame) -> pd.DataFrame:
    """Per layer, kind and modality: the largest channel (and in what share of the pictures it is the largest), its
    ratio to the median channel with a 95 % bootstrap interval over pictures, and the mean number of outliers."""
    import pandas as pd

    from mmdit_probe.results.statistics import interval

    rows = []
    for (layer, kind, token), part in channels.groupby(["layer", "kind", "token"], observed=True):
        often = part["channel"].value_counts()
        ratio, low, high = interval(part["ratio"])
        rows.append(
            {"layer": layer, "kind": kind, "token": token, "channel": int(often.index[0]),
             "channel_share": float(often.iloc[0] / len(part)), "n": len(part), "ratio": ratio, "ratio_low": low,
             "ratio_high": high, "outliers": float(part["outliers"].mean())}
        )  # fmt: skip
    return pd.DataFrame(rows)


def quality_rows(gain: pd.DataFrame) -> Table:
    """Map quality by layer before and after, for the terminal."""
    from mmdit_probe.cli.tables import bare_table
    from mmdit_probe.experiments.sink_quality import SCORES

    table = bare_table(["layer", *(column for name in SCORES for column in (name.replace("_", " "), "difference"))])
    rows = gain.set_index(["layer", "score"])
    for layer in sorted(set(gain["layer"])):
        cells = [str(layer)]
        for name in SCORES:
            row = rows.loc[(layer, name)] if (layer, name) in rows.index else None
            cells += ["", ""] if row is None else [
                f"{row['before']:.3f} -> {row['after']:.3f}",
                f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] {row['verdict']}",
            ]  # fmt: skip
        table.add_row(*cells)
    return table


def sink_rows(top: pd.DataFrame) -> Table:
    """One row per layer for the terminal: mass on sinks by head, and what the largest key is."""
    from mmdit_probe.cli.tables import bare_table

    table = bare_table(["layer", "mass on sinks", "head with most", "its largest key", "kind"])
    for layer, part in top.groupby("layer"):
        row = part.sort_values("sink_mass").iloc[-1]
        table.add_row(
            str(layer), f"{part['sink_mass'].mean():.3f}", f"{row['head']}: {row['sink_mass']:.3f}",
            f"{row['largest']:.3f}", f"{row['kind']} ({row['kind_share']:.0%})",
        )  # fmt: skip
    return table
