"""Tiny random stock pipelines that make or edit more than one picture, as in `tests.pipelines`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests import tiny
from tests.families import CHANNELS, TEXT
from tests.pipelines import clip, flow, llm, llm_tokenizer, t5, transformer, with_t5

CLIP_LENGTH = 77


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
    ).eval()  # fmt: skip


def guider() -> Any:
    from diffusers.guiders import ClassifierFreeGuidance

    return ClassifierFreeGuidance(guidance_scale=3.0)


def hunyuan_video(pipeline: str = "HunyuanVideoPipeline", name: str = "hunyuan_video", **parts: Any) -> Any:
    import diffusers

    tokenizer, clip_tokenizer = llm_tokenizer(), tiny.clip_tokenizer("<|endoftext|>")
    autoencoder = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    return getattr(diffusers, pipeline)(
        text_encoder=llm(tokenizer), tokenizer=tokenizer, transformer=transformer(name), vae=autoencoder,
        scheduler=flow(), text_encoder_2=clip(clip_tokenizer, CLIP_LENGTH), tokenizer_2=clip_tokenizer, **parts,
    )  # fmt: skip


def hunyuan_video15(pipeline: str = "HunyuanVideo15Pipeline", **parts: Any) -> Any:
    import diffusers
    from diffusers import AutoencoderKLHunyuanVideo15
    from transformers import ByT5Tokenizer

    tokenizer, glyphs = llm_tokenizer(), ByT5Tokenizer()
    autoencoder = AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS, block_out_channels=(32, 32, 32, 32), layers_per_block=1, spatial_compression_ratio=8
    )
    pipe = getattr(diffusers, pipeline)(
        text_encoder=llm(tokenizer), tokenizer=tokenizer, vae=autoencoder, scheduler=flow(), text_encoder_2=t5(glyphs),
        tokenizer_2=glyphs, guider=guider(),
        transformer=transformer("hunyuan_video15", in_channels=2 * CHANNELS + 1, target_size=64), **parts,
    )  # fmt: skip
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 500, 20, 3
    return pipe


def cogvideox(pipeline: str = "CogVideoXPipeline", channels: int = CHANNELS) -> Any:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler

    autoencoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, norm_num_groups=2,
        block_out_channels=(8, 8, 8, 8), latent_channels=CHANNELS, layers_per_block=1,
    )  # fmt: skip
    return with_t5(
        pipeline, "cogvideox", autoencoder, CogVideoXDDIMScheduler(),
        max_text_seq_length=tiny.T5_LENGTH, sample_width=4, sample_height=4, in_channels=channels,
    )  # fmt: skip


def mochi() -> Any:
    from diffusers import AutoencoderKLMochi

    channels = {f"{part}_block_out_channels": (32, 32, 32, 32) for part in ("encoder", "decoder")}
    autoencoder = AutoencoderKLMochi(
        latent_channels=CHANNELS, layers_per_block=(1, 1, 1, 1, 1), latents_mean=None, latents_std=None, **channels,
    )  # fmt: skip
    # As genmo/mochi-1-preview has it: the only schedule that counts from noise.
    schedule = flow(invert_sigmas=True)
    return with_t5("MochiPipeline", "mochi", autoencoder, schedule, max_sequence_length=tiny.T5_LENGTH)


def easyanimate() -> Any:
    from diffusers import AutoencoderKLMagvit, EasyAnimatePipeline

    tokenizer = llm_tokenizer("left")
    autoencoder = AutoencoderKLMagvit(
        latent_channels=CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    return EasyAnimatePipeline(
        vae=autoencoder, text_encoder=llm(tokenizer), tokenizer=tokenizer, transformer=transformer("easyanimate"),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def motif_video() -> Any:
    from diffusers import MotifVideoPipeline

    tokenizer = tiny.t5_tokenizer()
    return MotifVideoPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=wan_vae(), text_encoder=t5(tokenizer), tokenizer=tokenizer,
        transformer=transformer("motif_video", in_channels=2 * CHANNELS + 1), guider=guider(),
    )  # fmt: skip


def joyimage_edit() -> Any:
    from diffusers import JoyImageEditPipeline

    tokenizer = llm_tokenizer("left")
    return JoyImageEditPipeline(
        scheduler=flow(), vae=wan_vae(), text_encoder=joy_llm(tokenizer), tokenizer=tokenizer, processor=None,
        transformer=transformer("joyimage_edit"),
    )  # fmt: skip


def joy_llm(tokenizer: Any) -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    from tests.pipelines import vision_llm

    model = Qwen3VLForConditionalGeneration(vision_llm(tokenizer).config)
    return model.eval()


def seeing() -> dict[str, Any]:
    """A tiny SigLIP, and what prepares pictures for it."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=TEXT, intermediate_size=TEXT, num_hidden_layers=1, num_attention_heads=2, image_size=16,
        patch_size=8,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    return {"image_encoder": SiglipVisionModel(config).eval(), "feature_extractor": SiglipImageProcessor(size=size)}


FROM_A_PICTURE: dict[str, Callable[[], Any]] = {
    "cogvideox": lambda: cogvideox("CogVideoXImageToVideoPipeline", 2 * CHANNELS),
    "hunyuan_video15": lambda: hunyuan_video15("HunyuanVideo15ImageToVideoPipeline", **seeing()),
}
"""Pipelines whose videos begin with a picture."""

VIDEO_PIPELINES: dict[str, Callable[[], Any]] = {
    "hunyuan_video": hunyuan_video,
    "hunyuan_video_framepack": lambda: hunyuan_video(
        "HunyuanVideoFramepackPipeline", "hunyuan_video_framepack", image_encoder=None, feature_extractor=None
    ),
    "hunyuan_video15": hunyuan_video15,
    "cogvideox": cogvideox,
    "mochi": mochi,
    "easyanimate": easyanimate,
    "motif_video": motif_video,
    "joyimage_edit": joyimage_edit,
}
