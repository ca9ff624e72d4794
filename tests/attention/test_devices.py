"""Tensors are made where their inputs are: the meta device mixes with no other, so one made elsewhere is an error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmdit_probe.attention import exact, reference
from mmdit_probe.attention.call import SDPACall

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 7, 11, 4


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def call(**options: object) -> SDPACall:
    query = meta(BATCH, HEADS, QUERIES, WIDTH)
    key, value = meta(BATCH, HEADS, KEYS, WIDTH), meta(BATCH, HEADS, KEYS, WIDTH)
    return SDPACall(query, key, value, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [False, True])
def test_the_oracle_stays_on_the_device_of_its_inputs(causal: bool) -> None:
    one = call()
    found = reference.probabilities(one.query, one.key, meta(QUERIES, KEYS, dtype=torch.bool), causal)
    assert found.device.type == "meta" and found.shape == (BATCH, HEADS, QUERIES, KEYS)


def test_live_queries_stay_on_the_device_of_the_mask() -> None:
    live = exact.live_queries(call(attn_mask=meta(QUERIES, KEYS, dtype=torch.bool), is_causal=True))
    assert live is not None and live.device.type == "meta"


@pytest.mark.parametrize("head_mean", [False, True])
@pytest.mark.parametrize("sums", [None, 2])
@pytest.mark.parametrize("groups", [None, 5])
def test_reductions_stay_on_the_device_of_the_call(head_mean: bool, sums: int | None, groups: int | None) -> None:
    """Weights may be given on the processor; what comes out is where the call is."""
    found = exact.reduce(
        call(),
        meta(BATCH, HEADS, QUERIES),
        slice(None),
        key_weights=None if groups is None else torch.ones(1, KEYS, groups),
        query_weights=None if sums is None else torch.ones(1, sums, QUERIES),
        head_mean=head_mean,
    )
    shape = (QUERIES if sums is None else sums, KEYS if groups is None else groups)
    assert found.device.type == "meta" and found.shape == ((BATCH, *shape) if head_mean else (BATCH, HEADS, *shape))
