"""Latents as autoencoders and transformers hold them: scaled, and packed into tokens where the pipeline does that.

    packed = pack(latents, "packed", cell=2)         # [B, C, h, w] -> [B, h/2 * w/2, C * 4]
    latents = unpack(packed, "packed", cell=2, size=(h, w))

Pipelines' own order of channels (C, then the cell's rows and columns), diffusers 0.42.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmdit_probe.errors import UserError
from mmdit_probe.models.families.facts import Form

"""Latents [B, C, h, w]; tokens [B, I, C * cell^2]; a list of [C, frames, h, w]; or tokens after places for the text,
which the stock pipeline alone makes."""


def pack(latents: Tensor, form: Form, cell: int) -> Any:
    """Latents [B, C, h, w] as a transformer's image input."""
    if form == "listed":
        return list(latents[:, :, None])
    if form == "latents":
        return latents
    cells = latents.unflatten(-1, (-1, cell)).unflatten(-3, (-1, cell))  # [B, C, h', cell, w', cell]
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def channels(image: Any, form: Form) -> int:
    """How many numbers a transformer's image input has for one position."""
    if form == "listed":
        return len(image[0])
    return int(image.shape[1 if form == "latents" else -1])


def unpack(output: Any, form: Form, cell: int, size: tuple[int, int]) -> Tensor:
    """A transformer's output as latents [B, C, h, w]; `size` is (h, w)."""
    if form == "listed":
        return torch.stack([sample[:, 0] for sample in output])
    if form == "latents":
        return torch.as_tensor(output)
    tokens: Tensor = output.unflatten(-1, (-1, cell, cell)).unflatten(1, (size[0] // cell, size[1] // cell))
    return tokens.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def encode(vae: Any, pixels: Tensor, cell: int = 0) -> Tensor:
    """Latents [B, C, h, w] float32 of pixels [B, 3, H, W] in -1..1: the mean, normalised as the transformer expects.

    Args:
        cell: side, in latent cells, of one token of the transformer.

    Raises:
        UserError: an autoencoder whose normalisation is not known.
    """
    video = _is_video(vae)
    encoded = vae.encode(pixels[:, :, None] if video else pixels)
    # Deep-compression autoencoders have no distribution: they give the latents themselves.
    mean = (encoded.latent if "latent" in encoded else encoded.latent_dist.mode()).float()
    mean = mean[:, :, 0] if video else mean
    shift, scale = _normalisation(vae, cell, mean)
    return (mean - shift.to(mean.device)) * scale.to(mean.device)


def decode(vae: Any, latents: Tensor, cell: int = 0) -> Tensor:
    """Pixels [B, 3, H, W] in -1..1 of latents [B, C, h, w]; `cell` as in `encode`."""
    shift, scale = _normalisation(vae, cell, latents)
    unscaled = (latents / scale.to(latents.device) + shift.to(latents.device)).to(vae.dtype)
    if _is_video(vae):
        return torch.as_tensor(vae.decode(unscaled[:, :, None], return_dict=False)[0][:, :, 0])
    return torch.as_tensor(vae.decode(unscaled, return_dict=False)[0])


def _is_video(vae: Any) -> bool:
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def _normalisation(vae: Any, cell: int, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale of latents [B, C, h, w]: one for all channels, one for each, or one for each and place in a
    token."""
    config = vae.config
    if hasattr(vae, "bn") and tuple(config.patch_size) == (cell, cell):
        # Flux.2: statistics of the channels of a token, which are the autoencoder's channels and a cell's places.
        variance = vae.bn.running_var.float() + config.batch_norm_eps
        repeats = (1, latents.shape[-2] // cell, latents.shape[-1] // cell)
        mean, std = (of.view(-1, cell, cell).repeat(repeats) for of in (vae.bn.running_mean.float(), variance.sqrt()))
        return mean, 1.0 / std
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        return mean, 1.0 / std
    if getattr(config, "scaling_factor", None) is None:
        raise UserError(f"the latents of {type(vae).__name__} are normalised in a way that is not known here")
    return torch.tensor(getattr(config, "shift_factor", None) or 0.0), torch.tensor(float(config.scaling_factor))
