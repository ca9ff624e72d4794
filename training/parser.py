"""Stage 1: the scene parser, trained on rendered scenes with blur, noise and shifted brightness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.evaluate import confusion, mean_iou
from mmdit_probe.scenes.parser import SceneParser
from mmdit_probe.scenes.world import CLASSES, NO_COLOUR
from training.loop import Stage, low_precision, run, trained_state, warmup_cosine
from training.pool import Pool, pool


def disturb(images: Tensor) -> Tensor:
    """Blur and noise of random strength, and a slight change of brightness, one setting per image [B, 3, S, S]."""
    n = len(images)
    taps = torch.tensor([1.0, 2.0, 1.0], device=images.device) / 4
    kernel = (taps[:, None] * taps[None]).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    amount = torch.rand(n, 1, 1, 1, device=images.device)
    mixed = images + amount * (blurred - images)
    light = 1 + 0.1 * torch.randn(n, 1, 1, 1, device=images.device)
    return mixed * light + 0.2 * torch.rand(n, 1, 1, 1, device=images.device) * torch.randn_like(images)


def batch_of(data: Pool, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 3, S, S] in [-1, 1], class ids and colour ids [B, S, S]."""
    rows = np.sort(indices.numpy())
    images = torch.from_numpy(data.images[rows]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    classes = torch.from_numpy(data.classes[rows]).to(device).long()
    return images, classes, torch.from_numpy(data.colours[rows]).to(device).long()


def train_parser(
    workdir: Path, *, steps: int = 1500, batch: int = 32, device: str = "cpu", resume: bool = True
) -> None:
    """Train the parser into ``workdir/parser``. A step sees a batch of full scenes; every fourth, small canvases."""
    where = torch.device(device)
    full = pool(workdir / "pools", "train", 40000)
    small = pool(workdir / "pools", "train", 40000, size=32, objects=(1, 1))
    val = pool(workdir / "pools", "val", 1000)
    torch.manual_seed(0)
    parser = SceneParser().to(where)
    optimizer = torch.optim.AdamW(parser.parameters(), lr=3e-3, weight_decay=1e-3)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        data, n = (small, 2 * batch) if step % 4 == 3 else (full, batch)
        images, classes, colours = batch_of(data, torch.randint(len(data), (n,)), where)
        with low_precision(where):
            class_logits, colour_logits = parser(disturb(images))
        class_loss = F.cross_entropy(class_logits.float(), classes)
        colour_loss = F.cross_entropy(colour_logits.float(), colours, ignore_index=NO_COLOUR)
        return class_loss + colour_loss, {"class": float(class_loss.detach()), "colour": float(colour_loss.detach())}

    def evaluate(step: int) -> dict[str, float]:
        parser.eval()
        numbers = validate(parser, val, where)
        parser.train()
        return numbers

    stage = Stage(
        "parser",
        steps,
        parser,
        [optimizer],
        loss,
        lambda step: warmup_cosine(step, steps, 100),
        evaluate,
        evaluate_every=500,
    )
    run(stage, workdir / "parser", resume=resume)


@torch.no_grad()
def validate(parser: SceneParser, val: Pool, device: torch.device, n: int = 256) -> dict[str, float]:
    """Mean IoU over classes, and colour accuracy, on clean and on disturbed held-out scenes."""
    numbers: dict[str, float] = {}
    images, classes, colours = batch_of(val, torch.arange(n), device)
    for name, seen in (("clean", images), ("disturbed", disturb(images))):
        found, shades = (torch.from_numpy(x) for x in parser.label(seen))
        counts = confusion(classes.cpu().numpy(), found.numpy(), len(CLASSES))
        coloured = colours.cpu() != NO_COLOUR
        numbers[f"miou_{name}"] = float(mean_iou(counts, "gt"))
        numbers[f"colour_{name}"] = float((shades == colours.cpu())[coloured].float().mean())
    return numbers


def load_trained_parser(workdir: Path) -> SceneParser:
    """The parser as trained in ``workdir``, in evaluation mode."""
    parser = SceneParser()
    parser.load_state_dict(trained_state(workdir / "parser"))
    return parser.eval().requires_grad_(False)
