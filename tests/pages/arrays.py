"""Random arrays of a model's sizes as an exploration."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmdit_probe.pages import Exploration
from mmdit_probe.pages.explorer import PagePlan, plan
from mmdit_probe.results.clip import Clip

WORDS = ["a", "red", "ring", "</script><img src=x>"]


def exploration(
    layers: int, heads: int, grid: tuple[int, ...], words: list[str], pixels: int, special: int = 1
) -> tuple[Exploration, PagePlan]:
    """What `plan` lets into a page, filled with noise: nothing compresses. With a grid (frames, h, w) of a video."""
    random = np.random.default_rng(0)
    fits = plan(len(words), layers, heads, grid, 28, layers)
    rows, size = 1 + fits.steps, [*grid[:-2], *(-(-side // fits.coarse) for side in grid[-2:])]

    def noise(*shape: int) -> np.ndarray:
        return random.random(shape, dtype=np.float32)

    names = [*words[: len(words) - special], *(f"BOS {k}" for k in range(special))]
    frames = random.integers(0, 255, (grid[0] if len(grid) == 3 else 1, pixels, pixels, 3), dtype=np.uint8)
    budget = noise(layers, 1 + heads, rows, 2, 3)
    return Exploration(
        "tiny & <b>", " ".join(words), Clip.of(frames) if len(grid) == 3 else Image.fromarray(frames[0]), names,
        [(name, k) for k, name in enumerate(names)], range(layers), ["mean", *map(str, range(fits.steps))],
        noise(layers, rows, len(words), *size), noise(layers, len(words), *size),
        {k: (noise(heads, len(words), *size), noise(heads, len(words), *size)) for k in range(fits.layers)},
        ["word", "bos", "image"], budget / budget.sum(-1, keepdims=True), [1],
        frozenset(range(len(words) - special, len(words))), "about",
    ), fits  # fmt: skip
