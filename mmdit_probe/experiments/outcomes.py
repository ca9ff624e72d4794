"""What an edit does to images: how far they move, and whether they still show what the prompt says.

    outcomes = [Change(), Parser()]
    rows = measure(outcomes, prompts, images, unedited)

`Change` needs nothing. `Parser` reads images of the scenes world. `ClipScores` and `Dino` take transformers checkpoints
that the user names: CLIP-T is image against prompt, CLIP-I and DINO are image against the unedited image, cosines of
pooled features (arXiv:2509.18096, B.5). Not here: running the model (`experiments.sweep`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from mmdit_probe import assets
from mmdit_probe.errors import UserError, first_line
from mmdit_probe.evaluate.clipscore import cosine
from mmdit_probe.quiet import quiet, reached
from mmdit_probe.scenes.captions import STATED
from mmdit_probe.segment.clip import CLIP

if TYPE_CHECKING:
    from PIL.Image import Image


Images = Sequence["Image"]
Numbers = dict[str, np.ndarray]
"""Name -> one number per image."""


class Outcome(Protocol):
    """Named numbers per image."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def __call__(self, prompts: Sequence[str], images: Images, unedited: Images) -> Numbers: ...


class Change:
    """`change`: root mean square difference of pixels from the unedited image, 0 to 1; exactly 0 for equal images."""

    names = ("change",)

    def __call__(self, prompts: Sequence[str], images: Images, unedited: Images) -> Numbers:
        pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(images, unedited, strict=True)]
        return {"change": np.array([np.sqrt(np.mean((a - b) ** 2)) / 255 for a, b in pairs])}


class Parser:
    """The scenes parser: `facts` (share of the prompt's facts shown), `things_right`, `grounds_right`, what is stated
    beside its opposite (`CONTRASTS`: relation, count, colours), and `relabelled`, the share of pixels read as another
    class than in the unedited image. All but the last are NaN, undefined, where the prompt states no such thing."""

    names = ("facts", "things_right", "grounds_right", *STATED, "relabelled")

    def __init__(self) -> None:
        from mmdit_probe.scenes.parser import load_parser

        self.parser = load_parser()

    def __call__(self, prompts: Sequence[str], images: Images, unedited: Images) -> Numbers:
        from mmdit_probe.scenes.parser import judge

        readings, before = self.parser.read(images), self.parser.read(unedited)
        scores = [judge(*pair) for pair in zip(prompts, readings, strict=True)]
        return {
            **{name: np.array([of[name] for of in scores]) for name in self.names[:-1]},
            "relabelled": np.array(
                [float((a.classes != b.classes).mean()) for a, b in zip(readings, before, strict=True)]
            ),
        }


class ClipScores:
    """`clip_t`: cosine of image and prompt, `clip_i`: of image and unedited image, in a CLIP model."""

    names = ("clip_t", "clip_i")

    def __init__(self, path: Path | str, device: str | torch.device = "cpu") -> None:
        self.clip = CLIP.open(str(path), device)

    def __call__(self, prompts: Sequence[str], images: Images, unedited: Images) -> Numbers:
        now, before = (self.clip.vectors(self.clip.pixels(batch)) for batch in (images, unedited))
        return {"clip_t": cosine(now, self.clip.sentences(prompts)), "clip_i": cosine(now, before)}


class Dino:
    """`dino`: cosine of the class features of image and unedited image in a DINO or DINOv2 model."""

    names = ("dino",)

    def __init__(self, path: Path | str, device: str | torch.device = "cpu") -> None:
        from mmdit_probe.segment.clip import image_processor

        self.device = device
        with quiet(path):
            from transformers import AutoModel

            try:
                here = reached(str(path))
                model = AutoModel.from_pretrained(str(path), use_safetensors=True, adapter_kwargs=here, **here)
                self.model = model.to(device).float().eval()
                self.processor = image_processor(str(path))
            except (OSError, ValueError) as error:
                what = f"model and image processor of {str(path)!r}"
                raise UserError(f"cannot load {what}: {first_line(error)}") from error

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Images, unedited: Images) -> Numbers:
        features = []
        for batch in (images, unedited):
            pixels = self.processor(images=list(batch), return_tensors="pt")["pixel_values"]
            features.append(self.model(pixels.to(self.device)).last_hidden_state[:, 0])
        return {"dino": cosine(*features)}


DEFAULT_CLIP = "scenes-clip"
"""CLIP of the scenes world, which ships with the package."""


def outcomes_of(
    scenes: bool, device: str | torch.device, clip: str | None = None, dino: str | None = None
) -> tuple[list[Outcome], dict[str, str | None]]:
    """What is measured of images, and the checkpoints it takes.

    The change always; the scenes parser and scenes-clip for models of the scenes world; CLIP and DINO where named
    ("none" leaves CLIP out).
    """
    outcomes: list[Outcome] = [Change()]
    if scenes:
        outcomes.append(Parser())
        clip = DEFAULT_CLIP if clip is None else clip
    clip = None if clip == "none" else clip
    if clip is not None:
        outcomes.append(ClipScores(assets.path(clip) if clip in assets.names() else clip, device))
    if dino is not None:
        outcomes.append(Dino(dino, device))
    return outcomes, {"clip": clip, "dino": dino}


def measure(outcomes: Sequence[Outcome], prompts: Sequence[str], images: Images, unedited: Images) -> Numbers:
    """All outcomes of a batch: name -> one number per image."""
    return {name: values for outcome in outcomes for name, values in outcome(prompts, images, unedited).items()}
