"""Diagnose: which single tokens take the attention (sinks), what word maps are without them, and outlier channels.

    result = Diagnose(images="scenes:val", limit=8).run("scenes-sd3")
    result.summary                      # per layer and head: mass on sinks, the largest key and its kind

A sink is a key that takes more than ten times the uniform share from image queries (`observe.sinks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import counted
from mmdit_probe.experiments import controls
from mmdit_probe.experiments.experiment import Experiment, Study, one_per_item, plain, request_of
from mmdit_probe.experiments.options import Control, LayersAndHeads, Pictured, notes_on
from mmdit_probe.experiments.text import Text, TextTable, bounded, signed
from mmdit_probe.experiments.token_rows import cut_off
from mmdit_probe.results.statistics import interval, measured
from mmdit_probe.specs import heads_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.data import Sample
    from mmdit_probe.experiments.controls import Variant
    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.models.tokens import TokenTable

KEY_COLUMNS = [
    "item", "control", "prompt", "seed", "step", "branch", "layer", "head", "query", "token", "span", "stream", "mass",
    "uniform",
]  # fmt: skip
SHOWN = "shown"
"""Name of the arrays of the figure of maps."""
SHOWN_MAPS = 10


@dataclass(frozen=True, kw_only=True)
class Diagnose(Pictured, LayersAndHeads, Experiment):
    """Which single tokens take the attention (sinks), what word maps are without them, and outlier channels.

    A sink is a key that takes more than ten times the uniform share from image queries. On scenes: how good the maps
    of the prompt's classes are before and after sinks (but no content words) are removed and the rest renormalised.
    """

    name = "diagnose"
    examples = ("--limit 8", "--images photos --layers 2-5 --model MODEL")
    tables = ("channels", "keys", "map_quality")
    claimed = "sinks take more of the image queries' attention than in the control"

    control: Control = "none"

    default_pictures = 8

    def prepare(self, model: MMDiT, inputs: list[Sample]) -> Study:
        layers, heads = self.places(model)
        chosen = self.chosen_controls()
        captions, items = self.texts(inputs, self.seed)
        request = request_of(model, layers=list(layers), heads=plain(heads), controls=list(chosen), **items)
        tasks = [
            (variant, number, text)
            for variant in controls.variants(model, chosen)
            for number, text in enumerate(variant.texts(captions))
        ]
        notes = notes_on(model, inputs, captions, model.default_size) + cut_off(model, captions)
        facts = {"pictures": [picture.name for picture in inputs], "remarks": notes}
        return Study(model, request, tasks, "pictures", facts=facts, notes=notes, state=(inputs, layers, heads))

    def measure(self, study: Study, task: tuple[Variant, int, str], record: TaskRecord) -> None:
        from mmdit_probe.experiments.scenes_quality import map_scores
        from mmdit_probe.observe.probe import probe
        from mmdit_probe.observe.sinks import Channels, KeyMass, SinkFree

        (variant, number, text), (pictures, layers, heads) = task, study.state
        picture, model, seed = pictures[number], variant.model, self.seed + number
        noised = model.noise(model.encode_image(picture.open(model.default_size)), self.sigma, seed)
        encoded = model.encode_prompt([text])
        with probe(model, KeyMass(), Channels(), SinkFree(), layers=layers, edits=variant.edits) as run:
            model.denoise(noised, self.sigma, encoded, seeds=seed)
        found = {"keys": run[KeyMass].table(), "channels": run[Channels].table()}
        if (label := picture.label(model.default_size)) is not None:
            found["map_quality"] = map_scores(run[SinkFree], label, picture.names, encoded.tokens[0], layers)
        kept = {(layer, head) for layer in layers for head in heads_at(heads, layer, model.heads)}
        for name, frame in found.items():
            if "head" in frame:
                pairs = zip(frame["layer"], frame["head"], strict=True)
                frame = frame[[head < 0 or (layer, head) in kept for layer, head in pairs]]
            record.write(name, frame, item=number, control=variant.name)
        if task is study.tasks[0]:
            image = np.asarray(picture.open(model.default_size))
            record.arrays(SHOWN, image=image, **shown_maps(run, encoded.tokens[0]))

    def summarise(self, result: Result) -> pd.DataFrame:
        from mmdit_probe.observe.sinks import top_keys

        return top_keys(measured(result.store.table("keys", KEY_COLUMNS)))

    def scores(self, result: Result) -> pd.DataFrame:
        from mmdit_probe.observe.sinks import sink_mass

        masses = sink_mass(result.store.chunks("keys", KEY_COLUMNS))
        return one_per_item(masses, result.request["items"], ["control", "layer"])

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        from mmdit_probe.experiments.scenes_quality import improvement

        frames = {"sinks": result.summary, "outlier_channels": outliers(result)}
        if result.store.has("map_quality"):
            table, labels = result.store.table("map_quality"), ["control", "layer", "head", "maps"]
            frames["map_quality_by_head"] = improvement(one_per_item(table, result.request["items"], labels))
        return frames

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.layers import sink_maps, sinks

        count = len(result.request["items"])
        title = f"{result.model_name}: attention of image queries on sinks, n = {count}, sigma {self.sigma:g}"
        figures = {"diagnose": sinks(result.summary, title=title)}
        shown = result.store.load_arrays(SHOWN) if SHOWN in result.store.array_names() else {}
        if "names" in shown:
            where = f"layer {shown['layer']}, where sinks take most: {result.request['items'][0][1]}"
            names = [str(name) for name in shown["names"]]
            figures["diagnose_maps"] = sink_maps(shown["image"], shown["plain"], names, shown["clean"], title=where)
        return figures

    def tell(self, result: Result) -> list[Text]:
        from mmdit_probe.observe.sinks import OUTLIER, SINK

        lines: list[Text] = [
            sink_table(result.summary, measured(self.scores(result))),
            f"a sink: a key above {SINK:g} times the uniform share of image queries' attention; mass: mean over heads,"
            " 95 % interval over pictures; the head with most was found on the same ones; kind: of the largest key.",
        ]
        if (gain := result.frames.get("map_quality_by_head")) is not None:
            lines += [
                quality_table(gain),
                "maps of the classes that the prompt names, mean over heads, as they are -> with sinks other than words"
                " removed and the rest renormalised; difference paired over pictures [95 % interval].",
            ]
        channels = result.frames["outlier_channels"]
        worst = channels.sort_values("ratio").iloc[-1]
        ratio = bounded(worst["ratio"], worst["ratio_low"], worst["ratio_high"], 1)
        return [
            *lines,
            f"largest outlier channel: layer {worst['layer']}, {worst['kind']} of {worst['token']} tokens, channel"
            f" {worst['channel']} (in {worst['channel_share']:.0%} of pictures), {ratio} times the median channel;"
            f" {int((channels['ratio'] > OUTLIER).sum())} of {len(channels)} (layer, kind, tokens) exceed {OUTLIER:g}."
            f" It is the largest of {len(channels)} on the same pictures, which its interval does not allow for.",
            f"n = {counted(len(result.request['items']), 'picture')}, sigma {self.sigma:g}.",
        ]

    def document(self, result: Result) -> dict[str, Any]:
        gain = result.frames.get("map_quality_by_head")
        channels = result.frames["outlier_channels"]
        found = {"sinks": result.summary, "outlier_channels": channels, "controls": result.claims}
        return found if gain is None else found | {"map_quality": gain}


def shown_maps(run: Any, table: TokenTable) -> dict[str, np.ndarray]:
    """Maps of a picture in the layer where sinks take most: as they are, and with sinks removed."""
    from mmdit_probe.observe.sinks import KeyMass, SinkFree, top_keys

    top = top_keys(run[KeyMass].table()).groupby("layer")["sink_mass"].mean()
    layer, words = int(str(top.idxmax())), table.positions(kind="word")
    if not words:
        return {}
    plain, clean = (maps[0].mean(0).numpy() for maps in run[SinkFree].maps(layer))  # [h, w, T]
    others = [p for kind in ("bos", "eos", "pad") for p in table.positions(kind=kind)[:1]]
    shown = [*others, *words][:SHOWN_MAPS]
    names = [f"{table.tokens[p].word or table.tokens[p].kind.upper()}\n{table.tokens[p].stream}" for p in shown]
    return {
        "layer": np.array(layer), "names": np.array(names), "plain": plain[..., shown], "clean": clean[..., shown]
    }  # fmt: skip


def outliers(result: Result) -> pd.DataFrame:
    """Per layer, kind and modality: the largest channel (and in what share of the pictures it is the largest), its
    ratio to the median channel with a 95 % interval over pictures, and the mean number of outliers."""
    channels = measured(result.store.table("channels"))
    rows = []
    for (layer, kind, token), part in channels.groupby(["layer", "kind", "token"], observed=True):
        often = part["channel"].value_counts()
        ratios = one_per_item(part[["item", "ratio"]], result.request["items"], [])["ratio"]
        largest = {"channel": int(often.index[0]), "channel_share": float(often.iloc[0] / len(part)), "n": len(ratios)}
        found = interval(ratios).named("ratio") | {"outliers": float(part["outliers"].mean())}
        rows.append({"layer": layer, "kind": kind, "token": token} | largest | found)
    return pd.DataFrame(rows)


def quality_table(gain: pd.DataFrame) -> TextTable:
    """Map quality by layer before and after, in text, mean over heads."""
    from mmdit_probe.experiments.scenes_quality import MEAN, SCORES

    gain = gain[gain["head"] == MEAN]
    columns = [c for name in SCORES for c in (name.replace("_", " "), "difference")]
    table = TextTable(["layer", *columns], spare=("difference", *reversed(columns[2:])))
    rows = gain.set_index(["layer", "score"])
    for layer in sorted(set(gain["layer"])):
        cells = [str(layer)]
        for name in SCORES:
            row = rows.loc[(layer, name)] if (layer, name) in rows.index else None
            cells += ["", ""] if row is None else [
                f"{row['before']:.3f} -> {row['after']:.3f}",
                f"{signed(row['difference'], row['low'], row['high'])} {row['verdict']}",
            ]  # fmt: skip
        table.add(*cells)
    return table


def sink_table(top: pd.DataFrame, masses: pd.DataFrame) -> TextTable:
    """One row per layer in text: mass on sinks (of every picture in `masses`), and what the largest key is."""
    table = TextTable(["layer", "mass on sinks", "head with most", "its largest key", "kind"], left=("kind",))
    for layer, part in top.groupby("layer"):
        row = part.sort_values("sink_mass").iloc[-1]
        mass = interval(masses.loc[masses["layer"] == layer, "value"].clip(0, 1), kind="share")
        table.add(
            str(layer), bounded(*mass), f"{row['head']}: {row['sink_mass']:.3f}",
            f"{row['largest']:.3f}", f"{row['kind']} ({row['kind_share']:.0%})",
        )  # fmt: skip
    return table
