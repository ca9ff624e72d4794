"""A whole training from its options: data by name, captions, the model's own masks, held-out pictures, the loop.

    options = MagnetOptions(layers=(4,), dataset="coco-stuff:coco", train_steps=400)
    result = run(options, load("scenes-sd3"), out="runs/magnet")

Where the data are objects of one's own, `trainer.train` is the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmdit_probe.data import Data, PictureData, Sample, training_data
from mmdit_probe.data.captions import Captioner, cached
from mmdit_probe.errors import UserError
from mmdit_probe.magnet.check import check
from mmdit_probe.magnet.config import MagnetOptions
from mmdit_probe.magnet.pseudo import SelfLabelled
from mmdit_probe.magnet.trainer import TrainResult, train
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results.selection import load_selection
from mmdit_probe.specs import layer_indices

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""(what is done, how many) -> a context with the function to call after each."""


def _quiet(label: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)


def run(
    options: MagnetOptions, model: MMDiT, *, text: Mapping[str, Any] | None = None, out: Path | str | None = None,
    resume: bool = False, progress: Progress = _quiet,
) -> TrainResult:  # fmt: skip
    """Train a LoRA on `model` as the options say; see `trainer.train`.

    Raises:
        UserError: unknown data, layers or masks, or data that do not fit the model; before anything is trained.
    """
    layers = options.layers
    if layers is None:
        assert options.selection is not None
        layers = load_selection(options.selection, model, any_weights=True).layers
    aligned = layer_indices(layers, len(model.layers))
    options = replace(options, layers=aligned, selection=None)
    data = training_data(
        options.dataset, size=model.default_size, prompt=options.prompt_kind, limit=options.limit, fit=options.fit,
        masks="part" if options.masks in ("part", "self-segments") else "class", split=options.split,
        sentences=options.sentences,
    )  # fmt: skip
    data = _captioned(data, options, model, progress)
    held_out = validation_data(options, model)
    if options.masks.startswith("self"):
        check(data, model, "none")
        with progress("labelling", len(data)) as advance:
            source: Any = "segments" if options.masks == "self-segments" else "maps"
            data = SelfLabelled.make(model, data, source=source, layers=aligned, refine=options.refine, advance=advance)
    with progress("steps", options.train_steps) as advance:

        def start(at: int) -> None:
            for _ in range(at):
                advance()

        return train(
            model, data, options, held_out=held_out, text=text, out=out, resume=resume, advance=advance, start=start
        )


def validation_data(options: MagnetOptions, model: MMDiT) -> list[Sample]:
    """Held-out pictures; none for data on disk unless named: validation on training pictures says nothing."""
    of_scenes = options.dataset.partition(":")[0] == "scenes"
    named = options.validation or ("scenes:val" if of_scenes else None)
    if named is None or options.validate_limit == 0:
        return []
    held = training_data(named, size=model.default_size, prompt="list", limit=options.validate_limit, fit=options.fit,
                         split=options.split.replace("train", "val"))  # fmt: skip
    return [held[index] for index in range(len(held))]


def _captioned(data: Data, options: MagnetOptions, model: MMDiT, progress: Progress) -> Data:
    """The data with captions from a file, written by a captioning model where they are missing."""
    file, name = options.captions, options.caption_model
    if file is None and name is None:
        return data
    if not isinstance(data, PictureData):
        raise UserError("scenes have captions of their own; --captions and --caption-model are for pictures on disk")
    if file is None:
        raise UserError("where are captions kept? Give --captions FILE.json: it is made, and used again next time")
    pictures = data.pictures()
    captioner = None
    if name is not None:
        captioner = partial(Captioner.load, name, instruction=options.caption_instruction, device=model.device)
    with progress("captions", len(pictures)) as advance:
        return replace(data, captions=cached(pictures, file, captioner, advance=advance))
