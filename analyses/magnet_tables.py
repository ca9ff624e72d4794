"""The tables of analyses/magnet_scenes.py: gains with paired intervals, the choice among pilots, a summary.

    choose(pilots, frames)                                  # which loss and rate the val scenes ask for
    write(out, counts, frames, pilots, logs, examples, settings)

Knows no model: it reads counts per image and scores per picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mmdit_probe.evaluate.scores import ImageCounts
from mmdit_probe.experiments.score import KEYS, compare_variants, margin_of, sign_of, with_verdicts
from mmdit_probe.experiments.text import bounded, signed
from mmdit_probe.magnet.validation import Readout
from mmdit_probe.results.statistics import (
    FEWEST_SEEDS,
    NO_WORSE,
    TOO_FEW,
    TOO_FEW_SEEDS,
    UNDECIDED,
    WORSE,
    Interval,
    Jackknife,
    across_seeds,
    jackknife,
)

BASE, CONTROL = "base", "control"
PROTOCOLS: dict[Readout, str] = {
    ("probability", "none"): "present",
    ("probability", "centre"): "present, maps / mean",
    ("probability", "minmax"): "present, min-max",
    ("logit", "none"): "present, before the softmax",
    ("logit", "minmax"): "present, before the softmax, min-max",
}
"""How maps are read, and what that is called in the tables; the first is the protocol, the others Table 5's."""
UNSUPERVISED = "unsupervised"
SHOWN = ("facts", "all_right")
"""Metrics of the summary beside CLIPScore; generation.csv has all."""
TOLD = (WORSE, UNDECIDED, TOO_FEW, TOO_FEW_SEEDS)
"""Verdicts that are told with their categories."""
TARGET = 0.05
"""Gain in mIoU (present) over the base model that was asked for; its interval must lie above."""

HEAD = """\
# MAGNET on scenes-sd3, measured

Written by `python analyses/magnet_scenes.py`; every number is from a checkpoint with these
weights: `{weight_hash:.8}`.

Maps of layer {layer}: of {layers} layers the one whose maps name the val scenes best in the base model. {steps} steps
of {batch} on {train} training scenes. {recipe} All that follows is of test scenes and their captions;
pictures have {num_steps} steps, guidance {guidance:g}, {precision}, and the same seeds in every variant. `control` is
the same LoRA trained with flow matching alone. {trained}
"""
SEEDS = """\
Every training has {seeds} seeds, the control's the same; means are
over seeds, and the seeds' spread is in every interval; what has fewer than {fewest} has none."""
FEW_SEEDS = """\
Every training has {seeds} of the {fewest} seeds that an
interval takes: values stand alone, and a gain that is as small as seeds may differ is none yet."""
RECIPE = {
    "ours": "LoRA on both streams of all layers. The loss reads {space} maps, normalisation {normalise}, rate {rate:g}:"
            " chosen on val by the pilot below.",
    "paper": "The paper's recipe as it stands: LoRA on the image stream of all layers, CLIP's maps before the softmax,"
             " rate 1e-4, gradient norm 0.01; `class-long` has {long_steps} steps and one seed.",
}  # fmt: skip
MIOU = """
## mIoU on test scenes

95 % intervals over {over}, each by itself (not corrected for their number); gains are paired by image and
seed. *present*: the classes of the picture compete; the other readings of the same maps are those of the paper's Table
5. *unsupervised*: segments of the empty prompt, matched within each picture.

| variant | protocol | n | mIoU | gain over base | gain over control |
|-|-|-|-|-|-|
"""
PICTURES = """
## Generated pictures

Mean, and paired difference to the control with its 95 % interval over prompts{and_seeds}. n counts different captions
(one that comes up again, in one category or two, is the same: texture has eight in all). *no worse*: the interval lies
above a loss of .05 (one point of CLIPScore); *worse*: it lies below zero; else undecided. Both are corrected for the
rows of a metric (Holm). *facts*: share of the caption's facts that the scene parser reads in the picture.

"""
PILOT = """\
## Pilot

{pilot_steps} steps of `class` for every form of the loss (Table 5's two choices, at the loss) and rate, measured on
val: mIoU (present), and the share of facts against a control of the same rate and length. Each has one seed: intervals
are over prompts, and do not say how much another training would differ.

| alignment | maps | min-max | rate | mIoU | facts | difference to control | chosen |
|-|-|-|-|-|-|-|-|
"""


def choose(pilots: pd.DataFrame, frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Pilots with what their pictures lost against the control of their rate, and which one is taken.

    Taken is the highest mIoU among those whose share of facts is no worse than the control's; if there is none, the one
    that loses least.

    Args:
        pilots: columns name, alignment, rate, miou, and space and normalise (empty for controls).
        frames: rows of `score` by pilot.
    """
    rows = []
    for row in pilots.to_dict("records"):
        own = row["name"]
        control = pilots[(pilots["rate"] == row["rate"]) & (pilots["alignment"] == "none")]["name"].iloc[0]
        table = compare_variants(pd.concat([frames[name] for name in dict.fromkeys((control, own))]), control)
        facts = table[(table["variant"] == own) & (table["category"] == "all") & (table["metric"] == "facts")].iloc[0]
        kept = ("mean", "difference", "difference_low", "difference_high", "verdict")
        rows.append(row | {f"facts_{key}".replace("facts_mean", "facts"): facts[key] for key in kept})
    found = pd.DataFrame(rows)
    aligned = found[found["alignment"] != "none"]
    harmless = aligned[aligned["facts_verdict"] == NO_WORSE]
    taken = harmless["miou"].idxmax() if len(harmless) else aligned["facts_difference"].idxmax()
    return found.assign(chosen=found.index == taken)


def miou_table(counts: Mapping[tuple[str, int, str], ImageCounts]) -> pd.DataFrame:
    """mIoU per variant and protocol, mean over training seeds, with intervals over images and seeds, and paired gains
    over the base model and over the control.

    Args:
        counts: by variant, training seed (the base model has seed 0 alone) and protocol.
    """
    rows = []
    left_out = {place: found.leave_one_out("miou") for place, found in counts.items()}
    places = [(variant, protocol) for variant, _, protocol in counts]
    trained = {at: [seed for name, seed, of in counts if (name, of) == at] for at in places}

    def of(variant: str, seed: int, protocol: str) -> NDArray[np.float64]:
        return left_out[variant, 0 if variant == BASE else seed, protocol]

    for (variant, protocol), seeds in trained.items():
        found = _over_seeds({seed: left_out[variant, seed, protocol] for seed in seeds}, trained=variant != BASE)
        row: dict[str, object] = {"variant": variant, "protocol": protocol, "n": len(counts[variant, 0, protocol])}
        low, high = np.clip(found[1:3], 0, 1)
        row |= {"seeds": len(seeds), "miou": found.value, "low": low, "high": high}
        for other in (BASE, CONTROL):
            paired = trained[other, protocol] if variant == BASE else seeds
            pairs = {seed: of(variant, seed, protocol) - of(other, seed, protocol) for seed in paired}
            gain = _over_seeds(pairs, trained=variant != other)
            ends = np.clip(gain[1:3], -1, 1)
            row |= {f"gain_{other}": gain.value, f"gain_{other}_low": ends[0], f"gain_{other}_high": ends[1]}
        rows.append(row)
    return pd.DataFrame(rows)


def _over_seeds(values: Mapping[int, np.ndarray], trained: bool) -> Jackknife:
    """Of scores by seed, each of all images and then of all but one [1 + n]."""
    mean = np.mean(list(values.values()), axis=0)
    found = jackknife(mean[0], mean[1:])
    return across_seeds(found, [of[0] for of in values.values()], len(mean) - 1) if trained else found


def generation_table(frames: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """`compare_variants` of the means over training seeds, the seeds' spread in the intervals; "too few seeds" where
    fewer than `FEWEST_SEEDS` were trained.

    Args:
        frames: rows of `score` with the columns variant and training_seed (the base model has seed 0 alone).
    """
    keys = ["variant", *KEYS]
    mean = frames.drop(columns="training_seed").groupby(keys, sort=False).mean().reset_index()
    whole = compare_variants(mean, baseline)
    place = ["variant", "category", "metric"]
    metrics = mean[list(dict.fromkeys(whole["metric"]))]
    most = np.where((metrics.min() >= 0) & (metrics.max() <= 1), 1, np.inf)  # two shares differ by no more than 1
    most = pd.Series(most, metrics.columns)
    seeds = {}
    for seed in dict.fromkeys(frames["training_seed"]):
        lone = frames[(frames["training_seed"] == seed) | (frames["variant"] == BASE)].drop(columns="training_seed")
        if baseline in set(lone["variant"]):
            seeds[seed] = compare_variants(lone, baseline).set_index(place)[["mean", "difference"]]
    rows = []
    for row in whole.to_dict("records"):
        key, limit, items = tuple(row[name] for name in place), most[row["metric"]], row["prompts"]
        if row["variant"] == baseline == BASE:  # no training, beside none
            rows.append(row | {"seeds": 1})
            continue
        of = pd.DataFrame([known.loc[key] for known in seeds.values() if key in known.index])
        if row["variant"] != BASE:
            own = across_seeds(Interval(row["mean"], row["low"], row["high"]), of["mean"], items)
            row |= {"low": max(own.low, 0.0) if limit == 1 else own.low, "high": min(own.high, limit)}
        if row["variant"] != baseline:
            found = Interval(row["difference"], row["difference_low"], row["difference_high"])
            spread = across_seeds(found, of["difference"], items)
            loss = -margin_of(row["metric"]) * sign_of(row["metric"])
            from_margin = across_seeds(Interval(*(x - loss for x in found)), of["difference"] - loss, items)
            low, high = np.clip(spread[1:3], -limit, limit)
            row |= {"difference_low": low, "difference_high": high}
            row |= {name: p if np.isfinite(row[name]) else np.nan  # as many items as a verdict takes
                    for name, p in (("p_holm", spread.p), ("p_margin", from_margin.p))}  # fmt: skip
        rows.append(row | {"seeds": len(of)})
    table = with_verdicts(pd.DataFrame(rows), baseline)
    few = (table["seeds"] < FEWEST_SEEDS) & (table["variant"] != baseline)
    return table.assign(verdict=table["verdict"].mask(few, TOO_FEW_SEEDS))


def verdict(miou: pd.DataFrame, generation: pd.DataFrame) -> list[str]:
    """One line per aligned variant: what it gained, and where its pictures are no worse than the control's."""
    lines = []
    present = miou[miou["protocol"] == "present"].set_index("variant")
    for variant in (name for name in present.index if name not in (BASE, CONTROL)):
        gain = present.loc[variant]
        part = generation[(generation["variant"] == variant) & (generation["metric"] == "facts")]
        of = {word: list(part[part["verdict"] == word]["category"]) for word in TOLD}
        told = [f"{word} in {', '.join(names)}" for word, names in of.items() if names]
        reached = "reached" if gain["gain_base_low"] >= TARGET and not told else "not reached"
        lines.append(
            f"* `{variant}` ({gain['seeds']:g} seed{'s' if gain['seeds'] > 1 else ''}):"
            f" {_points(gain, BASE)} points over the base model, {_points(gain, CONTROL)} over the control; facts"
            f" against the control's, margin"
            f" {margin_of('facts'):g}: {'; '.join(told) or 'no worse in every category'}. Target {reached}."
        )
    return lines


def _points(row: pd.Series, other: str) -> str:
    return signed(*(100 * row[f"gain_{other}{end}"] for end in ("", "_low", "_high")), digits=1)


def write(
    out: Path, counts: Mapping[tuple[str, int, str], ImageCounts], frames: pd.DataFrame, pilots: pd.DataFrame | None,
    logs: Mapping[str, pd.DataFrame], examples: Mapping[str, Any], settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write every table, `examples.npz`, `settings.json` and `summary.md`. `pilots`: None where nothing was chosen."""
    out.mkdir(parents=True, exist_ok=True)
    miou, generation = miou_table(counts), generation_table(frames, CONTROL)
    over_base = generation_table(frames, BASE)
    tables = {"miou": miou, "generation": generation, "generation_over_base": over_base, **logs}
    tables |= {} if pilots is None else {"pilot": pilots}
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False, float_format="%.5g")
    np.savez_compressed(out / "examples.npz", **examples)
    (out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (out / "summary.md").write_text(summary(miou, generation, pilots, settings), encoding="utf-8")


def summary(
    miou: pd.DataFrame, generation: pd.DataFrame, pilots: pd.DataFrame | None, settings: Mapping[str, Any]
) -> str:  # fmt: skip
    """All tables for people."""
    taken = {} if pilots is None else pilots[pilots["chosen"]].iloc[0].to_dict()
    words = {"recipe": RECIPE[settings["recipe"]].format(**settings | taken), "layers": len(settings["layer_miou_val"])}
    several = settings["seeds"] >= FEWEST_SEEDS
    words |= {"trained": (SEEDS if several else FEW_SEEDS).format(**settings, fewest=FEWEST_SEEDS)}
    head = HEAD.format(**settings | words).splitlines()
    how = MIOU.format(over="images and seeds" if several else "images")
    lines = [*head, "", *verdict(miou, generation), *how.splitlines()]
    for row in miou.to_dict("records"):
        gains = [
            "" if o == row["variant"] else signed(row[f"gain_{o}"], row[f"gain_{o}_low"], row[f"gain_{o}_high"])
            for o in (BASE, CONTROL)
        ]
        own = bounded(row["miou"], row["low"], row["high"])
        lines.append(f"| {' | '.join([row['variant'], row['protocol'], str(row['n']), own, *gains])} |")
    lines += PICTURES.format(and_seeds=" and seeds" if several else "").splitlines()
    shown = [m for m in dict.fromkeys(generation["metric"]) if m in SHOWN or m.startswith("clipscore")]
    for metric in shown:
        part = generation[generation["metric"] == metric]
        categories = list(dict.fromkeys(part["category"]))
        whole = part[part["category"] == "all"].iloc[0]
        sizes = part.groupby("category")["prompts"].first()
        lines += [f"### {metric} ({whole['images']} pictures of each training)", ""]
        heads = [f"{name} (n = {sizes[name]})" for name in categories]
        lines += [f"| variant | {' | '.join(heads)} |", "|-" * (len(categories) + 1) + "|"]
        for variant, of in part.groupby("variant", sort=False):
            cells = []
            for row in of.set_index("category").loc[categories].to_dict("records"):
                change = signed(row["difference"], row["difference_low"], row["difference_high"])
                told = "" if variant == CONTROL else f", {change} ({row['verdict']})"
                cells.append(f"{row['mean']:.3f}{told}")
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        lines.append("")
    if pilots is None:
        return "\n".join([*lines, ""])
    lines += PILOT.format(**settings).splitlines()
    for row in pilots.fillna("").to_dict("records"):
        change = signed(row["facts_difference"], row["facts_difference_low"], row["facts_difference_high"])
        cells = [row["alignment"], row["space"], row["normalise"], f"{row['rate']:g}", f"{row['miou']:.3f}",
                 f"{row['facts']:.3f}", change, "yes" if row["chosen"] else ""]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
