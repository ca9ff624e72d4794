"""The embedded checkpoints, loaded by name: stock diffusers or transformers folders, weights as safetensors."""

from __future__ import annotations

from pathlib import Path

from mmdit_probe.errors import unknown

_ROOT = Path(__file__).parent


def folder() -> Path:
    """The folder that holds all embedded assets."""
    return _ROOT


def names() -> list[str]:
    """Names of all embedded assets: folders, and the `*.json` recipes of models derived from them."""
    return sorted(
        entry.stem if entry.suffix == ".json" else entry.name
        for entry in _ROOT.iterdir()
        if entry.suffix == ".json" or (entry.is_dir() and not entry.name.startswith("_"))
    )


def path(name: str) -> Path:
    """Where an asset lies: its folder, or the `.json` recipe of a derived model such as "scenes-sd3-random".

    Raises:
        UserError: no such asset.
    """
    for candidate in (_ROOT / name, _ROOT / f"{name}.json"):
        if name in names() and candidate.exists():
            return candidate
    raise unknown("embedded asset", name, names())
