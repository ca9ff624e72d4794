"""When a denoising call is: its sampling step and noise levels, from the scheduler or counted.

clock = Clock(pipeline.scheduler)
step, sigmas = clock.at(timestep, 2, family)            # 2, [0.6, 0.6]
"""

from __future__ import annotations

import math
from typing import Any

import torch

from mmdit_probe.models.families.facts import Family

_NEAR = 8.0
"""Of 1000 timesteps: a rescaled timestep has gone through the latents' precision, so it is only near."""


class Clock:
    """Steps of one sampling run after another.

    Args:
        scheduler: the pipeline's, or None for a bare transformer.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._count, self._last = -1, math.nan

    @property
    def steps(self) -> int | None:
        """Number of sampling steps of the run; None if nobody says."""
        return None if self.scheduler is None else len(self.scheduler.timesteps)

    def at(self, timestep: Any, samples: int, family: Family) -> tuple[int, list[float]]:
        """Step and noise level per sample of a call with this timestep: the scheduler's where the timestep is one of
        its own, else counted and scaled."""
        given = math.nan if timestep is None else timestep
        values = torch.as_tensor(given).detach().double().cpu().reshape(-1).tolist()
        values = values * samples if len(values) == 1 else values
        sigmas = [family.sigma(value) for value in values]
        if self.scheduler is not None and len(set(values)) == 1:
            # A rescaled timestep is a scheduler's by chance only: 1.0 is the first level and the last timestep.
            place = self._near(sigmas[0]) if family.timesteps == 1.0 else self._exact(values[0], sigmas[0])
            if place is not None:
                return place, [family.levels(self.scheduler)[place]] * samples
        known = not math.isnan(sigmas[0])
        moment = sigmas[0] if known else values[0]  # of a model whose timesteps are not known, which may rise or fall
        if moment != self._last:
            # Sampling runs from noise to image: a rise of the noise level is the start of another image.
            self._count, self._last = (0 if known and moment > self._last else self._count + 1), moment
        return self._count, sigmas

    @property
    def _now(self) -> int:
        """The scheduler's own place: of img2img and inpainting, which begin later, before their first step too."""
        step = getattr(self.scheduler, "step_index", None)
        return int((getattr(self.scheduler, "begin_index", None) if step is None else step) or 0)

    def _exact(self, timestep: float, sigma: float) -> int | None:
        places = (self.scheduler.timesteps.double().cpu() == timestep).nonzero()[:, 0].tolist()
        return next((place for place in places if place >= self._now), places[0]) if places else self._near(sigma)

    def _near(self, sigma: float) -> int | None:
        now, known = self._now, self.scheduler.timesteps
        return now if now < len(known) and abs(1000.0 * sigma - float(known[now])) < _NEAR else None
