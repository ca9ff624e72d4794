"""One micro-batch: samples in, the MAGNET objective out, as a mean over samples.

The samples' noise, noise levels and dropped prompts are functions of their place in the training, and pictures and
prompts are encoded one by one, so that the result does not depend on how a batch is split.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmdit_probe.data.sample import Sample
from mmdit_probe.magnet import schedule
from mmdit_probe.magnet.config import MagnetConfig
from mmdit_probe.magnet.losses import as_logits, flow_matching, mask_loss, match
from mmdit_probe.magnet.tap import TextMapTap
from mmdit_probe.models.mmdit import MMDiT, TextCondition
from mmdit_probe.models.tokens import TokenTable

TERMS = ("loss", "flow", "focal", "dice", "masks")
"""Columns of the training log; `masks` is the mean number of aligned masks per sample."""


@dataclass(frozen=True)
class Encoded:
    """A sample as the transformer reads it: latents [C, h, w], text [T, C], pooled [P], what each position is."""

    latents: Tensor
    text: Tensor
    pooled: Tensor
    tokens: TokenTable


class Encoder:
    """Pictures and prompts to latents and embeddings, remembered up to a number of bytes."""

    def __init__(self, model: MMDiT, limit: int = 1 << 30) -> None:
        self.model, self.limit = model, limit
        self._known: OrderedDict[tuple[str, str], Encoded] = OrderedDict()
        self._bytes = 0

    def __call__(self, sample: Sample, prompt: str) -> Encoded:
        key = (sample.name, prompt)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        text = self.model.encode_prompt([prompt])
        latents = self.model.encode_image([sample.image])
        found = Encoded(latents[0], text.prompt_embeds[0], text.pooled[0], text.tokens[0])
        self._known[key] = found
        self._bytes += _size(found)
        while self._bytes > self.limit and len(self._known) > 1:
            self._bytes -= _size(self._known.popitem(last=False)[1])
        return found


class ConvHead(nn.Module):
    """The published code's hidden head on the maps: three 3x3 convolutions, 1-64-64-1, added to its input. Ablation."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
                nn.Conv2d(64, 1, 3, padding=1),
            )  # fmt: skip

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [K, h, w] with the residual added."""
        return maps + self.body(maps[:, None])[:, 0]


class Objective:
    """The loss of a micro-batch of samples.

    Args:
        model: the model whose encoders and scheduler are used. config: the options. head: the ablation's head, or None.
    """

    def __init__(self, model: MMDiT, config: MagnetConfig, head: nn.Module | None = None) -> None:
        self.model, self.config, self.head = model, config, head
        self.encode = Encoder(model)
        self.levels: NDArray[np.float64] = schedule.noise_levels(model.scheduler)

    def __call__(
        self, transformer: Any, tap: TextMapTap | None, samples: Sequence[Sample], places: Sequence[int]
    ) -> tuple[Tensor, dict[str, float]]:
        """The objective, a mean over the samples, with gradients.

        Args:
            transformer: what is called: the model's transformer, or a data-parallel wrapper of it.
            tap: attached to it; None trains on flow matching alone.
            samples: pictures of one size. places: the place of each in the whole training.

        Returns: the loss, and the means of its terms (see `TERMS`).
        """
        config, family = self.config, self.model.family
        encoded, sigmas, noises, dropped = [], [], [], []
        for sample, place in zip(samples, places, strict=True):
            rng = schedule.draws(place, config.seed)
            normal, drop = float(rng.standard_normal()), float(rng.random()) < config.drop_prompt
            encoded.append(self.encode(sample, "" if drop else sample.prompt))
            sigmas.append(schedule.level_of(normal, self.levels, config.sigma_mean, config.sigma_std))
            noises.append(schedule.noise(tuple(encoded[-1].latents.shape), place, config.seed))
            dropped.append(drop)
        device = self.model.device
        latents, noise = torch.stack([e.latents for e in encoded]), torch.stack(noises).to(device)
        sigma = torch.tensor(sigmas, device=device, dtype=torch.float32)
        mixed = torch.lerp(latents, noise, sigma[:, None, None, None])
        masks = [np.zeros((0, 1, 1), bool) if d else s.masks for s, d in zip(samples, dropped, strict=True)]
        groups = self._groups(samples, encoded, masks) if config.alignment == "token" else None
        if tap is not None:
            tap.begin(groups, family.grid(mixed, self.model.transformer.config))
        text = TextCondition(
            torch.stack([e.text for e in encoded]),
            torch.stack([e.pooled for e in encoded]),
            [e.tokens for e in encoded],
        )
        output = transformer(**self.model.inputs(mixed, sigma, text), return_dict=False)[0]
        velocity = self.model.velocity(output, mixed)
        flow = flow_matching(velocity, latents, noise)
        focals, dices = self._aligned(tap, masks) if tap is not None else (torch.zeros_like(flow),) * 2
        weights = config.weights
        total = weights.flow * flow + weights.mask * (weights.focal * focals + weights.dice * dices)
        loss = total.mean()
        if self.head is not None:
            # Data parallelism expects a gradient of every parameter, also from a batch without masks.
            loss = loss + 0.0 * torch.stack([p.sum() for p in self.head.parameters()]).sum()
        terms = {"loss": loss, "flow": flow.mean(), "focal": focals.mean(), "dice": dices.mean()}
        counted = {name: float(value.detach()) for name, value in terms.items()}
        return loss, counted | {"masks": float(np.mean([len(m) for m in masks]))}

    def _groups(self, samples: Sequence[Sample], encoded: Sequence[Encoded], masks: Sequence[Any]) -> Tensor:
        """Weights [B, T, G] of the text positions of each named mask: the mean over its word's positions."""
        most = max(1, *(len(m) for m in masks)) if masks else 1
        groups = torch.zeros(len(samples), len(encoded[0].tokens), most, device=self.model.device)
        for row, (sample, item, of) in enumerate(zip(samples, encoded, masks, strict=True)):
            for place, name in enumerate(sample.names[: len(of)]):
                positions = [p for span in item.tokens.word_spans(name).values() for p in span]
                groups[row, positions, place] = 1.0 / len(positions)
        return groups

    def _aligned(self, tap: TextMapTap, masks: Sequence[NDArray[np.bool_]]) -> tuple[Tensor, Tensor]:
        """Focal and dice loss per sample [B]; 0 where a sample has no masks."""
        config = self.config
        by_layer = list(tap.take().values())
        nothing = by_layer[0].new_zeros(())
        focals, dices = [], []
        for row, of in enumerate(masks):
            if len(of) == 0:
                focals.append(nothing)
                dices.append(nothing)
                continue
            truth = torch.from_numpy(of).to(self.model.device)
            if config.alignment == "head":
                maps = torch.cat([m[row].flatten(0, 1) for m in by_layer])  # [L H T, h, w]
                logits = as_logits(maps, config.space, config.normalise)
                chosen, paired = match(logits, truth, config.weights)
                logits, truth = logits[chosen], truth[paired]
            else:
                maps = torch.stack([m[row, : len(of)] for m in by_layer]).mean(0)
                logits = as_logits(maps, config.space, config.normalise)
            if self.head is not None:
                logits = self.head(logits)
            of_focal, of_dice = mask_loss(logits, truth, config.weights)
            focals.append(of_focal)
            dices.append(of_dice)
        return torch.stack(focals), torch.stack(dices)


def _size(item: Encoded) -> int:
    return sum(t.numel() * t.element_size() for t in (item.latents, item.text, item.pooled))
