"""Stage 3: the autoencoder. A stock AutoencoderKL, four times smaller in each direction, eight channels.

It learns from pixels alone. The parser judges reconstructions (``read_right``) and teaches nothing: after 3000 steps it
reads .987 of the pixels right. Latents are shifted and scaled by one number each, as SD3's are, so that noise drowns
fine detail before layout.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.loop import Stage, low_precision, run, trained, warmup_cosine
from training.parser import batch_of, images_of, load_trained_parser
from training.session import Session

CHANNELS = 8
DOWN = 4
"""Pixels per latent cell along each axis."""
KL_WEIGHT = 2e-5


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


def train_vae(session: Session) -> bool:
    """Train the autoencoder into ``workdir/vae``: mostly small canvases, every fourth step full scenes."""
    where, steps = session.where, session.steps or 3000
    full, small = session.pool("train"), session.pool("train", size=32, objects=(1, 1))
    val = session.pool("val")
    parser = load_trained_parser(session.workdir).to(where)
    torch.manual_seed(session.seed)
    vae = build_vae().to(where)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.99))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        data, n = (full, 16) if step % 4 == 3 else (small, 32)
        images = images_of(data, torch.randint(len(data), (n,)), where)
        with low_precision(where):
            posterior = vae.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            restored = vae.decode(
                (mean + (0.5 * logvar).exp() * torch.randn_like(mean)).to(posterior.mean.dtype)
            ).sample
        pixel = (restored.float() - images).abs().mean() + (restored.float() - images).square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean() / (images.shape[-1] / 32) ** 2
        return pixel + KL_WEIGHT * kl, {"pixel": float(pixel.detach()), "kl": float(kl.detach())}

    def evaluate(step: int) -> dict[str, float]:
        images, classes, _ = batch_of(val, torch.arange(min(128, len(val))), where)
        restored = vae.decode(vae.encode(images).latent_dist.mode()).sample
        found = torch.from_numpy(parser.label(restored)[0])
        mse = float((restored - images).square().mean()) / 4
        return {
            "psnr": -10 * torch.log10(torch.tensor(mse)).item(),
            "read_right": float((found == classes.cpu()).float().mean()),
        }

    stage = Stage(
        "vae", steps, vae, [optimizer], loss, lambda step: warmup_cosine(step, steps, 100), evaluate,
        evaluate_every=500,
    )  # fmt: skip
    return run(stage, session.workdir / "vae", session)


def load_trained_vae(session: Session) -> AutoencoderKL:
    """The autoencoder as trained, frozen; shift and scale are set so that latents have mean 0, variance 1."""
    vae = trained(build_vae(), session.workdir / "vae")
    data = session.pool("train")
    with torch.no_grad():
        images = images_of(data, torch.arange(min(256, len(data))), torch.device("cpu"))
        latents = vae.encode(images).latent_dist.mode()
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(1 / float(latents.std()), 4)
    )
    return vae
