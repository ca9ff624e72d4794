"""Heat maps over pictures: overlays, one word's map, and all maps of a picture.

    overlay(picture, heat)                          # PIL, of the picture's size
    maps = PictureMaps(picture, "a red ring", {"ring": heat})
    maps["ring"].overlay(); maps.sheet()

Under the colours the picture is grey, so that no colour of its own is taken for heat. Dark is the map's minimum, light
its maximum, bilinear between the tokens. Not here: what is measured, and the page to explore it (`pages`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import UserError, check_known
from mmdit_probe.plots.sheet import sheet, short, wrapped
from mmdit_probe.results.clip import Clip, still, stills

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

STRENGTH = 0.65
"""Of the colours in an overlay: 0 the grey picture, 1 the map alone."""

COLOURS = "viridis"
KEY = "dark: least attention to the word, light: most"
"""What the colours of an overlay mean, for a line below it."""


def overlay(picture: Any, heat: NDArray[Any], strength: float = STRENGTH) -> Any:
    """A picture under a heat map, or a video under a video's map.

    Args:
        picture: PIL, or uint8 [H, W, 3]; of a video a `Clip`, or a list of its frames.
        heat: [h, w], stretched over the whole picture; of a video [F, h, w], each of the model's frames over those that
            are decoded from it, with one scale of colours for all. strength: 0 to 1.

    Raises:
        UserError: the map fits neither, or the strength is out of range.
    """
    heat = np.asarray(heat, np.float32)
    moving = isinstance(picture, Clip | list | tuple)
    heat = heat[None] if moving and heat.ndim == 2 else heat  # one frame of the model
    if heat.ndim != (3 if moving else 2):
        wanted = "of a video has shape (frames, h, w)" if moving else "has shape (h, w)"
        raise UserError(f"a heat map {wanted}; found {heat.shape}")
    if not 0.0 <= strength <= 1.0:
        raise UserError(f"strength {strength}: expected a number from 0 to 1")
    spread = float(heat.max() - heat.min())
    level = (heat - heat.min()) / spread if spread > 0 else np.zeros_like(heat)
    if not moving:
        return _coloured(picture, level, strength)
    clip = Clip.of(picture)
    return Clip(
        tuple(_coloured(frame, level[k], strength) for frame, k in zip(clip, clip.times(len(level)), strict=True))
    )


def _coloured(picture: Any, level: NDArray[np.float32], strength: float) -> Image:
    """A picture under numbers [h, w] of 0 to 1."""
    from matplotlib import colormaps
    from PIL import Image as pil

    image = picture if hasattr(picture, "convert") else pil.fromarray(np.asarray(picture))
    large = np.asarray(pil.fromarray(level).resize(image.size, pil.Resampling.BILINEAR)).clip(0.0, 1.0)
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    colour = colormaps[COLOURS](large)[..., :3] * 255.0
    return pil.fromarray(np.rint(grey * (1 - strength) + colour * strength).astype(np.uint8))


@dataclass(frozen=True, eq=False)
class WordMap:
    """Where one word is looked for in a picture.

    Attributes:
        array: [h, w] float32 on the token grid, [F, h, w] of a video: the mean probability of the word's tokens as keys
            of each image query. image: the picture, or the video.
    """

    word: str
    array: NDArray[np.float32]
    image: Image | Clip

    def overlay(self, strength: float = STRENGTH) -> Any:
        """The picture, or the video, under the map."""
        return overlay(self.image, self.array, strength)

    def __repr__(self) -> str:
        side = " x ".join(map(str, self.array.shape))
        return f"WordMap({self.word!r}, {side} tokens, max {short(float(self.array.max()))})"

    def _repr_png_(self) -> bytes:
        return png(still(self.overlay()))


@dataclass(frozen=True, eq=False)
class PictureMaps(Mapping[str, WordMap]):
    """The maps of a picture's words: `maps["ring"]`.

    Attributes:
        image, prompt, seed: of the picture, or the video. arrays: word -> [h, w], of a video [F, h, w].
        about: what they were averaged over, in words. explorer: makes the page of `explore`.
    """

    image: Image | Clip
    prompt: str
    arrays: Mapping[str, NDArray[np.float32]]
    seed: int = 0
    about: str = ""
    explorer: Any = field(default=None, repr=False)

    def __getitem__(self, word: str) -> WordMap:
        check_known("word", word, self.arrays)
        return WordMap(word, self.arrays[word], self.image)

    def get(self, word: str, default: Any = None) -> Any:
        """The map of a word, or `default`: the error of a word that is not there is no KeyError."""
        try:
            return self[word]
        except UserError:
            return default

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __contains__(self, word: object) -> bool:
        return word in self.arrays

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: without the page's maker, which holds the model."""
        return vars(self) | {"explorer": None}

    def __repr__(self) -> str:
        return f"PictureMaps of {self.prompt!r} (seed {self.seed}): {', '.join(self)}"

    def sheet(self) -> Figure:
        """The picture and an overlay per word, as a figure; of a video their middle frames."""
        return maps_sheet([self])

    def explore(self) -> Any:
        """The page to explore it: the picture is made once more (same seed), with every layer observed.

        Raises:
            UserError: the maps were read from a folder or a pickle, without the model.
        """
        if self.explorer is None:
            raise UserError("these maps come without their model; run `mmdit-probe explore` with the same prompt")
        return self.explorer()

    def _repr_html_(self) -> str:
        def cell(label: str, picture: Image | Clip) -> str:
            picture = still(picture)
            shown = picture.resize((192, round(192 * picture.height / picture.width)))
            data = base64.b64encode(png(shown)).decode()
            return (
                f'<figure style="display:inline-block;margin:4px"><img alt="{escape(label)}"'
                f' src="data:image/png;base64,{data}"><figcaption>{escape(label)}</figcaption></figure>'
            )

        cells = [cell("picture", self.image), *(cell(word, one.overlay()) for word, one in self.items())]
        return f"<p>{escape(self.prompt)}</p>{''.join(cells)}<p><small>{escape(f'{self.about}; {KEY}')}</small></p>"


def maps_sheet(pictures: list[PictureMaps], title: str = "") -> Figure:
    """Pictures and their overlays: one picture over as many rows as it needs, several a row each."""
    across = 6
    cells, captions, rows = [], [], []
    for one in pictures:
        shown = stills([one.image, *(found.overlay() for found in one.values())])
        texts = [
            "middle frame" if isinstance(one.image, Clip) else "picture",
            *(f"{word}\nmax {short(float(found.array.max()))}" for word, found in one.items()),
        ]
        part, above = wrapped(shown, texts, min(across, max(len(found) + 1 for found in pictures)))
        cells += part
        captions += above
        rows += [one.prompt, *[None] * (len(part) - 1)]
    note = f"{pictures[0].about}; {KEY}" if pictures else ""
    return sheet(cells, rows=rows if len(pictures) > 1 else (), captions=captions, title=title, note=note, side=1.1)


def png(image: Image) -> bytes:
    """A picture as a PNG file's bytes."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def colours() -> list[list[int]]:
    """The 256 colours of the maps, dark to light."""
    from matplotlib import colormaps

    return [[round(255 * part) for part in colormaps[COLOURS](level)[:3]] for level in range(256)]
