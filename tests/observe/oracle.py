"""What a probe should find, by other means: q and k of every joint call written down by a patched attention function,
then
the explicit softmax in float64. Used by tests only; nothing of the probe is involved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmdit_probe.attention import reference


@contextmanager
def written_down(joint_tokens: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(query, key) of every attention call over exactly `joint_tokens` tokens, in order."""
    stock = torch.nn.functional.scaled_dot_product_attention
    calls: list[tuple[Tensor, Tensor]] = []

    def recording(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[-2] == joint_tokens and query.shape[1] > 1:
            calls.append((query.detach().clone(), key.detach().clone()))
        return stock(query, key, value, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = recording
    try:
        yield calls
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock


def attentions(run: Callable[[], Any], joint_tokens: int) -> list[Tensor]:
    """Probabilities [B, H, N, N] float64 of every joint call that `run` makes, in order."""
    with written_down(joint_tokens) as calls:
        run()
    return [reference.probabilities(query, key) for query, key in calls]
