"""Evidence per layer: five measurements joined, ranked, and compared with each other.

    long = measure("word_mass", model, "val", Amount(n=16))     # evidence, split, control, item, layer, value
    table = by_layer(long)                                      # value with interval, rank, per evidence and layer
    agreement(long)                                             # rank correlations between evidences
    layers = choose(table, top=1); stability(long)              # and how often each layer wins over resampled items

Higher is always more evidence that a layer grounds words. None of the five is the truth: mass may lie on a sink, norms
differ between layers for other reasons, and the best map is what it is on one data set. Where they disagree the
correlations say so. Not here: the analyses themselves, which are the other experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError, check_known, unknown
from mmdit_probe.experiments import experiment_of
from mmdit_probe.experiments.controls import variants
from mmdit_probe.experiments.experiment import one_per_item
from mmdit_probe.experiments.options import shared, sources_of
from mmdit_probe.experiments.perturb import CONTROL, EDIT
from mmdit_probe.experiments.sweep import EQUAL
from mmdit_probe.experiments.target import knows_scenes
from mmdit_probe.experiments.value_norms import with_gap
from mmdit_probe.models.names import other_parts
from mmdit_probe.results.folder import read_record
from mmdit_probe.results.statistics import NONE, corrected, count_means, defined, interval, measured, rank_agreement
from mmdit_probe.specs import named_of

if TYPE_CHECKING:
    from mmdit_probe.experiments.experiment import Experiment
    from mmdit_probe.models.mmdit import MMDiT

EVIDENCE = {
    "word_mass": "I2T mass on words, in units of what uniform attention gives",
    "value_gap": "value norm, prompt minus image tokens, relative to image tokens",
    "pca_class": "recall of a class probe on the attention output, above that with another scene's classes",
    "perturbation": "pixels read as another class when the layer's I2T is blurred, above a change of equal size",
    "segmentation": "mIoU of the I2T maps of the classes present",
}
"""Name -> what it measures. Higher means more evidence that a layer grounds words."""

CONTROLLED = {
    "word_mass": ("random", "shuffled", "uniform"),
    "value_gap": ("random", "shuffled", "uniform"),
    "pca_class": ("random", "shuffled", "uniform"),
    "perturbation": ("random", "uniform"),
    "segmentation": ("random", "uniform"),
}
"""Controls of `experiments.controls` that make sense for each: where the text asks for the image's own classes, or
nothing reads it, another item's caption does not."""

OF_COMMAND = {
    "attention-budget": "word_mass",
    "value-norms": "value_gap",
    "pca": "pca_class",
    "perturb": "perturbation",
}
"""Command whose run folder holds an evidence -> its name."""

RANK_RULES = ("ranks", "median-ranks")
WEIGHT_RULES = ("equal", "ranks")
COLUMNS = ["evidence", "split", "control", "item", "layer", "value"]


@dataclass(frozen=True)
class Amount:
    """How much to measure: pictures per evidence, noise level, and prompts, steps and guidance of the perturbation."""

    n: int = 16
    sigma: float = 0.515
    prompts: int = 8
    num_steps: int = 28
    guidance: float = 7.5
    seed: int = 0


def evidence_names(asked: str | None, from_runs: bool) -> list[str]:
    """The evidence that an option means: all of it, some by name, or (with run folders given instead) none."""
    if asked is None:
        return [] if from_runs else list(EVIDENCE)
    return list(EVIDENCE) if asked.strip() == "all" else named_of("evidence", asked, EVIDENCE)


def measure(name: str, model: MMDiT, split: str, amount: Amount, controls: Sequence[str] = ()) -> pd.DataFrame:
    """Measure one evidence on one split of the scenes world, and its controls among those asked for.

    Returns: evidence, split, control, item, layer, value.
    """
    chosen = [of for of in controls if of in CONTROLLED[name]]
    if name not in ("segmentation", "perturbation"):
        table, read = TABLES[name]
        result = _asked(name, split, amount, ",".join(chosen) or NONE).run(model, progress=False)
        return read(result.store.table(table)).assign(evidence=name, split=split)[COLUMNS]
    from mmdit_probe.observe.probe import probe

    own = {"segmentation": _segmentation, "perturbation": _perturbation}[name]
    parts = []
    for variant in variants(model, chosen):
        with probe(variant.model, edits=variant.edits):
            parts.append(own(variant.model, split, amount).assign(control=variant.name))
    return pd.concat(parts, ignore_index=True).assign(evidence=name, split=split)[COLUMNS]


def _asked(name: str, split: str, amount: Amount, control: str) -> Experiment:
    """The experiment that an evidence is read from."""
    command = next(command for command, of in OF_COMMAND.items() if of == name)
    options: dict[str, Any] = {"seed": amount.seed, "control": control}
    if name == "perturbation":
        options |= {
            "prompts": f"scenes:{split}", "limit": amount.prompts, "num_steps": amount.num_steps,
            "guidance": amount.guidance, "shown": 0, "clip": "none",
        }  # fmt: skip
    else:
        options |= {"images": f"scenes:{split}", "limit": amount.n, "sigma": amount.sigma}
        options |= {"kinds": "output"} if name == "pca_class" else {"rows": "summary"}
    return experiment_of(command, options)


def word_mass(by_item: pd.DataFrame) -> pd.DataFrame:
    """I2T mass on words of the reduced table of `AttentionBudget`, in units of what uniform attention gives."""
    words = by_item.query("branch != 'uncond' and query == 'image' and key == 'text' and span == 'word'")
    return words.assign(value=words["mass"] / words["uniform"])


def value_gap(by_item: pd.DataFrame) -> pd.DataFrame:
    """Prompt minus image norm of the reduced table of `ValueNorms`, relative because layers differ in scale."""
    wide = with_gap(by_item[by_item["branch"] != "uncond"])
    return wide.assign(value=wide["gap"] / wide["image"])


def pca_class(table: pd.DataFrame) -> pd.DataFrame:
    """Recall of the class probe on the attention output, above that with another scene's classes."""
    rows = table[(table["kind"] == "output") & table["class"].notna()]
    if rows.empty:
        raise UserError("the PCA run has no class scores of the attention output; run pca on scenes with kind output")
    return rows.assign(value=rows["class"] - rows["class_shuffled"])


def _perturbation(model: MMDiT, split: str, amount: Amount) -> pd.DataFrame:
    """Of a variant of the model, beside its own changes of equal size."""
    return perturbation(_asked("perturbation", split, amount, "budget").run(model, progress=False).table)


def perturbation(table: pd.DataFrame) -> pd.DataFrame:
    """What the edit of a layer changes beyond a change of equal size, where that was sampled: beyond the coherent one,
    or the noise if it alone was."""
    name = "relabelled" if "relabelled" in table else "change"
    whole = table[(table["head"] == -1) & (table["span"] == "all") & table["control"].isin([NONE, *EQUAL])]
    equal = next((of for of in EQUAL if (whole["control"] == of).any()), NONE)
    edited, moved = (
        whole[(whole["condition"] == kind) & (whole["control"] == of)].set_index(["item", "layer"])[name]
        for kind, of in ((EDIT, NONE), (CONTROL, equal))
    )
    value = edited if moved.empty else edited - moved
    return value.rename("value").reset_index().assign(control=NONE)


TABLES: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame]]] = {
    "word_mass": ("attention_budget_by_item", word_mass),
    "value_gap": ("value_norms_by_item", value_gap),
    "pca_class": ("pca", pca_class),
    "perturbation": ("perturb", perturbation),
}
"""Evidence -> the table of its experiment, and what reads it there."""


def _segmentation(model: MMDiT, split: str, amount: Amount) -> pd.DataFrame:
    from mmdit_probe.experiments.scenes_quality import held_out, word_map_scores

    parts = []
    for index, item in enumerate(held_out(amount.n, split)):
        table = word_map_scores(model, [item], sigma=amount.sigma, seed=amount.seed + index)
        plain = table[(table["head"] == "mean") & ~table["min_max"]]  # the softmax alone, the paper's choice
        parts.append(plain.assign(item=index, value=plain["miou"]))
    return pd.concat(parts, ignore_index=True)


def record_of(folder: Path | str) -> dict[str, Any]:
    """The record of a run of a command that measures evidence.

    Raises:
        UserError: it is none.
    """
    record = read_record(folder)
    if record is None or record.get("command") not in OF_COMMAND:
        raise UserError(f"{str(folder)!r} is no run folder of {', '.join(OF_COMMAND)}")
    return record


def from_run(folder: Path | str, model: MMDiT, text: Mapping[str, Any], kept: str = "") -> pd.DataFrame:
    """The evidence that a run folder of another command holds, as `measure` gives it; its split is the folder's name.

    Args:
        text: how text is encoded where not in the model's own way, as requests say it: `no_t5`, `max_sequence_length`.
        kept: pictures or prompts that are kept for the report, such as "scenes:test".

    Raises:
        UserError: no run folder, no evidence in it, or one of other weights, of text encoded in another way, or of what
            is kept for the report.
    """
    from mmdit_probe.experiments.result import Result

    record = record_of(folder)
    command, request = str(record["command"]), record["request"]
    others = other_parts(record["model"], {"parts": model.parts})
    if others or request.get("weight_hash") != model.weight_hash:
        what = others or "other weights"
        raise UserError(f"{str(folder)!r} was measured on {what} than those of {model.name}; run {command} on it")
    if kept and shared([kept], sources_of(record.get("options", {}), knows_scenes(record["model"]["id"]))):
        raise UserError(
            f"{str(folder)!r} was measured on {kept}, which is reported on: select on other scenes, or --report others"
        )
    told, asked = ({n: of.get(n) for n in ("no_t5", "max_sequence_length")} for of in (request, text))
    if told != asked:
        raise UserError(
            f"{str(folder)!r} was measured with text encoded in another way ({_said(told)}; here: {_said(asked)});"
            f" run {command} with the options of this command"
        )
    if command == "pca" and request.get("fit") != "joint":
        raise UserError(
            f"{str(folder)!r} has a basis per picture, whose class scores are another measure; run pca joint"
        )
    name = OF_COMMAND[command]
    table, read = TABLES[name]
    result = Result.read(folder)
    frame = measured(read(result.store.table(table)).assign(evidence=name, split=Path(folder).name))
    if frame.empty:
        raise UserError(f"{str(folder)!r} holds no {name}: has any of its prompts a word?")
    return one_per_item(frame[COLUMNS], result.request["items"], [c for c in COLUMNS if c not in ("item", "value")])


def _said(text: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in text.items() if value) or "the model's own way"


def by_layer(long: pd.DataFrame) -> pd.DataFrame:
    """One row per split, evidence and layer: value, low and high (95 % interval over items), n, rank; of the
    measurement itself, without its controls. A layer for which no item has a value has no row.

    Raises:
        UserError: no item has any value.
    """
    rows = []
    for (split, name, layer), part in _known(long).groupby(["split", "evidence", "layer"], sort=False, observed=True):
        found = interval(part["value"], "share" if name == "segmentation" else "mean")
        row = {"split": split, "evidence": name, "layer": layer}
        rows.append(row | found.named("value", "") | {"n": len(defined(part["value"]))})
    if not rows:
        raise UserError("the evidence is undefined for every item: has any of its prompts a word?")
    table = pd.DataFrame(rows)
    table["rank"] = table.groupby(["split", "evidence"])["value"].rank(ascending=False, method="min").astype(int)
    return table


def _known(long: pd.DataFrame) -> pd.DataFrame:
    """The rows of the measurement itself that have a value."""
    return measured(long).dropna(subset=["value"])


def _wide(long: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """(evidence, split) -> values, items by row and layers by column."""
    return {
        (str(key[0]), str(key[1])): part.pivot(index="item", columns="layer", values="value")
        for key, part in _known(long).groupby(["evidence", "split"], sort=False, observed=True)
    }


def _resampled(tables: Sequence[pd.DataFrame], rng: np.random.Generator) -> list[np.ndarray]:
    """Means over resampled items, [L] of each table; tables of the same items draw the same ones."""
    drawn: dict[tuple[Any, ...], np.ndarray] = {}
    means = []
    for table in tables:
        key = tuple(table.index)
        if key not in drawn:
            drawn[key] = rng.integers(0, len(key), len(key))
        counts = np.bincount(drawn[key], minlength=len(key)).astype(float)
        means.append(count_means(counts[None], table.to_numpy())[0])
    return means


def agreement(long: pd.DataFrame, draws: int = 2000) -> pd.DataFrame:
    """Spearman rank correlation over layers of each two (evidence, split), with its 95 % interval over items.

    Two evidences measured on the same items draw the same ones.

    Returns: first, first_split, second, second_split, rho, low, high, p_holm (of such a correlation among unrelated
    orders of so few layers, corrected for the rows of the table), layers.
    """
    values = _wide(long)
    keys = list(values)
    rows = []
    for place, first in enumerate(keys):
        for second in keys[place + 1 :]:
            shared = values[first].columns.intersection(values[second].columns)
            one, two = (values[key][shared].to_numpy() for key in (first, second))
            same = first[1] == second[1] and values[first].index.equals(values[second].index)
            found = rank_agreement(one, two, same_items=same, draws=draws)
            rows.append(
                {"first": first[0], "first_split": first[1], "second": second[0], "second_split": second[1],
                 "rho": found.rho, "low": found.low, "high": found.high, "p_holm": found.p, "layers": found.places}
            )  # fmt: skip
    return corrected(pd.DataFrame(rows), ["p_holm"]) if rows else pd.DataFrame()


def choose(table: pd.DataFrame, top: int = 1, rule: str = "ranks") -> tuple[int, ...]:
    """The best layers, best first.

    Args:
        table: of one split, from `by_layer`. top: how many.
        rule: "ranks" (least mean rank over all evidence), "median-ranks" (least median rank, so that one dissenter does
            not decide; ties go to the least mean rank), or the name of one evidence. What is level then goes by its
            number (`level`).
    """
    order = _order(table, rule)
    if not 1 <= top <= len(order):
        raise UserError(f"--top {top}: expected 1 to {len(order)} layers")
    return tuple(int(layer) for layer in order.index[:top])


def level(table: pd.DataFrame, layers: Sequence[int], rule: str = "ranks") -> tuple[int, ...]:
    """The layers that the rule puts level with the last of those that it chose, which has the lower number alone."""
    order = _order(table, rule)
    same = np.isclose(order, order.loc[layers[-1]]).all(1)
    return tuple(int(layer) for layer in order.index[same.tolist()] if layer not in layers)


def _order(table: pd.DataFrame, rule: str) -> pd.DataFrame:
    """What a rule goes by, by layer, best first."""
    check_known("rule", rule, [*RANK_RULES, *dict.fromkeys(table["evidence"])])
    keys = ["median", "mean"] if rule == "median-ranks" else ["mean"]
    return ranks_of(table, rule).agg(["median", "mean"], axis=1)[keys].sort_values(keys, kind="stable")


def ranks_of(table: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Ranks, layers by row and the evidences of a rule by column, among the layers that all of these have a value of:
    else a layer that only one of them was measured on would be the best of few.

    Raises:
        UserError: there is none.
    """
    part = table if rule in RANK_RULES else table[table["evidence"] == rule]
    values = part.pivot(index="layer", columns="evidence", values="value").dropna()
    if values.empty:
        raise UserError(f"no layer has a value of each of {', '.join(dict.fromkeys(part['evidence']))}: measure them on"
                        " the same layers, or select by one of them (--rule)")  # fmt: skip
    return values.rank(ascending=False, method="min")


def stability(long: pd.DataFrame, top: int = 1, rule: str = "ranks", draws: int = 500) -> pd.DataFrame:
    """How often each layer is among the selected ones when the items are drawn again (bootstrap, paired over the
    evidences measured on the same items). Layers that tie in a draw win it equally often.

    Args:
        long: of one split.

    Returns: layer, share.
    """
    from scipy.stats import rankdata

    values = _wide(long)
    counted = [place for place, key in enumerate(values) if rule in (*RANK_RULES, key[0])]
    if not counted:
        raise unknown("rule", rule, [*RANK_RULES, *dict.fromkeys(key[0] for key in values)])
    layers = sorted({int(layer) for table in values.values() for layer in table.columns})
    # As in `ranks_of`: among the layers that all that count have.
    seen = sorted(set.intersection(*({int(layer) for layer in list(values.values())[k].columns} for k in counted)))
    columns = [table.columns.get_indexer(pd.Index(seen)) for table in values.values()]
    rng, ties = np.random.default_rng(0), np.random.default_rng(1)
    wins = np.zeros(len(layers), int)
    for _ in range(draws):
        means = _resampled(list(values.values()), rng)
        own = rankdata([-means[k][columns[k]] for k in counted], "min", axis=1, nan_policy="omit")
        keys = [np.nanmean(own, 0)] + [np.nanmedian(own, 0)] * (rule == "median-ranks")
        wins[np.searchsorted(layers, seen)[np.lexsort([ties.random(len(seen)), *keys])[:top]]] += 1
    return pd.DataFrame({"layer": layers, "share": wins / draws})


def weights_of(
    table: pd.DataFrame, layers: Sequence[int], rule: str = "equal", chosen_by: str = "ranks"
) -> tuple[float, ...]:
    """Weights of the chosen layers, summing to 1.

    Args:
        table: of one split, from `by_layer`. layers: from `choose`, by the rule `chosen_by`.
        rule: "equal", or "ranks": in proportion to L + 1 minus the mean rank (of what that rule goes by), so that the
            best of L layers has L.
    """
    check_known("rule of the weights", rule, WEIGHT_RULES)
    ranks = ranks_of(table, chosen_by).mean(axis=1)
    raw = [1.0 if rule == "equal" else len(ranks) + 1 - float(ranks[layer]) for layer in layers]
    return tuple(value / sum(raw) for value in raw)


def best_heads(
    model: MMDiT, layers: Sequence[int], count: int, split: str, amount: Amount
) -> dict[int, tuple[int, ...]]:
    """The heads whose I2T maps segment best, per layer, on `amount.n` scenes of a split; best first."""
    from mmdit_probe.experiments.scenes_quality import held_out, word_map_scores

    table = word_map_scores(model, held_out(amount.n, split), sigma=amount.sigma, seed=amount.seed)
    heads = table[(table["head"] != "mean") & ~table["min_max"]]
    return {
        layer: tuple(
            int(head) for head in heads[heads["layer"] == layer].sort_values("miou", ascending=False)["head"][:count]
        )
        for layer in layers
    }
