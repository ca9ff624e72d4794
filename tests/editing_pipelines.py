"""Tiny random stock pipelines that edit a picture, or go by several, as in `tests.pipelines`.

    pipe = build("qwen_edit_plus")
    pipe(image=[picture(32, 48), picture(64, 32, 1)], prompt="a red ring", num_inference_steps=1)

Their sizes are the library's constants, of a megapixel; `small` makes them tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import CHANNELS, TEXT
from tests.pipelines import flow, flux, flux2, llm_tokenizer, qwen_vae, transformer

PICTURE = "<|image_pad|>"


def picture(height: int, width: int, seed: int = 0) -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def small(patch: pytest.MonkeyPatch) -> None:
    """Pictures of 48 x 64 pixels instead of a megapixel."""
    from diffusers.pipelines.flux import pipeline_flux_kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    patch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(64, 48), (48, 64)])
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        sizes = (64, 32, None) if module is pipeline_qwenimage_edit else (64, 32)
        patch.setattr(module, "calculate_dimensions", lambda area, ratio, sizes=sizes: sizes)


def kontext() -> Any:
    return flux("FluxKontextPipeline")


def picture_tokenizer() -> Any:
    tokenizer = llm_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", PICTURE, "<|video_pad|>"]}
    )
    return tokenizer


def qwen_edit(pipeline: str = "QwenImageEditPipeline") -> Any:
    """Its language model sees the picture in cells of 28 pixels."""
    import diffusers
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )

    class Processor(Qwen2VLProcessor):  # type: ignore[misc]
        """Without the processor of videos, which needs a library for them."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return type(argument)

    tokenizer = picture_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": TEXT, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT,
              "fullatt_block_indexes": [0]}  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (
        ("image_token_id", PICTURE), ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
    )}  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)).eval()
    processor = Processor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16), tokenizer=tokenizer,
        video_processor=object(),
    )  # fmt: skip
    return getattr(diffusers, pipeline)(
        scheduler=flow(use_dynamic_shifting=True), vae=qwen_vae(), text_encoder=model, tokenizer=tokenizer,
        processor=processor, transformer=transformer("qwen_image", in_channels=4 * CHANNELS),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "kontext": kontext,
    "flux2": flux2,
    "qwen_edit": qwen_edit,
    "qwen_edit_plus": lambda: qwen_edit("QwenImageEditPlusPipeline"),
}


def build(name: str) -> Any:
    """The pipeline, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe
