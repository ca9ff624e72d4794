"""The networks of stage 4: a small SD3, the frozen text encoders before it, and pools as it sees them.

How it is trained is in `training.flow`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import T5EncoderModel

from mmdit_probe.scenes.world import SIZE
from training import align
from training.align import LAYERS, Alignment
from training.features import WIDTH as FEATURE_WIDTH
from training.loop import low_precision, trained_state
from training.parser import images_of
from training.pool import Pool, console, save_array
from training.text import WIDTH, ClipPair
from training.tokenizers import clip_tokenizer, ids_of, t5_tokenizer
from training.vae import CHANNELS, DOWN

HEADS, HEAD_WIDTH = 4, 32
SHIFT = 3.0
"""Of the noise levels, in training and in the scheduler that ships."""


def build_transformer() -> SD3Transformer2DModel:
    """The untrained transformer: 8 joint blocks, 4 heads of 32, 256 image tokens at 64 px."""
    return SD3Transformer2DModel(
        sample_size=SIZE // DOWN,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )


def init_for_training(model: SD3Transformer2DModel) -> None:
    """Zero what starts as a no-op: modulation gates, the output, and the weights that would read the pooled text."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
                module.weight.zero_()
                module.bias.zero_()
        model.time_text_embed.text_embedder.linear_1.weight.zero_()


class ExplicitJointAttention:
    """SD3's joint attention with the softmax written out; for training only.

    Same result as the stock processor to rounding. On a CPU the fused kernel's backward is several times slower than
    this at a few hundred tokens, and ``torch.compile`` fuses the softmax.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        batch, image_tokens, _ = hidden_states.shape

        def split(x: Tensor) -> Tensor:
            return x.view(batch, x.shape[1], attn.heads, -1).transpose(1, 2)

        q = attn.norm_q(split(attn.to_q(hidden_states)))
        k = attn.norm_k(split(attn.to_k(hidden_states)))
        q_text = attn.norm_added_q(split(attn.add_q_proj(encoder_hidden_states)))
        k_text = attn.norm_added_k(split(attn.add_k_proj(encoder_hidden_states)))
        v = torch.cat([split(attn.to_v(hidden_states)), split(attn.add_v_proj(encoder_hidden_states))], dim=2)
        scores = torch.cat([q, q_text], dim=2) * q.shape[-1] ** -0.5 @ torch.cat([k, k_text], dim=2).transpose(2, 3)
        mixed = (scores.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        image, text = mixed[:, :image_tokens], mixed[:, image_tokens:]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


class AlignedTransformer(nn.Module):
    """The transformer, and the heads that its tokens are aligned through, if any; heads are not shipped."""

    def __init__(self, alignment: Alignment | None = None) -> None:
        super().__init__()
        self.transformer = build_transformer()
        init_for_training(self.transformer)
        alignment = alignment or Alignment()
        self.heads = alignment.heads(align.READ if alignment.target == "labels" else FEATURE_WIDTH)

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Velocity [B, C, h, w], the stock one at pooled text zero, and what each head says [B, I, K]."""
        model = self.transformer
        height, width = latents.shape[-2:]
        hidden = model.pos_embed(latents)
        pooled = torch.zeros(len(latents), 2 * WIDTH, device=latents.device)
        temb = model.time_text_embed(timestep, pooled)
        encoded = model.context_embedder(text)
        said = []
        for i, block in enumerate(model.transformer_blocks):
            encoded, hidden = block(hidden_states=hidden, encoder_hidden_states=encoded, temb=temb)
            if str(i) in self.heads:
                said.append(self.heads[str(i)](hidden))
        velocity = model.proj_out(model.norm_out(hidden, temb))
        return velocity.transpose(1, 2).unflatten(2, (height, width)), said


@dataclass(frozen=True)
class TextEncoders:
    """The frozen text side: captions in, rows of the joint attention out, exactly as the SD3 pipeline makes them."""

    clip: ClipPair
    t5: T5EncoderModel
    device: torch.device

    @torch.no_grad()
    def __call__(self, texts: list[str], kept: dict[str, Tensor] | None = None) -> Tensor:
        """Embeddings [B, 48, 128]: 24 CLIP rows (both towers side by side), then 24 T5 rows.

        Args:
            texts: captions.
            kept: encoder -> for each caption whether its rows stay [B], else they are zero (`draw_kept`).
        """
        ids = {name: ids_of(tokenizer, texts).to(self.device) for name, tokenizer in _TOKENS.items()}
        first = self.clip.clip.text_model(input_ids=ids["clip_l"], output_hidden_states=True).hidden_states[-2]
        second = self.clip.second(input_ids=ids["clip_g"], output_hidden_states=True).hidden_states[-2]
        third = self.t5(ids["t5"])[0]
        if kept:
            first, second, third = (
                rows * kept[name][:, None, None].to(rows)
                for rows, name in zip((first, second, third), ("clip_l", "clip_g", "t5"), strict=True)
            )
        return torch.cat([torch.cat([first, second], dim=-1), third], dim=1)


def draw_kept(n: int, drop: dict[str, float]) -> dict[str, Tensor]:
    """Encoder -> which of n captions keep its rows [n], dropped with its probability (torch's generator)."""
    return {name: torch.rand(n) >= p for name, p in drop.items()}


_TOKENS: dict[str, Any] = {"clip_l": clip_tokenizer(), "clip_g": clip_tokenizer("!"), "t5": t5_tokenizer()}


POOLS: dict[str, dict[str, Any]] = {
    "single": {"size": 32, "objects": (1, 1)},
    "pair": {"size": 48, "objects": (2, 2)},
    "scenes": {"size": SIZE, "objects": (1, 4)},
}


@dataclass(frozen=True)
class Encoded:
    """A pool as the transformer sees it: latents float16 [n, C, h, w]."""

    data: Pool
    latents: NDArray[np.float16]

    def clean(self, rows: Tensor, device: torch.device) -> Tensor:
        """Latents of some scenes [B, C, h, w]."""
        return torch.from_numpy(self.latents[rows.numpy()]).float().to(device)


@torch.no_grad()
def encode_pool(data: Pool, name: str, workdir: Path, vae: AutoencoderKL, device: torch.device) -> Encoded:
    """Latents of a pool, computed once per autoencoder into ``workdir/encoded``."""
    weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in vae.state_dict().values())
    path = workdir / "encoded" / f"{name}-{len(data)}-vae{zlib.crc32(weights):08x}.npy"
    if not path.exists():
        console.print(f"encoding {len(data)} scenes ({name}) ...")
        vae = vae.to(device)
        latents = []
        for start in range(0, len(data), 100):
            images = images_of(data, torch.arange(start, min(start + 100, len(data))), device)
            with low_precision(device):
                mean = vae.encode(images).latent_dist.mode().float()
            latents.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu().numpy())
        save_array(path, np.concatenate(latents))
    return Encoded(data, np.load(path))


def load_trained_transformer(folder: Path) -> SD3Transformer2DModel:
    """The averaged weights of the last checkpoint in a stage's folder, stock processors, in evaluation mode."""
    model, prefix = build_transformer(), "transformer."
    state = trained_state(folder, average=True)
    model.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    return model.eval().requires_grad_(False)
