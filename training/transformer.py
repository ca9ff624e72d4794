"""Stage 4: the joint transformer, a small SD3, trained by rectified flow on frozen text encoders and latents.

The recipe, and where each part comes from:

* velocity target ``n - x`` at logit-normal noise levels under shift 3 (SD3, arXiv 2403.03206, section 3);
* every text encoder dropped at random by zeroing its rows, 10 % empty captions (same, section 5.2 and appendix B);
* low resolution first: single objects on 32 px canvases (64 tokens), then whole scenes (256 tokens);
* the pooled text is zero throughout, so all text acts through the joint attention;
* image tokens in the middle of the network are also asked what the parser reads at their place in the clean image
  (classes and colours), after REPA (arXiv 2410.06940), cross-entropy for cosine. Attention is never supervised;
* Muon for the matrices inside the blocks, AdamW for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5EncoderModel

from mmdit_probe.scenes.captions import KINDS
from mmdit_probe.scenes.parser import SceneParser
from mmdit_probe.scenes.world import CLASSES, COLOUR_NAMES, SIZE
from training.loop import AverageOfWeights, Stage, constant_then_linear, low_precision, run, trained_state
from training.parser import batch_of, load_trained_parser
from training.pool import Pool, pool
from training.text import WIDTH, ClipPair, draw_captions, load_trained_text
from training.tokenizers import TEXT_LENGTH, clip_tokenizer, t5_tokenizer
from training.vae import CHANNELS, DOWN, load_trained_vae

LAYERS, HEADS, HEAD_WIDTH = 8, 4, 32
ALIGN_AFTER = 5
"""Image tokens are aligned to the parser after this many blocks."""
ALIGN_WEIGHT = 0.3
SHIFT = 3.0
EMPTY = 0.1
DROP = {"clip_l": 0.15, "clip_g": 0.15, "t5": 0.5}
"""Probability that an encoder's rows are zeroed, independently of the others."""


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
    """The transformer and the head that its middle tokens are aligned through; the head is not shipped."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()
        init_for_training(self.transformer)
        width = HEADS * HEAD_WIDTH
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, len(CLASSES) + len(COLOUR_NAMES) + 1)
        )

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity [B, C, h, w] and alignment logits [B, I, 22]. The velocity is the stock one, pooled text zero."""
        model = self.transformer
        height, width = latents.shape[-2:]
        hidden = model.pos_embed(latents)
        pooled = torch.zeros(len(latents), 2 * WIDTH, device=latents.device)
        temb = model.time_text_embed(timestep, pooled)
        encoded = model.context_embedder(text)
        logits = hidden
        for i, block in enumerate(model.transformer_blocks, start=1):
            encoded, hidden = block(hidden_states=hidden, encoder_hidden_states=encoded, temb=temb)
            if i == ALIGN_AFTER:
                logits = self.head(hidden)
        velocity = model.proj_out(model.norm_out(hidden, temb))
        return velocity.transpose(1, 2).unflatten(2, (height, width)), logits


@dataclass(frozen=True)
class TextEncoders:
    """The frozen text side: captions in, rows of the joint attention out, exactly as the SD3 pipeline makes them."""

    clip: ClipPair
    t5: T5EncoderModel
    device: torch.device

    @torch.no_grad()
    def __call__(self, texts: list[str], drop: dict[str, float] | None = None) -> Tensor:
        """Embeddings [B, 48, 128]: 24 CLIP rows (both towers side by side), then 24 T5 rows.

        Args:
            texts: captions.
            drop: probability by encoder that its rows are zero for a caption (drawn from torch's generator).
        """

        def ids(tokens: Any) -> Tensor:
            encoded = tokens(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
            return encoded.input_ids.to(self.device)  # type: ignore[no-any-return]

        first = self.clip.clip.text_model(input_ids=ids(_TOKENS["clip_l"]), output_hidden_states=True).hidden_states[-2]
        second = self.clip.second(input_ids=ids(_TOKENS["clip_g"]), output_hidden_states=True).hidden_states[-2]
        third = self.t5(ids(_TOKENS["t5"]))[0]
        kept = {name: torch.rand(len(texts), 1, 1) >= p for name, p in (drop or {}).items()}
        if drop:
            first, second, third = (x * kept[name].to(x) for x, name in zip((first, second, third), drop, strict=True))
        return torch.cat([torch.cat([first, second], dim=-1), third], dim=1)


_TOKENS: dict[str, Any] = {"clip_l": clip_tokenizer(), "clip_g": clip_tokenizer("!"), "t5": t5_tokenizer()}


@dataclass(frozen=True)
class Encoded:
    """A pool as the transformer sees it: latents float16 [n, C, h, w], the parser's reading float16 [n, 22, h, w]."""

    data: Pool
    latents: NDArray[np.float16]
    reading: NDArray[np.float16]


@torch.no_grad()
def encode_pool(
    data: Pool, name: str, workdir: Path, vae: AutoencoderKL, parser: SceneParser, device: torch.device
) -> Encoded:
    """Latents and parser readings of a pool, computed once into ``workdir/encoded``.

    The reading of a token is the mean over its pixels of the parser's class probabilities [15], and of its colour
    probabilities where it sees an object [6], the rest being "no colour" [1].
    """
    folder = workdir / "encoded"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{part}.npy" for part in ("latents", "reading")]
    if not all(path.exists() for path in paths):
        vae, parser = vae.to(device), parser.to(device)
        latents, readings = [], []
        things = len(CLASSES) - 5
        for start in range(0, len(data), 100):
            images, _, _ = batch_of(data, torch.arange(start, min(start + 100, len(data))), device)
            with low_precision(device):
                mean = vae.encode(images).latent_dist.mode().float()
                classes, colours = (x.float().softmax(1) for x in parser(images))
            thing = classes[:, :things].sum(1, keepdim=True)
            reading = F.avg_pool2d(torch.cat([classes, colours * thing, 1 - thing], dim=1), DOWN)
            latents.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu().numpy())
            readings.append(reading.half().cpu().numpy())
        for path, parts in zip(paths, (latents, readings), strict=True):
            np.save(path, np.concatenate(parts))
    return Encoded(data, *(np.load(path) for path in paths))


@dataclass(frozen=True)
class Phase:
    """One part of the curriculum: which pool, how many steps, which batch."""

    pool: str
    steps: int
    batch: int


POOLS: dict[str, dict[str, Any]] = {
    "single": {"size": 32, "objects": (1, 1)},
    "scenes": {"size": SIZE, "objects": (1, 4)},
}
HELD_OUT = {"single": 500, "scenes": 1000}
CURRICULUM = (Phase("single", 750, 96), Phase("scenes", 4750, 48))


def phase_at(step: int, curriculum: tuple[Phase, ...]) -> Phase:
    """The phase that a step belongs to; steps past the end stay in the last."""
    for phase in curriculum:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return curriculum[-1]


def draw_sigmas(n: int) -> Tensor:
    """Noise levels [n] in (0, 1): logit-normal(0, 1), then shift 3 (arXiv 2403.03206, eqs. 19 and 23)."""
    u = torch.sigmoid(torch.randn(n))
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def optimizers(model: nn.Module, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices inside the blocks (not those of the modulation), AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = "transformer_blocks" in name and parameter.ndim == 2 and "norm1" not in name
        (matrices if inside else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=adam_rate, weight_decay=0.0, betas=(0.9, 0.98))]


def train_transformer(
    workdir: Path,
    *,
    curriculum: tuple[Phase, ...] = CURRICULUM,
    device: str = "cpu",
    resume: bool = True,
    compiled: bool = True,
    validate: Callable[[AlignedTransformer, int], dict[str, float]] | None = None,
) -> None:
    """Train the transformer into ``workdir/transformer``.

    Args:
        curriculum: phases in order; lengthening the last one continues a finished run.
        validate: called on the averaged weights every 500 steps, beside the text gain that is always measured.
    """
    where = torch.device(device)
    parser, vae = load_trained_parser(workdir), load_trained_vae(workdir)
    clip, t5 = load_trained_text(workdir)
    encode = TextEncoders(clip.to(where), t5.to(where), where)

    @cache
    def encoded(split: str, count: int, name: str) -> Encoded:
        data = pool(workdir / "pools", split, count, **POOLS[name])
        return encode_pool(data, f"{split}-{name}", workdir, vae, parser, where)

    torch.manual_seed(0)
    model = AlignedTransformer().to(where)
    model.transformer.set_attn_processor(ExplicitJointAttention())
    forward = torch.compile(model) if compiled else model
    steps = sum(phase.steps for phase in curriculum)
    average = AverageOfWeights(model, 0.999)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        phase = phase_at(step, curriculum)
        data = encoded("train", 40000, phase.pool)
        rows = torch.randint(len(data.data), (phase.batch,))
        clean = torch.from_numpy(data.latents[rows.numpy()]).float().to(where)
        reading = torch.from_numpy(data.reading[rows.numpy()]).float().to(where)
        text = encode(draw_captions(data.data, rows.tolist(), EMPTY), DROP)
        sigma = draw_sigmas(phase.batch).to(where)
        noise = torch.randn(clean.shape).to(where)
        mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
        with low_precision(where):
            velocity, logits = forward(mixed, text, 1000 * sigma)
        flow = F.mse_loss(velocity.float(), noise - clean)
        align = alignment_loss(logits.float(), reading)
        return flow + ALIGN_WEIGHT * align, {"flow": float(flow.detach()), "align": float(align.detach())}

    def evaluate(step: int) -> dict[str, float]:
        name = phase_at(step - 1, curriculum).pool
        averaged = AlignedTransformer().to(where)
        average.copy_to(averaged)
        averaged.eval().requires_grad_(False)
        numbers = text_gain(averaged, encoded("val", HELD_OUT[name], name), encode, where)
        return numbers | (validate(averaged, step) if validate else {})

    stage = Stage(
        "transformer",
        steps,
        model,
        optimizers(model, 3e-3, 2e-3),
        loss,
        lambda step: constant_then_linear(step, steps, 200),
        evaluate,
        evaluate_every=500,
        save_every=250,
        average=average,
    )
    run(stage, workdir / "transformer", resume=resume)


def alignment_loss(logits: Tensor, reading: Tensor) -> Tensor:
    """Cross-entropy of the head's class and colour logits [B, I, 22] against the parser's reading [B, 22, h, w]."""
    target = reading.flatten(2).transpose(1, 2)
    parts = zip(
        logits.split([len(CLASSES), len(COLOUR_NAMES) + 1], -1), target.split([len(CLASSES), 7], -1), strict=True
    )
    return torch.stack([-(t * part.log_softmax(-1)).sum(-1).mean() for part, t in parts]).sum()


@torch.no_grad()
def text_gain(
    model: AlignedTransformer, data: Encoded, encode: TextEncoders, device: torch.device, n: int = 96
) -> dict[str, float]:
    """Held-out flow loss at fixed noise levels with the right caption, and how much worse another's or none makes it.

    Returns:
        ``flow@s``, ``shuffled@s`` and ``empty@s``: the loss, and the relative increase in percent, at sigma s.
    """
    clean = torch.from_numpy(data.latents[:n]).float().to(device)
    kind = KINDS.index("colour")
    right = [data.data.captions[i][kind] for i in range(n)]
    texts = {"flow": right, "shuffled": right[n // 2 :] + right[: n // 2], "empty": [""] * n}
    encoded = {name: encode(captions) for name, captions in texts.items()}
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(device)
    numbers: dict[str, float] = {}
    for sigma in (0.95, 0.85, 0.7, 0.5, 0.3):
        mixed = torch.lerp(clean, noise, sigma)
        for name, text in encoded.items():
            with low_precision(device):
                velocity, _ = model(mixed, text, torch.full((n,), 1000 * sigma, device=device))
            loss = float(F.mse_loss(velocity.float(), noise - clean))
            base = numbers.get(f"flow@{sigma}", loss)
            numbers[f"{name}@{sigma}"] = loss if name == "flow" else 100 * (loss / base - 1)
    return numbers


def load_trained_transformer(workdir: Path) -> SD3Transformer2DModel:
    """The averaged weights of the last checkpoint in ``workdir``, stock processors, in evaluation mode."""
    model = AlignedTransformer()
    model.load_state_dict(trained_state(workdir / "transformer", average=True))
    return model.transformer.eval().requires_grad_(False)
