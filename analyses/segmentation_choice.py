"""Which layers, text stream, noise level, heads and refinement segment best? Chosen on training scenes, for the league.

    python analyses/segmentation_choice.py
    python analyses/segmentation_choice.py --limit 40 --report-limit 40 --out runs/segmentation-choice/mine

One step after the other, each on the same images of `--dataset` (mIoU, union rule, protocol present):

    signal    noise level x text stream x layer, each layer alone, maps scaled by their mean
    layers    the best layers together, equally or by their mIoU, x the softmax that the maps are read from
    heads     all heads, or those of each layer that do at least half as well as its best one
    fused     one forward, or the mean over noise seeds or noise levels
    refine    every refinement, alone and joined
    options   of every other method, without refinement and with the chosen one

More forwards and fewer heads are taken only if the paired 95 % interval of the gain lies above 0. Writes
`selection.json` (a LayerSelection, for `--selection`), `settings.json` (the rest, as options of `evaluate`),
`choice.csv` (every row), and `gains.csv`, `gains.md`: what each step is worth on `--report`, other images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mmdit_probe import load
from mmdit_probe.data import dataset as read_dataset
from mmdit_probe.errors import at_least, run_script
from mmdit_probe.evaluate.captures import Captures
from mmdit_probe.evaluate.league import league
from mmdit_probe.evaluate.plan import CEILING, KEYS, Entry, Plan
from mmdit_probe.evaluate.scores import ImageCounts
from mmdit_probe.results import RunFolder
from mmdit_probe.results.selection import LayerSelection
from mmdit_probe.results.statistics import corrected
from mmdit_probe.segment.capture import layer_weights
from mmdit_probe.segment.methods import find
from mmdit_probe.segment.record import Reading

NAME = "segmentation-choice"
SIGMAS = (0.1, 0.2, 0.3, 0.4, 0.5)
SOFTMAX = ("joint", "image-odds", "words")
REFINE = (
    "none", "minmax", "centre", "pamr", "affinity+centre", "nosink+centre", "walk+centre", "centre+regions",
    "centre+pamr", "centre+pamr:20", "centre+pamr:40", "centre+pamr:80", "minmax+pamr", "minmax+pamr:40",
    "minmax+pamr:80", "affinity:1+centre+pamr:40", "centre+regions+pamr", "centre+regions+pamr:40",
)  # fmt: skip
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "diffsegmenter": tuple({"order": order} for order in (1, 2)),
    "iseg": tuple({"ent": ent, "rounds": rounds} for ent in (0.015, 0.2) for rounds in (1, 2, 8)),
    "tokenrank": tuple({"bounces": bounces} for bounces in (1, 2, 3)),
    "conceptattention": tuple(
        {"softmax": softmax, "normalise": normalise, "temperature": temperature}
        for softmax in ("before", "after", "none")
        for normalise, temperature in (("none", 1.0), ("none", 0.05), ("concepts", 1.0), ("both", 20.0))
    ),
    "proxyclip": tuple({"source": source, "beta": beta} for source in ("features", "i2i") for beta in (0.8, 1.2, 1.6)),
    "corrclip": tuple({"cut": cut, "tau": tau} for cut in (0.3, 0.5) for tau in (4.0, 10.0)),
    "seg4diff-unsup": tuple(
        {"tau": tau, "axis": axis, "kinds": kinds}
        for axis, taus in (("space", (0.003, 0.01, 0.035)), ("token", (0.01, 0.035, 0.1)))
        for tau in taus
        for kinds in ("pad,eos", "pad", "all")
    ),
    "diffseg": tuple({"tau": tau} for tau in (0.2, 0.3, 0.4, 0.6, 0.9)),
    "diffcut": tuple({"tau": tau, "alpha": alpha} for tau in (0.3, 0.5, 0.7) for alpha in (5.0, 10.0)),
}
"""Options that are tried, by method; the published values are among them."""


@dataclass(frozen=True)
class Setting:
    """What seg4diff reads and how, as far as it is chosen."""

    layers: tuple[int, ...]
    sigmas: tuple[float, ...]
    seeds: int = 1
    weights: Mapping[int, float] | None = None
    heads: Mapping[int, tuple[int, ...]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    refine: str = "centre"

    def method_options(self, name: str) -> dict[str, Any]:
        """The part of the choice that another method can read: heads, and of named classes stream and softmax."""
        heads = {} if self.heads is None else {"heads": dict(self.heads)}
        known = {**({} if find(name).unsupervised else self.options), **heads}
        return {key: value for key, value in known.items() if key in find(name).defaults}


@dataclass
class Bench:
    """Measures entries on the first images of a split; forwards of one call are shared by its entries."""

    captures: Captures
    split: str
    count: int

    def run(self, entries: Sequence[tuple[str, Entry]], seeds: int = 1) -> tuple[pd.DataFrame, dict[str, ImageCounts]]:
        """The league of labelled entries, and their counts by label."""
        dataset, facts = read_dataset(self.split, self.count), self.captures.facts
        reading = Reading(seeds=tuple(range(seeds)))
        plan = Plan.of(dataset, ["seg4diff"], (facts["layers"], facts["heads"]), reading=reading)
        renamed = [replace(entry, method=replace(entry.method, name=label)) for label, entry in entries]
        plan = replace(plan, entries=tuple(renamed), controls=False)
        counts = pd.concat(map(pd.DataFrame, plan.rows(self.captures, range(self.count))), ignore_index=True)
        table = league(counts, len(dataset.classes))
        groups = {str(key): part for key, part in counts.groupby("method", observed=True)}
        return table, {key: ImageCounts.from_table(part, len(dataset.classes)) for key, part in groups.items()}


def entry(setting: Setting, name: str = "seg4diff", options: Mapping[str, Any] | None = None) -> Entry:
    """One configuration of a plan."""
    method = find(name).configure({**setting.method_options(name), **(options or {})})
    heads = "mean" if setting.heads is None else "chosen"
    layers = tuple(sorted(setting.layers))
    return Entry(method, setting.refine, layers, heads, setting.sigmas, layer_weights(layers, setting.weights))


def best(table: pd.DataFrame) -> pd.Series:
    """The row with the highest mIoU that is no baseline."""
    runs = table[table["layers"] != ""]
    return runs.loc[runs["miou"].idxmax()]


def choose(
    bench: Bench, log: list[pd.DataFrame]
) -> tuple[Setting, dict[str, dict[str, Any]], dict[int, tuple[int, ...]]]:
    """The setting of seg4diff, the options of every method at the same layers and noise level, and the good heads."""

    def measure(step: str, found: Mapping[str, Setting]) -> tuple[pd.DataFrame, dict[str, ImageCounts]]:
        tables, counts = [], {}
        for seeds in sorted({one.seeds for one in found.values()}):
            group = [(label, entry(one)) for label, one in found.items() if one.seeds == seeds]
            table, of_label = bench.run(group, seeds)
            tables.append(table)
            counts |= of_label
        table = pd.concat(tables, ignore_index=True)
        log.append(table.assign(step=step))
        return table, counts

    layer_count, head_count = bench.captures.facts["layers"], bench.captures.facts["heads"]
    model = bench.captures.model
    streams = ("all", *dict.fromkeys(token.stream for token in model.token_tables("word")[0].tokens if token.word))
    signal = {
        (sigma, stream, layer): Setting((layer,), (sigma,), options={"streams": stream})
        for sigma in SIGMAS for stream in streams for layer in range(layer_count)
    }  # fmt: skip
    _, counts = measure("signal", {str(key): one for key, one in signal.items()})
    sigma, stream, _ = max(signal, key=lambda key: counts[str(key)].miou())
    value = {layer: counts[str((sigma, stream, layer))].miou() for layer in range(layer_count)}
    ranked = sorted(value, key=lambda layer: -value[layer])
    sets: dict[str, Setting] = {}
    for softmax in SOFTMAX:
        top = Setting((ranked[0],), (sigma,), options={"streams": stream, "softmax": softmax}, refine="centre+pamr:40")
        for count in range(1, min(5, layer_count + 1)):
            layers = tuple(ranked[:count])
            sets[f"{layers} {softmax}, equal"] = replace(top, layers=layers)
            if count > 1:
                weights = {layer: value[layer] for layer in layers}
                sets[f"{layers} {softmax}, by mIoU"] = replace(top, layers=layers, weights=weights)
    table, _ = measure("layers", sets)
    now = sets[best(table)["method"]]
    single = {
        f"{layer} {head}": replace(now, layers=(layer,), weights=None, heads={layer: (head,)}, refine="centre")
        for layer in now.layers for head in range(head_count)
    }  # fmt: skip
    table, _ = measure("heads", single)
    of_head = {
        tuple(map(int, row["method"].split())): row["miou"] for _, row in table[table["layers"] != ""].iterrows()
    }
    kept = {
        layer: tuple(
            head for head in range(head_count)
            if of_head[layer, head] >= 0.5 * max(of_head[layer, other] for other in range(head_count))
        )
        for layer in now.layers
    }  # fmt: skip
    now = _if_better(measure("heads", {"as is": now, "good heads": replace(now, heads=kept)})[1], now, "as is",
                     {"good heads": replace(now, heads=kept)})  # fmt: skip
    sigma = now.sigmas[0]
    fused = {
        "2 seeds": replace(now, seeds=2),
        "4 seeds": replace(now, seeds=4),
        "3 levels": replace(now, sigmas=tuple(round(sigma + step, 3) for step in (-0.1, 0.0, 0.1) if sigma + step > 0)),
    }
    now = _if_better(measure("fused", {"as is": now, **fused})[1], now, "as is", fused)
    table, _ = measure("refine", {name: replace(now, refine=name) for name in REFINE})
    now = replace(now, refine=best(table)["method"])
    options = {}
    for name, tried in OPTIONS.items():
        plain = {json.dumps(one): one for one in tried}
        rows = [(f"{name} {label} {refine}", entry(replace(now, refine=refine), name, one))
                for label, one in plain.items() for refine in ("none", now.refine)]  # fmt: skip
        table, _ = bench.run(rows, now.seeds)
        log.append(table.assign(step=f"options of {name}"))
        chosen = best(table)["method"].removeprefix(f"{name} ").rpartition(" ")[0]
        options[name] = {**now.method_options(name), **plain[chosen]}
    options["seg4diff"] = now.method_options("seg4diff")
    for of_method in options.values():
        of_method.pop("heads", None)  # they are the selection's
    return now, options, kept


def _if_better(
    counts: Mapping[str, ImageCounts], now: Setting, label: str, others: Mapping[str, Setting]
) -> Setting:  # fmt: skip
    """The other setting with the largest gain whose interval lies above 0, or the one there is."""
    gains = {name: counts[name].gain(counts[label]) for name in others}
    sure = {name: gain for name, gain in gains.items() if gain[1] > 0}
    return others[max(sure, key=lambda name: sure[name][0])] if sure else now


def gains(bench: Bench, chosen: Setting, good: Mapping[int, tuple[int, ...]]) -> pd.DataFrame:
    """What each step is worth on other images: mIoU before and after, gain with its paired interval.

    Grid and pixel steps are added to plain or scaled maps; heads, weights and fused forwards are put in
    or taken out of the chosen setting.
    """
    plain = replace(chosen, seeds=1, sigmas=chosen.sigmas[:1])
    scaled = replace(plain, refine="centre")
    sigma = plain.sigmas[0]
    three = tuple(round(sigma + step, 3) for step in (-0.1, 0.0, 0.1) if sigma + step > 0)
    pairs: list[tuple[str, Setting, Setting]] = [
        ("scale of each map: centre", replace(plain, refine="none"), scaled),
        ("scale of each map: minmax", replace(plain, refine="none"), replace(plain, refine="minmax")),
        ("I2I affinity, before centre", scaled, replace(plain, refine="affinity+centre")),
        ("the same without sink columns", replace(plain, refine="affinity+centre"),
         replace(plain, refine="nosink+centre")),
        ("the same, heads weighted by their second eigenvalue", replace(plain, refine="affinity+centre"),
         replace(plain, refine="walk+centre")),
        ("mean within regions, after centre", scaled, replace(plain, refine="centre+regions")),
        ("colours of the picture: pamr, after centre", scaled, replace(plain, refine="centre+pamr")),
        ("more rounds of pamr: 40", replace(plain, refine="centre+pamr"), replace(plain, refine="centre+pamr:40")),
        ("regions before pamr:40", replace(plain, refine="centre+pamr:40"),
         replace(plain, refine="centre+regions+pamr:40")),
        ("several layers instead of the best one", replace(plain, layers=chosen.layers[:1], weights=None, heads=None),
         replace(plain, heads=None)),
        ("the good heads of each layer instead of all", replace(plain, heads=None), replace(plain, heads=good)),
        ("4 noise seeds averaged", plain, replace(plain, seeds=4)),
        ("3 noise levels averaged", plain, replace(plain, sigmas=three)),
    ]  # fmt: skip
    wanted: dict[str, Setting] = {}
    for _, before, after in pairs:
        wanted |= {repr(one): one for one in (before, after)}
    counts: dict[str, ImageCounts] = {}
    for seeds in sorted({one.seeds for one in wanted.values()}):
        counts |= bench.run([(key, entry(one)) for key, one in wanted.items() if one.seeds == seeds], seeds)[1]
    ceiling = counts[CEILING].score("miou")
    rows = []
    for step, before, after in pairs:
        one, other = counts[repr(before)], counts[repr(after)]
        (gain, low, high, p), reached = other.gain(one), other.score("miou")
        rows.append(
            {"step": step, "before": before.refine, "after": after.refine, "n": len(one),
             "miou_before": one.score("miou"), "miou_after": reached, "gain": gain, "low": low, "high": high,
             "p_holm": p, "share_of_ceiling": reached / ceiling}
        )  # fmt: skip
    return corrected(pd.DataFrame(rows), ["p_holm"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-sd3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="scenes:train", help="images to choose on")
    parser.add_argument("--limit", "-n", type=at_least(1), default=64, help="how many of them")
    parser.add_argument("--report", default="scenes:val", help="images that gains are reported on")
    parser.add_argument("--report-limit", type=at_least(1), default=200, help="how many of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "segmentation_choice")
    options = parser.parse_args()
    model = load(options.model, device=options.device)
    captures = Captures(lambda: model, options.model)
    request = {
        "model": model.name, "weight_hash": model.weight_hash, "split": options.dataset, "n": options.limit,
        "report": options.report, "report_n": options.report_limit,
    }  # fmt: skip
    folder = RunFolder.open(NAME, request)
    log: list[pd.DataFrame] = []
    chosen, of_methods, good = choose(Bench(captures, options.dataset, options.limit), log)
    rows = pd.concat(log, ignore_index=True)
    selection = LayerSelection(
        model.name, model.weight_hash, chosen.layers,
        layer_weights(chosen.layers, chosen.weights), dict(chosen.heads or {}),
        how={"rule": "best mIoU on training images, see analyses/segmentation_choice.py", "split": options.dataset,
             "n": options.limit},
    )  # fmt: skip
    settings = {
        "selection": "selection.json", "sigma": list(chosen.sigmas), "noise_seeds": chosen.seeds,
        "refine": chosen.refine, "options": of_methods, "chosen_on": options.dataset, "n": options.limit,
        "model": model.name, "weight_hash": model.weight_hash,
    }  # fmt: skip
    table = gains(Bench(captures, options.report, options.report_limit), chosen, good)
    options.out.mkdir(parents=True, exist_ok=True)
    for place in (folder.path, options.out):
        selection.save(place / "selection.json")
        (place / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        rows[["step", *KEYS[:-1], "n", "miou", "miou_low", "miou_high"]].to_csv(
            place / "choice.csv", index=False, float_format="%.5g"
        )
        table.to_csv(place / "gains.csv", index=False, float_format="%.5g")
        (place / "gains.md").write_text(_markdown(table, options), encoding="utf-8")
    folder.finish()
    print(json.dumps(settings, indent=2))
    print(table.round(3).to_string(index=False))
    print(folder.path)


def _markdown(table: pd.DataFrame, options: argparse.Namespace) -> str:
    lines = [
        f"# What each refinement is worth: {options.model} on {options.report}, n = {int(table['n'].max())}",
        "",
        f"mIoU (union rule), protocol present, seg4diff in the setting chosen on {options.dataset} (n ="
        f" {options.limit}).",
        f"Gains with 95 % intervals over paired images; p: of no gain, corrected for {len(table)} steps (Holm).",
        "",
        "| step | mIoU before | after | gain | p | of the ceiling |",
        "|-|-|-|-|-|-|",
    ]
    lines += [
        f"| {row.step} | {row.miou_before:.3f} | {row.miou_after:.3f} "
        f"| {row.gain:+.3f} [{row.low:+.3f}, {row.high:+.3f}] | {p_text(row.p_holm)} | {row.share_of_ceiling:.0%} |"
        for row in table.itertuples()
    ]
    return "\n".join(lines) + "\n"


def p_text(p: float) -> str:
    """A p value with three decimals; no p value is 0."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


if __name__ == "__main__":
    run_script(main)
