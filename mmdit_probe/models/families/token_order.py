"""The order of image, text, reference and other tokens in the keys of one denoising call, sample by sample.

    >>> import torch
    >>> inputs = {"hidden_states": torch.zeros(2, 4, 6, 8), "encoder_hidden_states": torch.zeros(2, 5, 32)}
    >>> config = type("Config", (), {"patch_size": 2})
    >>> found = sequence(latents, "text", "image")(inputs, config)
    >>> found.samples[0], found.grid
    ((('text', 5), ('image', 12)), (3, 4))

Masks are not looked at: what a mask hides is seen at the attention call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmdit_probe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("image", "text", "other", "reference")
"""Kinds of token. References are clean latents of pictures that are given: to be edited, or to go by."""

Inputs = Mapping[str, Any]
Segment = tuple[str, "int | tuple[int, ...]"]
"""Kind of token, and how many; or which text positions, where they are not in order or not all there."""


@dataclass(frozen=True)
class Reference:
    """The tokens of one reference picture: how many, and (h, w), row-major, within each frame; None if unknown."""

    count: int
    grid: tuple[int, int] | None
    frames: int = 1

    @classmethod
    def of(cls, frames: int, h: int, w: int) -> Reference:
        return cls(frames * h * w, (h, w), frames)


@dataclass(frozen=True)
class Arrangement:
    """Order of the keys at every joint-attention call of one denoising call.

    Attributes:
        samples: per sample, segments in key order. Keys beyond the last segment are padding.
        grid: (h, w) of the image tokens, row-major, within each of `frames` frames.
        queries: kinds of tokens that are queries too.
        references: per sample, the references in the order of their tokens; one entry stands for all samples.
    """

    samples: tuple[tuple[Segment, ...], ...]
    grid: tuple[int, int] | None
    frames: int = 1
    queries: tuple[str, ...] = KINDS
    references: tuple[tuple[Reference, ...], ...] = ()

    @property
    def text_length(self) -> int:
        """T, the number of text positions; samples with less lack the last ones."""
        return max((max(positions(sample, "text"), default=-1) + 1 for sample in self.samples), default=0)

    @property
    def regular(self) -> bool:
        """Whether all samples have the same keys in the same order, each kind of token complete and a query."""
        first = self.samples[0]
        return (
            len(self.queries) == len(KINDS)
            and all(sample == first for sample in self.samples)
            and all(isinstance(extent, int) for _, extent in first)
        )


def positions(sample: Sequence[Segment], kind: str) -> list[int]:
    """Positions among the tokens of one kind, in key order."""
    found: list[int] = []
    for of, extent in sample:
        if of == kind:
            start = max(found, default=-1) + 1
            found += range(start, start + extent) if isinstance(extent, int) else extent
    return found


@dataclass(frozen=True)
class Extent:
    """Size of the image tokens: (h, w) grid and frames; and what follows them, references and then padding."""

    grid: tuple[int, int] | None
    frames: int = 1
    references: tuple[Reference, ...] = ()
    padding: int = 0

    @property
    def image(self) -> tuple[Segment, ...]:
        h, w = self.grid or (0, 0)
        references = (("reference", one.count) for one in self.references)
        padding: tuple[Segment, ...] = (("other", self.padding),) if self.padding else ()
        return ("image", self.frames * h * w), *references, *padding

    def arranged(self, samples: Sequence[tuple[Segment, ...]], queries: tuple[str, ...] = KINDS) -> Arrangement:
        """The arrangement of samples that all have this extent."""
        return Arrangement(tuple(samples), self.grid, self.frames, queries, (self.references,))


Measure = Callable[[Inputs, Any], Extent]
Rule = Callable[[Inputs, Any], Arrangement]


def latents(inputs: Inputs, config: Any, frame_axis: int = -3) -> Extent:
    """Latents [B, C, h, w] or [B, C, frames, h, w], cut into the config's patches."""
    image = inputs["hidden_states"]
    patch = _sizes(getattr(config, "patch_size", 1))
    time = getattr(config, "patch_size_t", None) or (patch[0] if len(patch) == 3 else 1)
    frames = -(-image.shape[frame_axis] // time) if image.ndim == 5 else 1
    return Extent((image.shape[-2] // patch[-2], image.shape[-1] // patch[-1]), frames)


def frames_first(inputs: Inputs, config: Any) -> Extent:
    """Latents [B, frames, C, h, w]."""
    return latents(inputs, config, frame_axis=-4)


def position_ids(inputs: Inputs, config: Any) -> Extent:
    """Packed latents [B, I, C] whose `img_ids` [I, axes] say (image, row, column); images after the first are
    references.

    Raises:
        UserError: several images are made at once (VisualCloze), whose sizes may differ.
    """
    ids = inputs["img_ids"]
    own, *others = id_runs(ids[0] if ids.ndim == 3 else ids)
    if others and (getattr(config, "out_channels", None) or config.in_channels) != config.in_channels:
        raise UserError(
            f"the {1 + len(others)} pictures of this call are denoised together, and are no references; a probe knows"
            " one picture a sample"
        )
    return Extent(own.grid, 1, tuple(others))


def id_runs(ids: Tensor) -> list[Reference]:
    """The pictures whose tokens have positions (picture, row, column) [N, axes], in order."""
    ids = ids.cpu()
    _, counts = ids[:, 0].unique_consecutive(return_counts=True)
    found = []
    for part in ids.split(counts.tolist()):
        h, w = (int(part[:, axis].max() - part[:, axis].min()) + 1 for axis in (1, 2))
        found.append(Reference(len(part), (h, w) if h * w == len(part) else None))
    return found


def image_shapes(inputs: Inputs, config: Any) -> Extent:
    """Packed latents whose `img_shapes` list (frames, h, w), per sample, of the image and of its references; or of the
    layers of a picture, which are made together, and of the picture."""
    shapes = inputs["img_shapes"]
    sizes = [(int(f), int(h), int(w)) for f, h, w in (shapes[0] if isinstance(shapes[0], list) else [shapes[0]])]
    made = len(sizes) - 1 if getattr(config, "use_layer3d_rope", False) else 1
    references = tuple(Reference.of(*size) for size in sizes[made:])
    return Extent(sizes[0][1:], sum(frames for frames, _, _ in sizes[:made]), references)


def text_count(inputs: Inputs, names: Sequence[str]) -> int:
    """T: the lengths of the text inputs [B, T, ...] that are given, together."""
    return sum(int(inputs[name].shape[1]) for name in names if inputs.get(name) is not None)


def sequence(
    measure: Measure,
    *order: str,
    text: Sequence[str] = ("encoder_hidden_states",),
    registers: int | str = 0,
    queries: tuple[str, ...] = KINDS,
) -> Rule:
    """Whole runs of tokens, the same for every sample.

    Args:
        measure: the image's extent. order: kinds in key order.
        text: names of the text inputs. queries: kinds that are queries.
        registers: number of "other" tokens, or the input [B, number, ...] that they come from, if it is given.
    """

    def rule(inputs: Inputs, config: Any) -> Arrangement:
        extent = measure(inputs, config)
        others = registers if isinstance(registers, int) else text_count(inputs, [registers])
        runs: dict[str, tuple[Segment, ...]] = {
            "image": extent.image,
            "text": (("text", text_count(inputs, text)),),
            "other": (("other", others),),
        }
        sample = tuple(segment for kind in order for segment in runs[kind])
        return extent.arranged((sample,) * samples(inputs), queries)

    return rule


def samples(inputs: Inputs) -> int:
    """B, the number of samples: of the latents, a tensor or a list with one entry per sample."""
    image = inputs["hidden_states"] if "hidden_states" in inputs else inputs["x"]
    return len(image)


def valid(mask: Tensor, offset: int = 0, keep: bool = True) -> list[tuple[int, ...]]:
    """Per sample, the text positions that a mask [B, T] keeps (or hides)."""
    kept = mask.bool().cpu() if keep else ~mask.bool().cpu()
    return [tuple((offset + row.nonzero()[:, 0]).tolist()) for row in kept]


def packed(measure: Measure, *order: str) -> Rule:
    """Only the text that `encoder_attention_mask` keeps is among the keys, sample by sample."""

    def rule(inputs: Inputs, config: Any) -> Arrangement:
        extent = measure(inputs, config)
        found = tuple(
            tuple(s for kind in order for s in (extent.image if kind == "image" else (("text", kept),)))
            for kept in valid(inputs["encoder_attention_mask"])
        )
        return extent.arranged(found)

    return rule


def _sizes(value: Any) -> tuple[int, ...]:
    return (int(value), int(value)) if isinstance(value, int) else tuple(int(v) for v in value)
