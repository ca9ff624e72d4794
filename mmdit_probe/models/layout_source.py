"""Where a transformer's token layout comes from: its family's entry, or the mechanical layout (`discover_layout`).

    source = layout_source(transformer)
    source.arrange(inputs)                   # {"": arrangement}, or one per layer for a model without an entry

A model without an entry is laid out at its first denoising call, and again when the shapes of its inputs change, or
what its masks and indices say.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_probe.errors import UserError
from mmdit_probe.models.discover_layout import IMAGE_NAMES, TEXT_NAMES, Site, input_names, joint_sites, taint
from mmdit_probe.models.families.facts import Family
from mmdit_probe.models.families.registry import family_of, find_family
from mmdit_probe.models.families.token_order import KINDS, Arrangement
from mmdit_probe.models.layout import Layer, find_layers

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


class EntryLayout:
    """The layout that a family's entry states.

    Attributes:
        family: the entry. layers: joint-attention layers, None until they are known.
    """

    def __init__(self, family: Family, transformer: nn.Module) -> None:
        self.family, self.transformer = family, transformer
        self.layers: list[Layer] | None = find_layers(family, transformer)

    def arrange(self, inputs: Mapping[str, Any]) -> dict[str, Arrangement]:
        """Order of the keys in a denoising call with these arguments, by layer path; "" is every other layer."""
        return {"": self.family.arrangement(inputs, self.transformer.config)}


class FoundLayout(EntryLayout):
    """The layout of a transformer without an entry, found by `models.discover_layout`."""

    def __init__(self, transformer: nn.Module) -> None:
        name = type(transformer).__name__
        self.family = Family(name, name, (), (), _nothing, timesteps=math.nan)
        self.transformer = transformer
        self.layers = None
        self._found: dict[tuple[Any, ...], dict[str, Arrangement]] = {}

    def arrange(self, inputs: Mapping[str, Any]) -> dict[str, Arrangement]:
        known = tuple((name, _decisive(name, value)) for name, value in inputs.items())
        if known not in self._found:
            self._found[known] = self._calibrated(inputs)
        return self._found[known]

    def _calibrated(self, inputs: Mapping[str, Any]) -> dict[str, Arrangement]:
        image, text = input_names(inputs)
        timestep = next((name for name in TIMESTEP_NAMES if name in inputs), "")
        self.family = replace(self.family, image_input=image[0], text_input=text[0], timestep_input=timestep)
        sites = joint_sites(self.transformer, taint(self.transformer, inputs))
        layers = [Layer(n, path, self.transformer.get_submodule(path)) for n, path in enumerate(sites)]
        if self.layers is None:
            self.layers = layers
        elif [layer.path for layer in layers] != [layer.path for layer in self.layers]:
            raise UserError(f"{self.family.name} has other joint-attention layers in this call than in the first one")
        return {path: _arrangement(site, inputs[image[0]]) for path, site in sites.items()}


def layout_source(transformer: nn.Module) -> EntryLayout:
    """Where the layout of an unwrapped transformer comes from.

    Raises:
        UserError: it is no MM-DiT, or nothing in its forward's arguments looks like latents and text.
    """
    names = inspect.signature(type(transformer).forward).parameters
    may_be_found = set(IMAGE_NAMES) & set(names) and any(name.startswith(TEXT_NAMES) for name in names)
    family = find_family(transformer) if may_be_found else family_of(transformer)
    return FoundLayout(transformer) if family is None else EntryLayout(family, transformer)


def _arrangement(site: Site, image: Any) -> Arrangement:
    samples = tuple(tuple(site.order(sample)) for sample in range(len(site.labels)))
    every = all(count == len(labels) for count, labels in zip(site.queries, site.labels, strict=True))
    grid = _guessed_grid(image, int((site.labels[0] == 0).sum()))
    return Arrangement(samples, grid, queries=KINDS if every else ("image",))


def _guessed_grid(image: Any, count: int) -> tuple[int, int] | None:
    """(h, w) of `count` image tokens cut from latents [B, C, h', w'] into square patches; None if that does not fit."""
    if not isinstance(image, Tensor) or image.ndim != 4:
        return None
    patch = math.isqrt(max(1, image.shape[-2] * image.shape[-1] // max(1, count)))
    h, w = image.shape[-2] // patch, image.shape[-1] // patch
    return (h, w) if h * w == count else None


def _nothing(inputs: Mapping[str, Any], config: Any) -> Arrangement:
    raise UserError("the layout of this model is found mechanically, at its first call")


def _decisive(name: str, value: Any) -> Any:
    """What of an argument may decide which token is where: shapes of tensors, values of masks and indices."""
    if isinstance(value, list | tuple):
        return tuple(_decisive(name, item) for item in value)
    if not isinstance(value, Tensor):
        return None
    told = name not in TIMESTEP_NAMES and ("mask" in name or not value.is_floating_point())
    if not told:
        return tuple(value.shape)
    held = (
        value.detach().flatten().contiguous().view(torch.uint8).cpu().numpy().tobytes()
    )  # a mask of all pairs: millions
    return tuple(value.shape), hashlib.sha256(held).hexdigest()
