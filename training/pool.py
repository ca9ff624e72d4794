"""Rendered training scenes, kept on disk: the data of every training stage.

A pool is a function of (world version, split, size, objects, count) and nothing else: a cache that can be deleted.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from mmdit_probe.results.atomic import replacing, write_text
from mmdit_probe.scenes import KINDS, SIZE, WORLD_VERSION, Scene, describe, scene

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Pool:
    """Scenes as arrays.

    Attributes:
        images: uint8 [n, S, S, 3].
        classes, colours: uint8 [n, S, S], as in ``Scene``.
        captions: by scene, by kind (the order of ``KINDS``): every kind of caption of every scene.
    """

    images: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    colours: NDArray[np.uint8]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.images)


_Row = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], list[str]]


def _row(item: Scene) -> _Row:
    return item.image, item.classes, item.colours, [describe(item, kind) for kind in KINDS]


def _render(task: tuple[str, range, int, tuple[int, int]]) -> list[_Row]:
    split, indices, size, objects = task
    return [_row(scene(split, i, size=size, objects=objects)) for i in indices]


def pool(
    folder: Path,
    split: str,
    count: int,
    *,
    size: int = SIZE,
    objects: tuple[int, int] = (1, 4),
    workers: int | None = None,
) -> Pool:
    """The first ``count`` scenes of a split, rendered once into ``folder`` and read from there afterwards."""
    name = f"world{WORLD_VERSION}-{split}-{size}px-{objects[0]}to{objects[1]}-{count}"
    captions = folder / f"{name}.json"
    if not captions.exists():
        console.print(f"rendering {count} scenes of {size} px ({split}) ...")
        chunks = [(split, range(i, min(i + 500, count)), size, objects) for i in range(0, count, 500)]
        if len(chunks) == 1:
            rows = _render(chunks[0])
        else:
            with ProcessPoolExecutor(workers or os.cpu_count()) as executor:
                rows = [row for chunk in executor.map(_render, chunks) for row in chunk]
        for part, column in enumerate(("images", "classes", "colours")):
            save_array(folder / f"{name}-{column}.npy", np.stack([row[part] for row in rows]))
        write_text(captions, json.dumps([row[3] for row in rows]))
    images, classes, colours = (
        np.load(folder / f"{name}-{column}.npy", mmap_mode="r") for column in ("images", "classes", "colours")
    )
    return Pool(images, classes, colours, json.loads(captions.read_text(encoding="utf-8")))


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array: complete or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)
