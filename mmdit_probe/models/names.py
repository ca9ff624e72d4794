"""Names of models, devices and precisions, checked before torch is imported.

    source_of("scenes-sd3")         # the folder, or the hub id, that a name means
    check_device("gpu")             # UserError: unknown device 'gpu'

Not here: whether a hub id exists, whether a device is there (`models.load`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mmdit_probe import assets
from mmdit_probe.errors import check_known, unknown

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")


def embedded_models() -> list[str]:
    """Names of the embedded models that `load` takes: pipeline directories and random-weight twins."""
    found = [(name, assets.path(name)) for name in assets.names()]
    return [name for name, path in found if path.suffix == ".json" or (path / "model_index.json").is_file()]


def source_of(name: str) -> tuple[str, dict[str, Any] | None]:
    """The directory or hub id to read, and the description of the random-weight twin if it is one.

    Raises:
        UserError: no embedded model, directory or hub id has this name.
    """
    if name in embedded_models():
        path = assets.path(name)
        if path.suffix != ".json":
            return str(path), None
        twin = json.loads(path.read_text())
        return str(assets.path(twin["base"])), twin
    if Path(name).exists():
        return name, None
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name, None
    raise unknown("model (no embedded model, directory or hub id of this name)", name, embedded_models())


def check_device(name: str) -> None:
    """A device has this name: one of `DEVICES` or of torch's others, perhaps with a number.

    Raises:
        UserError: unknown.
    """
    if not re.fullmatch(rf"auto|(?:{'|'.join(DEVICES[1:])}|xpu|meta)(?::\d+)?", name):
        raise unknown("device", name, DEVICES)


def check_dtype(name: str) -> None:
    """A precision has this name.

    Raises:
        UserError: unknown.
    """
    check_known("dtype", name, DTYPES)
