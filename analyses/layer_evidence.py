"""Which layer grounds words? Five kinds of evidence per layer, their controls, and whether they agree.

    python analyses/layer_evidence.py                       # about ten minutes on one core
    python analyses/layer_evidence.py --limit 8 --perturb-limit 4 # a quick look

A layer is selected on one split (least mean rank, a rule set before any result; of layers that are level the lowest,
and the summary says so); the evidence is then measured again on another split, with the controls of
`experiments.controls`, so that nothing reported was used to select. Printed and written to
`analyses/results/layer_evidence`: evidence per item, and per layer with interval and rank (CSV), how often each layer
would be selected if the items were drawn again, paired differences to each control
(a layer whose control shows the same is "not above its control"), rank correlations between evidences and between
splits with intervals, `summary.md`, and the figure. Unfinished runs go on where they stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from mmdit_probe import load
from mmdit_probe.errors import at_least, run_script
from mmdit_probe.experiments import SelectLayers, evidence
from mmdit_probe.experiments.evidence import EVIDENCE, RANK_RULES
from mmdit_probe.experiments.text import signed
from mmdit_probe.plots import save
from mmdit_probe.plots.layers import evidence as figure
from mmdit_probe.results.statistics import ABOVE, NONE, compare

OUT = Path(__file__).parent / "results" / "layer_evidence"


def verdicts(long: pd.DataFrame, layers: tuple[int, ...]) -> pd.DataFrame:
    """The selected layers' evidence beside its controls, and where each evidence is highest.

    Args:
        long: evidence, control, item, layer, value of one split. layers: selected ones.

    Returns: evidence, layer, best_layer (of that evidence), control, n, value, control_value, difference, low, high,
    verdict, and compared: for how many comparisons, of all layers, that is corrected.
    """
    table = compare(long, ["evidence", "layer"])
    own = long[long["control"] == NONE].groupby(["evidence", "layer"], observed=True)["value"].mean()
    best = {name: int(part.idxmax()[1]) for name, part in own.groupby("evidence", observed=True)}
    chosen = table[table["layer"].isin(layers)]
    chosen.insert(2, "best_layer", [best[str(name)] for name in chosen["evidence"]])
    return chosen.assign(compared=int(table["p_holm"].notna().sum())).reset_index(drop=True)


def markdown(
    by_layer: pd.DataFrame, against: pd.DataFrame, agreement: pd.DataFrame, stable: pd.DataFrame,
    layers: tuple[int, ...], options: argparse.Namespace,
) -> str:  # fmt: skip
    """The tables for people."""
    select, report = options.split, options.report
    ranks = {split: part.groupby("layer")["rank"].mean() for split, part in by_layer.groupby("split")}
    level = evidence.level(by_layer[by_layer["split"] == select], layers, options.rule)
    tied = f" (level with layer {', '.join(map(str, level))}: the lower number is taken)" if level else ""
    lines = [
        "# Evidence per layer",
        "",
        f"Written by `python analyses/layer_evidence.py`. Model {options.model}, {options.limit} scenes and"
        f" {options.perturb_limit} prompts ({options.num_steps} steps) per split. Selected on"
        f" `{select}` by {options.rule}: layer {', '.join(map(str, layers))}{tied}. Every number below is from"
        f" `{report}`, except where splits are named.",
        f"Mean rank of the selected layers on `{report}`: "
        + ", ".join(f"layer {layer}: {ranks[report][layer]:.1f} of {len(ranks[report])}" for layer in layers)
        + f"; least there: layer {ranks[report].idxmin()} ({ranks[report].min():.1f}).",
        stability_line(stable, select),
        "",
        "Value [95 % interval over items] (rank); " + "; ".join(f"{k}: {v}" for k, v in EVIDENCE.items()) + ".",
        "",
    ]
    part = by_layer[by_layer["split"] == report]
    names = list(dict.fromkeys(part["evidence"]))
    lines += [f"| layer | {' | '.join(names)} | mean rank |", f"|{'-|' * (len(names) + 2)}"]
    rows = part.set_index(["layer", "evidence"])
    for layer in sorted(set(part["layer"])):
        cells = [rows.loc[(layer, name)] for name in names]
        told = [f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}] ({int(c['rank'])})" for c in cells]
        lines.append(f"| {layer} | {' | '.join(told)} | {ranks[report][layer]:.1f} |")
    lines += ["", "## The selected layers beside their controls", ""]
    count = against["compared"].max()
    lines += [f"Paired by item; verdicts are corrected for {count} comparisons, those of all layers (Holm).", ""]
    lines += ["| evidence | layer | its best layer | control | n | value | control's | difference [95 %] | verdict |",
              "|-|-|-|-|-|-|-|-|-|"]  # fmt: skip
    for row in against.to_dict("records"):
        difference = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        lines.append(
            f"| {row['evidence']} | {row['layer']} | {row['best_layer']} | {row['control']} | {row['n']} |"
            f" {row['value']:.3f} | {row['control_value']:.3f} | {difference} | {row['verdict']} |"
        )
    failed = int((against["verdict"] != ABOVE).sum())
    lines += ["", f"{failed} of {len(against)} comparisons are not above their control."]
    lines += [
        "",
        "## Agreement",
        "",
        "Spearman correlation over layers, 95 % interval over items; p: of such a correlation among unrelated orders,"
        f" corrected for {len(agreement)} comparisons (Holm).",
        "",
    ]
    lines += ["| first | second | rank correlation | p |", "|-|-|-|-|"]
    for row in agreement.to_dict("records"):
        same = row["first"] == row["second"]
        if same or row["first_split"] == row["second_split"] == report:
            first, second = (f"{row[k]} ({row[f'{k}_split']})" if same else row[k] for k in ("first", "second"))
            rho = signed(row["rho"], row["low"], row["high"], 2)
            p = "<0.01" if row["p_holm"] < 0.005 else f"{row['p_holm']:.2f}"
            lines.append(f"| {first} | {second} | {rho} | {p} |")
    return "\n".join(lines) + "\n"


def stability_line(stable: pd.DataFrame, select: str) -> str:
    """How often each layer is selected over resampled items, most often first."""
    shares = [f"layer {row['layer']}: {row['share']:.1%}" for row in stable.to_dict("records") if row["share"]]
    return f"Stability: if the items of `{select}` are drawn again (bootstrap), selected are {', '.join(shares)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-sd3")
    parser.add_argument("--evidence", default="all", help=", ".join(EVIDENCE))
    parser.add_argument("--limit", "-n", type=at_least(1), default=32, help="scenes per evidence and split")
    parser.add_argument("--perturb-limit", type=at_least(1), default=8, help="prompts of the perturbation")
    parser.add_argument("--num-steps", type=at_least(1), default=14, help="sampling steps of the perturbation")
    parser.add_argument("--split", default="val", help="split to select on")
    parser.add_argument("--report", default="test", help="split to report on")
    parser.add_argument("--rule", default="ranks", choices=[*RANK_RULES, *EVIDENCE])
    parser.add_argument("--top", type=at_least(1), default=1, help="layers to select")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    options = parser.parse_args()
    # Controls belong to the split that an experiment selects on; here they are of the split that is reported.
    experiment = SelectLayers(
        evidence=options.evidence, limit=options.limit, perturb_limit=options.perturb_limit,
        num_steps=options.num_steps, split=options.report, report=options.split, top=options.top,
        control="random,shuffled,uniform",
    )  # fmt: skip
    model = load(options.model, device=options.device)
    result = experiment.run(model, out="auto", resume=True)
    long, by_layer = result.table, result.summary
    agreement = evidence.agreement(long)
    layers = evidence.choose(by_layer[by_layer["split"] == options.split], options.top, options.rule)
    stable = evidence.stability(long[long["split"] == options.split], options.top, options.rule)
    stable = stable.sort_values("share", ascending=False, kind="stable")
    reported = long[long["split"] == options.report]
    against = verdicts(reported, layers)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, table in (("by_layer", by_layer), ("controls", compare(reported, ["evidence", "layer"])),
                        ("agreement", agreement), ("stability", stable), ("by_item", long)):  # fmt: skip
        table.to_csv(options.out / f"{name}.csv", index=False, float_format="%.5g")
    text = markdown(by_layer, against, agreement, stable, layers, options)
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    here = agreement[(agreement["first_split"] == options.report) & (agreement["second_split"] == options.report)]
    level = evidence.level(by_layer[by_layer["split"] == options.split], layers, options.rule)
    tied = f" (level with {', '.join(map(str, level))})" if level else ""
    chosen = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}{tied} selected on {options.split}"
    title = f"{model.name}: {chosen}; evidence on {options.report}"
    save(figure(by_layer[by_layer["split"] == options.report], here, layers, title=title), options.out / "evidence")
    print(text)
    print(options.out)


if __name__ == "__main__":
    run_script(main)
