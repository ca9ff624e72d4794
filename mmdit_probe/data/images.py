"""Pictures from what a user types: a folder, a file, or a split of the embedded world.

    >>> from mmdit_probe.data.images import resolve
    >>> picture = resolve("scenes:val", limit=1)[0]
    >>> picture.name
    'scenes:val:0'

A picture is opened when it is used, so a folder of thousands costs nothing at the start; that it can be opened is
checked first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmdit_probe.data.prompts import DEFAULT_COUNT, SPLITS
from mmdit_probe.errors import UserError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Picture:
    """One picture to probe.

    Attributes:
        name: file name, or `scenes:<split>:<index>`.
        prompt: its caption; empty where none is known.
        open: (height, width) in pixels -> PIL image of that size, RGB.
    """

    name: str
    prompt: str
    open: Callable[[tuple[int, int]], Image]


def resolve(source: str, limit: int | None = None) -> list[Picture]:
    """The pictures that `source` means.

    Args:
        source: a folder of pictures, one picture, or `scenes:train`, `scenes:val`, `scenes:test`. The caption of
        `cat.png`
            is the text of `cat.txt` beside it, if there is one; scenes bring their own.
        limit: keep the first `limit`; for scenes also how many to take (default 50).

    Raises:
        UserError: no such folder or set, no pictures in it, or a file that is not a picture.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves nothing to do; expected 1 or more")
    if source.startswith("scenes:"):
        split = source.removeprefix("scenes:")
        if split not in SPLITS:
            raise unknown("picture set", source, [f"scenes:{name}" for name in SPLITS])
        return [_scene(split, index) for index in range(limit or DEFAULT_COUNT)]
    path = Path(source)
    if not path.exists():
        raise UserError(f"no folder {source!r}; expected a folder of pictures, or scenes:val")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"no picture in {source!r}; expected files ending in {', '.join(SUFFIXES)}")
    files = files[:limit]
    for file in files:
        _check(file)
    return [Picture(file.name, _caption(file), partial(_open, file)) for file in files]


def fit(image: Image, size: tuple[int, int]) -> Image:
    """Crop the centre to the aspect of `size` (height, width in pixels) and resize, RGB."""
    from PIL import Image as pil
    from PIL import ImageOps

    height, width = size
    return ImageOps.fit(image.convert("RGB"), (width, height), method=pil.Resampling.LANCZOS)


def _check(file: Path) -> None:
    from PIL import Image as pil

    try:
        with pil.open(file) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{str(file)!r} cannot be read as a picture ({_reason(error)}); convert or remove it"
        ) from error


def _open(file: Path, size: tuple[int, int]) -> Image:
    from PIL import Image as pil

    try:
        with pil.open(file) as image:
            return fit(image, size)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{str(file)!r} cannot be read as a picture ({_reason(error)}); convert or remove it"
        ) from error


def _reason(error: Exception) -> str:
    return "no picture format" if type(error).__name__ == "UnidentifiedImageError" else str(error)


def _caption(file: Path) -> str:
    beside = file.with_suffix(".txt")
    return " ".join(beside.read_text(encoding="utf-8").split()) if beside.is_file() else ""


def _scene(split: str, index: int) -> Picture:
    from mmdit_probe.scenes import scene

    def draw(size: tuple[int, int]) -> Image:
        from PIL import Image as pil

        return fit(pil.fromarray(scene(split, index).image), size)

    return Picture(f"scenes:{split}:{index}", scene(split, index).caption, draw)
