"""What an entry of a model family states: names of inputs, token order, grid rule, text streams.

No behaviour lives here and no family's name appears in another module than `models.families.entries`: the engine reads
facts. The entries are looked up through `models.families.registry`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmdit_probe.models.families.token_order import Arrangement

Form = Literal["latents", "packed", "listed", "joined"]

Part = tuple[str, int]
"""A text that a tokenizer reads, and its place in the prompt, a character offset; -1 if it is none of the prompt's."""


@dataclass(frozen=True)
class TextStream:
    """A run of text positions in the joint order, and where its tokens come from.

    `tokenizers`, `encoders`, `prompts` and `negatives` are parallel: pipeline components, and arguments of the
    pipeline's `encode_prompt`. Several tokenizers mean that one position carries features of each (concatenated
    channels).
    """

    name: str
    tokenizers: tuple[str, ...]
    encoders: tuple[str, ...]
    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    length: str
    """Where the number of positions comes from: "tokenizer" (its model_max_length), the name of an argument, or the
    name of a number that the pipeline holds."""
    limited: bool = False
    """Whether there are no more positions than its tokenizer takes, whatever the argument says."""
    wrap: Callable[[Any, bool], tuple[str, str]] | None = None
    """(pipeline, whether it is the negative prompt) -> the text around the prompt that the tokenizer reads too."""
    texts: Callable[[Any, str], list[list[Part]]] | None = None
    """(pipeline, prompt) -> what the tokenizer reads instead of the prompt: texts, tokenized one by one, each made of
    parts. Without any text the positions hold zeros."""
    cut: Callable[[Any], int] | None = None
    """(pipeline) -> how many of the first positions the pipeline cuts off."""
    tail: Callable[[Any], tuple[str, int]] | None = None
    """(pipeline) -> a text that is tokenized by itself and comes after the padding, and how many positions the padding
    leaves for it."""
    padded: bool = True
    """Whether every prompt has the full number of positions; else only the longest prompt of a call has all of them."""
    together: bool = False
    """Where prompts are not padded to the full length: whether those that are encoded together are padded to the
    longest of them by the tokenizer; else the pipeline does so afterwards, at the end."""
    multiple: int = 1
    """Prompts that are padded together have a multiple of this many positions."""
    reads: str = ""
    """What of the prompt it reads, where that is not all: "what stands in quotation marks"."""
    side: str = ""
    """"left" or "right", where the tokenizer pads; empty if it is the tokenizer's own choice."""
    blank: str = ""
    """Kind of the one token that stands for an empty prompt and fills its positions; empty if the tokenizer says."""
    special_tokens: bool = True
    """Whether the tokenizer adds its own special tokens."""
    picture: str = ""
    """The token that stands for a reference picture in the text and is repeated for its patches, where the encoder sees
    pictures too. Beside pictures no text is cut off."""
    pictures: Callable[[Any, int], str] | None = None
    """(pipeline, how many) -> the text before the prompt that names them, where it is not part of `wrap`."""


@dataclass(frozen=True)
class Family:
    """Facts about one MM-DiT family. Input names are keyword arguments of the transformer's forward."""

    name: str
    transformer: str
    """Class name of the diffusers transformer."""
    layers: str | tuple[str, ...]
    """Regular expressions of the module paths of joint attention, by kind of block in forward order; the first group is
    the place among its kind."""
    order: tuple[str, ...]
    """Kinds of tokens in the order of the attention call's keys."""
    arrangement: Callable[[Mapping[str, Any], Any], Arrangement]
    """(arguments of the transformer's forward, its config) -> the order of every sample's keys."""
    textless: str = ""
    """Name of a number in the config: how many of the last `layers` see no text, and are no joint attention."""
    image_input: str = "hidden_states"
    text_input: str = "encoder_hidden_states"
    timestep_input: str = "timestep"
    timesteps: float = 1.0
    """timestep = timesteps * sigma."""
    clean_timestep: float = 0.0
    """The timestep of a clean image; where it is not 0, timestep = clean_timestep * (1 - sigma)."""
    towards_image: bool = False
    """Whether the transformer predicts x - n, the way from noise to image, and not the velocity n - x."""
    pooled_input: str = ""
    skip_input: str = ""
    """Argument of the transformer's forward that lists layers to leave out of this one call."""
    guidance: tuple[str, ...] = ()
    """Branches in batch order when the pipeline runs classifier-free guidance in one call."""
    streams: tuple[TextStream, ...] = ()
    """Where text positions come from; empty if the pipeline's prompts are not followed."""
    template_arguments: tuple[str, ...] = ()
    """Arguments of `encode_prompt` that change the text read around, or in place of, the prompt. The streams state what
    their defaults do; with other values the tokens stay unknown."""
    length_argument: str = ""
    """Argument of `encode_prompt` and of the pipeline that sets the length of the streams that name it."""
    default_length: int = 0
    """Value of `length_argument` when nobody sets it; 0 where it is the tokenizer's model_max_length."""
    encoded: tuple[str, ...] = ()
    """What `encode_prompt` returns: "text", "negative text" and others. Without a "negative text" the negative
    prompt is encoded by a call of its own."""
    pipelines: tuple[str, ...] = ()
    """Classes of the stock text-to-image and editing pipelines that `load` takes."""
    not_loaded: str = ""
    """Why `load` takes none, where that is so: the pipeline, or the transformer, is given to `probe`."""
    editing: tuple[str, ...] = ()
    """Those of `pipelines` that only edit a picture, although the argument for it may be left out of their calls."""
    reference_argument: str = "image"
    """Argument of these pipelines that takes a picture to edit, or several to go by."""
    options: tuple[tuple[str, Any], ...] = ()
    """Arguments of these pipelines that are always set: none may change the prompt or the size that was asked for."""
    scale_argument: str = "guidance_scale"
    """Argument of the pipeline that is the scale of classifier-free (or distilled) guidance."""
    distilled: bool = False
    """Whether that scale is an input of the transformer, and no second forward."""
    scale_offset: float = 0.0
    """What the pipeline's scale is short of g in u + g (c - u): 1 where it computes c + scale (c - u)."""
    cell: int = 0
    """Side, in latent cells, of one token; 0 where it is the transformer's patch_size."""
    scale_of_tokens: bool = False
    """Whether the pipeline's vae_scale_factor is the side of a token in pixels, and not of a latent cell."""
    size_in_pixels: bool = False
    """Whether the pipeline's default_sample_size is in pixels, and not in units of its vae_scale_factor."""
    form: Form = "latents"
    """How the transformer is given latents: see `models.latents`."""
    video_size: Callable[[Any], tuple[int, int]] | None = None
    """(pipeline) -> own (height, width) in pixels of the videos that it makes; None where it makes pictures."""

    @property
    def reads_pictures(self) -> bool:
        """Whether a text encoder is shown reference pictures; its pipelines take one prompt at a time with them."""
        return any(stream.picture for stream in self.streams)

    @property
    def fixed_length(self) -> bool:
        """Whether every prompt has the same number of text positions."""
        return bool(self.streams) and all(stream.padded for stream in self.streams)

    def layer_place(self, path: str) -> tuple[int, int] | None:
        """Place of a module in the joint-attention forward order (kind of block, place in it), or None."""
        for kind, pattern in enumerate((self.layers,) if isinstance(self.layers, str) else self.layers):
            match = re.fullmatch(pattern, path)
            if match:
                return kind, int(match[1])
        return None

    def timestep(self, sigma: Any) -> Any:
        """The timestep that the transformer gets at a noise level."""
        return self.clean_timestep * (1.0 - sigma) if self.clean_timestep else self.timesteps * sigma

    def sigma(self, timestep: float) -> float:
        """The noise level of a timestep as the transformer gets it."""
        return 1.0 - timestep / self.clean_timestep if self.clean_timestep else timestep / self.timesteps

    def levels(self, scheduler: Any) -> list[float]:
        """The noise level at each of a scheduler's timesteps.

        One that is no rectified flow has levels by its timesteps only; Mochi's counts from noise to image.
        """
        known = getattr(scheduler, "sigmas", None)
        if known is None:
            return [self.sigma(float(timestep)) for timestep in scheduler.timesteps]
        inverted = getattr(getattr(scheduler, "config", None), "invert_sigmas", False)
        return [1.0 - float(sigma) if inverted else float(sigma) for sigma in known[: len(scheduler.timesteps)]]
