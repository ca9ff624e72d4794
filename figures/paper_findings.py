"""What arXiv:2509.18096 finds in Stable Diffusion 3, and whether this model shows it: `paper_findings.md`.

    python figures/paper_findings.py --model ...

Reads the CSVs that the other scripts wrote to `figures/out/<model>/` and says of every finding what was measured here,
and whether it agrees. Where it does not, what else was measured that bears on it stands below. The paper's layers have
no counterpart in another model; the same question is asked of the layer whose raw I2T maps segment best in it.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from paper_vs_measured import read
from runs import options_of, target

from mmdit_probe.data import paper_table
from mmdit_probe.errors import run_script
from mmdit_probe.experiments.text import bounded, signed
from mmdit_probe.results.statistics import BEYOND

AGREES, DIFFERS, OPEN = "agrees", "differs", "not decided"
BLUR_EXPERT = 9
"""The layer of SD3-medium whose blur costs most in the paper's Fig. 18, whose numbers are only drawn."""


def main() -> None:
    options = options_of(__doc__, run=False, more=False).parse_args()
    path = target(options, options.model, "paper_findings").with_suffix(".md")
    path.write_text(markdown(path.parent, Path(options.model).name), encoding="utf-8")
    print(path)


def markdown(folder: Path, model: str) -> str:
    """The findings as a table, and what else was measured as a list; only that of which there are files."""
    layers = read(folder, "fig08_miou_by_layer")
    if layers.empty:
        return f"# The paper's findings in {model}\n\nNot measured: `fig08_miou_by_layer` is not there.\n"
    raw, centred = alone(layers, "none"), alone(layers, "centre")
    best = int(raw.index[0])
    rows = [
        one_layer(raw), *value_norms(read(folder, "fig04_value_norms"), best),
        *blur(read(folder, "fig18_blur_scores"), best),
    ]  # fmt: skip
    lines = [
        f"# The paper's findings in {model}",
        "",
        "Written by `python figures/paper_findings.py`. [95 % intervals; which layer segments best was seen on the"
        " images that its intervals are of]",
    ]
    lines += ["", "| finding | the paper, SD3-medium | here | |", "|-|-|-|-|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    beside = [*rescaled(centred, best), *written(read(folder, "contribution_budget"), best)]
    return "\n".join([*lines, "", *([f"Beside it, where layer {best} of {model} is concerned:", ""] if beside else []),
                      *(f"* {line}" for line in beside)]) + "\n"  # fmt: skip


def alone(layers: pd.DataFrame, refine: str) -> pd.DataFrame:
    """The mIoU of each layer alone, best first, by layer."""
    found = layers[layers["layers"].notna() & (layers["role"] == "method") & (layers["refine"] == refine)]
    return found.assign(layer=found["layers"].astype(int)).set_index("layer").sort_values("miou", ascending=False)


def one_layer(raw: pd.DataFrame) -> list[str]:
    """Whether the best layer's interval lies above that of the second."""
    paper = paper_table("miou_by_layer").set_index("layer")["miou"].sort_values(ascending=False)
    first, second = raw.iloc[0], raw.iloc[1]
    told = f"layer {first.name}: {bounded(*ends(first, 'miou'))}; layer {second.name}: {bounded(*ends(second, 'miou'))}"
    stands = first["miou_low"] > second["miou_high"]
    return [
        "one layer's raw I2T maps segment best (Fig. 8, mIoU)",
        "; ".join(f"layer {layer}: {value / 100:.3f}" for layer, value in paper.iloc[:2].items()),
        f"n = {first['n']} images: {told}",
        f"{AGREES}, by disjoint intervals" if stands else OPEN,
    ]  # fmt: skip


def value_norms(norms: pd.DataFrame, best: int) -> list[list[str]]:
    """Whether prompt tokens have larger value norms than image tokens in the layer that segments best."""
    if norms.empty:
        return []
    paper = paper_table("value_norm_by_layer").set_index("layer").loc[BLUR_EXPERT]
    here = norms.set_index("layer").loc[best]
    verdict = AGREES if here["prompt_low"] > here["image_high"] else DIFFERS
    if here["prompt_low"] <= here["image_high"] and here["prompt_high"] >= here["image_low"]:
        verdict = OPEN
    larger = [str(row["layer"]) for row in norms.to_dict("records") if row["prompt_low"] > row["image_high"]]
    told = f"layer {best}: {bounded(*ends(here, 'prompt'), 1)} against {bounded(*ends(here, 'image'), 1)}"
    return [[
        "in it, the values of prompt tokens are larger than those of image tokens (Fig. 4)",
        f"layer {BLUR_EXPERT}: {paper['prompt']:.1f} against {paper['image']:.1f}",
        f"n = {here['prompts']:.0f} prompts: {told}; larger in layer {', '.join(larger) or 'none'}", verdict,
    ]]  # fmt: skip


def blur(scores: pd.DataFrame, best: int) -> list[list[str]]:
    """Whether blurring I2T costs alignment most in that layer, of those where it does beyond a change of equal size: by
    intervals that are apart, where there are several."""
    if scores.empty or "facts" not in set(scores["outcome"]):
        return []
    facts = scores[(scores["outcome"] == "facts") & (scores["layer"] >= 0)].set_index("layer")
    beyond = facts[(facts["verdict"] == BEYOND) & (facts["effect"] < 0)].sort_values("effect").index.tolist()
    told = "; ".join(
        f"layer {layer}: {signed(*facts.loc[layer, ['effect', 'low', 'high']])}"
        for layer in dict.fromkeys([best, *beyond])
    )
    most, others = beyond[:1], beyond[1:]
    verdict = OPEN
    if most == [best] and (facts.loc[others, "low"] > facts.loc[best, "high"]).all():
        verdict = AGREES
    elif most and most != [best] and (best not in others or facts.loc[most[0], "high"] < facts.loc[best, "low"]):
        verdict = DIFFERS
    return [[
        "blurring its I2T costs most of what the prompt asked for (Fig. 5, 18)", f"layer {BLUR_EXPERT}, as drawn",
        f"share of facts, n = {int(facts['n'].max())}: {told}; beyond the control in layer "
        f"{', '.join(map(str, sorted(beyond))) or 'none'}", verdict,
    ]]  # fmt: skip


def rescaled(centred: pd.DataFrame, best: int) -> list[str]:
    """Which layer is best once each word's map is rescaled: the scale of a map is not where it looks."""
    if centred.empty:
        return []
    first, second = centred.iloc[0], centred.iloc[1]
    same = "the same" if first.name == best else "another"
    return [f"with each map centred, layer {first.name} segments best, {bounded(*ends(first, 'miou'))} (next: layer"
            f" {second.name}, {bounded(*ends(second, 'miou'))}; n = {first['n']} images): {same}"
            " layer. Raw maps are compared in their scale as well as in their place."]  # fmt: skip


def written(budget: pd.DataFrame, best: int) -> list[str]:
    """Which layer's words write most into image tokens."""
    if budget.empty:
        return []
    words = budget[budget["group"] == "word"].set_index("layer").sort_values("relative", ascending=False)
    first, second, own = words.iloc[0], words.iloc[1], words.loc[best]
    return [
        f"words write most into image tokens at layer {first.name}: norm {bounded(*ends(first, 'relative'), 2)} of"
        f" all that attention writes (next: layer {second.name}, {bounded(*ends(second, 'relative'), 2)}); at layer"
        f" {best}: {bounded(*ends(own, 'relative'), 2)} (contribution budget, n = {first['n']} prompts)"
    ]


def ends(row: pd.Series, name: str) -> tuple[float, float, float]:
    """A value and its interval."""
    return row[name], row[f"{name}_low"], row[f"{name}_high"]


if __name__ == "__main__":
    run_script(main)
