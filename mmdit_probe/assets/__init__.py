"""The checkpoints that ship with the package, by name.

A directory `<name>/` is a complete diffusers pipeline directory; a file `<name>.json` is a random-weight twin of one:
{"base": "<name of the trained one>", "seed": 0}.

    >>> sorted(names()) == names()
    True
"""

from __future__ import annotations

from pathlib import Path

from mmdit_probe.errors import unknown

_ROOT = Path(__file__).parent


def names() -> list[str]:
    """Names of the embedded models that are installed, sorted."""
    directories = [entry.parent.name for entry in _ROOT.glob("*/model_index.json")]
    twins = [entry.stem for entry in _ROOT.glob("*.json")]
    return sorted(directories + twins)


def path(name: str) -> Path:
    """The pipeline directory of an embedded model, or the JSON file of a random-weight twin.

    Raises:
        UserError: there is none of this name.
    """
    if name not in names():
        raise unknown("embedded model", name, names())
    directory = _ROOT / name
    return directory if directory.is_dir() else _ROOT / f"{name}.json"
