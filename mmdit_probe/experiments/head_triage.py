"""HeadTriage: which heads localise words, which do the opposite, and what maps gain when that is put right.

    result = HeadTriage(limit=64, train_limit=64).run("scenes-sd3")
    result.summary                     # per layer, encoder stream and way to read the maps: mIoU on other scenes

Two faults of word maps cost more than the choice of the layer: words differ in how much attention they draw anywhere,
and some heads look away from the word. Both are measured on training scenes alone (a word's mean mass by layer; heads
whose AUC lies below one half, interval and all) and put right on scenes of another split, where everything is reported.
Centring needs no training scenes: each map over its own mean. Control: as many heads left out at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError, counted
from mmdit_probe.experiments.experiment import Experiment, Study, request_of
from mmdit_probe.experiments.options import Input
from mmdit_probe.experiments.text import Text, TextTable, bounded, signed
from mmdit_probe.options import Option
from mmdit_probe.results.statistics import (
    ALIKE,
    HIGHER,
    LOWER,
    NONE,
    TOO_FEW,
    holm,
    interval,
    kind_of,
    p_value,
    two_sided,
)
from mmdit_probe.scenes import scene, split_of_world
from mmdit_probe.scenes.world import CLASSES, Scene
from mmdit_probe.specs import Spec, layer_indices

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.models.mmdit import MMDiT

ALL = "all"
RAW, CENTRED, SCALED, TRIAGED, BOTH, RANDOM = "raw", "centred", "scaled", "triaged", "triaged, scaled", "random heads"
WAYS = (RAW, CENTRED, SCALED, TRIAGED, BOTH, RANDOM)
"""Ways to read maps: as they are; over their own mean; over the word's mean on training scenes; without anti-localised
heads; the last two; without as many heads drawn at random (the control of `triaged`)."""


@dataclass(frozen=True, kw_only=True)
class HeadTriage(Experiment):
    """Find heads that localise words and heads that look away, on training scenes; report what that gains on others.

    Writes head_triage.parquet (mIoU per scene, layer, encoder stream and way to read the maps) and heads.parquet (per
    training scene, layer, head and word: AUC and mean of its map).
    """

    name = "head-triage"
    examples = ("--limit 32 --train-limit 32",)
    tables = ("head_triage", "heads")
    claimed = "maps read this way have a higher mIoU than the same maps as they are, or with other heads left out"
    headlined = ("span", ALL)

    layers: Annotated[Spec, Option("Joint-attention layers, 0-based: all, 4, 2-5 or 0,4.")] = "all"
    limit: Annotated[int, Input("Scenes to report on.", min=2)] = 64
    report: Annotated[Literal["val", "test"], Input("Scenes to report on.")] = "test"
    train_limit: Annotated[int, Input("Training scenes to select and calibrate on.", min=2)] = 64
    sigma: Annotated[float, Option("Noise level, 0 clean to 1 noise.", min=0, max=1)] = 0.515

    def gather(self, scenes: bool) -> list[Scene]:
        if not scenes:
            raise UserError("head triage compares maps with the regions of scenes, which this model does not know")
        return several(self.report, self.limit)

    def prepare(self, model: MMDiT, inputs: list[Scene]) -> Study:
        layers = layer_indices(self.layers, len(model.layers))
        request = request_of(
            model, layers=list(layers), n=self.limit, split=split_of_world(self.report), train=self.train_limit,
            sigma=self.sigma, seed=self.seed,
        )  # fmt: skip
        streams = [ALL, *dict.fromkeys(model.token_tables(["grass"])[0].streams)]
        reader = Reader(model, layers, [*streams] if len(streams) > 2 else [ALL], self.sigma, self.seed)
        note = f"{self.train_limit} training scenes are measured before the first of {len(inputs)}"
        state = Calibration(reader, several("train", self.train_limit))
        return Study(model, request, list(enumerate(inputs)), "scenes", notes=[note], state=state)

    def measure(self, study: Study, task: tuple[int, Scene], record: TaskRecord) -> None:
        number, item = task
        calibration: Calibration = study.state
        if number == 0:
            record.write("heads", calibration.rows)
        record.write("head_triage", calibration.report(item, number), item=number)

    def summarise(self, result: Result) -> pd.DataFrame:
        return summarise(result.table)

    def scores(self, result: Result) -> pd.DataFrame:
        """Each way beside raw maps, and triage beside as many heads at random: the way is part of the cell."""
        table = result.table.rename(columns={"miou": "value", "stream": "span", "way": "kind"})
        raw = table[table["kind"] == RAW].drop(columns="kind")
        random = table[table["kind"] == RANDOM].assign(control=RANDOM, kind=TRIAGED)
        ways = [way for way in WAYS if way not in (RAW, RANDOM)]
        against = [raw.assign(control=RAW, kind=way) for way in ways]
        own = table[table["kind"].isin(ways)].assign(control=NONE)
        return pd.concat([own, *against, random])[["item", "control", "layer", "span", "kind", "value"]]

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        return {f"{self.tables[0]}_by_layer": result.summary, "heads_by_layer": verdicts(result.store.table("heads"))}

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.layers import triage

        n = int(result.summary["n"].max())
        of = f"heads chosen on {self.train_limit} training scenes, mIoU on {counted(n, 'scene')} of {self.report}"
        title = f"{result.model_name}: {of}, sigma {self.sigma:g}"
        return {"head_triage": triage(result.summary, result.frames["heads_by_layer"], title=title)}

    def tell(self, result: Result) -> list[Text]:
        heads = result.frames["heads_by_layer"]
        away = heads[heads["verdict"] == AWAY]
        named = ", ".join(f"{row['layer']}.{row['head']} (AUC {row['auc']:.2f})" for row in away.to_dict("records"))
        return [
            triage_table(result.summary),
            "mIoU of the argmax over the words of the scene's classes, mean over scenes; raw with its 95 % interval,"
            " the other ways as paired differences from raw.",
            f"Heads that look away from words on {self.train_limit} training scenes (layer.head): {named or 'none'}.",
            f"n = {counted(result.summary['n'].max(), 'scene')} of {self.report} that training scenes do not share,"
            f" sigma {self.sigma:g}; heads and scales were chosen on the training split alone.",
        ]


def several(split: str, count: int) -> list[Scene]:
    """The scenes with two classes or more among the first `count` of a split."""
    found = [item for item in (scene(split, index) for index in range(count)) if len(item.class_names) > 1]
    if len(found) < 2:
        of_all = counted(count, "scene")
        raise UserError(f"two classes are in {len(found)} of {of_all}; triage compares words: take more scenes")
    return found


@dataclass(frozen=True)
class Reader:
    """Reads the maps of the words of a scene's classes, of every layer, head and encoder stream."""

    model: MMDiT
    layers: tuple[int, ...]
    streams: Sequence[str]
    sigma: float
    seed: int

    def maps(self, item: Scene, number: int) -> dict[tuple[int, str], Tensor]:
        """(layer, stream) -> [H, K, h, w]; the prompt is the bare list of the scene's classes."""
        from mmdit_probe.experiments.scenes_quality import class_scores
        from mmdit_probe.observe.maps import TextMaps
        from mmdit_probe.observe.probe import probe

        text = self.model.encode_prompt([" ".join(item.class_names)])
        latents = self.model.noise(self.model.encode_image([item.image]), self.sigma, self.seed + number)
        with probe(self.model, TextMaps(heads="all"), layers=list(self.layers)) as run:
            self.model.denoise(latents, self.sigma, text)
        return {
            (layer, stream): class_scores(run[TextMaps].maps(layer)[0], text.tokens[0], item.class_names, stream)
            for layer in self.layers
            for stream in self.streams
        }


class Calibration:
    """What training scenes tell of heads and words, and maps of other scenes read with it."""

    def __init__(self, reader: Reader, items: Sequence[Scene]) -> None:
        self.reader, self.items = reader, items

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Per training scene, layer, stream, head and word: auc of its map against the region, mean of its map."""
        return pd.concat([self._rows(item, number) for number, item in enumerate(self.items)], ignore_index=True)

    @cached_property
    def away(self) -> dict[int, list[int]]:
        """Layer -> its heads that look away from words, never all of them."""
        return looking_away(verdicts(self.rows), self.reader.model.heads)

    def _rows(self, item: Scene, number: int) -> pd.DataFrame:
        from mmdit_probe.evaluate.scores import area_under_curve
        from mmdit_probe.observe.pca import token_classes

        parts = []
        for (layer, stream), maps in self.reader.maps(item, number).items():
            labels = token_classes(item.classes[None], (maps.shape[2], maps.shape[3]))[0].ravel()
            flat = maps.flatten(2).numpy()  # [H, K, h w]
            for word, values in zip(item.class_names, flat.swapaxes(0, 1), strict=True):
                auc = area_under_curve(values, labels == CLASSES.index(word))
                parts.append(
                    pd.DataFrame({"train_item": number, "layer": layer, "stream": stream, "head": range(len(values)),
                                  "word": word, "auc": auc, "mean": values.mean(-1)})
                )  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    def scale(self, layer: int, stream: str, words: Sequence[str], heads: Sequence[int]) -> np.ndarray:
        """Mean of each word's map over training scenes and these heads, [K, 1, 1]; of words never seen that of all."""
        rows = self.rows
        part = rows[(rows["layer"] == layer) & (rows["stream"] == stream) & rows["head"].isin(heads)]
        means = part.groupby("word")["mean"].mean()
        return means.reindex(list(words)).fillna(means.mean()).to_numpy().clip(1e-12)[:, None, None]

    def report(self, item: Scene, number: int) -> pd.DataFrame:
        """mIoU of one scene: layer, stream, way, miou (mean IoU over its classes)."""
        import torch

        from mmdit_probe.evaluate.scores import map_quality, mean_iou

        names, rows = item.class_names, []
        ids = [CLASSES.index(name) for name in names]
        for (layer, stream), maps in self.reader.maps(item, len(self.items) + number).items():
            every, away = list(range(len(maps))), self.away.get(layer, [])
            scales = {heads: self.scale(layer, stream, names, heads) for heads in (tuple(every), _without(every, away))}
            read = torch.stack(list(ways(maps, away, scales, self.reader.seed + number).values()))
            counts = map_quality(read, item.classes, ids, len(CLASSES))  # (ways, C, C)
            rows += [
                {"layer": layer, "stream": stream, "way": way, "miou": float(mean_iou(of))}
                for way, of in zip(WAYS, counts, strict=True)
            ]
        return pd.DataFrame(rows)


def ways(
    maps: Tensor, away: Sequence[int], scales: Mapping[tuple[int, ...], np.ndarray], seed: int
) -> dict[str, Tensor]:
    """Maps [K, h, w] read in every way of `WAYS`.

    Args:
        maps: [H, K, h, w]. away: heads that look away. scales: of the words, [K, 1, 1], by the heads that are averaged.
    """
    import torch

    from mmdit_probe.segment.tail import STRETCHES

    every = list(range(len(maps)))
    kept = _without(every, away)
    drawn = np.random.default_rng(seed).permutation(len(maps))[: len(away)].tolist()
    whole, triaged = maps.mean(0), maps[list(kept)].mean(0)
    scale = {heads: torch.from_numpy(of).to(maps) for heads, of in scales.items()}
    found = (
        whole, STRETCHES["centre"](whole), whole / scale[tuple(every)], triaged, triaged / scale[kept],
        maps[list(_without(every, drawn))].mean(0),
    )  # fmt: skip
    return dict(zip(WAYS, found, strict=True))


def _without(every: Sequence[int], away: Sequence[int]) -> tuple[int, ...]:
    return tuple(head for head in every if head not in away)


LOCALISES, AWAY, NEITHER = "localises", "looks away", "neither"


def verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """Per layer and head, over training scenes (all streams): n, auc with low and high (95 % interval), p_holm (of one
    half, corrected for all heads), verdict: "localises" if the interval lies above one half and p_holm is at most .05,
    "looks away" if below it, else "neither"; "too few items" where p_holm is NaN, and then no head is left out."""
    found = []
    for (layer, head), part in rows[rows["stream"] == ALL].groupby(["layer", "head"], observed=True):
        items = part.groupby("train_item")["auc"].mean()
        row = {"layer": layer, "head": head, "n": int(items.notna().sum())}
        found.append(row | interval(items, kind="share").named("auc", "") | {"p_holm": p_value(items - 0.5)})
    heads = pd.DataFrame(found)
    heads["p_holm"] = holm(heads["p_holm"])
    away = heads.assign(difference=heads["auc"] - 0.5, low=heads["low"] - 0.5, high=heads["high"] - 0.5)
    told = {HIGHER: LOCALISES, LOWER: AWAY, ALIKE: NEITHER, TOO_FEW: TOO_FEW}
    return heads.assign(verdict=two_sided(away).map(told))


def looking_away(heads: pd.DataFrame, count: int) -> dict[int, list[int]]:
    """Layer -> heads that look away; where all of them do, the best one is kept."""
    found = {}
    for layer, part in heads[heads["verdict"] == AWAY].groupby("layer"):
        worst_first = part.sort_values("auc")["head"].astype(int).tolist()
        found[int(str(layer))] = sorted(worst_first[: count - 1])
    return found


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Per layer, stream and way: n, miou, low, high, and difference, difference_low, difference_high (paired, from raw
    maps of the same layer and stream)."""
    rows = []
    for (layer, stream), part in table.groupby(["layer", "stream"], observed=True, sort=False):
        wide = part.pivot(index="item", columns="way", values="miou")
        for way in WAYS:
            row = {"layer": layer, "stream": stream, "way": way, "n": int(wide[way].notna().sum())}
            row |= interval(wide[way], kind="share").named("miou", "")
            kind = kind_of(wide[way], wide[RAW])
            rows.append(row | interval(wide[way] - wide[RAW], kind).named("difference"))
    return pd.DataFrame(rows)


def triage_table(summary: pd.DataFrame) -> TextTable:
    """One row per layer and stream in text."""
    table = TextTable(["layer", "text tokens", *WAYS], left=("text tokens",), spare=(RANDOM, BOTH))
    for (layer, stream), part in summary.groupby(["layer", "stream"], sort=False):
        rows = {str(row["way"]): row for row in part.to_dict("records")}
        raw = bounded(rows[RAW]["miou"], rows[RAW]["low"], rows[RAW]["high"])
        rest = [
            signed(rows[way]["difference"], rows[way]["difference_low"], rows[way]["difference_high"], 2)
            for way in WAYS[1:]
        ]
        table.add(str(layer), str(stream), raw, *rest)
    return table
