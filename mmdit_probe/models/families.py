"""One entry per model family, stating facts only: names of inputs, token order, grid rule, text streams.

No behaviour lives here and no family's name appears in another module: the engine reads these facts. A fact's source is
the diffusers class named in the entry (0.42.1).

    >>> FAMILIES["sd3"].order
    ('image', 'text')

This is not a list of what could work: an unlisted transformer is refused with a message.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mmdit_probe.errors import UserError


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
    """Where the number of positions comes from: "tokenizer" (its model_max_length) or the name of an argument."""


@dataclass(frozen=True)
class Family:
    """Facts about one MM-DiT family. Input names are keyword arguments of the transformer's forward."""

    name: str
    transformer: str
    """Class name of the diffusers transformer."""
    layers: str
    """Regular expression of the module paths of joint attention; its first group is the place in forward order."""
    order: tuple[str, ...]
    """Kinds of tokens in the order of the attention call's keys."""
    attention_inputs: dict[str, str]
    """Kind of token -> keyword argument of the attention module whose axis 1 counts them, in positional order."""
    image_input: str
    text_input: str
    pooled_input: str
    timestep_input: str
    skip_input: str
    """Argument of the transformer's forward that lists layers to leave out of this one call."""
    timesteps: float
    """timestep = timesteps * sigma."""
    guidance: tuple[str, ...]
    """Branches in batch order when the pipeline runs classifier-free guidance in one call."""
    streams: tuple[TextStream, ...]
    length_argument: str
    """Argument of `encode_prompt` and of the pipeline that sets the length of the streams that name it."""
    default_length: int
    """Value of `length_argument` when nobody sets it."""
    encoded: tuple[str, ...]
    """What `encode_prompt` returns, in order."""
    guidance_argument: str = "do_classifier_free_guidance"

    def grid(self, image_input: Any, config: Any) -> tuple[int, int]:
        """Token grid (h, w), row-major, of an image input [B, C, latent height, latent width]."""
        return image_input.shape[-2] // config.patch_size, image_input.shape[-1] // config.patch_size

    def layer_place(self, path: str) -> int | None:
        """Place of a module in the joint-attention forward order, or None if it is not joint attention."""
        match = re.fullmatch(self.layers, path)
        return int(match[1]) if match else None


# transformer_sd3.py and pipeline_stable_diffusion_3.py. SD3.5's `attn2` sees image tokens only and does not match
# `layers`. # The attention ignores any text mask: pads are keys. Without its encoder the T5 stream is zeros of the same
# length.
SD3 = Family(
    name="sd3",
    transformer="SD3Transformer2DModel",
    layers=r"transformer_blocks\.(\d+)\.attn",
    order=("image", "text"),
    attention_inputs={"image": "hidden_states", "text": "encoder_hidden_states"},
    image_input="hidden_states",
    text_input="encoder_hidden_states",
    pooled_input="pooled_projections",
    timestep_input="timestep",
    skip_input="skip_layers",
    timesteps=1000.0,
    guidance=("uncond", "cond"),
    streams=(
        TextStream(
            name="clip",
            tokenizers=("tokenizer", "tokenizer_2"),
            encoders=("text_encoder", "text_encoder_2"),
            prompts=("prompt", "prompt_2"),
            negatives=("negative_prompt", "negative_prompt_2"),
            length="tokenizer",
        ),
        TextStream(
            name="t5",
            tokenizers=("tokenizer_3",),
            encoders=("text_encoder_3",),
            prompts=("prompt_3",),
            negatives=("negative_prompt_3",),
            length="max_sequence_length",
        ),
    ),
    length_argument="max_sequence_length",
    default_length=256,
    encoded=("text", "negative text", "pooled", "negative pooled"),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (SD3,)}


def family_of(transformer: object) -> Family:
    """The family of a diffusers transformer, by its class or a base class.

    Raises:
        UserError: not a known MM-DiT.
    """
    names = [base.__name__ for base in type(transformer).__mro__]
    for family in FAMILIES.values():
        if family.transformer in names:
            return family
    known = ", ".join(family.transformer for family in FAMILIES.values())
    raise UserError(
        f"{names[0]} is not a known MM-DiT: image and text tokens must share one softmax. Known transformers: {known}"
    )
