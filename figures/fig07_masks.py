"""Fig. 7 and 34 to 39 of arXiv:2509.18096, re-made: label maps of pictures, with class names and without.

    python figures/fig07_masks.py
    python figures/fig07_masks.py --model ... --dataset voc20:VOCdevkit/VOC2012

Writes `fig07_masks_open` (the classes of each picture are named) and `fig37_masks_unsupervised` (nothing is named; a
segment has the colour of the class it is matched to, or grey) under `figures/out/<model>/`, with a CSV of the share of
pixels that are right. Other data sets than scenes:val have their name in the file's name: coco-object is Fig. 34,
pc59 35, ade20k 36; without names coco-stuff-27 is 37, voc20 38, ade20k 39.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from runs import CHOICE, chosen, options_of, target, write

from mmdit_probe.data import Dataset, dataset
from mmdit_probe.evaluate.scores import assign, histogram
from mmdit_probe.plots.segmentation import mask_sheet
from mmdit_probe.results import RunFolder
from mmdit_probe.results.folder import read_record

COMMAND = "masks"
OPEN = ("iseg", "tokenrank", "diffsegmenter")
BLIND = ("seg4diff-unsup", "diffseg", "diffcut")
REFINE, PIXELS = "centre+pamr", "pamr"
"""Refinement where none was chosen for the model, and that of segments, which have no scale to centre."""
UNKNOWN = 255


def main() -> None:
    parser = options_of(__doc__, "masks, the folder that this script makes")
    parser.add_argument("--dataset", default="scenes:val")
    parser.add_argument("--limit", type=int, default=6, help="number of pictures")
    options = parser.parse_args()
    data = dataset(options.dataset, options.limit)
    folder = Path(options.run) if options.run else measured(options, data)
    request = (read_record(folder) or {})["request"]
    model = Path(request["model"]).name
    suffix = "" if options.dataset == "scenes:val" else "_" + options.dataset.split(":")[0]
    pictures = [sample.image for sample in data.samples]
    truths = [sample.label() for sample in data.samples]
    names = [one.name for one in data.classes]
    with np.load(folder / "labels.npz") as stored:
        for stem, kind in (("fig07_masks_open", "open"), ("fig37_masks_unsupervised", "blind")):
            found: dict[str, list[np.ndarray]] = {}
            for method, refine in request[kind]:
                maps = [
                    unpack(one, truth) for one, truth in zip(stored[f"{kind}/{method}/{refine}"], truths, strict=True)
                ]
                if kind == "blind":
                    maps = [matched(one, truth, len(names)) for one, truth in zip(maps, truths, strict=True)]
                found[method if refine == "none" else f"{method} + {refine}"] = maps
            what = "classes named" if kind == "open" else "nothing named, segments matched to classes"
            figure = mask_sheet(pictures, truths, found, names, title=f"{model} on {options.dataset}: {what}")
            write(figure, target(options, model, stem + suffix), scores(data, truths, found))


def measured(options: argparse.Namespace, data: Dataset) -> Path:
    """The run folder of this request, with the label maps of every method: measured unless it is there."""
    from mmdit_probe.cli.session import open_model
    from mmdit_probe.results.selection import load_selection
    from mmdit_probe.segment.record import Reading
    from mmdit_probe.segment.run import discover, segment

    model = open_model(options.model, debug=False, device=options.device)
    setting = chosen(options.model)
    how: dict[str, Any] = {}
    if setting:
        selection = load_selection(CHOICE / setting["selection"], model)
        how = {
            "layers": list(selection.layers), "weights": dict(zip(selection.layers, selection.weights, strict=True)),
            "sigmas": setting["sigma"], "seeds": list(range(setting["noise_seeds"])),
        }  # fmt: skip
    best = setting.get("refine", REFINE)
    named = [("seg4diff", "none"), ("seg4diff", best), *((method, best) for method in OPEN)]
    unnamed = [(BLIND[0], "none"), *((method, PIXELS) for method in BLIND)]
    settings, reading = setting.get("options", {}), Reading(**how)
    request = {
        "model": model.name, "weight_hash": model.weight_hash, "dataset": options.dataset,
        "pictures": len(data.samples), "open": named, "blind": unnamed, "options": settings, **how,
    }  # fmt: skip
    folder = RunFolder.open(COMMAND, request, resume=not options.fresh)
    if folder.complete:
        return folder.path
    stored: dict[str, Any] = {}
    for method, refine in named:
        maps = []
        for sample in data.samples:
            present = sorted(set(np.unique(sample.label())) & set(range(len(data.classes))))
            classes = [data.classes[index] for index in present]
            result = segment(
                model, sample.image, classes, reading, method=method, options=settings.get(method), refine=refine
            )
            maps.append(np.array(present)[result.labels])
        stored[f"open/{method}/{refine}"] = pack(maps)
    for method, refine in unnamed:
        maps = [
            discover(model, sample.image, reading, method=method, options=settings.get(method), refine=refine).labels
            for sample in data.samples
        ]
        stored[f"blind/{method}/{refine}"] = pack(maps)
    np.savez_compressed(folder.path / "labels.npz", **stored)
    folder.finish(device=str(model.device))
    return folder.path


def scores(data: Dataset, truths: list[np.ndarray], found: dict[str, list[np.ndarray]]) -> pd.DataFrame:
    """Share of the labelled pixels that are right, by picture and method."""
    rows = [
        {"picture": sample.name, "method": name, "right": float((one == truth)[truth < UNKNOWN].mean())}
        for name, maps in found.items() for sample, one, truth in zip(data.samples, maps, truths, strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def pack(maps: list[np.ndarray]) -> np.ndarray:
    """Label maps of different sizes as one array [n, H, W], filled up with UNKNOWN."""
    height, width = (max(one.shape[axis] for one in maps) for axis in (0, 1))
    out = np.full((len(maps), height, width), UNKNOWN, np.uint16)
    for place, one in enumerate(maps):
        out[place, : one.shape[0], : one.shape[1]] = one
    return out


def unpack(packed: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return packed[: truth.shape[0], : truth.shape[1]].astype(np.int64)


def matched(found: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """The class of each pixel's segment after one assignment per picture; UNKNOWN for segments left over."""
    of = assign(histogram(truth, found, classes), "image")
    return np.where(of == classes, UNKNOWN, of)[found]


if __name__ == "__main__":
    main()
