"""The embedded world: images with exact masks and captions, and the parser that reads images back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.exports import first_use
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
    split_of_world,
)

if TYPE_CHECKING:
    from mmdit_probe.scenes.parser import SceneParser, alignment, load_parser

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
# The parser needs torch; scenes and captions do not.
__getattr__, __dir__ = first_use(__name__, {"parser": ("SceneParser", "alignment", "load_parser")})
