"""The embedded world: images with exact masks and captions, and the parser that reads images back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmdit_probe.scenes.captions import CATEGORIES, KINDS, Facts, Group, captions, describe, parse
from mmdit_probe.scenes.world import (
    CLASSES,
    COLOUR_NAMES,
    COLOURS,
    GROUNDS,
    NO_COLOUR,
    PARTS,
    SIZE,
    SPLITS,
    STUFF,
    THINGS,
    WORLD_VERSION,
    Scene,
    SceneObject,
    scene,
)

if TYPE_CHECKING:
    from mmdit_probe.scenes.parser import SceneParser, alignment, load_parser

_LAZY = ("SceneParser", "alignment", "load_parser")


def __getattr__(name: str) -> Any:
    """The parser needs torch; scenes and captions do not."""
    if name in _LAZY:
        return getattr(importlib.import_module("mmdit_probe.scenes.parser"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CATEGORIES",
    "CLASSES",
    "COLOURS",
    "COLOUR_NAMES",
    "GROUNDS",
    "KINDS",
    "NO_COLOUR",
    "PARTS",
    "SIZE",
    "SPLITS",
    "STUFF",
    "THINGS",
    "WORLD_VERSION",
    "Facts",
    "Group",
    "Scene",
    "SceneObject",
    "SceneParser",
    "alignment",
    "captions",
    "describe",
    "load_parser",
    "parse",
    "scene",
]
