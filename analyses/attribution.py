"""Where do attention maps and causal attribution agree? Per layer, for two targets, two methods and a random network.

    python analyses/attribution.py                # a few minutes on one core
    python analyses/attribution.py --limit 8

For (word, region) pairs of held-out scenes: the I2T map of the word in the region, and what the word causes there,
found by feature ablation and integrated gradients (captum). Targets: the region's denoising loss, and the mass of the
word's own map in the region. Written to `analyses/results/attribution`: rank correlation per layer with its interval
over scenes beside that of the scene's next word (`agreement.csv`), paired differences to the same network with random
weights (`controls.csv`), `summary.md` and the figures. Unfinished runs go on where they stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from mmdit_probe import load
from mmdit_probe.errors import at_least, run_script
from mmdit_probe.experiments import Attribute
from mmdit_probe.plots import save

OUT = Path(__file__).parent / "results" / "attribution"
SETTINGS = (("loss", "ablation", "random"), ("loss", "gradients", "none"), ("mass", "ablation", "random"))
"""Target, method, control. Integrated gradients of every map in every layer cost far more and are left to the command:
`mmdit-probe attribute --target mass --method gradients --layers 4 --limit 8`."""


def markdown(table: pd.DataFrame, controls: pd.DataFrame, options: argparse.Namespace) -> str:
    """The tables for people."""
    lines = [
        "# Attention maps and causal attribution",
        "",
        f"Written by `python analyses/attribution.py`. Model {options.model}, scenes of `{options.split}`, sigma"
        f" {options.sigma}. Spearman correlation over (word, region) pairs, 95 % interval over scenes;",
        "control: the attention of the scene's next word. Last column: the rank correlation within scenes, minus that",
        "of the same network with random weights, paired (not measured for gradients). Verdicts are corrected for the",
        "layers of a target and method (Holm).",
        "",
        "| target | method | layer | n | rank correlation | next word | verdict | minus random network |",
        "|-|-|-|-|-|-|-|-|",
    ]
    known = controls.set_index(["target", "method", "layer"])
    for row in table.to_dict("records"):
        key = (row["target"], row["method"], row["layer"])
        against = ""
        if key in known.index:
            one = known.loc[key]
            against = f"{one['difference']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}] {one['verdict']}"
        lines.append(
            f"| {' | '.join(map(str, key))} | {row['n']} | {row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] |"
            f" {row['control']:+.2f} [{row['control_low']:+.2f}, {row['control_high']:+.2f}] | {row['verdict']} |"
            f" {against} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-sd3")
    parser.add_argument("--limit", "-n", type=at_least(1), default=32, help="scenes; those of one class are left out")
    parser.add_argument("--split", default="test")
    parser.add_argument("--sigma", type=float, default=0.7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    options = parser.parse_args()
    model = load(options.model, device=options.device)
    tables, controls = [], []
    options.out.mkdir(parents=True, exist_ok=True)
    for target, method, control in SETTINGS:
        experiment = Attribute(
            limit=options.limit, split=options.split, sigma=options.sigma, target=target, method=method, control=control
        )  # type: ignore[arg-type]
        result = experiment.run(model, out="auto", resume=True)
        tables.append(result.summary.assign(target=target, method=method))
        controls.append(result.claims.assign(target=target, method=method))
        save(result.figure(), options.out / f"{target}_{method}")
    table, against = pd.concat(tables, ignore_index=True), pd.concat(controls, ignore_index=True)
    table.to_csv(options.out / "agreement.csv", index=False, float_format="%.5g")
    against.to_csv(options.out / "controls.csv", index=False, float_format="%.5g")
    text = markdown(table, against, options)
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    print(options.out)


if __name__ == "__main__":
    run_script(main)
