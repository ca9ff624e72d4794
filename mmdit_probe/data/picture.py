"""The only opener of pictures: upright, 8 bits, RGB, with a note of what had to be decided.

    picture = open_picture("cat.png")
    picture.image.size, picture.notes           # PIL image; ("transparency was laid on white",)

Turned by the EXIF tag; deep and float pictures scaled by their type; transparent ones laid on white; of several frames
the first; huge ones reduced. What cannot be read rightly is refused by name. Label maps: `labels`. Geometry: `fit`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pil, ImageOps
from PIL.Image import Image

from mmdit_probe.data.text import regular, stem
from mmdit_probe.errors import ProbeError, UserError, brief, first_line, is_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Which files of a folder are its pictures, in any case."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
"""What is decoded; PIL knows more, some of which start other programs (EPS)."""
BOMB = 178_956_970
"""Pixels from which on a file is refused as a decompression bomb: twice PIL's own warning."""
HUGE = 2**26
"""Pixels from which on a picture is reduced while it is read: 8192 x 8192, above any model's input."""


@dataclass(frozen=True)
class Picture:
    """An opened picture: a PIL image, RGB and upright, and what a reader of results should know of it."""

    image: Image
    notes: tuple[str, ...] = ()

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [height, width, 3]."""
        return np.asarray(self.image)


def open_picture(source: Path | str | Image | NDArray[Any], *, reduce: bool = True) -> Picture:
    """Open a picture.

    Args:
        source: a file, a PIL image, or an array [H, W], [H, W, 3 or 4]: integers of 0..the largest of their type,
            booleans, or floats of 0..1.
        reduce: bring pictures of more than `HUGE` pixels down; False where a label map has to fit.

    Raises:
        UserError: it cannot be read rightly; the message names the file and the reason.
    """
    if not isinstance(source, str | Path | pil.Image):
        source = _of_array(_array(source))
    if isinstance(source, pil.Image):
        with _told("the picture", "picture"):
            return _plain(source, "the picture", reduce)
    with opened(source, "picture") as image:
        return _plain(image, str(source), reduce)


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture as `open_picture(path, reduce=False)` gives it, from its header."""
    with opened(path, "picture") as image:
        try:
            turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # PIL turns TIFF itself
        except Exception:  # as in `_plain`
            turned = False
        return (image.width, image.height) if turned else (image.height, image.width)


def check_picture(path: Path) -> None:
    """Refuse a file that is no picture, by its header and check sums; pixels are decoded when it is used."""
    with opened(path, "picture") as image:
        image.verify()


@contextmanager
def opened(path: Path | str, what: str) -> Iterator[Image]:
    """An image file while it is read; whatever its decoder raises becomes one line that names the file.

    Raises:
        UserError: no regular file, no picture, damaged, or a decompression bomb.
    """
    path = regular(path, "a picture file, or scenes:val:0" if what == "picture" else "a label PNG", what)
    pil.init()
    with _told(repr(str(path)), what), pil.open(path, formats=[name for name in FORMATS if name in pil.OPEN]) as image:
        if image.width * image.height > BOMB:
            raise UserError(f"{str(path)!r} unpacks to {image.width} x {image.height}: too many pixels; reduce it")
        yield image


@contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    """Decoders of damaged files raise nearly anything, and warn: one line that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is refused or noted
            yield
    except ProbeError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be read as a {what} ({_reason(error)}); convert or remove it") from error


def listed(folder: Path) -> list[Path]:
    """The pictures of a folder, by name; the case of suffixes, the locale and the disk's order do not matter.

    Raises:
        UserError: no folder, no picture in it, or two pictures that differ in their suffix alone: a caption or mask is
            found by the name before it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"no folder {str(folder)!r}; expected a folder of pictures, or scenes:val")
    files = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and not p.is_dir()]
    files.sort(key=lambda p: (p.stem + p.suffix.lower(), p.name))
    if not files:
        raise UserError(f"no picture in {str(folder)!r}; expected files ending in {', '.join(SUFFIXES)}")
    return list(by_name(files, folder, stem).values())


def below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files of a folder and of all folders in it, those that are linked there too.

    Raises:
        UserError: a folder that cannot be read.
    """
    here = (*above, os.path.realpath(folder))  # a link back is followed no further
    try:
        with os.scandir(folder) as entries:
            found = [(Path(entry.path), entry.is_dir()) for entry in entries]
    except OSError as error:
        raise UserError(f"cannot read {str(folder)!r}: {error.strerror or error}") from error
    for path, is_folder in found:
        if not is_folder:
            yield path
        elif os.path.realpath(path) not in here:
            yield from below(path, here)


def by_name(files: Iterable[Path], folder: Path, name: Callable[[Path], str]) -> dict[str, Path]:
    """Files of a folder by the name that a picture, its caption and its masks share.

    Raises:
        UserError: two of one name, or one that is not UTF-8.
    """
    found: dict[str, Path] = {}
    for file in files:
        if not is_text(file.name):
            raise UserError(f"{str(folder)!r} holds {file.name!r}, a name that is not UTF-8; rename it")
        other = found.setdefault(name(file), file)
        if other is not file:
            raise UserError(
                f"{str(folder)!r} holds {other.name!r} and {file.name!r}, which share captions and masks;"
                " rename or remove one"
            )
    return found


def _plain(image: Image, name: str, reduce: bool) -> Picture:
    """RGB, upright, 8 bits."""
    notes: list[str] = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a phone's photograph with its depth map
        notes.append(f"the first of {frames} frames is used")
    most, factor = _most(image), _factor(image) if reduce else 1
    inverted = getattr(image, "tag_v2", {}).get(262) == 0  # white is zero: PIL heeds it in up to 8 bits
    _, step, deep = stored(image)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the file's value: PIL stretches those of pixels alone
        image.info["transparency"] = clear * step
    elif isinstance(clear, tuple) and deep:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if factor > 1:
        notes.append(f"{image.height} x {image.width} pixels were reduced")
        image.draft("RGB", (image.width // factor, image.height // factor))  # JPEG is decoded smaller at once
    image.load()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = ImageOps.exif_transpose(image)
    except Exception:  # the pixels are sound, see above; what is damaged is the tag
        notes.append("its EXIF data cannot be read; it is taken as stored")
    image = _eight_bits(image, most, inverted, name)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _on_white(image, notes)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return Picture(image.reduce(_factor(image)) if reduce and _factor(image) > 1 else image, tuple(notes))


def _factor(image: Image) -> int:
    """How often a side has to be shortened until the picture is no longer huge."""
    return max(1, int(np.ceil((image.width * image.height / HUGE) ** 0.5)))


def _on_white(image: Image, notes: list[str]) -> Image:
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    notes.append("transparency was laid on white")
    return pil.alpha_composite(pil.new("RGBA", image.size, "white"), image).convert("RGB")


def _eight_bits(image: Image, most: float, inverted: bool, name: str) -> Image:
    """Modes of 16 and 32 bits and floats scaled to 0..255 by their type; others as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if most == 2**32 - 1:
        values = values.astype(np.int64) % 2**32  # PIL keeps unsigned 32 bits as signed ones
    if inverted:
        values = most - values
    scaled, clear = pil.fromarray(_scaled(values, most, name)), image.info.get("transparency")
    if clear is not None:
        scaled.putalpha(pil.fromarray(values != clear))
    return scaled


def stored(image: Image) -> tuple[bool, int, bool]:
    """How a file that is not yet read holds its values: whether PIL inverts them (white is zero), by what it stretches
    grey values of 2 and 4 bits to 0..255, and whether it cuts colours of 16 bits."""
    args = next((tile.args for tile in getattr(image, "tile", ())), "")
    kind, _, how = (args if isinstance(args, str) else str(args[0])).partition(";")
    return "I" in how, {"L;2": 85, "L;4": 17}.get(f"{kind};{how[:1]}", 1), how.startswith("16")


def _most(image: Image) -> float:
    """The largest value that the file's type can hold."""
    tags = getattr(image, "tag_v2", None)
    if image.mode == "F":
        return 1.0
    if tags is not None:
        bits, signed = int(tags.get(258, (16,))[0]), tags.get(339, (1,))[0] == 2
        return float(2 ** (bits - signed) - 1)
    return 2.0**31 - 1 if image.mode == "I" and image.format is None else 65535.0  # PNG and PPM: at most 16 bits


def _scaled(values: NDArray[Any], most: float, name: str) -> NDArray[np.uint8]:
    found = np.asarray(values, np.float64)
    if not np.isfinite(found).all() or found.min(initial=0.0) < 0 or found.max(initial=0.0) > most:
        raise UserError(
            f"{name!r} holds values {found.min():g}..{found.max():g}; its type has 0..{most:g}, without NaN; rescale it"
        )
    scaled = np.rint(found * (255.0 / most)).astype(np.uint8)
    if most > 2**16 and found.any() and not scaled.any():  # 0..255 in a type of 32 or 64 bits
        raise UserError(
            f"{name!r} holds values up to {found.max():g} of a type that has 0..{most:g}: it would be black; give it in"
            " 8 or 16 bits"
        )
    return scaled


def _array(source: Any) -> NDArray[Any]:
    """The array that numpy, torch or another library of arrays holds."""
    if not hasattr(source, "__array__"):
        raise UserError(f"picture is {brief(source)}; expected a file, a PIL image or an array [height, width, 3]")
    detached = source.detach().cpu() if hasattr(source, "detach") else source  # torch
    return np.asarray(detached)


def _of_array(array: NDArray[Any]) -> Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise UserError(f"picture of shape {array.shape}: expected [height, width], or [height, width, 3 or 4]")
    if array.dtype.kind not in "buif":
        raise UserError(f"picture of type {array.dtype}: expected integers, or floats of 0..1")
    if array.dtype != np.uint8:
        most = float(np.iinfo(array.dtype).max) if array.dtype.kind in "ui" else 1.0
        array = _scaled(array, most, "the picture")
    return pil.fromarray(np.ascontiguousarray(array))


def _reason(error: Exception) -> str:
    names = {"UnidentifiedImageError": "no picture format", "DecompressionBombError": "too many pixels"}
    return names.get(type(error).__name__, first_line(error))
