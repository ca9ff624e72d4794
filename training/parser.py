"""Stage 1: the scene parser, trained on rendered scenes with blur, noise and shifted brightness."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.evaluate import confusion, mean_iou
from mmdit_probe.scenes.parser import SceneParser
from mmdit_probe.scenes.world import CLASSES, NO_COLOUR
from training.loop import Stage, low_precision, run, trained, warmup_cosine
from training.pool import Pool
from training.session import Session


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


def images_of(data: Pool, rows: Tensor, device: torch.device) -> Tensor:
    """Images [B, 3, S, S] in [-1, 1] of some scenes, in the order of ``rows``."""
    return torch.from_numpy(data.images[rows.numpy()]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch_of(data: Pool, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 3, S, S] in [-1, 1], class ids and colour ids [B, S, S], in the order of the pool."""
    rows = rows.sort().values
    classes, colours = (torch.from_numpy(maps[rows.numpy()]).to(device).long() for maps in (data.classes, data.colours))
    return images_of(data, rows, device), classes, colours


def train_parser(session: Session) -> bool:
    """Train the parser into ``workdir/parser``. A step sees 32 full scenes; every fourth, 64 small canvases."""
    where, steps = session.where, session.steps or 1500
    full, small = session.pool("train"), session.pool("train", size=32, objects=(1, 1))
    val = session.pool("val")
    torch.manual_seed(session.seed)
    parser = SceneParser().to(where)
    optimizer = torch.optim.AdamW(parser.parameters(), lr=3e-3, weight_decay=1e-3)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        data, n = (small, 64) if step % 4 == 3 else (full, 32)
        images, classes, colours = batch_of(data, torch.randint(len(data), (n,)), where)
        with low_precision(where):
            class_logits, colour_logits = parser(disturb(images))
        class_loss = F.cross_entropy(class_logits.float(), classes)
        colour_loss = F.cross_entropy(colour_logits.float(), colours, ignore_index=NO_COLOUR)
        return class_loss + colour_loss, {"class": float(class_loss.detach()), "colour": float(colour_loss.detach())}

    stage = Stage(
        "parser", steps, parser, [optimizer], loss, lambda step: warmup_cosine(step, steps, 100),
        lambda step: validate(parser, val, where), evaluate_every=500,
    )  # fmt: skip
    return run(stage, session.workdir / "parser", session)


def validate(parser: SceneParser, val: Pool, device: torch.device, n: int = 256) -> dict[str, float]:
    """Mean IoU over classes, and colour accuracy, on clean and on disturbed held-out scenes."""
    numbers: dict[str, float] = {}
    images, classes, colours = batch_of(val, torch.arange(min(n, len(val))), device)
    for name, seen in (("clean", images), ("disturbed", disturb(images))):
        found, shades = (torch.from_numpy(x) for x in parser.label(seen))
        counts = confusion(classes.cpu().numpy(), found.numpy(), len(CLASSES))
        coloured = colours.cpu() != NO_COLOUR
        numbers[f"miou_{name}"] = float(mean_iou(counts, "gt"))
        numbers[f"colour_{name}"] = float((shades == colours.cpu())[coloured].float().mean())
    return numbers


def load_trained_parser(workdir: Path) -> SceneParser:
    """The parser as trained in ``workdir``, in evaluation mode."""
    return trained(SceneParser(), workdir / "parser")
