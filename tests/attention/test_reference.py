"""The oracle itself: against torch's own attention, and against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from mmdit_probe.attention import reference


def test_rows_sum_to_one_and_reproduce_torch() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 7, 8, dtype=torch.float64) for _ in range(3))
    attention = reference.probabilities(query, key)
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(attention.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64))
    assert torch.allclose(attention @ value, stock, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"scale": 0.3}, {"bool": True}, {"float": True}, {"gqa": True}]
)
def test_every_option_reproduces_torch(options: dict[str, object]) -> None:
    torch.manual_seed(1)
    heads = 2 if "gqa" in options else 4
    query = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    key, value = (torch.randn(1, heads, 6, 8, dtype=torch.float64) for _ in range(2))
    mask = None
    if "bool" in options:
        mask = torch.rand(1, 1, 6, 6) > 0.4
        mask[..., 0] = True
    if "float" in options:
        mask = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    causal, scale = bool(options.get("is_causal")), options.get("scale")
    stock = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads == 2
    )
    attention = reference.probabilities(query, key, mask, causal, scale)  # type: ignore[arg-type]
    assert torch.allclose(attention @ value.repeat_interleave(4 // heads, 1), stock, atol=1e-12)


def test_logsumexp_is_the_normaliser() -> None:
    torch.manual_seed(2)
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    scores, lse = reference.logits(query, key), reference.logsumexp(query, key)
    assert torch.allclose(torch.exp(scores - lse[..., None]), reference.probabilities(query, key))


def test_group_masses_add_up_by_hand() -> None:
    attention = torch.tensor([[[[0.1, 0.2, 0.3, 0.4]]]], dtype=torch.float64)
    masses = reference.group_masses(attention, torch.tensor([1, 0, 1, 2]), 3)
    assert torch.allclose(masses, torch.tensor([0.2, 0.4, 0.4], dtype=torch.float64))


def test_a_row_that_sees_nothing_is_zero() -> None:
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask[0, 0, 1] = False
    attention = reference.probabilities(torch.randn(1, 1, 3, 8), torch.randn(1, 1, 4, 8), mask)
    assert attention[0, 0, :, :].sum(-1).tolist() == pytest.approx([1.0, 0.0, 1.0])
