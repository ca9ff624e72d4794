"""Tiny random pipelines for tests: complete `StableDiffusion3Pipeline` directories built from the library's own
classes.

    directory = build(tmp_path, variant="sd3")        # "sd3", "sd35" (dual attention and qk-norm) or "no-t5"

Weights are random but every path is live: a zero-initialised projection would hide whatever passes through it. The
vocabularies are written by hand, because the tokenizer trainers do not give the same ids twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LAYERS, HEADS, HEAD_WIDTH = 3, 2, 16
SAMPLE_SIZE = 8  # latent side; patch 2 gives a 4 x 4 token grid, the VAE's /8 gives 64 pixels
CLIP_LENGTH, T5_LENGTH = 12, 10
MERGES = [("r", "e"), ("re", "d</w>"), ("r", "i"), ("ri", "n"), ("rin", "g</w>"), ("c", "a"), ("ca", "t</w>")]
PIECES = ["▁a", "▁red", "▁ri", "ng", "▁cat", "▁and", "▁blue", "▁house", "▁on", "▁grass", "▁"]


def clip_tokenizer(pad: str, merges: list[tuple[str, str]] = MERGES) -> Any:
    """Byte-level BPE with the full byte alphabet, plain and end-of-word, so that no character is ever unknown."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(33, 127)] + ["é"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -2.0) for piece in PIECES] + [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def _clip_encoder(tokenizer: Any, width: int, projection: int) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def transformer(variant: str = "sd3", **changes: Any) -> Any:
    """A random `SD3Transformer2DModel` in which every parameter is non-zero."""
    from diffusers import SD3Transformer2DModel

    options: dict[str, Any] = {
        "sample_size": SAMPLE_SIZE,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": LAYERS,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 40,
        "caption_projection_dim": HEADS * HEAD_WIDTH,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 16,
    }
    if variant == "sd35":
        options |= {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    model = SD3Transformer2DModel(**(options | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            # Attention comes out far from uniform and far from one-hot, so that a wrong probability shows.
            scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape))
    return model.eval()


def pipeline(variant: str = "sd3", seed: int = 0) -> Any:
    """A complete random `StableDiffusion3Pipeline` in memory."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")
        text_encoder, text_encoder_2 = _clip_encoder(tokenizer, 16, 8), _clip_encoder(tokenizer_2, 24, 16)
        tokenizer_3, text_encoder_3 = t5_tokenizer(), None
        if variant != "no-t5":
            config = T5Config(
                vocab_size=len(tokenizer_3), d_model=40, d_kv=8, d_ff=64, num_layers=2, num_heads=2, is_gated_act=True
            )
            text_encoder_3 = T5EncoderModel(config)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            norm_num_groups=2,
            layers_per_block=1,
            sample_size=64,
            scaling_factor=1.5,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        pipe = StableDiffusion3Pipeline(
            transformer=transformer(variant),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae.eval(),
            text_encoder=text_encoder.eval(),
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2.eval(),
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3.eval() if text_encoder_3 is not None else None,
            tokenizer_3=tokenizer_3 if variant != "no-t5" else None,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build(directory: Path, variant: str = "sd3", seed: int = 0) -> Path:
    """Write `pipeline(variant, seed)` to `directory` as diffusers does, safetensors only."""
    pipeline(variant, seed).save_pretrained(directory, safe_serialization=True)
    assert (directory / "model_index.json").exists(), json.dumps([p.name for p in directory.iterdir()])
    return directory


def sentencepiece_tokenizer(directory: Path) -> Any:
    """SentencePiece in Python: no character offsets; what it was not trained on falls into bytes. Its pieces are the
    trainer's choice."""
    from sentencepiece import SentencePieceTrainer
    from transformers import SentencePieceBackend

    SentencePieceTrainer.train(
        sentence_iterator=iter(["a red ring and a blue house on grass", "a cat, a house and a ring"] * 50),
        model_prefix=str(directory / "pieces"), vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, pad_id=3,
    )  # fmt: skip
    return SentencePieceBackend(
        vocab_file=str(directory / "pieces.model"), unk_token="<unk>", eos_token="</s>", pad_token="<pad>",
        model_max_length=T5_LENGTH,
    )  # fmt: skip
