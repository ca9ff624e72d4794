"""The scenes world: small images with exact masks, each a pure function of (world version, split, index).

    >>> from mmdit_probe.scenes import scene
    >>> scene("val", 0).image.shape
    (64, 64, 3)

One to four objects on a ground, or on a ground under the sky: ten nouns (four made of named parts), six colours, four
grounds and the sky. Each noun has its own fine texture, so that a noun predicts local appearance and not only an
outline. Masks are those of the visible pixels. Not a benchmark of anything but the tools of this package.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import UserError, check_known
from mmdit_probe.scenes.shapes import OUTLINES, PART_SHADE, STUFF_COLOURS, TEXTURES, smooth_noise, stuff

WORLD_VERSION = 1
"""Changes whenever a pixel of any scene changes; part of the seed and of every cached file."""

SIZE = 64
"""Side of an image in pixels."""

THINGS: tuple[str, ...] = tuple(OUTLINES)
STUFF: tuple[str, ...] = tuple(STUFF_COLOURS)
GROUNDS: tuple[str, ...] = ("grass", "sand", "water", "stone")
CLASSES: tuple[str, ...] = THINGS + STUFF
"""Class names; the id of a class is its index. Things first, then stuff."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 48, 44),
    "green": (46, 176, 66),
    "blue": (48, 78, 214),
    "yellow": (236, 210, 48),
    "purple": (152, 62, 190),
    "white": (226, 226, 226),
}
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
NO_COLOUR = 255
"""Colour id of pixels that belong to no object."""

PARTS: tuple[str, ...] = STUFF + tuple(
    part for noun in THINGS for part in OUTLINES[noun](np.zeros((1, 1)), np.zeros((1, 1)))
)
"""Part names; the id of a part is its index. A plain object is one part with its own name; so is a stuff."""

SPLITS: dict[str, int] = {"train": 1, "val": 2, "test": 3}


def split_of_world(split: str) -> str:
    """A split as requests and records name it: with the world's version, but for the first, of which they say nothing.
    So no run goes on with the scenes of another version, nor is it paired with one of those."""
    return split if WORLD_VERSION == 1 else f"{split} of world {WORLD_VERSION}"


@dataclass(frozen=True)
class SceneObject:
    """One object as placed. Centre and radius in pixels, before occlusion; later objects lie in front."""

    noun: str
    colour: str
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Scene:
    """One image with its truth. All maps are [S, S].

    Attributes:
        image: uint8 [S, S, 3].
        classes: index into ``CLASSES``.
        colours: index into ``COLOUR_NAMES``, ``NO_COLOUR`` where there is no object.
        instances: 0 for stuff, k for the k-th object of ``objects`` (1-based).
        parts: index into ``PARTS``.
        objects: back to front.
        grounds: the ground, and "sky" behind it where there is one.
    """

    split: str
    index: int
    image: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    colours: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    parts: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    grounds: tuple[str, ...]
    caption_seed: int = field(repr=False, default=0)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that have at least one visible pixel, things first, in the order of ``CLASSES``."""
        return [CLASSES[i] for i in np.unique(self.classes)]


_RADIUS = {1: (0.3, 0.44), 2: (0.24, 0.31), 3: (0.2, 0.26), 4: (0.18, 0.22)}
"""Radius range by number of objects, as a share of the side."""

_VISIBLE = 0.6
"""Share of an object's own pixels that must stay visible."""

_COUNT_URN = (1,) * 7 + (2,) * 7 + (3,) * 4 + (4,) * 2
"""Numbers of objects to draw from: crowded scenes are rarer."""


def scene(split: str, index: int, *, size: int = SIZE, objects: tuple[int, int] = (1, 4)) -> Scene:
    """The scene number ``index`` of a split.

    Args:
        split: "train", "val" or "test".
        index: any integer from 0.
        size: side in pixels. Textures keep their pixel scale, so a smaller canvas is a crop-like, easier scene.
        objects: least and largest number of objects (1 to 4).

    Raises:
        UserError: unknown split, negative index, or a number of objects outside 1..4.
    """
    check_known("split", split, SPLITS)
    if index < 0:
        raise UserError(f"scene index {index}: expected an integer from 0")
    low, high = objects
    if not 1 <= low <= high <= 4:
        raise UserError(f"number of objects {objects}: expected a range within 1..4")
    rng = np.random.Generator(np.random.PCG64([WORLD_VERSION, SPLITS[split], index, size, low, high]))
    canvas = _Canvas(size, rng)
    grounds = canvas.draw_ground()
    urn = [n for n in _COUNT_URN if low <= n <= high]
    count = urn[int(rng.integers(0, len(urn)))]
    # Sometimes several objects of one kind, so that counts can be told.
    alike = count > 1 and int(rng.integers(0, 10)) < 4
    nouns = [THINGS[int(rng.integers(0, len(THINGS)))] for _ in range(count)]
    colours = [COLOUR_NAMES[int(rng.integers(0, len(COLOUR_NAMES)))] for _ in range(count)]
    same = int(rng.integers(2, count + 1)) if alike else 1
    nouns[:same] = nouns[:1] * same
    colours[:same] = colours[:1] * same
    for noun, colour in zip(nouns, colours, strict=True):
        canvas.place(noun, colour, count)
    return Scene(
        split=split,
        index=index,
        image=np.clip(np.rint(canvas.rgb), 0, 255).astype(np.uint8),
        classes=canvas.classes,
        colours=canvas.colours,
        instances=canvas.instances,
        parts=canvas.parts,
        objects=tuple(canvas.objects),
        grounds=grounds,
        caption_seed=int(rng.integers(0, 2**31)),
    )


class _Canvas:
    """The maps of one scene while it is being drawn."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.y, self.x = np.mgrid[0:size, 0:size].astype(np.int64)
        self.rgb = np.zeros((size, size, 3))
        self.classes = np.zeros((size, size), np.uint8)
        self.colours = np.full((size, size), NO_COLOUR, np.uint8)
        self.instances = np.zeros((size, size), np.uint8)
        self.parts = np.zeros((size, size), np.uint8)
        self.objects: list[SceneObject] = []
        self.pixels: list[int] = []  # of every object, as if nothing hid it

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def draw_ground(self) -> tuple[str, ...]:
        ground = GROUNDS[int(self.rng.integers(0, len(GROUNDS)))]
        stacked = int(self.rng.integers(0, 10)) < 4
        horizon = int(self._uniform(0.25, 0.5) * self.size) if stacked else 0
        for name, rows in ((ground, slice(horizon, None)), ("sky", slice(0, horizon))):
            grain = self.rng.random((self.size, self.size)) * 2 - 1
            cloud = smooth_noise(self.rng.random((6, 6)) * 2 - 1, self.size)
            field = stuff(name, self.x, self.y, int(self.rng.integers(0, 24)), grain, cloud)
            self.rgb[rows] = field[rows]
            self.classes[rows] = CLASSES.index(name)
            self.parts[rows] = PARTS.index(name)
        return (ground, "sky") if stacked else (ground,)

    def place(self, noun: str, colour: str, count: int) -> None:
        """Draw one object where it and those before it stay mostly visible; skip it if 60 tries find no place."""
        low, high = _RADIUS[count]
        for _ in range(60):
            radius = self._uniform(low, high) * self.size
            cx = self._uniform(radius, self.size - radius)
            cy = self._uniform(radius, self.size - radius)
            shape = OUTLINES[noun]((self.x + 0.5 - cx) / radius, (self.y + 0.5 - cy) / radius)
            whole = np.logical_or.reduce(list(shape.values()))
            if self._keeps_others_visible(whole) and not self._touches_twin(noun, colour, whole):
                self._draw(SceneObject(noun, colour, (cx, cy), radius), shape, whole)
                return

    def _keeps_others_visible(self, whole: NDArray[np.bool_]) -> bool:
        return all(
            np.count_nonzero((self.instances == k) & ~whole) >= _VISIBLE * own
            for k, own in enumerate(self.pixels, start=1)
        )

    def _touches_twin(self, noun: str, colour: str, whole: NDArray[np.bool_]) -> bool:
        """Objects of one noun and colour keep a gap, so that they can be counted."""
        twins = [k for k, one in enumerate(self.objects, start=1) if (one.noun, one.colour) == (noun, colour)]
        if not twins:
            return False
        wide = whole.copy()
        for axis in (0, 1):
            for step in (-2, -1, 1, 2):
                wide |= np.roll(whole, step, axis)
        return bool(np.isin(self.instances[wide], twins).any())

    def _draw(self, item: SceneObject, shape: dict[str, NDArray[np.bool_]], whole: NDArray[np.bool_]) -> None:
        self.objects.append(item)
        self.pixels.append(int(np.count_nonzero(whole)))
        jitter = self.rng.random(3) * 24 - 12
        base = np.array(COLOURS[item.colour], float) + jitter
        light = TEXTURES[item.noun](self.x, self.y, int(self.rng.integers(0, 24)))
        self.classes[whole] = THINGS.index(item.noun)
        self.colours[whole] = COLOUR_NAMES.index(item.colour)
        self.instances[whole] = len(self.objects)
        for part, mask in shape.items():
            self.rgb[mask] = base[None] * (light[mask] * PART_SHADE.get(part, 1.0))[:, None]
            self.parts[mask] = PARTS.index(part)
