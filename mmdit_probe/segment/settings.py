"""What users type for segmentation, as values: sizes, noise levels, the layers and heads to read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmdit_probe.errors import UserError


def parse_sigmas(text: str) -> list[float]:
    """Noise levels from "0.515" or "0.3,0.5".

    Raises:
        UserError: no number in 0..1.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0.0 <= value <= 1.0 for value in values):
        raise UserError(f"sigma {text!r}: expected numbers in 0..1 separated by commas, e.g. 0.515")
    return values


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) from "512x768".

    Raises:
        UserError: another form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if not match:
        raise UserError(f"size {text!r}: expected HEIGHTxWIDTH in pixels, e.g. 512x768")
    return int(match[1]), int(match[2])


def selected(selection: Path | None, layers: str | None, heads: str | None) -> tuple[Any, Any, dict[int, float] | None]:
    """Layers (None: the default), heads (None: all) and layer weights (None: equal), from a LayerSelection file or from
    --layers and --heads.

    Raises:
        UserError: both were given, or the file is not a selection.
    """
    if selection is None:
        return layers, heads, None
    if layers is not None or heads is not None:
        raise UserError("--selection names layers and heads already; leave --layers and --heads out")
    from mmdit_probe.results.selection import load_selection

    found = load_selection(selection)
    weights = dict(zip(found.layers, found.weights, strict=True))
    equal = max(found.weights) - min(found.weights) < 1e-9
    return list(found.layers), found.heads or None, None if equal else weights
