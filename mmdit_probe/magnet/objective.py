"""One micro-batch: samples in, the MAGNET objective out, as a mean over samples.

    >>> [round(rate_at(s, steps=100, warmup=10, floor=0.01), 3) for s in (0, 10, 55, 99)]
    [0.01, 1.0, 0.5, 0.0]

What is drawn (samples, noise, noise levels, dropped prompts) is a pure function of the seed and of the place in the
training, and pictures and prompts are encoded one by one: the result does not depend on how a batch is split.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmdit_probe.data.sample import Sample
from mmdit_probe.errors import UserError
from mmdit_probe.magnet.config import MagnetOptions
from mmdit_probe.magnet.losses import as_logits, flow_matching, mask_loss, match
from mmdit_probe.magnet.tap import TextMapTap
from mmdit_probe.models.mmdit import MMDiT, TextCondition
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.specs import named_of

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
        self._known: OrderedDict[Hashable, Encoded] = OrderedDict()
        self._bytes = 0

    def __call__(self, sample: Sample, prompt: str) -> Encoded:
        key = (hashlib.sha256(sample.image.tobytes()).hexdigest(), sample.image.shape, prompt)
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

    def __init__(self, model: MMDiT, config: MagnetOptions, head: nn.Module | None = None) -> None:
        self.model, self.config, self.head = model, config, head
        self.encode = Encoder(model)
        self.levels: NDArray[np.float64] = noise_levels(model.scheduler)

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
        config, device = self.config, self.model.device
        encoded, sigmas, noises, masks = [], [], [], []
        for sample, place in zip(samples, places, strict=True):
            rng = draws(place, config.seed)
            normal, drop = float(rng.standard_normal()), float(rng.random()) < config.drop_prompt
            encoded.append(self.encode(sample, "" if drop else sample.prompt))
            sigmas.append(level_of(normal, self.levels, config.sigma_mean, config.sigma_std))
            noises.append(noise_of(tuple(encoded[-1].latents.shape), place, config.seed))
            masks.append(np.zeros((0, 1, 1), bool) if drop else sample.masks)
        latents, noise = torch.stack([e.latents for e in encoded]), torch.stack(noises).to(device)
        sigma = torch.tensor(sigmas, device=device, dtype=torch.float32)
        mixed = torch.lerp(latents, noise, sigma[:, None, None, None])
        tables = [e.tokens for e in encoded]
        if tap is not None:
            tap.begin(self._groups(samples, tables, masks) if config.level == "token" else None)
        text = TextCondition(torch.stack([e.text for e in encoded]), torch.stack([e.pooled for e in encoded]), tables)
        output = transformer(**self.model.inputs(mixed, sigma, text), return_dict=False)[0]
        flow = flow_matching(self.model.velocity(output, mixed), latents, noise)
        focals, dices = self._aligned(tap, masks, tables) if tap is not None else (torch.zeros_like(flow),) * 2
        total = config.flow_weight * flow
        total = total + config.mask_weight * (config.focal_weight * focals + config.dice_weight * dices)
        loss = total.mean()
        if self.head is not None:
            # Data parallelism expects a gradient of every parameter, also from a batch without masks.
            loss = loss + 0.0 * torch.stack([p.sum() for p in self.head.parameters()]).sum()
        terms = {"loss": loss, "flow": flow.mean(), "focal": focals.mean(), "dice": dices.mean()}
        counted = {name: float(value.detach()) for name, value in terms.items()}
        return loss, counted | {"masks": float(np.mean([len(m) for m in masks]))}

    def _groups(self, samples: Sequence[Sample], tables: Sequence[TokenTable], masks: Sequence[Any]) -> Tensor:
        """Weights [B, T, G] of the text positions of each named mask: the mean over its word's positions."""
        most = max(1, *(len(m) for m in masks)) if masks else 1
        groups = torch.zeros(len(samples), len(tables[0]), most, device=self.model.device)
        for row, (sample, table, of) in enumerate(zip(samples, tables, masks, strict=True)):
            aligned = set(columns_of(self.config, table))
            for place, name in enumerate(sample.names[: len(of)]):
                spans = table.word_spans(name, beside=sample.names)
                positions = [p for span in spans.values() for p in span if p in aligned]
                if not positions:
                    raise UserError(
                        f"{sample.name}: {name!r} has tokens in {', '.join(spans)} only; leave --streams out"
                    )
                groups[row, positions, place] = 1.0 / len(positions)
        return groups

    def _aligned(
        self, tap: TextMapTap, masks: Sequence[NDArray[np.bool_]], tables: Sequence[TokenTable]
    ) -> tuple[Tensor, Tensor]:
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
            if config.level == "head":
                columns = columns_of(config, tables[row])
                maps = torch.cat([m[row][:, columns].flatten(0, 1) for m in by_layer])  # (L H T, h, w)
                logits = as_logits(maps, config.space, config.normalise)
                chosen, paired = match(logits, truth, config)
                logits, truth = logits[chosen], truth[paired]
            else:
                maps = torch.stack([m[row, : len(of)] for m in by_layer]).mean(0)
                logits = as_logits(maps, config.space, config.normalise)
            if self.head is not None:
                logits = self.head(logits)
            of_focal, of_dice = mask_loss(logits, truth, config)
            focals.append(of_focal)
            dices.append(of_dice)
        return torch.stack(focals), torch.stack(dices)


def columns_of(config: MagnetOptions, table: TokenTable) -> list[int]:
    """The text positions whose maps are aligned.

    Raises:
        UserError: the joint attention reads no such encoder.
    """
    known = dict.fromkeys(table.streams)
    asked = named_of("encoder stream", known if config.streams is None else config.streams, known)
    return [place for place, stream in enumerate(table.streams) if stream in asked]


def _size(item: Encoded) -> int:
    return sum(t.numel() * t.element_size() for t in (item.latents, item.text, item.pooled))


_ORDER, _DRAWS, _NOISE = 1, 2, 3
"""What is drawn, the first number of each seed."""


def rate_at(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the learning rate at a 0-based step: linear from `floor` over the warm-up, then a cosine to 0."""
    if step < warmup:
        return floor + (1 - floor) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def items_at(step: int, effective: int, total: int, seed: int) -> list[int]:
    """The samples of an optimiser step: consecutive places of an endless run of shuffled passes over the data."""
    places = range(step * effective, (step + 1) * effective)
    orders = {
        epoch: np.random.default_rng([_ORDER, seed, epoch]).permutation(total)
        for epoch in {place // total for place in places}
    }
    return [int(orders[place // total][place % total]) for place in places]


def draws(place: int, seed: int) -> np.random.Generator:
    """The generator of one sample's choices; `place` is its place in the whole training."""
    return np.random.default_rng([_DRAWS, seed, place])


def noise_of(shape: tuple[int, ...], place: int, seed: int) -> Tensor:
    """Gaussian noise of one sample, drawn on the CPU, float32."""
    number = int(np.random.default_rng([_NOISE, seed, place]).integers(0, 2**62))
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def noise_levels(scheduler: Any) -> NDArray[np.float64]:
    """The training noise levels of a flow-matching scheduler: its table before any `set_timesteps`, 1 downwards."""
    fresh = type(scheduler).from_config(copy.deepcopy(dict(scheduler.config)))
    return fresh.sigmas.double().cpu().numpy()


def level_of(normal: float, levels: NDArray[np.float64], mean: float, std: float) -> float:
    """The noise level for a standard normal draw: sigmoid(mean + std normal) indexes the table (high: less noise)."""
    u = 1 / (1 + math.exp(-(mean + std * normal)))
    return float(levels[min(int(u * len(levels)), len(levels) - 1)])
