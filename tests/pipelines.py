"""Tiny random stock pipelines of other families than SD3, built from the libraries' own classes.

    pipe = PIPELINES["flux"]()                       # a FluxPipeline; random weights, tiny tokenizers
    pipe("a red ring", num_inference_steps=2, height=32, width=32)

The transformers are those of `tests.families`. A language model stands for each family's own (Gemma, GLM, Qwen): what
matters here is what the pipelines do with its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests import tiny
from tests.families import CHANNELS, FIXTURES, TEXT

SIDE = 32
"""Pixels; the autoencoder's /8 and patches of 2 give 2 x 2 tokens."""

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llm_tokenizer(side: str = "right", length: int = 512) -> Any:
    """Byte-level BPE with a chat template: one token per byte, except the merged words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    merges = [("r", "e"), ("re", "d"), ("r", "i"), ("ri", "n"), ("rin", "g"), ("Ġ", "red"), ("Ġ", "ring")]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in merges), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, pad_token="<|endoftext|>",
        eos_token="<|im_end|>", model_max_length=length, padding_side=side, chat_template=CHAT,
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


def llm(tokenizer: Any, width: int = TEXT) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    return Qwen3Model(config).eval()


def t5(tokenizer: Any, width: int = TEXT) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, is_gated_act=True
    )
    return T5EncoderModel(config).eval()


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    options = {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4, 4, 4, 4), "latent_channels": CHANNELS, "norm_num_groups": 2, "layers_per_block": 1,
        "sample_size": SIDE, "scaling_factor": 1.5, "shift_factor": 0.06, "use_quant_conv": False,
        "use_post_quant_conv": False,
    }  # fmt: skip
    return AutoencoderKL(**(options | changes)).eval()


def qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
    ).eval()  # fmt: skip


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def transformer(name: str, **changes: Any) -> Any:
    return FIXTURES[name].build(**changes)


def _with_t5(pipeline: str, name: str, **changes: Any) -> Any:
    import diffusers

    tokenizer = tiny.t5_tokenizer()
    return getattr(diffusers, pipeline)(
        transformer=transformer(name, **changes), scheduler=flow(), vae=vae(), text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
    )  # fmt: skip


def _with_llm(
    pipeline: str, name: str, autoencoder: Any = None, side: str = "right", scheduler: Any = None, **changes: Any
) -> Any:
    import diffusers

    tokenizer = llm_tokenizer(side)
    return getattr(diffusers, pipeline)(
        transformer=transformer(name, **changes), scheduler=scheduler or flow(), vae=autoencoder or vae(),
        text_encoder=llm(tokenizer), tokenizer=tokenizer,
    )  # fmt: skip


def flux() -> Any:
    from diffusers import FluxPipeline

    clip_tokenizer, tokenizer = tiny.clip_tokenizer("<|endoftext|>"), tiny.t5_tokenizer()
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer), hidden_size=20, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=tiny.CLIP_LENGTH, projection_dim=20,
        bos_token_id=clip_tokenizer.bos_token_id, eos_token_id=clip_tokenizer.eos_token_id,
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer("flux", in_channels=4 * CHANNELS), scheduler=flow(use_dynamic_shifting=True),
        vae=vae(), text_encoder=CLIPTextModel(config).eval(), tokenizer=clip_tokenizer, text_encoder_2=t5(tokenizer),
        tokenizer_2=tokenizer,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "flux": flux,
    "chroma": lambda: _with_t5("ChromaPipeline", "chroma", in_channels=4 * CHANNELS),
    "bria": lambda: _with_t5("BriaPipeline", "bria", in_channels=4 * CHANNELS),
    "aura_flow": lambda: _with_t5("AuraFlowPipeline", "aura_flow"),
    "cogview4": lambda: _with_llm(
        "CogView4Pipeline",
        "cogview4",
        side="left",
        scheduler=flow(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
        ),
    ),
    "qwen_image": lambda: _with_llm("QwenImagePipeline", "qwen_image", qwen_vae(), in_channels=4 * CHANNELS),
    "lumina2": lambda: _with_llm("Lumina2Pipeline", "lumina2", axes_lens=(300, 16, 16)),
    "z_image": lambda: _with_llm("ZImagePipeline", "z_image"),
    "ovis_image": lambda: _with_llm(
        "OvisImagePipeline", "ovis_image", in_channels=4 * CHANNELS, out_channels=4 * CHANNELS
    ),
}


def build(name: str) -> Any:
    """The pipeline of a family, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe
