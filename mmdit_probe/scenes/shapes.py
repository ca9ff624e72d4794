"""Outlines and textures of the scenes world.

An outline is a function of normalised coordinates ``(u, v)`` in ``[-1, 1]`` (v grows downwards) that returns boolean
masks by part name, later parts drawn over earlier ones. A texture is a function of integer pixel coordinates and a
phase that returns a brightness factor. Everything is built from comparisons, additions, products and integer remainders
of float64 and int64 values, so that a scene is identical on every machine; the one table that needs trigonometry (the
star's corners) is rounded to six decimals.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bool = NDArray[np.bool_]
Float = NDArray[np.float64]
Int = NDArray[np.int64]

_STAR = [
    (
        round(math.sin(math.pi * k / 5) * (1.0 if k % 2 == 0 else 0.46), 6),
        round(-math.cos(math.pi * k / 5) * (1.0 if k % 2 == 0 else 0.46), 6),
    )
    for k in range(10)
]


def _rect(u: Float, v: Float, left: float, top: float, right: float, bottom: float) -> Bool:
    return (u >= left) & (u <= right) & (v >= top) & (v <= bottom)


def _disc(u: Float, v: Float, cu: float, cv: float, radius: float) -> Bool:
    return (u - cu) ** 2 + (v - cv) ** 2 <= radius * radius


def _polygon(u: Float, v: Float, corners: list[tuple[float, float]]) -> Bool:
    """Even-odd rule by horizontal ray casting; ``corners`` in order, the last joins the first."""
    inside = np.zeros(u.shape, dtype=bool)
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if v0 == v1:
            continue
        spans = (v0 > v) != (v1 > v)
        inside ^= spans & (u < (u1 - u0) * (v - v0) / (v1 - v0) + u0)
    return inside


def _heart(u: Float, v: Float) -> dict[str, Bool]:
    lobes = _disc(u, v, -0.46, -0.38, 0.5) | _disc(u, v, 0.46, -0.38, 0.5)
    return {
        "heart": lobes | _polygon(u, v, [(-0.9, -0.16), (0.9, -0.16), (0.0, 0.95)]) | _rect(u, v, -0.5, -0.4, 0.5, -0.1)
    }


def _house(u: Float, v: Float) -> dict[str, Bool]:
    return {
        "walls": _rect(u, v, -0.78, -0.15, 0.78, 0.95),
        "roof": _polygon(u, v, [(-1.0, -0.12), (1.0, -0.12), (0.0, -1.0)]),
        "door": _rect(u, v, -0.22, 0.3, 0.22, 0.95),
    }


def _tree(u: Float, v: Float) -> dict[str, Bool]:
    return {
        "trunk": _rect(u, v, -0.2, 0.2, 0.2, 1.0),
        "crown": _disc(u, v, 0, -0.42, 0.58) | _disc(u, v, -0.4, -0.05, 0.46) | _disc(u, v, 0.4, -0.05, 0.46),
    }


def _car(u: Float, v: Float) -> dict[str, Bool]:
    body = _rect(u, v, -1.0, -0.1, 1.0, 0.5)
    cabin = _polygon(u, v, [(-0.62, -0.08), (-0.4, -0.68), (0.4, -0.68), (0.62, -0.08)])
    return {
        "body": body | cabin,
        "window": _polygon(u, v, [(-0.42, -0.1), (-0.28, -0.52), (0.28, -0.52), (0.42, -0.1)]),
        "wheels": _disc(u, v, -0.52, 0.5, 0.3) | _disc(u, v, 0.52, 0.5, 0.3),
    }


def _boat(u: Float, v: Float) -> dict[str, Bool]:
    return {
        "mast": _rect(u, v, -0.1, -0.95, 0.06, 0.35),
        "sail": _polygon(u, v, [(0.06, -0.98), (0.06, 0.2), (0.86, 0.2)])
        | _polygon(u, v, [(-0.1, -0.8), (-0.1, 0.2), (-0.72, 0.2)]),
        "hull": _polygon(u, v, [(-1.0, 0.3), (1.0, 0.3), (0.66, 0.92), (-0.66, 0.92)]),
    }


OUTLINES: dict[str, Callable[[Float, Float], dict[str, Bool]]] = {
    "ring": lambda u, v: {"ring": _disc(u, v, 0, 0, 1) & ~_disc(u, v, 0, 0, 0.42)},
    "star": lambda u, v: {"star": _polygon(u, v, _STAR)},
    "ball": lambda u, v: {"ball": _disc(u, v, 0, 0, 0.92)},
    "cross": lambda u, v: {"cross": _rect(u, v, -0.34, -0.95, 0.34, 0.95) | _rect(u, v, -0.95, -0.34, 0.95, 0.34)},
    "heart": _heart,
    "moon": lambda u, v: {"moon": _disc(u, v, 0, 0, 0.98) & ~_disc(u, v, 0.55, -0.1, 0.72)},
    "house": _house,
    "tree": _tree,
    "car": _car,
    "boat": _boat,
}
"""Noun -> outline. Insertion order is the order of the thing classes."""

PART_SHADE: dict[str, float] = {
    "roof": 0.72,
    "door": 0.5,
    "trunk": 0.58,
    "window": 1.18,
    "wheels": 0.48,
    "mast": 0.55,
    "hull": 0.72,
}
"""Brightness of a part relative to the object's colour; parts not named here have 1."""


def _two(mask: Bool, low: float = 0.72, high: float = 1.1) -> Float:
    return np.where(mask, high, low)


def _bricks(x: Int, y: Int, p: int) -> Float:
    row = (y + p) // 4
    return _two(((y + p) % 4 != 0) & ((x + 4 * (row % 2) + p // 2) % 8 != 0), 0.6, 1.05)


def _scales(x: Int, y: Int, p: int) -> Float:
    row = (y + p) // 4
    dx = (x + 3 * (row % 2) + p // 3) % 6 - 2.5
    dy = (y + p) % 4 - 0.0
    return _two(dx * dx + dy * dy < 7.0, 0.68, 1.1)


TEXTURES: dict[str, Callable[[Int, Int, int], Float]] = {
    "ring": lambda x, y, p: _two((y + p) % 4 < 2),
    "star": lambda x, y, p: _two((x + p) % 4 < 2),
    "ball": lambda x, y, p: _two(((x + p) // 3 + (y + p // 4) // 3) % 2 == 0),
    "cross": lambda x, y, p: _two((x + y + p) % 6 < 3),
    "heart": lambda x, y, p: _two((x - y + p) % 6 < 3),
    "moon": lambda x, y, p: _two(((x + p) % 4 < 2) & ((y + p // 4) % 4 < 2), 0.84, 1.2),
    "house": _bricks,
    "tree": _scales,
    "car": lambda x, y, p: _two((y + p) % 8 < 4, 0.76, 1.08),
    "boat": lambda x, y, p: _two((x + p) % 8 < 4, 0.76, 1.08),
}
"""Noun -> texture ``(x, y, phase) -> brightness factor``; phase is an integer in 0..23."""


def smooth_noise(cells: Float, size: int) -> Float:
    """Bilinear interpolation of a coarse grid ``cells`` [k, k] to ``[size, size]``."""
    k = cells.shape[0]
    position = np.arange(size) * (k - 1) / (size - 1)
    low = np.minimum(position.astype(np.int64), k - 2)
    w = position - low
    rows = cells[low] * (1 - w)[:, None] + cells[low + 1] * w[:, None]
    return rows[:, low] * (1 - w)[None] + rows[:, low + 1] * w[None]


def stuff(name: str, x: Int, y: Int, phase: int, grain: Float, cloud: Float) -> Float:
    """Colour field of a ground or sky.

    Args:
        name: one of ``STUFF_COLOURS``.
        x, y: integer pixel coordinates [S, S].
        phase: integer in 0..23.
        grain: independent noise in [-1, 1] per pixel [S, S].
        cloud: smooth noise in [-1, 1] [S, S].

    Returns:
        RGB in 0..255, float64 [S, S, 3].
    """
    if name == "grass":
        light = 1 + 0.16 * _two(((x + phase) % 3 == 0) & ((y + x // 3 * 2) % 4 < 3), -1.0, 1.0) + 0.05 * grain
    elif name == "sand":
        light = 1 + 0.06 * grain + 0.1 * _two(((x + 2 * y + phase) % 5 == 0), -0.4, 1.0)
    elif name == "water":
        wave = np.abs((x + phase) % 8 - 4) // 2
        light = 1 + 0.17 * _two((y + wave + phase) % 5 < 2, -0.6, 1.0) + 0.02 * grain
    elif name == "stone":
        light = 1 + 0.16 * cloud + 0.08 * grain
    else:
        light = 1 + 0.1 * cloud
    return np.array(STUFF_COLOURS[name])[None, None] * light[..., None]


STUFF_COLOURS: dict[str, tuple[float, float, float]] = {
    "grass": (92.0, 150.0, 72.0),
    "sand": (208.0, 178.0, 128.0),
    "water": (62.0, 118.0, 168.0),
    "stone": (126.0, 126.0, 130.0),
    "sky": (168.0, 206.0, 236.0),
}
