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
from tests.families import CHANNELS, FIXTURES, POOLED, TEXT

SIDE = 32
"""Pixels; the autoencoder's /8 and patches of 2 give 2 x 2 tokens."""
LONGEST = 218
"""Positions of HiDream's CLIPs, which pad to the length of the other encoders up to here."""
FIBO_BLANK = 128000
"""Number of the token that BriaFiboPipeline puts in place of an empty prompt."""

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if message.content is string else message.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llm_tokenizer(side: str = "right", length: int = 512, **special: Any) -> Any:
    """Byte-level BPE with a chat template: one token per byte, except the merged words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    merges = [("r", "e"), ("re", "d"), ("r", "i"), ("ri", "n"), ("rin", "g"), ("Ġ", "red"), ("Ġ", "ring")]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in merges), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, pad_token="<|endoftext|>",
        eos_token="<|im_end|>", model_max_length=length, padding_side=side, chat_template=CHAT,
        **({"additional_special_tokens": ["<|im_start|>"]} | special),
    )  # fmt: skip


def llm(tokenizer: Any, width: int = TEXT, vocabulary: int | None = None, layers: int = 2) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocabulary or len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=1024,
    )  # fmt: skip
    return Qwen3Model(config).eval()


def vision_llm(tokenizer: Any, width: int = TEXT, layers: int = 2) -> Any:
    """A language model that also takes pictures, for pipelines that name positions along three axes."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "deepstack_visual_indexes": [],
    }  # fmt: skip
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


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
        latents_mean=[0.1] * CHANNELS, latents_std=[1.2] * CHANNELS,
    ).eval()  # fmt: skip


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def transformer(name: str, **changes: Any) -> Any:
    return FIXTURES[name].build(**changes)


def with_t5(pipeline: str, name: str, autoencoder: Any = None, scheduler: Any = None, **changes: Any) -> Any:
    import diffusers

    tokenizer = tiny.t5_tokenizer()
    return getattr(diffusers, pipeline)(
        transformer=transformer(name, **changes), scheduler=scheduler or flow(), vae=autoencoder or vae(),
        text_encoder=t5(tokenizer), tokenizer=tokenizer,
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


def clip(tokenizer: Any, length: int = tiny.CLIP_LENGTH, kind: str = "CLIPTextModel", projection: int = 20) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=20, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=length, projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def flux(kind: str = "FluxPipeline") -> Any:
    """A pipeline of Flux's parts, by its class in diffusers."""
    import diffusers

    clip_tokenizer, tokenizer = tiny.clip_tokenizer("<|endoftext|>"), tiny.t5_tokenizer()
    return getattr(diffusers, kind)(
        transformer=transformer("flux", in_channels=4 * CHANNELS), scheduler=flow(use_dynamic_shifting=True),
        vae=vae(), text_encoder=clip(clip_tokenizer), tokenizer=clip_tokenizer, text_encoder_2=t5(tokenizer),
        tokenizer_2=tokenizer,
    )  # fmt: skip


def cogview4() -> Any:
    """Its language model's tokenizer puts two tokens before every text."""
    from tokenizers.processors import TemplateProcessing

    time_shift = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256, "time_shift_type": "linear"}
    pipe = _with_llm(
        "CogView4Pipeline", "cogview4", vae(shift_factor=None), side="left",
        scheduler=flow(use_dynamic_shifting=True, **time_shift),
    )  # fmt: skip
    backend = pipe.tokenizer.backend_tokenizer
    signs = ["[gMASK]", "<sop>"]
    pipe.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *signs]})
    backend.post_processor = TemplateProcessing(
        single=f"{signs[0]} {signs[1]} $A", special_tokens=[(s, pipe.tokenizer.convert_tokens_to_ids(s)) for s in signs]
    )  # fmt: skip
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    return pipe


def cogview3plus() -> Any:
    from diffusers import CogVideoXDDIMScheduler

    return with_t5("CogView3PlusPipeline", "cogview3plus", vae(shift_factor=None), CogVideoXDDIMScheduler())


def prx() -> Any:
    from types import SimpleNamespace

    from diffusers.pipelines.prx import pipeline_prx

    # An optional package that mends broken encodings, which leaves plain text as it is.
    if not hasattr(pipeline_prx, "ftfy"):
        pipeline_prx.ftfy = SimpleNamespace(fix_text=lambda text: text)
    return with_t5("PRXPipeline", "prx")


def krea2() -> Any:
    from diffusers import Krea2Pipeline

    tokenizer = llm_tokenizer()
    pipe = Krea2Pipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=qwen_vae(), text_encoder=vision_llm(tokenizer),
        tokenizer=tokenizer, transformer=transformer("krea2", in_channels=4 * CHANNELS),
        text_encoder_select_layers=(0, 1, 2),
    )  # fmt: skip
    # The end of the template takes more tokens of this tokenizer: one per letter.
    pipe.prompt_template_encode_num_suffix_tokens = len(tokenizer(pipe.prompt_template_encode_suffix)["input_ids"])
    return pipe


def longcat() -> Any:
    from diffusers import LongCatImagePipeline

    tokenizer = llm_tokenizer()
    pipe = LongCatImagePipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=vae(latent_channels=16), text_encoder=llm(tokenizer),
        tokenizer=tokenizer, text_processor=None, transformer=transformer("longcat_image", in_channels=64),
    )  # fmt: skip
    pipe.tokenizer_max_length = 24
    return pipe


def nucleus() -> Any:
    from diffusers import NucleusMoEImagePipeline

    tokenizer = llm_tokenizer("left")
    pipe = NucleusMoEImagePipeline(
        transformer=transformer("nucleus_image", in_channels=4 * CHANNELS), scheduler=flow(use_dynamic_shifting=True),
        vae=qwen_vae(), text_encoder=llm(tokenizer), processor=tokenizer,
    )  # fmt: skip
    pipe.default_return_index = -1
    return pipe


def bria_fibo() -> Any:
    from diffusers import AutoencoderKLWan, BriaFiboPipeline

    tokenizer = llm_tokenizer()
    autoencoder = AutoencoderKLWan(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * CHANNELS, latents_std=[1.2] * CHANNELS, in_channels=12, out_channels=12, patch_size=2,
    )  # fmt: skip
    return BriaFiboPipeline(
        transformer=transformer("bria_fibo", joint_attention_dim=2 * TEXT), scheduler=flow(use_dynamic_shifting=True),
        vae=autoencoder.eval(), text_encoder=llm(tokenizer, vocabulary=FIBO_BLANK + 1), tokenizer=tokenizer,
    )  # fmt: skip


def glm_image() -> Any:
    """With a language model that draws the prior tokens: some of 64."""
    from diffusers import GlmImagePipeline
    from transformers import ByT5Tokenizer

    tokenizer, (processor, drawing) = ByT5Tokenizer(), _prior()
    pipe = GlmImagePipeline(
        tokenizer=tokenizer, processor=processor, text_encoder=t5(tokenizer), vision_language_encoder=drawing,
        vae=vae(latents_mean=[0.1] * CHANNELS, latents_std=[1.2] * CHANNELS),
        transformer=transformer("glm_image", prior_vq_quantizer_codebook_size=64),
        scheduler=flow(use_dynamic_shifting=True, time_shift_type="linear"),
    )  # fmt: skip
    pipe.default_sample_size = SIDE // pipe.vae_scale_factor  # prior tokens are drawn one by one
    return pipe


def _prior() -> tuple[Any, Any]:
    from transformers import GlmImageConfig, GlmImageForConditionalGeneration, GlmImageProcessor
    from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

    signs = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    tokenizer = llm_tokenizer("left", bos_token="<bos>", extra_special_tokens=signs)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vision_vocab_size": 64, "eos_token_id": 63,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = GlmImageConfig(
        text_config=text, vq_config={"embed_dim": 8, "num_embeddings": 60, "latent_channels": 16},
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "image_size": 64},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"), image_start_token_id=60, image_end_token_id=61,
    )  # fmt: skip
    model = GlmImageForConditionalGeneration(config).eval()
    # A random model would end too early.
    model.generation_config.eos_token_id = None
    return GlmImageProcessor(GlmImageImageProcessorPil(), tokenizer, chat_template=CHAT), model


def hunyuan_image() -> Any:
    from diffusers import AutoencoderKLHunyuanImage, HunyuanImagePipeline
    from diffusers.guiders import AdaptiveProjectedMixGuidance
    from transformers import ByT5Tokenizer

    tokenizer, glyphs = llm_tokenizer(), ByT5Tokenizer()
    autoencoder = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=CHANNELS, block_out_channels=(32, 32, 32, 32),
        layers_per_block=1, spatial_compression_ratio=8, sample_size=SIDE, scaling_factor=0.5,
    )  # fmt: skip
    pipe = HunyuanImagePipeline(
        scheduler=flow(), vae=autoencoder, text_encoder=llm(tokenizer), tokenizer=tokenizer, text_encoder_2=t5(glyphs),
        tokenizer_2=glyphs, transformer=transformer("hunyuan_image", text_embed_2_dim=TEXT),
        guider=AdaptiveProjectedMixGuidance(),
    )  # fmt: skip
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 160, 32
    return pipe


def flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    autoencoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=2,
    )  # fmt: skip
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    return autoencoder.eval()


def flux2() -> Any:
    """The one with a single text encoder. It reads three of 28 layers."""
    from diffusers import Flux2KleinPipeline

    tokenizer = llm_tokenizer("left")
    changes = {"in_channels": 4 * CHANNELS, "joint_attention_dim": 3 * TEXT, "guidance_embeds": False}
    return Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=flux2_vae(), text_encoder=llm(tokenizer, layers=28),
        tokenizer=tokenizer, transformer=transformer("flux2", **changes),
    )  # fmt: skip


def ernie_image() -> Any:
    """With a model that rewrites prompts: one that cannot, so that nobody asks it to."""
    from diffusers import ErnieImagePipeline

    tokenizer = llm_tokenizer()
    return ErnieImagePipeline(
        transformer=transformer("ernie_image", in_channels=4 * CHANNELS, out_channels=4 * CHANNELS),
        vae=flux2_vae(), text_encoder=llm(tokenizer), tokenizer=tokenizer, scheduler=flow(),
        pe=llm(tokenizer), pe_tokenizer=tokenizer,
    )  # fmt: skip


def ideogram4() -> Any:
    from diffusers import Ideogram4Pipeline

    tokenizer = llm_tokenizer()
    # 13 of the 36 layers are read.
    changes = {"in_channels": 4 * CHANNELS, "llm_features_dim": 13 * 8}
    return Ideogram4Pipeline(
        scheduler=flow(), vae=flux2_vae(), text_encoder=vision_llm(tokenizer, 8, 36), tokenizer=tokenizer,
        transformer=transformer("ideogram4", **changes), unconditional_transformer=transformer("ideogram4", **changes),
    )  # fmt: skip


def hidream() -> Any:
    """Two text encoders whose tokens are keys, and two CLIPs that are pooled."""
    from diffusers import HiDreamImagePipeline
    from transformers import LlamaConfig, LlamaForCausalLM

    clip_tokenizer, tokenizer, words = tiny.clip_tokenizer("<|endoftext|>"), tiny.t5_tokenizer(), llm_tokenizer()
    tokenizer.model_max_length = LONGEST
    parts = {"kind": "CLIPTextModelWithProjection", "projection": POOLED // 2}
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=TEXT, intermediate_size=2 * TEXT, num_hidden_layers=4, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    pipe = HiDreamImagePipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=vae(), text_encoder=clip(clip_tokenizer, LONGEST, **parts),
        tokenizer=clip_tokenizer, text_encoder_2=clip(clip_tokenizer, LONGEST, **parts), tokenizer_2=clip_tokenizer,
        text_encoder_3=t5(tokenizer), tokenizer_3=tokenizer, text_encoder_4=LlamaForCausalLM(config).eval(),
        tokenizer_4=words, transformer=transformer("hidream"),
    )  # fmt: skip
    pipe.default_sample_size = SIDE // pipe.vae_scale_factor  # it makes pictures of this area only
    return pipe


PIPELINES: dict[str, Callable[[], Any]] = {
    "flux": flux,
    "hidream": hidream,
    "chroma": lambda: with_t5("ChromaPipeline", "chroma", in_channels=4 * CHANNELS),
    "bria": lambda: with_t5("BriaPipeline", "bria", in_channels=4 * CHANNELS),
    "aura_flow": lambda: with_t5("AuraFlowPipeline", "aura_flow", vae(shift_factor=None)),
    "cogview3plus": cogview3plus,
    "cogview4": cogview4,
    "qwen_image": lambda: _with_llm("QwenImagePipeline", "qwen_image", qwen_vae(), in_channels=4 * CHANNELS),
    "lumina2": lambda: _with_llm("Lumina2Pipeline", "lumina2", axes_lens=(300, 16, 16)),
    "z_image": lambda: _with_llm("ZImagePipeline", "z_image"),
    "ovis_image": lambda: _with_llm(
        "OvisImagePipeline", "ovis_image", in_channels=4 * CHANNELS, out_channels=4 * CHANNELS
    ),
    "prx": prx,
    "krea2": krea2,
    "longcat_image": longcat,
    "nucleus_image": nucleus,
    "bria_fibo": bria_fibo,
    "glm_image": glm_image,
    "hunyuan_image": hunyuan_image,
    "ideogram4": ideogram4,
    "ernie_image": ernie_image,
    "flux2": flux2,
}


def build(name: str) -> Any:
    """The pipeline of a family, the same at every call."""
    from tests.video_pipelines import VIDEO_PIPELINES

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = (PIPELINES | VIDEO_PIPELINES)[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe
