"""Stage ssl: an encoder of scenes that no label taught, by masked reconstruction (SimMIM, arXiv 2111.09886).

    python -m training ssl
    python -m training transformer --align all:features

A small vision transformer sees an image with three fifths of it hidden, in blocks of 8 px, and restores the hidden
pixels from what is left. Its tokens are those of the embedded transformer, one per latent cell, at any canvas size.
Exact masks judge it (a linear probe, beside the same probe on plain pixels) and never teach it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit_probe.scenes.world import CLASSES
from training.loop import Stage, low_precision, run, trained, warmup_cosine
from training.parser import batch_of, images_of
from training.pool import Pool
from training.session import Session

PATCH = 4
"""Pixels per token along each axis, as many as per latent cell."""
WIDTH = 96
HIDDEN, BLOCK = 0.6, 2
"""Share of an image that is hidden, and the side of a hidden block in tokens."""


class SceneEncoder(nn.Module):
    """A vision transformer of four layers, width 96, with a linear head that restores pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH**2, WIDTH)
        self.hidden = nn.Parameter(torch.zeros(WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 3, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.restore = nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Features [B, I, 96] of images [B, 3, S, S] in [-1, 1]; `hidden` [B, I] says which tokens it may not see."""
        tokens = self.embed(patches(images))
        if hidden is not None:
            tokens = torch.where(hidden[..., None], self.hidden.to(tokens), tokens)
        places = get_2d_sincos_pos_embed(WIDTH, images.shape[-1] // PATCH, output_type="pt")
        return self.layers(tokens + places.to(tokens))  # type: ignore[no-any-return]


def patches(images: Tensor) -> Tensor:
    """Pixels of each token, [B, I, 48]."""
    return F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)


def draw_hidden(n: int, grid: int) -> Tensor:
    """Which tokens of n images are hidden: bool [n, grid * grid], the same number in each."""
    side = grid // BLOCK
    order = torch.rand(n, side * side).argsort(1)
    blocks = (order < round(HIDDEN * side * side)).view(n, side, side)
    return blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2).flatten(1)


def train_ssl(session: Session) -> bool:
    """Train the encoder into ``workdir/ssl``: full scenes, every fourth step small canvases."""
    where, steps = session.where, session.steps or 3000
    full, small = session.pool("train"), session.pool("train", size=32, objects=(1, 1))
    val = session.pool("val")
    torch.manual_seed(session.seed)
    encoder = SceneEncoder().to(where)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.02, betas=(0.9, 0.98))

    def error(images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = draw_hidden(len(images), images.shape[-1] // PATCH).to(where)
        with low_precision(where):
            restored = encoder.restore(encoder(images, hidden)).float()
        truth = patches(images)[hidden]
        return (restored[hidden] - truth).square().mean(), truth.var()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        data, n = (small, 64) if step % 4 == 3 else (full, 32)
        images = images_of(data, torch.randint(len(data), (n,)), where)
        return error(images)[0], {}

    def evaluate(step: int) -> dict[str, float]:
        n = min(256, len(val))
        lost, whole = error(images_of(val, torch.arange(n), where))
        numbers = {"explained": 1 - float(lost / whole)}
        return numbers | {
            name: probe(val, tokens, n, where) for name, tokens in (("probe", encoder), ("pixels", patches))
        }

    stage = Stage(
        "ssl", steps, encoder, [optimizer], loss, lambda step: warmup_cosine(step, steps, 200), evaluate,
        evaluate_every=500,
    )  # fmt: skip
    return run(stage, session.workdir / "ssl", session)


def probe(data: Pool, tokens: Callable[[Tensor], Tensor], n: int, device: torch.device) -> float:
    """Accuracy of a linear classifier from tokens to the class that fills most of their pixels, fitted on half of n."""
    images, classes, _ = batch_of(data, torch.arange(n), device)
    of_pixels = F.one_hot(classes, len(CLASSES)).movedim(-1, 1).float()
    shares = F.avg_pool2d(of_pixels, PATCH).flatten(2).transpose(1, 2).cpu()
    inputs = tokens(images).float().cpu()
    inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
    fitted, tested = ((x[: n // 2].flatten(0, 1), x[n // 2 :].flatten(0, 1)) for x in (inputs, shares))
    weights = torch.linalg.lstsq(fitted[0], tested[0]).solution
    return float(((fitted[1] @ weights).argmax(-1) == tested[1].argmax(-1)).float().mean())


def load_trained_encoder(workdir: Path) -> SceneEncoder:
    """The encoder as trained in ``workdir``, frozen, in evaluation mode."""
    return trained(SceneEncoder(), workdir / "ssl")
