"""The map explorer: a picture, its words to click, and their attention in every layer, head and step, as one file.

    page = explorer(Exploration(...)); page.save("explore.html")

Maps are grey PNGs inside the page: one per layer and direction, a column per word and a row per step (or per head). A
byte is the map's value in 255ths of its own maximum, which stands beside it as a number. `plan` says how much of what
was asked fits, at a byte a token even where nothing compresses. Not here: what is measured (`experiments.explore`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.pages.page import Page, data_url, picture_url
from mmdit_probe.plots.overlay import colours
from mmdit_probe.plots.style import FRAMES, IMAGE, LABELS, OTHER, REFERENCE, SPANS
from mmdit_probe.results.clip import Clip

if TYPE_CHECKING:
    from PIL.Image import Image

LIMIT = 9_600_000
"""Bytes of maps in a page; base64 makes 4/3 of them, so that a page stays below 15 MB."""
STEPS = 6
"""Most sampling steps in a page."""
DRAWN = 512
"""Longer side in pixels of a panel of the page."""


class PagePlan(NamedTuple):
    """How much a page holds: `steps` single steps beside their mean, single heads of `layers` layers, and how many
    tokens a side are averaged into one (`coarse`)."""

    steps: int
    layers: int
    coarse: int


def plan(words: int, layers: int, heads: int, grid: tuple[int, ...], steps: int, head_layers: int) -> PagePlan:
    """What fits into `LIMIT`: first the mean of all layers, then heads of up to half of the rest, then steps.

    Args:
        words: maps per layer. grid: (h, w), or (frames, h, w). steps: sampling steps that there are.
        head_layers: layers whose heads are asked for.
    """
    coarse, (*frames, height, width) = 1, grid
    while True:
        room = LIMIT // (math.prod(frames) * -(-height // coarse) * -(-width // coarse))
        left = room - 2 * layers * words  # both directions
        if left >= max(layers, 2 * heads) * words or min(height, width) <= coarse * 4:
            break
        coarse *= 2
    fitting = max(0, min(head_layers, left // (4 * heads * words) or left // (2 * heads * words)))
    left -= 2 * heads * words * fitting
    return PagePlan(max(0, min(steps, STEPS, left // (layers * words))), fitting, coarse)


@dataclass(frozen=True, eq=False)
class Exploration:
    """What a page shows: L layers, R = 1 + S rows (the steps' mean, then S steps), G words, H heads, a grid (h, w); of
    a video F frames, and maps [.., F, h, w] in place of [.., h, w].

    Attributes:
        title, prompt, about: plain text. image: the picture, or a clip of F frames.
        words: names of the G maps; special: which of them are no words. tokens: the prompt in order, (text, which word,
            or -1), then what is no word of it.
        layers: indices; chosen: those that ground words, best first. steps: names of the R rows.
        i2t: [L, R, G, h, w], image queries. t2i: [L, G, h, w], text queries, mean over steps.
        heads: layer -> ([H, G, h, w] I2T, the same of T2I), mean over steps.
        kinds: names of the K kinds of key. budget: [L, 1 + H, R, Q, K] shares of attention of the Q `queries`, the
            heads' mean first.
    """

    title: str
    prompt: str
    image: Image | Clip
    words: Sequence[str]
    tokens: Sequence[tuple[str, int]]
    layers: Sequence[int]
    steps: Sequence[str]
    i2t: NDArray[np.float32]
    t2i: NDArray[np.float32]
    heads: Mapping[int, tuple[NDArray[np.float32], NDArray[np.float32]]]
    kinds: Sequence[str]
    budget: NDArray[np.float32]
    chosen: Sequence[int] = ()
    special: frozenset[int] = field(default_factory=frozenset)
    about: str = ""
    queries: Sequence[str] = ("image", "text")


def explorer(of: Exploration) -> Page:
    """The page."""
    frames = [_drawn(frame) for frame in of.image] if isinstance(of.image, Clip) else [of.image]
    data = {
        "images": [picture_url(frame) for frame in frames],
        "size": frames[0].size,
        "grid": of.i2t.shape[-2:],
        "prompt": of.prompt,
        "words": list(of.words),
        "layers": list(of.layers),
        "chosen": list(of.chosen),
        "special": sorted(of.special),
        "steps": list(of.steps),
        "heads": of.budget.shape[1] - 1,
        "i2t": {str(layer): atlas(of.i2t[k]) for k, layer in enumerate(of.layers)},
        "t2i": {str(layer): atlas(of.t2i[k][None]) for k, layer in enumerate(of.layers)},
        "i2tHeads": {str(layer): atlas(found[0]) for layer, found in of.heads.items()},
        "t2iHeads": {str(layer): atlas(found[1]) for layer, found in of.heads.items()},
        "kinds": [[LABELS.get(kind, kind), _COLOURS.get(kind, OTHER)] for kind in of.kinds],
        "queries": [f"{query} queries" for query in of.queries],
        "budget": np.round(of.budget.astype(float), 4).tolist(),
        "colours": colours(),
    }
    return Page.of(of.title, _body(of), script="explorer.js", data=data)


def _drawn(frame: Image) -> Image:
    """One of many pictures, at most as large as it is drawn."""
    small = frame.copy()
    small.thumbnail((DRAWN, DRAWN))
    return small


def atlas(maps: NDArray[np.float32]) -> dict[str, Any]:
    """Maps [R, G, h, w] >= 0 as one grey PNG of R x G tiles, and the maximum of each; the frames of a map [F, h, w] lie
    below each other in its tile."""
    from PIL import Image as pil

    maps = maps.reshape(*maps.shape[:2], -1, maps.shape[-1])
    rows, words, height, width = maps.shape
    top = maps.max((2, 3))
    scaled = maps / np.maximum(top, np.finfo(np.float32).tiny)[..., None, None]
    tiles = np.rint(255 * scaled).clip(0, 255).astype(np.uint8)
    picture = pil.fromarray(tiles.transpose(0, 2, 1, 3).reshape(rows * height, words * width))
    buffer = BytesIO()
    picture.save(buffer, format="PNG", compress_level=9)
    return {"src": data_url(buffer.getvalue()), "max": [[float(f"{value:.4g}") for value in row] for row in top]}


def coarser(maps: NDArray[Any], factor: int) -> NDArray[Any]:
    """Maps [..., h, w] with `factor` x `factor` tokens averaged into one; a last part that is smaller too."""
    if factor == 1:
        return maps
    for axis in (-2, -1):
        starts = np.arange(0, maps.shape[axis], factor)
        sums = np.add.reduceat(maps, starts, axis=axis)
        counts = np.diff([*starts, maps.shape[axis]])
        maps = sums / (counts[:, None] if axis == -2 else counts)
    return maps.astype(np.float32)


_COLOURS = SPANS | FRAMES | {"template": "#009E73", "image": IMAGE, "reference": REFERENCE, "other": OTHER}
"""Of the kinds of key: one bar holds them all, so that none shares the image's colour."""


def _body(of: Exploration) -> str:
    buttons = "".join(
        f'<li><button type="button" data-word="{word}"{" disabled" if word < 0 else ""}'
        f'{" class=special" if word in of.special else ""} aria-pressed="false">{escape(text)}</button></li>'
        for text, word in of.tokens
    )

    def slider(name: str, label: str, last: int) -> str:
        return (
            f'<div class="slider"><label for="{name}">{label}</label><output id="{name}-value" for="{name}"></output>'
            f'<input type="range" id="{name}" min="0" max="{last}" value="0" step="1"></div>'
        )

    def panel(letter: str, direction: str, words: str) -> str:
        return (
            f'<figure class="{letter} {letter}-{direction}"><canvas id="{letter}-{direction}" role="img"></canvas>'
            f'<figcaption><span class="name" id="{letter}-{direction}-name"></span> {words}<br>'
            f'<span class="soft" id="{letter}-{direction}-value"></span></figcaption></figure>'
        )

    i2t, t2i = "I2T: where the image looks for it", "T2I: where it looks in the image"
    sliders = slider("layer", "Layer", len(of.layers) - 1) + slider("head", "Head", of.budget.shape[1] - 1)
    sliders += slider("step", "Step", len(of.steps) - 1)
    if isinstance(of.image, Clip) and len(of.image) > 1:
        sliders += slider("frame", "Frame", len(of.image) - 1)
    sliders += slider("strength", "Strength of the overlay", 100)
    return f"""
<h1>{escape(of.title)}</h1>
<p class="soft">{escape(of.about)}</p>
<h2 id="words">Words: click one to see where it is looked for</h2>
<ul class="tokens" aria-labelledby="words">{buttons}</ul>
<div class="columns">
<div>
<fieldset><legend>A click sets</legend>
<label><input type="radio" name="which" value="a" checked> word A</label>
<label><input type="radio" name="which" value="b"> word B, to compare</label>
</fieldset>
<fieldset><legend>Where</legend>{sliders}<p class="soft" id="note"></p></fieldset>
<div class="ramp" id="ramp" role="img" aria-label="Colours from each map's minimum, dark, to its maximum, light"></div>
<div class="ends"><span>minimum</span><span>maximum of each map</span></div>
<p id="status" class="soft" role="status" aria-live="polite"></p>
</div>
<div class="panels">
<figure><img id="picture" alt="{escape(of.prompt)}"><figcaption id="picture-name">picture</figcaption></figure>
{panel("a", "i2t", i2t)}
{panel("a", "t2i", t2i)}
{panel("b", "i2t", i2t)}
{panel("b", "t2i", t2i)}
</div>
</div>
<h2>What the shown layer attends to</h2>
<div id="budget"></div>
<p class="soft">Shares of the attention of image and of text queries, by kind of key; each bar sums to 1.</p>
"""
