"""Does a class's map say whether the class is in the picture, or only where its word would go? Why `full` is weak.

    python analyses/presence.py
    python analyses/presence.py -n 20 --out runs/presence/mine

All classes of the data set are named in one prompt; a class's I2T map is reduced to one number per picture (its mean,
its peak over its mean, its spread over its mean). Numbers of classes that are there are compared with those of classes
that are not: the area under the ROC curve (0.5: the map knows nothing of presence), numbers centred per class over the
pictures, 95 % bootstrap interval over pictures. Beside it stand two taggers that read the picture, and the network with
random weights. Settings are those of `analyses/segmentation_choice.py`, where it was run. Writes `presence.{csv,md}`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mmdit_probe import load
from mmdit_probe.data import dataset as read_dataset
from mmdit_probe.evaluate.scores import area_under_curve
from mmdit_probe.evaluate.tagger import open_tagger
from mmdit_probe.segment.capture import capture
from mmdit_probe.segment.methods import find
from mmdit_probe.segment.record import Reading

RESULTS = Path(__file__).parent / "results"
TAGGERS = ("scenes-clip", "scenes-parser")


def area(values: NDArray[np.float64], there: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of values [n, C] for classes that are there [n, C]; ties count half."""
    return float(area_under_curve(values.ravel(), there.ravel()))


def statistics_of(maps: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """One number per class of maps [C, h, w], by name."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    mean = flat.mean(1)
    return {"mean": mean, "peak over mean": flat.max(1) / mean, "spread over mean": flat.std(1) / mean}


def measure(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, NDArray[np.float64]]:
    """Numbers [n, C] by what they are of; key "there": the truth."""
    data = read_dataset(options.dataset, options.n)
    found: dict[str, list[NDArray[np.float64]]] = {}
    for kind, name in (("trained", options.model), ("random weights", f"{options.model}-random")):
        model = load(name, device=options.device)
        method = find("seg4diff").configure(settings["options"])
        for sample in data.samples:
            reading = Reading(layers=settings["layers"], sigmas=tuple(settings["sigma"]))
            record = capture(model, sample.image, data.classes, reading)
            for label, values in statistics_of(method(record).numpy()).items():
                found.setdefault(f"{kind}: map's {label}", []).append(np.log(values))
    for name in TAGGERS:
        tagger = open_tagger(name, data.classes)
        found[f"tagger: {name}"] = [tagger(sample.image) for sample in data.samples]
    there = [np.isin(np.arange(len(data.classes)), np.asarray(sample.label())) for sample in data.samples]
    return {key: np.stack(values) for key, values in found.items()} | {"there": np.stack(there)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-sd3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="scenes:val")
    parser.add_argument("-n", type=int, default=200, help="number of pictures")
    parser.add_argument("--out", type=Path, default=RESULTS / "presence")
    options = parser.parse_args()
    file = RESULTS / "segmentation_choice" / "settings.json"
    chosen = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings: dict[str, Any] = {"layers": None, "sigma": [0.515], "options": {}}
    if chosen.get("model") == options.model:
        selection = json.loads((file.parent / chosen["selection"]).read_text(encoding="utf-8"))
        settings = {"layers": sorted(selection["layers"]), "sigma": chosen["sigma"],
                    "options": chosen["options"]["seg4diff"]}  # fmt: skip
    found = measure(options, settings)
    there = found.pop("there").astype(bool)
    rng = np.random.default_rng(0)
    rows = []
    for key, values in found.items():
        values = values - values.mean(0)
        draws = [area(values[pick], there[pick]) for pick in rng.integers(0, len(there), (500, len(there)))]
        low, high = np.quantile(draws, [0.025, 0.975])
        rows.append({"what": key, "n": len(there), "auc": area(values, there), "low": low, "high": high})
    table = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "presence.csv", index=False, float_format="%.4g")
    lines = [
        f"# Does a map say that its class is there? {options.model} on {options.dataset}, n = {len(there)}", "",
        "Area under the ROC curve over (picture, class), 95 % interval over pictures; 0.5 knows nothing.", "",
        "| number per class | AUC |", "|-|-|",
        *(f"| {row.what} | {row.auc:.3f} [{row.low:.3f}, {row.high:.3f}] |" for row in table.itertuples()),
    ]  # fmt: skip
    (options.out / "presence.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
