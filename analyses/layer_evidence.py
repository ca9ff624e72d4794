"""Does the evidence for a layer survive its control? The same measurements on the trained and on the random network.

    python analyses/layer_evidence.py
    python analyses/layer_evidence.py --evidence word_mass,segmentation -n 12 --out runs/layer-evidence/mine

For each kind of evidence: the layer where the trained network shows most of it, its value there, the random network's
value at the same layer, and their difference with a 95 % bootstrap interval over items. A difference whose interval
includes 0 is printed as "as control". Writes `evidence.parquet` and `verdicts.csv` into its run folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from mmdit_probe import load
from mmdit_probe.results import RunFolder, TableWriter, read_table
from mmdit_probe.select import evidence
from mmdit_probe.select.names import EVIDENCE, evidence_names

NAME = "layer-evidence"


def verdicts(table: pd.DataFrame, draws: int = 2000) -> pd.DataFrame:
    """One row per evidence: best layer of the trained network, both values there, difference, interval, verdict.

    Args:
        table: evidence, item, layer, value and model ("trained" or "control").
    """
    rng = np.random.default_rng(0)
    rows = []
    for name, part in table.groupby("evidence", sort=False, observed=True):
        trained, control = (part[part["model"] == kind] for kind in ("trained", "control"))
        layer = trained.groupby("layer")["value"].mean().idxmax()
        one, two = (side.loc[side["layer"] == layer, "value"].to_numpy() for side in (trained, control))
        again = [side[rng.integers(0, len(side), (draws, len(side)))].mean(1) for side in (one, two)]
        low, high = np.quantile(again[0] - again[1], [0.025, 0.975])
        rows.append(
            {"evidence": name, "layer": layer, "n": len(one), "trained": one.mean(), "control": two.mean(),
             "difference": one.mean() - two.mean(), "low": low, "high": high,
             "verdict": "as control" if low <= 0 <= high else "differs from control"}
        )  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-sd3")
    parser.add_argument("--control", default="scenes-sd3-random")
    parser.add_argument("--evidence", default="all", help=", ".join(EVIDENCE))
    parser.add_argument("-n", type=int, default=24, help="scenes per evidence")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of the perturbation")
    parser.add_argument("--split", default="val")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="run folder")
    options = parser.parse_args()
    names = evidence_names(options.evidence, False)
    models = {kind: load(name, device=options.device) for kind, name in
              (("trained", options.model), ("control", options.control))}  # fmt: skip
    request = {
        "models": {kind: [model.name, model.weight_hash] for kind, model in models.items()},
        "evidence": names,
        "n": options.n,
        "prompts": options.prompts,
        "split": options.split,
    }
    folder = RunFolder.open(NAME, request, out=options.out, resume=True)
    plan = evidence.Plan(n=options.n, prompts=options.prompts)
    if not folder.complete:
        tasks = [(name, kind) for name in names for kind in models]
        with TableWriter(folder.path, "evidence") as writer:
            for number, (name, kind) in enumerate(tasks):
                if number not in writer.done:
                    with writer.item(number) as item:
                        item.write(evidence.measure(models[kind], options.split, [name], plan).assign(model=kind))
        folder.finish()
    table = verdicts(read_table(folder.path / "evidence.parquet"))
    table.to_csv(folder.path / "verdicts.csv", index=False, float_format="%.6g")
    print(table.round(3).to_string(index=False))
    print(folder.path)


if __name__ == "__main__":
    main()
