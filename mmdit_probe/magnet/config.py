"""Every choice of a MAGNET training, in one frozen record; defaults are the paper's (its code's where it is silent).

    >>> MagnetConfig(layers=(4,), steps=200).effective(processes=2)
    16

Source: arXiv:2509.18096 section 4.3 and appendix A, and its published code. One deliberate difference: the paper's
figure of 1e-5 for the learning rate is not what its code ran (1e-4), so 1e-4 is the default.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mmdit_probe.attention.gradients import Space
from mmdit_probe.errors import UserError, unknown
from mmdit_probe.magnet.losses import LossWeights, Normalise
from mmdit_probe.specs import Spec

ALIGNMENTS = ("token", "head", "none")
Alignment = Literal["token", "head", "none"]


@dataclass(frozen=True)
class MagnetConfig:
    """Options of `train`.

    Attributes:
        layers: joint-attention layers whose I2T maps are aligned; several are averaged (token) or all offered (head).
        alignment: "token" pairs the map of a class's words (mean over heads) with the class's mask; "head" pairs the
            maps of layers x heads x text tokens with masks by bipartite matching; "none" trains on flow matching
            alone, the control.
        space: maps before ("logit") or after ("probability") the softmax. normalise: "minmax" over space, or "none".
        weights: of the losses.
        lora_layers: layers that get an adapter; streams: "image" or "joint". rank, alpha: of the adapter.
        steps, batch, accumulation: optimiser steps, samples per process and micro-batch, micro-batches per step.
        rate, warmup, floor, decay, clip: AdamW's learning rate, warm-up steps (from `floor` times the rate), its final
            share of the rate after the cosine, weight decay, largest gradient norm.
        sigma_mean, sigma_std: of the normal whose sigmoid indexes the scheduler's 1000 shifted noise levels.
        ema: decay of the averaged adapter; 0 is off. The averaged one is validated and saved.
        precision: "no", "bf16" or "fp16" (autocast; the adapter stays float32). checkpointing: of activations.
        score_head: "conv" puts the published code's hidden 3-convolution head between maps and loss, an ablation.
        drop_prompt: share of samples whose prompt is empty, and whose masks are then left out.
        seed: of everything that is drawn.
    """

    layers: tuple[int, ...]
    alignment: Alignment = "token"
    space: Space = "logit"
    normalise: Normalise = "none"
    weights: LossWeights = field(default_factory=LossWeights)
    lora_layers: Spec = "all"
    streams: Literal["image", "joint"] = "image"
    rank: int = 16
    alpha: float = 16.0
    steps: int = 3000
    batch: int = 8
    accumulation: int = 1
    rate: float = 1e-4
    warmup: int = 500
    floor: float = 0.01
    decay: float = 1e-4
    clip: float = 0.01
    sigma_mean: float = 0.0
    sigma_std: float = 0.5
    ema: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpointing: bool = False
    score_head: Literal["none", "conv"] = "none"
    drop_prompt: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("alignment", ALIGNMENTS), ("space", ("logit", "probability")), ("normalise", ("none", "minmax")),
            ("streams", ("image", "joint")), ("precision", ("no", "bf16", "fp16")), ("score_head", ("none", "conv")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise unknown(name.replace("_", " "), getattr(self, name), known)
        for name in ("rank", "steps", "batch", "accumulation"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.warmup <= self.steps:
            raise UserError(f"warm-up of {self.warmup} steps in a training of {self.steps}; expected at most as many")
        if not 0.0 <= self.ema < 1.0:
            raise UserError(f"ema {self.ema}: expected a decay in 0..1, 0 for none")
        if self.score_head == "conv" and self.alignment != "token":
            raise UserError("the convolution head reads token maps; use it with alignment 'token'")

    def effective(self, processes: int = 1) -> int:
        """Samples per optimiser step."""
        return self.batch * self.accumulation * processes

    def as_request(self) -> dict[str, Any]:
        """JSON values of every option."""
        return asdict(self) | {"layers": list(self.layers)}
