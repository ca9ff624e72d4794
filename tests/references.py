"""Tiny random transformers with reference pictures in their calls, as each family's pipeline lays them out.

case = CASES["flux2"]()                          # two references, none of them square
case.sizes                                       # [(1, 2, 3), (1, 1, 4)]: (frames, h, w) in key order
case.moved("image"), case.moved(1)               # the inputs with other latents of the image, of reference 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.families import CHANNELS, FIXTURES, Inputs

GRID = (3, 4)
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A model, the inputs of one call, and the references in it."""

    model: Any
    inputs: Inputs
    sizes: list[Size]
    places: dict[str | int, tuple[str, Any]]
    """"image" or a reference's number -> input and index of its latents there."""

    def moved(self, what: str | int) -> Inputs:
        name, index = self.places[what]
        return self.inputs | {name: _changed(self.inputs[name], index)}


def _changed(value: Any, index: Any) -> Any:
    if isinstance(value, list):
        return [one + 1.0 if number == index else one for number, one in enumerate(value)]
    changed = value.clone()
    changed[index] += 1.0
    return changed


def _ids(number: int, h: int, w: int, axes: int) -> Tensor:
    ids = torch.zeros(h * w, axes)
    ids[:, 0], ids[:, 1], ids[:, 2] = number, torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    return ids


def _packed(name: str, sizes: list[Size], step: int, axes: int = 3) -> Case:
    """Tokens of the image and of its references one after the other, with positions (picture, row, column)."""
    inputs = FIXTURES[name].inputs(2, GRID)
    ids = [_ids(step * (number + 1), h, w, axes) for number, (_, h, w) in enumerate(sizes)]
    return _one_sequence(name, sizes, inputs | {"img_ids": torch.cat([inputs["img_ids"], *ids])})


def _one_sequence(name: str, sizes: list[Size], inputs: Inputs) -> Case:
    counts = [GRID[0] * GRID[1], *(f * h * w for f, h, w in sizes)]
    edges = torch.tensor([0, *counts]).cumsum(0).tolist()
    places = {
        what: ("hidden_states", (slice(None), slice(edges[k], edges[k + 1])))
        for k, what in enumerate(("image", *range(len(sizes))))
    }
    shape = inputs["hidden_states"].shape
    more = torch.randn(shape[0], edges[-1] - shape[1], *shape[2:], generator=torch.Generator().manual_seed(2))
    inputs = inputs | {"hidden_states": torch.cat([inputs["hidden_states"], more], 1)}
    return Case(FIXTURES[name].build(), inputs, sizes, places)


def _qwen() -> Case:
    sizes: list[Size] = [(1, 2, 3), (1, 4, 1)]
    inputs = FIXTURES["qwen_image"].inputs(2, GRID)
    return _one_sequence("qwen_image", sizes, inputs | {"img_shapes": [[(1, *GRID), *sizes]] * 2})


def _layered() -> Case:
    """Layers of a picture, which are made together, and the picture."""
    case = _qwen()
    model = FIXTURES["qwen_image"].build(use_layer3d_rope=True)
    inputs = FIXTURES["qwen_image"].inputs(2, GRID)
    shapes = [[(1, *GRID), (1, *GRID), (1, 2, 2)]] * 2
    tokens = torch.randn(2, 28, CHANNELS, generator=torch.Generator().manual_seed(3))
    places = {"image": ("hidden_states", (slice(None), slice(24))), 0: ("hidden_states", (slice(None), slice(24, 28)))}
    return Case(model, case.inputs | inputs | {"img_shapes": shapes, "hidden_states": tokens}, [(1, 2, 2)], places)


def _flux3() -> Case:
    inputs = FIXTURES["flux3"].inputs(2, GRID)
    ids = torch.cat([_ids(1, 2, 3, 4), _ids(2, 1, 5, 4)])
    inputs |= {"image_cond_hidden_states": torch.randn(2, 11, CHANNELS), "image_cond_ids": ids}
    name = "image_cond_hidden_states"
    places: dict[str | int, tuple[str, Any]] = {
        "image": ("hidden_states", slice(None)),
        0: (name, (slice(None), slice(6))),
        1: (name, (slice(None), slice(6, 11))),
    }
    # Without the blocks of one modality each, which mix the references before any joint layer.
    return Case(FIXTURES["flux3"].build(num_layers=0), inputs, [(1, 2, 3), (1, 1, 5)], places)


def _joy() -> Case:
    """Items [references, image]: the image is last here and first in the sequence."""
    inputs = FIXTURES["joyimage_edit"].inputs(1, GRID)
    latents = torch.randn(1, 3, *inputs["hidden_states"].shape[1:], generator=torch.Generator().manual_seed(4))
    places = {"image": ("hidden_states", (slice(None), 2)), 0: ("hidden_states", (slice(None), 0)),
              1: ("hidden_states", (slice(None), 1))}  # fmt: skip
    size = (2, *GRID)
    return Case(FIXTURES["joyimage_edit"].build(), inputs | {"hidden_states": latents}, [size, size], places)


def _joy_plus() -> Case:
    sizes: list[Size] = [(1, 2, 2), (1, 1, 3)]
    inputs = FIXTURES["joyimage_edit_plus"].inputs(2, GRID)
    return _one_sequence("joyimage_edit_plus", sizes, inputs | {"shape_list": [[(1, *GRID), *sizes]] * 2})


def _framepack() -> Case:
    """Frames made before; the oldest come first and are the coarsest."""
    inputs = FIXTURES["hunyuan_video_framepack"].inputs(2, GRID)
    names = ("latents_history_4x", "latents_history_2x", "latents_clean")
    places: dict[str | int, tuple[str, Any]] = {number: (name, slice(None)) for number, name in enumerate(names)}
    sizes: list[Size] = [(1, 1, 1), (1, 2, 2), (1, 3, 4)]
    model = FIXTURES["hunyuan_video_framepack"].build()
    return Case(model, inputs, sizes, places | {"image": ("hidden_states", slice(None))})


def _omnigen() -> Case:
    """Pictures have places in the text: one each, of two samples."""
    inputs = FIXTURES["omnigen"].inputs(2, GRID)
    places: dict[str | int, tuple[str, Any]] = {"image": ("hidden_states", slice(None))}
    return Case(FIXTURES["omnigen"].build(), inputs, [(1, 1, 2)], places | {0: ("input_img_latents", 1)})


def _minimax() -> Case:
    """Two keyframes of other sizes than the video, each at a time of its own."""
    inputs = FIXTURES["minimax_h3"].inputs(1, GRID)
    text, more = 7, 10
    places = torch.cat([_ids(20, 2, 3, 3), _ids(21, 1, 4, 3)])
    clean = torch.tensor([0] * text + [1] * more + [0] * (len(inputs["position_ids"]) - text))
    later = {name: torch.where(inputs[name] < text, inputs[name], inputs[name] + more)
             for name in ("audio_indices", "video_indices")}  # fmt: skip
    later["video_indices"] = torch.cat([torch.arange(text, text + more), later["video_indices"]])
    before = torch.randn(1, more, 4 * CHANNELS, generator=torch.Generator().manual_seed(5))
    inputs |= later | {
        "hidden_states": torch.cat([before, inputs["hidden_states"]], 1),
        "timestep": torch.tensor([0.4, 0.9]),
        "timestep_indices": clean,
        "token_tags": torch.cat([inputs["token_tags"][:text], torch.zeros(more).long(), inputs["token_tags"][text:]]),
        "position_ids": torch.cat([inputs["position_ids"][:text], places, inputs["position_ids"][text:]]),
    }
    of = "hidden_states"
    spots = {"image": (of, (slice(None), slice(10, None))), 0: (of, (slice(None), slice(6))),
             1: (of, (slice(None), slice(6, 10)))}  # fmt: skip
    return Case(FIXTURES["minimax_h3"].build(), inputs, [(1, 2, 3), (1, 1, 4)], spots)


CASES: dict[str, Callable[[], Case]] = {
    "flux": lambda: _packed("flux", [(1, 2, 5)], 1),
    "flux2": lambda: _packed("flux2", [(1, 2, 3), (1, 1, 4)], 10, 4),
    "longcat_image": lambda: _packed("longcat_image", [(1, 5, 2)], 1),
    "bria_fibo": lambda: _packed("bria_fibo", [(1, 2, 3), (1, 3, 1)], 1),
    "flux3": _flux3,
    "qwen_image": _qwen,
    "qwen_layered": _layered,
    "joyimage_edit": _joy,
    "joyimage_edit_plus": _joy_plus,
    "hunyuan_video_framepack": _framepack,
    "omnigen": _omnigen,
    "minimax_h3": _minimax,
}
