"""Evidence per layer: five measurements joined, ranked, and compared with each other.

    long = measure(model, "val", n=16)                 # evidence, split, item, layer, value
    table = by_layer(long)                             # value with interval, rank, per evidence and layer
    agreement(long)                                    # rank correlations between evidences
    layers = choose(table, top=1)

Higher is always more evidence that a layer grounds words. None of the five is the truth: mass may lie on a sink, norms
differ between layers for other reasons, and the best map is what it is on one data set. Where they disagree the
correlations say so. Not here: the analyses themselves (observe, edit, embedded.validate).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.experiments.evidence_names import EVIDENCE, RANK_RULES, WEIGHT_RULES
from mmdit_probe.results.statistics import NONE, interval, measured

if TYPE_CHECKING:
    import pandas as pd

    from mmdit_probe.experiments.budget_items import Budget
    from mmdit_probe.experiments.controls import Variant
    from mmdit_probe.models.mmdit import MMDiT

COMMANDS = {
    "attention-budget": ("word_mass",),
    "value-norms": ("value_gap",),
    "pca": ("pca_class",),
    "perturb": ("perturbation",),
}
"""Command whose run folder holds an evidence -> its name."""


COLUMNS = ["evidence", "split", "control", "item", "layer", "value"]


@dataclass(frozen=True)
class Plan:
    """What to measure: pictures per evidence, noise level, and prompts, steps and guidance of the perturbation."""

    n: int = 16
    sigma: float = 0.515
    prompts: int = 8
    num_steps: int = 28
    guidance: float = 7.5
    seed: int = 0


def measure(
    model: MMDiT, split: str, names: Sequence[str] = tuple(EVIDENCE), plan: Plan | None = None,
    advance: Callable[[], None] = lambda: None, control: str = NONE,
) -> pd.DataFrame:  # fmt: skip
    """Measure evidence on one split of the scenes world.

    Args:
        model: an MM-DiT that knows the world's words. split: train, val or test.
        names: which evidence. plan: how much of it. advance: called after each.
        control: measure it under this control of `experiments.controls` instead (see `names.CONTROLLED`).

    Returns: evidence, split, control, item, layer, value.
    """
    import pandas as pd

    from mmdit_probe.experiments.controls import Variant

    how, variant = plan or Plan(), Variant(control, model)
    measures = {
        "word_mass": _word_mass,
        "value_gap": _value_gap,
        "pca_class": _pca_class,
        "perturbation": _perturbation,
        "segmentation": _segmentation,
    }
    parts = []
    for name in names:
        if name not in EVIDENCE:
            raise unknown("evidence", name, EVIDENCE)
        parts.append(measures[name](variant, split, how).assign(evidence=name, split=split, control=control))
        advance()
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def from_run(folder: Path | str, model: MMDiT, text: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """The evidence that a run folder of another command holds, as `measure` gives it; its split is the folder's name.

    Args:
        text: how text is encoded where not in the model's own way, as requests say it: `no_t5`, `max_sequence_length`.

    Raises:
        UserError: no run folder, no evidence in it, or one of other weights or of text encoded in another way.
    """
    from mmdit_probe.results.folder import read_record

    path = Path(folder)
    record = read_record(path)
    command = "" if record is None else str(record.get("command"))
    if record is None or command not in COMMANDS:
        raise UserError(f"{str(folder)!r} is no run folder of {', '.join(COMMANDS)}")
    if record["request"].get("weight_hash") != model.weight_hash:
        raise UserError(
            f"{str(folder)!r} was measured on other weights than those of {model.name}; run {command} on it"
        )
    told, asked = ({n: of.get(n) for n in ("no_t5", "max_sequence_length")} for of in (record["request"], text or {}))
    if told != asked:
        raise UserError(
            f"{str(folder)!r} was measured with text encoded in another way ({_said(told)}; here: {_said(asked)});"
            f" run {command} with the options of this command"
        )
    if command == "pca" and record["request"].get("fit") != "joint":
        raise UserError(
            f"{str(folder)!r} has a basis per picture, whose class scores are another measure; run pca joint"
        )
    readers = {
        "attention-budget": _read_masses,
        "value-norms": _read_norms,
        "pca": _read_pca,
        "perturb": _read_perturb,
    }
    frame = readers[command](path).assign(evidence=COMMANDS[command][0], split=path.name, control=NONE)
    return frame[COLUMNS]


def _said(text: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in text.items() if value) or "the model's own way"


def by_layer(long: pd.DataFrame) -> pd.DataFrame:
    """One row per split, evidence and layer: value, low and high (95 % bootstrap interval over items), n, rank; of the
    measurement itself, without its controls."""
    import pandas as pd

    rows = []
    for (split, name, layer), part in measured(long).groupby(["split", "evidence", "layer"], sort=False, observed=True):
        value, low, high = interval(part["value"])
        rows.append(
            {"split": split, "evidence": name, "layer": layer, "value": value, "low": low, "high": high, "n": len(part)}
        )
    table = pd.DataFrame(rows)
    table["rank"] = table.groupby(["split", "evidence"])["value"].rank(ascending=False, method="min").astype(int)
    return table


def agreement(long: pd.DataFrame, draws: int = 500) -> pd.DataFrame:
    """Spearman rank correlation over layers of each two (evidence, split), with a 95 % bootstrap interval over items.

    Returns: first, first_split, second, second_split, rho, low, high, layers.
    """
    import pandas as pd

    values = {
        key: part.pivot(index="item", columns="layer", values="value")
        for key, part in measured(long).groupby(["evidence", "split"], sort=False, observed=True)
    }
    rng = np.random.default_rng(0)
    keys = list(values)
    rows = []
    for place, first in enumerate(keys):
        for second in keys[place + 1 :]:
            shared = values[first].columns.intersection(values[second].columns)
            one, two = (values[key][shared].to_numpy() for key in (first, second))
            rho = _spearman(one.mean(0), two.mean(0))
            again = [_spearman(*(x[rng.integers(0, len(x), len(x))].mean(0) for x in (one, two))) for _ in range(draws)]
            rows.append(
                {"first": first[0], "first_split": first[1], "second": second[0], "second_split": second[1], "rho": rho,
                 "low": float(np.nanquantile(again, 0.025)), "high": float(np.nanquantile(again, 0.975)),
                 "layers": len(shared)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def choose(table: pd.DataFrame, top: int = 1, rule: str = "ranks") -> tuple[int, ...]:
    """The best layers, best first.

    Args:
        table: of one split, from `by_layer`. top: how many.
        rule: "ranks" (least mean rank over all evidence), "median-ranks" (least median rank, so that one dissenter does
            not decide; ties go to the least mean rank), or the name of one evidence.
    """
    if rule not in {*RANK_RULES, *table["evidence"]}:
        raise unknown("rule", rule, [*RANK_RULES, *dict.fromkeys(table["evidence"])])
    part = table if rule in RANK_RULES else table[table["evidence"] == rule]
    keys = ["median", "mean"] if rule == "median-ranks" else ["mean"]
    order = part.groupby("layer")["rank"].agg(["median", "mean"]).sort_values(keys, kind="stable")
    if not 1 <= top <= len(order):
        raise UserError(f"--top {top}: expected 1 to {len(order)} layers")
    return tuple(int(layer) for layer in order.index[:top])


def weights_of(table: pd.DataFrame, layers: Sequence[int], rule: str = "equal") -> tuple[float, ...]:
    """Weights of the chosen layers, summing to 1.

    Args:
        table: of one split, from `by_layer`. layers: from `choose`.
        rule: "equal", or "ranks": in proportion to L + 1 minus the mean rank, so that the best of L layers has L.
    """
    if rule not in WEIGHT_RULES:
        raise unknown("rule of the weights", rule, WEIGHT_RULES)
    ranks = table.groupby("layer")["rank"].mean()
    raw = [1.0 if rule == "equal" else len(ranks) + 1 - float(ranks[layer]) for layer in layers]
    return tuple(value / sum(raw) for value in raw)


def best_heads(model: MMDiT, layers: Sequence[int], count: int, split: str, plan: Plan) -> dict[int, tuple[int, ...]]:
    """The heads whose I2T maps segment best, per layer, on `plan.n` scenes of a split; best first."""
    from mmdit_probe.experiments.scenes_quality import held_out, map_quality

    table = map_quality(model, held_out(plan.n, split), sigma=plan.sigma, seed=plan.seed)
    heads = table[(table["head"] != "mean") & ~table["min_max"]]
    return {
        layer: tuple(
            int(head) for head in heads[heads["layer"] == layer].sort_values("miou", ascending=False)["head"][:count]
        )
        for layer in layers
    }


def _spearman(first: Any, second: Any) -> float:
    from scipy.stats import rankdata

    one, two = rankdata(first), rankdata(second)
    if one.std() == 0 or two.std() == 0:
        return float("nan")
    return float(np.corrcoef(one, two)[0, 1])


def _pictures(split: str, plan: Plan) -> Any:
    from mmdit_probe.data.images import resolve

    return resolve(f"scenes:{split}", plan.n)


def _captured(kind: type[Budget], variant: Variant, split: str, plan: Plan) -> pd.DataFrame:
    """Rows of one measurement on pictures, under a control."""
    from mmdit_probe.results.tables import MemorySink

    memory = MemorySink()
    pictures = _pictures(split, plan)
    budget = kind.of_pictures(variant.stock, pictures, sigma=plan.sigma, seed=plan.seed).under(variant)
    for item in budget.items:
        budget.measure(item, memory)
    return memory.table()


def _word_mass(variant: Variant, split: str, plan: Plan) -> pd.DataFrame:
    from mmdit_probe.experiments.budget_items import Budget

    return _masses(_captured(Budget, variant, split, plan))


def _masses(table: pd.DataFrame) -> pd.DataFrame:
    words = table[
        (table["branch"] != "uncond")
        & (table["query"] == "image")
        & (table["key"] == "text")
        & (table["span"] == "word")
    ]
    # Streams add up within a call and head; then means over heads and steps. In units of what uniform attention gives.
    calls = words.groupby(["item", "layer", "step", "head"], observed=True)[["mass", "uniform"]].sum()
    means = calls.groupby(["item", "layer"]).mean().reset_index()
    return means.assign(value=means["mass"] / means["uniform"])


def _value_gap(variant: Variant, split: str, plan: Plan) -> pd.DataFrame:
    from mmdit_probe.experiments.budget_items import NormMeasurement

    return _norms(_captured(NormMeasurement, variant, split, plan))


def _norms(table: pd.DataFrame) -> pd.DataFrame:
    from mmdit_probe.experiments.norm_summary import by_item

    wide = by_item(table)
    # Relative, because layers differ in scale.
    return wide.assign(value=wide["gap"] / wide["image"])


def _pca_class(variant: Variant, split: str, plan: Plan) -> pd.DataFrame:
    from mmdit_probe.experiments.pca_items import pca_of_pictures

    pictures = _pictures(split, plan)
    captions = variant.texts([picture.prompt for picture in pictures])
    result = pca_of_pictures(
        variant.model, pictures, captions, kinds=("output",), sigma=plan.sigma, seed=plan.seed, edits=variant.edits
    )
    return _pca(result.table)


def _pca(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[(table["kind"] == "output") & table["class"].notna()]
    if rows.empty:
        raise UserError("the PCA run has no class scores of the attention output; run pca on scenes with kind output")
    return rows.assign(value=rows["class"] - rows["class_shuffled"])


def _perturbation(variant: Variant, split: str, plan: Plan) -> pd.DataFrame:
    from mmdit_probe.edit import Blur
    from mmdit_probe.experiments.outcomes import Parser
    from mmdit_probe.experiments.perturb import Sampling, perturb
    from mmdit_probe.scenes import captions

    sampling = Sampling(plan.num_steps, plan.guidance, plan.seed)
    prompts, blur = captions(split, plan.prompts), Blur("image", "text")
    table = perturb(variant.stock, prompts, blur, sampling=sampling, outcomes=[Parser()], variant=variant)
    return _perturbed(table.drop(columns="control"))


def _perturbed(table: pd.DataFrame) -> pd.DataFrame:
    from mmdit_probe.experiments.perturb import CONTROL, EDIT, own

    table = own(table)
    name = "relabelled" if "relabelled" in table else "change"
    whole = table[(table["head"] == -1) & (table["span"] == "all")]
    sides = [whole[whole["condition"] == kind].set_index(["item", "layer"])[name] for kind in (EDIT, CONTROL)]
    value = sides[0] - sides[1].reindex(sides[0].index).fillna(0.0)
    return value.rename("value").reset_index()


def _segmentation(variant: Variant, split: str, plan: Plan) -> pd.DataFrame:
    import pandas as pd

    from mmdit_probe.experiments.scenes_quality import held_out, map_quality
    from mmdit_probe.observe.probe import probe

    parts = []
    with probe(variant.model, edits=variant.edits):
        for index, item in enumerate(held_out(plan.n, split)):
            table = map_quality(variant.model, [item], sigma=plan.sigma, seed=plan.seed + index)
            plain = table[(table["head"] == "mean") & ~table["min_max"]]  # the softmax alone, the paper's choice
            parts.append(plain.assign(item=index, value=plain["miou"]))
    return pd.concat(parts, ignore_index=True)


def _read_masses(path: Path) -> pd.DataFrame:
    import pandas as pd

    from mmdit_probe.results import read_items

    columns = ["item", "control", "branch", "step", "layer", "head", "query", "key", "span", "mass", "uniform"]
    parts = [_masses(measured(part)) for part in read_items(path / "attention_budget.parquet", columns)]
    return pd.concat(parts, ignore_index=True)


def _read_norms(path: Path) -> pd.DataFrame:
    from mmdit_probe.results import read_table

    return _norms(read_table(path / "value_norms.parquet"))


def _read_pca(path: Path) -> pd.DataFrame:
    from mmdit_probe.results import read_table

    return _pca(measured(read_table(path / "pca.parquet")))


def _read_perturb(path: Path) -> pd.DataFrame:
    from mmdit_probe.results import read_table

    return _perturbed(read_table(path / "perturb.parquet"))
