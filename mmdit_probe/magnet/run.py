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

from mmdit_probe.data import Data, PictureData
from mmdit_probe.data.captions import Captioner, cached
from mmdit_probe.magnet.check import check
from mmdit_probe.magnet.config import MagnetOptions
from mmdit_probe.magnet.inputs import Inputs, gather
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
    options: MagnetOptions, model: MMDiT, inputs: Inputs | None = None, *, text: Mapping[str, Any] | None = None,
    out: Path | str | None = None, resume: bool = False, progress: Progress = _quiet,
) -> TrainResult:  # fmt: skip
    """Train a LoRA on `model` as the options say; see `trainer.train`.

    Args:
        inputs: those of the options, where they were read before the model was there.

    Raises:
        UserError: unknown data, layers or masks, or data that do not fit the model; before anything is trained.
    """
    layers = options.layers
    if layers is None:
        assert options.selection is not None
        layers = load_selection(options.selection, model, any_weights=True).layers
    aligned = layer_indices(layers, len(model.layers))
    options = replace(options, layers=aligned, selection=None)
    data, held_out = (_at(one, model) for one in inputs or gather(options))
    assert data is not None
    data = _captioned(data, options, model, progress)
    if options.masks.startswith("self"):
        check(data, model, "token" if options.masks == "self" else "none")
        with progress("labelling", len(data)) as advance:
            source: Any = "segments" if options.masks == "self-segments" else "maps"
            data = SelfLabelled.make(model, data, source=source, layers=aligned, refine=options.refine, advance=advance)
    with progress("steps", options.train_steps) as advance:

        def start(at: int) -> None:
            for _ in range(at):
                advance()

        return train(
            model, data, options, held_out=[] if held_out is None else [held_out[k] for k in range(len(held_out))],
            text=text, out=out, resume=resume, advance=advance, start=start,
        )  # fmt: skip


def _at(data: Data | None, model: MMDiT) -> Data | None:
    """Data in the model's size."""
    return replace(data, size=model.default_size) if isinstance(data, PictureData) else data


def _captioned(data: Data, options: MagnetOptions, model: MMDiT, progress: Progress) -> Data:
    """The data with the captions that a captioning model writes, where one is named."""
    name, file = options.caption_model, options.captions
    if name is None or file is None or not isinstance(data, PictureData):
        return data
    pictures = data.pictures()
    captioner = partial(Captioner.load, name, instruction=options.caption_instruction, device=model.device)
    with progress("captions", len(pictures)) as advance:
        return replace(data, captions=cached(pictures, file, captioner, advance=advance))
