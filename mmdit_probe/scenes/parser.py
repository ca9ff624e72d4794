"""The scene parser: a small network that reads an image back into classes and colours, and the facts that follow: what
detectors and question-answering models do for T2I-CompBench++ (arXiv 2307.06350). It knows this world only.

    >>> from mmdit_probe.scenes import load_parser, scene
    >>> parser = load_parser()
    >>> reading = parser.read(scene("val", 0).image)[0]  # doctest: +SKIP
    >>> alignment("a red ring on grass", reading)        # doctest: +SKIP
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn

from mmdit_probe import assets
from mmdit_probe.scenes.captions import CONTRASTS, RELATION_MARGIN, Facts, holds, is_caption, opposites, parse
from mmdit_probe.scenes.world import CLASSES, COLOUR_NAMES, STUFF, THINGS

MIN_OBJECT = 0.012
"""Least area of an object as a share of the image; smaller patches of a thing class are read as noise."""
MIN_GROUND = 0.04
"""Least area of a ground or sky as a share of the image."""


class _Block(nn.Sequential):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(
            nn.Conv2d(inner, outer, 3, padding=1),
            nn.GroupNorm(4, outer),
            nn.SiLU(),
            nn.Conv2d(outer, outer, 3, padding=1),
            nn.GroupNorm(4, outer),
            nn.SiLU(),
        )


class SceneParser(nn.Module):
    """A U-Net over four scales with two heads per pixel.

    Args:
        width: channels at full resolution; the coarser scales have 2, 3 and 4 times as many.
    """

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        widths = [width * k for k in (1, 2, 3, 4)]
        self.down = nn.ModuleList(_Block(i, o) for i, o in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(_Block(widths[k] + widths[k + 1], widths[k]) for k in (2, 1, 0))
        self.head = nn.Conv2d(width, len(CLASSES) + len(COLOUR_NAMES), 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, 15, H, W], colour logits [B, 6, H, W] of images [B, 3, H, W] in [-1, 1], sides from 8."""
        logits = self.head(self._features(images)[0])
        return logits[:, : len(CLASSES)], logits[:, len(CLASSES) :]

    def features(self, images: Tensor) -> Tensor:
        """Features at a quarter of the resolution, [B, 3 width, H // 4, W // 4]."""
        return self._features(images)[1]

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        for k, block in enumerate(self.down):
            x = block(nn.functional.avg_pool2d(x, 2) if k else x)
            kept.append(x)
        quarter = x
        for k, block in zip((2, 1, 0), self.up, strict=True):
            x = nn.functional.interpolate(x, kept[k].shape[-2:], mode="nearest")
            x = block(torch.cat([x, kept[k]], dim=1))
            quarter = x if k == 2 else quarter
        return x, quarter

    @torch.no_grad()
    def label(self, images: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Class ids and colour ids, each [B, H, W], of images [B, 3, H, W] in [-1, 1]."""
        classes, colours = self(images.to(next(self.parameters())))
        return classes.argmax(1).cpu().numpy(), colours.argmax(1).cpu().numpy()

    def read(self, images: Sequence[Image.Image | NDArray[np.uint8]] | NDArray[np.uint8]) -> list[SceneReading]:
        """Read images (PIL, or uint8 [H, W, 3], or uint8 [B, H, W, 3]); one reading each."""
        arrays = [np.asarray(images)] if isinstance(images, np.ndarray) and images.ndim == 3 else images
        return [read_maps(*maps) for maps in zip(*self.label(to_tensor(arrays)), strict=True)]


@dataclass(frozen=True)
class SeenObject:
    """A connected patch of one thing class and colour. Centre (x, y) as shares of the sides, area of the image."""

    noun: str
    colour: str
    centre: tuple[float, float]
    area: float


@dataclass(frozen=True)
class SceneReading:
    """What an image shows: objects and grounds (largest first), and the label maps [H, W] behind them."""

    objects: tuple[SeenObject, ...]
    grounds: tuple[str, ...]
    classes: NDArray[np.int64]
    colours: NDArray[np.int64]


def to_tensor(images: Sequence[Image.Image | NDArray[np.uint8]] | NDArray[np.uint8]) -> Tensor:
    """Images as float32 [B, 3, H, W] in [-1, 1]."""
    arrays = [np.asarray(i.convert("RGB") if isinstance(i, Image.Image) else i) for i in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_maps(classes: NDArray[np.int64], colours: NDArray[np.int64]) -> SceneReading:
    """Objects and grounds of label maps [H, W] (class ids and colour ids; the colour of stuff is ignored).

    Objects are the 8-connected patches of one noun and one colour. A patch's colour is decided per connected patch of
    the noun by majority, unless two colours each fill an object's area: then they are two objects.
    """
    pixels, (height, width) = classes.size, classes.shape
    seen: list[SeenObject] = []
    for noun_id, noun in enumerate(THINGS):
        patches, n = ndimage.label(classes == noun_id, structure=np.ones((3, 3)))
        for k in range(1, n + 1):
            patch = patches == k
            counts = np.bincount(colours[patch], minlength=len(COLOUR_NAMES))
            for colour_id in np.flatnonzero(counts >= max(MIN_OBJECT * pixels, 0.3 * counts.sum())):
                ys, xs = np.nonzero(patch & (colours == colour_id))
                centre = (float(xs.mean() + 0.5) / width, float(ys.mean() + 0.5) / height)
                seen.append(SeenObject(noun, COLOUR_NAMES[int(colour_id)], centre, len(ys) / pixels))
    areas = np.bincount(classes.ravel(), minlength=len(CLASSES)) / pixels
    grounds = [name for name in STUFF if areas[CLASSES.index(name)] >= MIN_GROUND]
    grounds.sort(key=lambda name: -areas[CLASSES.index(name)])
    return SceneReading(tuple(sorted(seen, key=lambda o: -o.area)), tuple(grounds), classes, colours)


def check(facts: Facts, reading: SceneReading) -> dict[str, bool]:
    """Each fact of a caption and whether the image shows it.

    A group without a colour takes any colour; it holds with exactly its number of objects, a group of one with at
    least one. Returns: one entry per group, relation and ground, keyed by its own words.
    """
    result: dict[str, bool] = {}
    matching = [[o for o in reading.objects if o.noun == g.noun and g.colour in (None, o.colour)] for g in facts.groups]
    for group, found in zip(facts.groups, matching, strict=True):
        result[str(group)] = len(found) == group.count if group.count > 1 else len(found) >= 1
    for first, relation, second in facts.relations:
        result[f"{facts.groups[first]} {relation} {facts.groups[second]}"] = any(
            holds(relation, a.centre, b.centre, RELATION_MARGIN / 2)
            for a in matching[first]
            for b in matching[second]
            if a is not b
        )
    for name in facts.grounds:
        result[name] = name in reading.grounds
    return result


def alignment(caption: str, reading: SceneReading) -> float:
    """Share of the caption's facts that the image shows, in [0, 1]; the empty caption scores 1."""
    facts = check(parse(caption), reading)
    return sum(facts.values()) / len(facts) if facts else 1.0


def aligned(caption: str, reading: SceneReading) -> bool:
    """Whether every fact of the caption holds."""
    return all(check(parse(caption), reading).values())


def things_right(caption: str, reading: SceneReading) -> bool:
    """Whether every named object is there in its colour, as often as it is named (more of them do no harm)."""
    facts = parse(caption)
    named: Counter[tuple[str, str | None]] = Counter()
    for group in facts.groups:
        named[group.noun, group.colour] += group.count
    return all(
        sum(o.noun == noun and colour in (None, o.colour) for o in reading.objects) >= n
        for (noun, colour), n in named.items()
    )


def grounds_right(caption: str, reading: SceneReading) -> bool:
    """Whether every named ground is there."""
    return all(name in reading.grounds for name in parse(caption).grounds)


SCORES = ("facts", "all_right", "things_right", "grounds_right", *(name for pair in CONTRASTS.items() for name in pair))
"""Names of what `judge` says."""


def judge(caption: str, reading: SceneReading) -> dict[str, float]:
    """Every score of an image against its caption, each beside its opposite, by name (`SCORES`).

    Returns: ``facts`` (share of the facts that hold), ``all_right``, ``things_right``, ``grounds_right``; and for each
    of `CONTRASTS` whether the image shows what is stated, and whether it shows the opposite (0 or 1; NaN where the
    caption states no such thing). An image without the objects shows neither. All are NaN, undefined, where the text is
    no caption of this world.
    """
    if not is_caption(caption):
        return dict.fromkeys(SCORES, np.nan)
    scores = {
        "facts": alignment(caption, reading),
        "all_right": float(aligned(caption, reading)),
        "things_right": float(things_right(caption, reading)),
        "grounds_right": float(grounds_right(caption, reading)),
    }
    turned = opposites(caption)
    for stated, opposite in CONTRASTS.items():
        scores |= {stated: np.nan, opposite: np.nan}
        if opposite in turned:
            right, wrong = (_claims(text, reading, stated) for text in (caption, turned[opposite]))
            scores[stated] = float(all(shown for claim, shown in right.items() if claim not in wrong))
            scores[opposite] = float(all(shown for claim, shown in wrong.items() if claim not in right))
    return scores


def _claims(caption: str, reading: SceneReading, what: str) -> dict[str, bool]:
    """The facts of a caption that a contrast is about: with relations, or only things."""
    facts = parse(caption)
    return check(facts if what == "relation" else replace(facts, relations=(), grounds=()), reading)


def load_parser(folder: Path | None = None) -> SceneParser:
    """The trained parser that ships with the package (or one saved in ``folder``), in evaluation mode, on the CPU."""
    parser = SceneParser()
    state = load_file((folder or assets.path("scenes-parser")) / "model.safetensors")
    parser.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return parser.eval().requires_grad_(False)
