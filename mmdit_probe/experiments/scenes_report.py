"""The scores of a model of the scenes world, as a run folder: what its images show and where its words look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mmdit_probe.experiments.scenes_quality import alignment_of, grid_ceiling, held_out, map_quality
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results import RunFolder, TableWriter, read_table
from mmdit_probe.results.statistics import interval
from mmdit_probe.scenes import CATEGORIES, captions, load_parser, scene
from mmdit_probe.scenes.parser import aligned, alignment, grounds_right, things_right

COMMAND = "scenes-score"
STREAMS = ("all", "clip", "t5")
"""Whose tokens make a word's map: both streams of the joint text, or one of them."""
SCORES = ("facts", "all_right", "things_right", "grounds_right")


@dataclass(frozen=True)
class Report:
    """What a score run found: the JSON document, the lines for the terminal, the folder."""

    document: dict[str, Any]
    lines: list[Any]
    path: Path


def score_model(
    model: MMDiT,
    request: Mapping[str, Any],
    *,
    categories: Sequence[str] = (*CATEGORIES, "real"),
    out: Path | None = None,
    resume: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Report:
    """Score a model on held-out captions and scenes.

    Args:
        model: an MM-DiT that knows the words of the world.
        request: n (captions per category, and scenes), split, guidance, num_steps, sigmas (list), seed.
        categories: caption categories to draw images for; "real" reads real scenes instead, the parser's own limit.
            With none of them only maps are measured.
        advance: called after every finished item: one per category, one for the parser itself, one for the maps.

    Returns:
        The report. Its folder holds ``alignment.parquet`` (one row per image) and ``maps.parquet`` (one row per layer,
        stream and head, as ``map_quality`` gives it).
    """
    ask = dict(request)
    how = {"steps": ask["num_steps"], "guidance": ask["guidance"], "seed": ask["seed"]}
    described = {"model": model.weight_hash, "categories": list(categories), **ask}
    folder = RunFolder.open(COMMAND, described, out=out, resume=resume)
    if not folder.complete:
        folder.record(model={"id": model.name, "weight_hash": model.weight_hash}, dtype=str(model.dtype))
        if categories:
            parser = load_parser()
            with TableWriter(folder.path, "alignment") as writer:
                for index, category in enumerate(categories):
                    if index in writer.done:
                        continue
                    if category == "real":
                        frame = _of_real_scenes(ask["n"], ask["split"])
                    else:
                        prompts = captions(ask["split"], ask["n"], category, distinct=False)
                        frame = alignment_of(model, parser, prompts, **how)
                    with writer.item(index) as item:
                        item.write(frame.assign(category=category))
                    advance()
        items = held_out(ask["n"], ask["split"])
        maps = pd.concat(
            map_quality(model, items, sigma=sigma, seed=ask["seed"], streams=STREAMS) for sigma in ask["sigmas"]
        )
        maps["ceiling"] = grid_ceiling(items, model.default_size[0] // model.size_multiple)
        with TableWriter(folder.path, "maps") as writer, writer.item(0) as item:
            item.write(maps)
        advance()
        folder.finish()
    return _report(folder, categories)


def _of_real_scenes(n: int, split: str) -> pd.DataFrame:
    """The parser's own limit: captions of real scenes, checked against what it reads in those scenes."""
    parser = load_parser()
    rows = []
    for index in range(n):
        item = scene(split, index)
        text, reading = item.caption, parser.read(item.image)[0]
        scores = (
            alignment(text, reading),
            aligned(text, reading),
            things_right(text, reading),
            grounds_right(text, reading),
        )
        rows.append({"caption": text, "seed": index, **dict(zip(SCORES, scores, strict=True))})
    return pd.DataFrame(rows)


def _report(folder: RunFolder, categories: Sequence[str]) -> Report:
    from rich.table import Table

    images = read_table(folder.path / "alignment.parquet") if categories else pd.DataFrame()
    maps = read_table(folder.path / "maps.parquet")
    by_category = Table(title="What generated images show, read by the parser; mean [95 % interval over images]")
    for column in ("caption category", "n", *(s.replace("_", " ") for s in SCORES)):
        by_category.add_column(column, justify="left" if column == "caption category" else "right")
    scores: dict[str, Any] = {}
    for category in categories:
        part = images[images["category"] == category]
        found = {name: interval(part[name].astype(float)) for name in SCORES}
        scores[category] = {"n": len(part), **found}
        label = "parser on real scenes" if category == "real" else category
        by_category.add_row(label, str(len(part)), *(f"{m:.3f} [{lo:.3f}, {hi:.3f}]" for m, lo, hi in found.values()))
    n, ceiling = int(maps["n"].iloc[0]), float(maps["ceiling"].iloc[0])
    by_layer = Table(
        title=f"I2T maps of the classes present, head mean, argmax, upsampled: mIoU by layer "
        f"(n {n}, token-grid ceiling {ceiling:.3f})"
    )
    means = maps[maps["head"] == "mean"].pivot(index=["stream", "layer"], columns=["sigma", "min_max"], values="miou")
    by_layer.add_column("text tokens")
    by_layer.add_column("layer", justify="right")
    for column in means.columns:
        by_layer.add_column(f"sigma {column[0]}, {'min-max' if column[1] else 'raw'}", justify="right")
    for key, row in zip(means.index.to_list(), means.to_numpy(), strict=True):
        by_layer.add_row(*map(str, key), *(f"{value:.3f}" for value in row))
    document = {
        "run": folder.path,
        "alignment": scores,
        "maps": maps[["layer", "stream", "head", "min_max", "sigma", "n", "miou"]].to_dict("records"),
        "ceiling": ceiling,
    }
    return Report(document, [by_category, by_layer, f"written: {folder.path}"], folder.path)
