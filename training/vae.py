"""Stage 3: the autoencoder. A stock AutoencoderKL, four times smaller in each direction, eight channels.

Its latents are shifted and scaled by one number each, as SD3's are, so that noise drowns fine detail before layout.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.scenes.world import NO_COLOUR
from training.loop import Stage, low_precision, run, trained_state, warmup_cosine
from training.parser import batch_of, load_trained_parser
from training.pool import pool

CHANNELS = 8
DOWN = 4
"""Pixels per latent cell along each axis."""
KL_WEIGHT = 2e-5
PARSER_WEIGHT = 0.05
"""Weight of the parser's cross-entropy on reconstructions: what the parser reads must survive the autoencoder."""


def build_vae() -> AutoencoderKL:
    """The untrained autoencoder: 64 px -> [8, 16, 16]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=64,
    )


def train_vae(workdir: Path, *, steps: int = 3000, batch: int = 32, device: str = "cpu", resume: bool = True) -> None:
    """Train the autoencoder into ``workdir/vae``: mostly small canvases, every fourth step full scenes."""
    where = torch.device(device)
    full = pool(workdir / "pools", "train", 40000)
    small = pool(workdir / "pools", "train", 40000, size=32, objects=(1, 1))
    val = pool(workdir / "pools", "val", 1000)
    parser = load_trained_parser(workdir).to(where)
    torch.manual_seed(0)
    vae = build_vae().to(where)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.99))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        data, n = (full, batch // 2) if step % 4 == 3 else (small, batch)
        images, classes, colours = batch_of(data, torch.randint(len(data), (n,)), where)
        with low_precision(where):
            posterior = vae.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            restored = vae.decode(
                (mean + (0.5 * logvar).exp() * torch.randn_like(mean)).to(posterior.mean.dtype)
            ).sample
            class_logits, colour_logits = parser(restored)
        pixel = (restored.float() - images).abs().mean() + (restored.float() - images).square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean() / (images.shape[-1] / 32) ** 2
        read = F.cross_entropy(class_logits.float(), classes)
        read = read + F.cross_entropy(colour_logits.float(), colours, ignore_index=NO_COLOUR)
        numbers = {"pixel": float(pixel.detach()), "kl": float(kl.detach()), "read": float(read.detach())}
        return pixel + KL_WEIGHT * kl + PARSER_WEIGHT * read, numbers

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        images, classes, _ = batch_of(val, torch.arange(128), where)
        restored = vae.decode(vae.encode(images).latent_dist.mode()).sample
        found = torch.from_numpy(parser.label(restored)[0])
        mse = float((restored - images).square().mean()) / 4
        return {
            "psnr": -10 * torch.log10(torch.tensor(mse)).item(),
            "read_right": float((found == classes.cpu()).float().mean()),
        }

    rate = lambda step: warmup_cosine(step, steps, 100)  # noqa: E731
    run(Stage("vae", steps, vae, [optimizer], loss, rate, evaluate, evaluate_every=500), workdir / "vae", resume=resume)


def load_trained_vae(workdir: Path) -> AutoencoderKL:
    """The autoencoder as trained in ``workdir``; shift and scale are set so that latents have mean 0, variance 1."""
    vae = build_vae()
    vae.load_state_dict(trained_state(workdir / "vae"))
    vae.eval().requires_grad_(False)
    data = pool(workdir / "pools", "train", 40000)
    with torch.no_grad():
        latents = vae.encode(batch_of(data, torch.arange(256), torch.device("cpu"))[0]).latent_dist.mode()
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(1 / float(latents.std()), 4)
    )
    return vae
