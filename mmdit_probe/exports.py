"""Packages whose names are found on first use, so that importing one imports none of its modules.

ROOMS = {"scores": ("confusion", "ious")}
__all__ = [name for names in ROOMS.values() for name in names]
__getattr__, __dir__ = first_use(__name__, ROOMS)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def first_use(package: str, rooms: Mapping[str, Iterable[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, the latter for the completion of names in notebooks: its `__all__`.

    `rooms`: module below it -> the names that the package has from there."""
    module_of = {name: f"{package}.{room}" for room, names in rooms.items() for name in names}

    def find(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    return find, lambda: sorted(sys.modules[package].__all__)
