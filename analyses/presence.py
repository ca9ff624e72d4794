"""Does a class's map say whether the class is in the picture, or only where its word would go? Why `full` is weak.

    python analyses/presence.py
    python analyses/presence.py --limit 20 --out runs/presence/mine

All classes of the data set are named in one prompt; a class's I2T map is reduced to one number per picture (its mean,
its peak over its mean, its spread over its mean, as logarithms). Numbers of classes that are there are compared with
those of classes that are not: the area under the ROC curve (0.5: the map knows nothing of presence), numbers centred
per class over the pictures, 95 % interval over pictures. Each number of the trained network is tested against that of
the network with random weights, paired by picture. Beside them stand two taggers that read the picture. Settings are
those of `analyses/segmentation_choice.py`, where it was run. Writes `presence.{csv,md}`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mmdit_probe.data import Dataset, Sample, dataset
from mmdit_probe.errors import at_least, run_script
from mmdit_probe.evaluate.scores import area_under_curve
from mmdit_probe.evaluate.tagger import open_tagger
from mmdit_probe.experiments import Experiment, Result
from mmdit_probe.experiments.controls import Variant, variants
from mmdit_probe.experiments.experiment import Study, request_of
from mmdit_probe.experiments.text import bounded, signed
from mmdit_probe.results.selection import load_selection
from mmdit_probe.results.statistics import NONE, Jackknife, corrected, jackknifed, verdicts
from mmdit_probe.segment.capture import capture
from mmdit_probe.segment.methods import find
from mmdit_probe.segment.record import PAPER_SIGMA, Reading

if TYPE_CHECKING:
    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.models.mmdit import MMDiT

RESULTS = Path(__file__).parent / "results"
TAGGERS = ("scenes-clip", "scenes-parser")
NETWORKS = {NONE: "trained", "random": "random weights"}


def area(values: NDArray[np.float64], there: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of values [n, C] for classes that are there [n, C]; ties count half."""
    return float(area_under_curve(values.ravel(), there.ravel()))


def statistics_of(maps: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """One number per class of maps [C, h, w], by name."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    mean = flat.mean(1)
    return {"mean": mean, "peak over mean": flat.max(1) / mean, "spread over mean": flat.std(1) / mean}


@dataclass(frozen=True, kw_only=True)
class Presence(Experiment):
    """A number per picture and class from maps of all classes, of the network and its random twin, and from taggers.

    Attributes:
        dataset, n: the pictures. selection, sigmas, options: where and how seg4diff reads its maps; a selection of
            other weights is refused.
    """

    name: ClassVar[str] = "presence"
    tables: ClassVar[tuple[str, ...]] = ("presence",)

    dataset: str = "scenes:val"
    n: int = 200
    selection: str | None = None
    sigmas: Sequence[float] = (PAPER_SIGMA,)
    options: Mapping[str, Any] = field(default_factory=dict)

    def gather(self, scenes: bool) -> Dataset:
        return dataset(self.dataset, self.n)

    def prepare(self, model: MMDiT, inputs: Dataset) -> Study:
        found = None if self.selection is None else load_selection(self.selection, model)
        reading = Reading(
            layers=None if found is None else found.layers, sigmas=tuple(self.sigmas),
            weights=None if found is None else dict(zip(found.layers, found.weights, strict=True)),
        )  # fmt: skip
        request = request_of(
            model, dataset=self.dataset, content=[sample.fingerprint() for sample in inputs.samples],
            layers=reading.layers, weights=reading.weights, sigmas=self.sigmas, options=self.options,
        )  # fmt: skip
        readers: list[Any] = [*variants(model, ["random"]), *(open_tagger(name, inputs.classes) for name in TAGGERS)]
        names = [*(variant.name for variant in readers[:2]), *TAGGERS]
        tasks = [(*of, item, one) for of in zip(names, readers, strict=True) for item, one in enumerate(inputs.samples)]
        return Study(model, request, tasks, "pictures", state=(inputs, reading))

    def measure(self, study: Study, task: tuple[str, Any, int, Sample], record: TaskRecord) -> None:
        (name, reader, item, sample), (data, reading) = task, study.state
        classes = data.classes
        if isinstance(reader, Variant):
            maps = find("seg4diff").configure(self.options)(capture(reader.model, sample.image, classes, reading))
            found = {
                f"{NETWORKS[name]}: map's {label}": np.log(values)
                for label, values in statistics_of(maps.numpy()).items()
            }
        else:
            found = {f"tagger: {name}": reader(sample.image)}
        there = np.isin(np.arange(len(classes)), np.asarray(sample.label()))
        for what, values in found.items():
            columns = {"class": np.arange(len(classes)), "value": np.asarray(values, np.float64), "there": there}
            record.write("presence", columns, item=item, what=what)

    def summarise(self, result: Result) -> pd.DataFrame:
        """Per number: n (pictures), auc, low, high; and, of the trained network's, over_random, over_random_low,
        over_random_high (minus that of random weights, the same picture left out of both), p_holm (corrected for the
        numbers) and verdict (as `statistics.compare`)."""
        known = {str(of): _centred(part) for of, part in result.table.groupby("what", observed=True, sort=False)}
        rows = []
        for what, (values, there) in known.items():
            row: dict[str, Any] = {"what": what, "n": len(there)}
            row |= _named("", jackknifed(partial(_area_of, values, there), len(there)), 0.0)
            twin = known.get(what.replace(f"{NETWORKS[NONE]}: ", f"{NETWORKS['random']}: "), (values, there))[0]
            if twin is not values:
                over = jackknifed(partial(_area_over, values, twin, there), len(there))
                row |= _named("over_random", over, -1.0) | {"p_holm": over.p}
            rows.append(row)
        table = corrected(pd.DataFrame(rows), ["p_holm"])
        verdict = verdicts(table["p_holm"], table["over_random_low"] > 0)
        return table.assign(verdict=np.where(table["over_random"].isna(), "", verdict))

    def draw(self, result: Result) -> dict[str, Any]:
        return {}


def _centred(part: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Values centred per class [n, C], and whether the class is there [n, C]."""
    values, there = (part.pivot(index="item", columns="class", values=name).to_numpy() for name in ("value", "there"))
    return values - values.mean(0), there.astype(bool)


def _named(name: str, found: Jackknife, lowest: float) -> dict[str, float]:
    """A jackknifed area, or difference of areas, as columns; the interval stays within what there can be."""
    prefix = f"{name}_" if name else ""
    low, high = np.clip([found.low, found.high], lowest, 1.0)
    return {name or "auc": found.value, f"{prefix}low": low, f"{prefix}high": high}


def _area_of(values: NDArray[np.float64], there: NDArray[np.bool_], drawn: NDArray[np.int64]) -> float:
    return area(values[drawn], there[drawn])


def _area_over(
    values: NDArray[np.float64], other: NDArray[np.float64], there: NDArray[np.bool_], drawn: NDArray[np.int64]
) -> float:
    return _area_of(values, there, drawn) - _area_of(other, there, drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-sd3")
    parser.add_argument("--dataset", default="scenes:val")
    parser.add_argument("--limit", "-n", type=at_least(1), default=200, help="number of pictures")
    parser.add_argument("--out", type=Path, default=RESULTS / "presence")
    options = parser.parse_args()
    file = RESULTS / "segmentation_choice" / "settings.json"
    chosen = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings: dict[str, Any] = {}
    if chosen.get("model") == options.model:
        settings = {"selection": str(file.parent / chosen["selection"]), "sigmas": chosen["sigma"],
                    "options": chosen["options"]["seg4diff"]}  # fmt: skip
    experiment = Presence(dataset=options.dataset, n=options.limit, **settings)
    table = experiment.run(options.model, out="auto", resume=True).summary
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "presence.csv", index=False, float_format="%.4g")
    (options.out / "presence.md").write_text(_markdown(table, options), encoding="utf-8")
    print(table.round(3).to_string(index=False))


def _markdown(table: pd.DataFrame, options: argparse.Namespace) -> str:
    tested = int(table["p_holm"].notna().sum())
    lines = [
        f"# Does a map say that its class is there? {options.model} on {options.dataset}, n = {table['n'].max()}", "",
        "Area under the ROC curve over (picture, class), 95 % interval over pictures; 0.5 knows nothing. Over random",
        "weights: minus the same number of the untrained network, paired by picture; p of no difference, corrected for",
        f"{tested} comparisons (Holm).", "",
        "| number per class | AUC | over random weights | p | verdict |", "|-|-|-|-|-|",
    ]  # fmt: skip
    for row in table.itertuples():
        over, p = "", ""
        if row.verdict:
            over = signed(row.over_random, row.over_random_low, row.over_random_high)
            p = "" if np.isnan(row.p_holm) else "<0.001" if row.p_holm < 0.0005 else f"{row.p_holm:.3f}"
        cells = [row.what, bounded(row.auc, row.low, row.high), over, p, row.verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
