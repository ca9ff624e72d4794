"""What is drawn and when, as pure functions of (seed, step, sample): the split of a batch cannot change them.

    >>> [round(rate_at(s, steps=100, warmup=10, floor=0.01, final=0.0), 3) for s in (0, 10, 55, 99)]
    [0.01, 1.0, 0.5, 0.0]

Because nothing is drawn from a running generator, an interrupted training continues exactly, and two processes do what
one does.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ORDER, _DRAWS, _NOISE = 1, 2, 3


def rate_at(step: int, steps: int, warmup: int, floor: float, final: float = 0.0) -> float:
    """Share of the learning rate at a 0-based step: linear from `floor` over the warm-up, then a cosine to `final`."""
    if step < warmup:
        return floor + (1 - floor) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def items_at(step: int, effective: int, total: int, seed: int) -> list[int]:
    """The samples of an optimiser step: consecutive places of an endless run of shuffled passes over the data."""
    places = range(step * effective, (step + 1) * effective)
    orders = {epoch: _order(epoch, total, seed) for epoch in {place // total for place in places}}
    return [int(orders[place // total][place % total]) for place in places]


def _order(epoch: int, total: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(total)


def draws(place: int, seed: int) -> np.random.Generator:
    """The generator of one sample's choices; `place` is its place in the whole training."""
    return np.random.default_rng([_DRAWS, seed, place])


def noise(shape: tuple[int, ...], place: int, seed: int) -> Tensor:
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
