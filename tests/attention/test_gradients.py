"""Maps and masses with gradients: values and gradients against dense float64 autograd, and controls that fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmdit_probe.attention import exact, gradients
from mmdit_probe.attention.call import SDPACall
from tests.attention.test_exact import CASES, IMAGE, TEXT, N, bool_mask, make

Maps = Callable[[SDPACall], Tensor]
IMAGE_ROWS, TEXT_KEYS = slice(0, IMAGE), slice(IMAGE, N)
GROUPS = torch.rand(2, TEXT, 5, generator=torch.Generator().manual_seed(2))


def dense_logits(query: Tensor, key: Tensor, call: SDPACall) -> Tensor:
    scores = call.scale_factor * query @ key.transpose(-1, -2)
    mask = call.additive_mask(torch.float64)
    if mask is not None:
        scores = scores + mask
    if call.is_causal:
        scores = scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), float("-inf"))
    return scores


def gradients_of(maps: Maps, call: SDPACall, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """The maps, and the gradients of q and k of a fixed random weighting of them."""
    query, key = (t.detach().to(dtype).requires_grad_() for t in (call.query, call.key))
    found = maps(SDPACall(query, key, call.value.to(dtype), call.attn_mask, 0.0, call.is_causal, call.scale))
    finite = torch.where(torch.isfinite(found), found, torch.zeros_like(found))  # masked logits are -inf
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (finite * weights).sum().backward()
    return found.detach().double(), query.grad.double(), key.grad.double()


def oracle(call: SDPACall, space: str, groups: Tensor | None) -> Maps:
    def maps(inner: SDPACall) -> Tensor:
        scores = dense_logits(inner.query, inner.key, call)
        block = (scores if space == "logit" else scores.softmax(-1))[..., IMAGE_ROWS, TEXT_KEYS]
        return block if groups is None else block @ groups[:, None].double()

    return maps


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["every position", "groups"])
@pytest.mark.parametrize(
    ("case", "space"),
    [
        *((case, "probability") for case in ("plain", "scale", "causal", "float mask")),
        *((case, "logit") for case in ("plain", "scale", "float mask")),
    ],
)
def test_maps_and_gradients_equal_dense_autograd(case: str, space: Any, groups: Tensor | None) -> None:
    call = make(**CASES[case])
    found = gradients_of(lambda c: gradients.text_maps(c, TEXT_KEYS, IMAGE_ROWS, groups, space=space), call)
    expected = gradients_of(oracle(call, space, groups), call, torch.float64)
    for ours, truth in zip(found, expected, strict=True):
        assert (ours - truth).norm() <= 3e-6 * max(truth.norm(), torch.tensor(1e-9)) + 1e-7


@pytest.mark.parametrize("case", CASES)
def test_log_sum_exp_and_columns_of_all_queries(case: str) -> None:
    """Of text queries too: a causal image query sees no text after it, so image rows alone say nothing there."""
    call = make(**CASES[case])
    for ours, truth in (
        (gradients.row_lse, lambda c: dense_logits(c.query, c.key, call).logsumexp(-1)),
        (
            lambda c: gradients.columns(c, TEXT_KEYS),
            lambda c: dense_logits(c.query, c.key, call).softmax(-1)[..., TEXT_KEYS],
        ),
    ):
        expected = gradients_of(truth, call, torch.float64)
        for found, wanted in zip(gradients_of(ours, call), expected, strict=True):
            assert wanted.norm() > 1 and (found - wanted).norm() <= 3e-6 * wanted.norm()


@pytest.mark.parametrize("case", ["bool mask", "key mask", "causal"])
def test_masses_under_masks(case: str) -> None:
    call = make(**CASES[case])
    on_text = torch.zeros(1, N, 1)
    on_text[:, TEXT_KEYS] = 1.0
    found = gradients_of(lambda c: gradients.weighted(c, on_text)[..., 0], call)
    expected = gradients_of(lambda c: dense_logits(c.query, c.key, call).softmax(-1)[..., TEXT_KEYS].sum(-1), call,
                         torch.float64)  # fmt: skip
    for ours, truth in zip(found, expected, strict=True):
        assert (ours - truth).norm() <= 3e-6 * truth.norm()


def test_both_ways_agree_and_heads_can_be_averaged() -> None:
    call = make()
    by_values = gradients.text_maps(call, TEXT_KEYS, IMAGE_ROWS, GROUPS)
    by_columns = gradients.columns(call, TEXT_KEYS, IMAGE_ROWS) @ GROUPS[:, None]
    torch.testing.assert_close(by_values, by_columns, atol=1e-6, rtol=1e-5)
    mean = gradients.text_maps(call, TEXT_KEYS, IMAGE_ROWS, GROUPS, heads="mean")
    torch.testing.assert_close(mean, by_values.mean(1))


def test_more_groups_than_the_head_is_wide() -> None:
    call = make()
    weights = torch.rand(1, N, 19)
    found = gradients.weighted(call, weights)
    torch.testing.assert_close(found, call_probabilities(call) @ weights[:, None], atol=1e-6, rtol=1e-5)


def call_probabilities(call: SDPACall) -> Tensor:
    return dense_logits(call.query.double(), call.key.double(), call).softmax(-1).float()


def test_control_a_constant_lse_gives_a_wrong_gradient() -> None:
    """What this module makes impossible: the same values with other gradients."""
    call = make()

    def constant(inner: SDPACall) -> Tensor:
        lse = exact.logsumexp(inner)
        assert lse is not None and not lse.requires_grad
        return (gradients.logits(inner, TEXT_KEYS, IMAGE_ROWS) - lse[:, :, IMAGE_ROWS, None]).exp()

    truth = gradients_of(oracle(call, "probability", None), call, torch.float64)
    value, of_query, of_key = gradients_of(constant, call)
    assert (value - truth[0]).abs().max() < 1e-5
    assert (of_query - truth[1]).norm() > 0.2 * truth[1].norm()
    assert (of_key - truth[2]).norm() > 0.2 * truth[2].norm()


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["columns", "values"])
def test_a_learned_bias_has_the_gradient_of_the_whole_softmax(groups: Tensor | None) -> None:
    """A mask that is trained: through the log-sum-exp too, not only through its own columns."""
    call = make()

    def gradient(maps: Maps, dtype: torch.dtype) -> Tensor:
        bias = torch.randn(1, 3, N, N, generator=torch.Generator().manual_seed(7)).to(dtype).requires_grad_()
        query, key, value = (t.to(dtype) for t in (call.query, call.key, call.value))
        found = maps(SDPACall(query, key, value, bias))
        (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)).sum().backward()
        assert bias.grad is not None
        return bias.grad.double()

    def truth(inner: SDPACall) -> Tensor:
        assert inner.attn_mask is not None
        scores = inner.scale_factor * inner.query @ inner.key.transpose(-1, -2) + inner.attn_mask
        block = scores.softmax(-1)[..., IMAGE_ROWS, TEXT_KEYS]
        return block if groups is None else block @ groups[:, None].double()

    expected = gradient(truth, torch.float64)
    found = gradient(lambda c: gradients.text_maps(c, TEXT_KEYS, IMAGE_ROWS, groups), torch.float32)
    assert (found - expected).norm() <= 3e-6 * expected.norm()


def test_grouped_heads_have_the_gradient_of_the_shared_key() -> None:
    call = make()
    query, key = call.query.requires_grad_(), call.key[:, :1].clone().requires_grad_()
    grouped = SDPACall(query, key, call.value[:, :1], enable_gqa=True)
    twice = call.query.detach().double().requires_grad_(), call.key[:, :1].detach().double().requires_grad_()
    dense = (0.25 * twice[0] @ twice[1].expand(-1, 3, -1, -1).transpose(-1, -2)).softmax(-1)[..., TEXT_KEYS]
    weights = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((dense * weights).sum(), twice)
    found = torch.autograd.grad((gradients.columns(grouped, TEXT_KEYS) * weights).sum(), (query, key))
    for ours, other in zip(found, expected, strict=True):
        assert (ours - other).norm() <= 3e-6 * other.norm()


@pytest.mark.parametrize("way", ["columns", "values"])
def test_queries_that_see_nothing_have_no_gradient_and_spoil_none(way: str) -> None:
    call = make(attn_mask=bool_mask(dead_row=True))

    def maps(inner: SDPACall) -> Tensor:
        if way == "columns":
            return gradients.columns(inner, TEXT_KEYS)
        return gradients.weighted(inner, torch.eye(N)[None, :, TEXT_KEYS])

    def truth(inner: SDPACall) -> Tensor:
        scores = dense_logits(inner.query, inner.key, call)
        dead = torch.zeros(2, 1, N, 1, dtype=torch.bool)
        dead[0, 0, 3] = True
        return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)[..., TEXT_KEYS]

    expected = gradients_of(truth, call, torch.float64)
    for ours, other in zip(gradients_of(maps, call), expected, strict=True):
        assert (ours - other).norm() <= 3e-6 * other.norm()


def test_no_function_takes_a_log_sum_exp() -> None:
    for function in (gradients.text_maps, gradients.columns, gradients.logits, gradients.weighted,
                     gradients.row_lse):  # fmt: skip
        assert not any("lse" in name for name in inspect.signature(function).parameters)


def test_probabilities_for_observers_cannot_carry_a_gradient() -> None:
    """The other half of it: what is made with a constant lse is cut off from q and k, so a loss on it raises."""
    call = make()
    query, key = call.query.requires_grad_(), call.key.requires_grad_()
    inner = SDPACall(query, key, call.value)
    _, lse = exact.attend(inner)
    assert lse is not None and not lse.requires_grad
    groups, weights = torch.zeros(N, dtype=torch.long), torch.ones(1, 1, N)
    by_name: dict[str, list[Tensor]] = {
        "reduce": [
            exact.reduce(inner, lse, TEXT_KEYS),
            exact.reduce(inner, lse, TEXT_KEYS, query_weights=weights),
            exact.reduce(inner, lse, TEXT_KEYS, IMAGE_ROWS, head_mean=True),
        ],
        "group_masses": [exact.group_masses(inner, lse, groups, 2), exact.group_masses(inner, None, groups, 2)],
        "within": [exact.within(inner, lse, [TEXT_KEYS], torch.ones(1, N))],
    }
    takes_one = {name for name, of in vars(exact).items() if inspect.isfunction(of) and of.__module__ == exact.__name__
                 and "lse" in inspect.signature(of).parameters and not name.startswith("_")}  # fmt: skip
    assert set(by_name) == takes_one
    for found in (found for several in by_name.values() for found in several):
        assert not found.requires_grad
        with pytest.raises(RuntimeError, match="does not require grad"):
            found.sum().backward()


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["columns", "values"])
def test_compiled_in_one_graph_with_the_same_gradients(groups: Tensor | None) -> None:
    call = make()

    def maps(query: Tensor, key: Tensor) -> Tensor:
        return gradients.text_maps(SDPACall(query, key, key), TEXT_KEYS, IMAGE_ROWS, groups)

    plain = gradients_of(lambda c: maps(c.query, c.key), call)
    torch._dynamo.reset()
    compiled = torch.compile(maps, fullgraph=True, backend="aot_eager")
    for ours, other in zip(gradients_of(lambda c: compiled(c.query, c.key), call), plain, strict=True):
        torch.testing.assert_close(ours, other)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    call = make()
    query = call.query.requires_grad_()
    (first,) = torch.autograd.grad(gradients.row_lse(SDPACall(query, call.key, call.value)).square().sum(), query,
                                   create_graph=True)  # fmt: skip
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_lse_gradient_where_no_kernel_gives_one(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make()
    with_kernel = gradients_of(gradients.row_lse, call)
    monkeypatch.setattr(exact, "logsumexp", lambda call: None)
    monkeypatch.setattr(gradients, "_ROWS_AT_ONCE", 20)
    for ours, other in zip(gradients_of(gradients.row_lse, call), with_kernel, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["columns", "values"])
def test_exact_under_gradient_checkpointing(groups: Tensor | None) -> None:
    call = make()
    plain = gradients_of(lambda c: gradients.text_maps(c, TEXT_KEYS, IMAGE_ROWS, groups), call)

    def recomputed(inner: SDPACall) -> Tensor:
        def maps(query: Tensor, key: Tensor) -> Tensor:
            again = SDPACall(2 * query / 2, key, inner.value)
            return gradients.text_maps(again, TEXT_KEYS, IMAGE_ROWS, groups)

        return checkpoint(maps, inner.query, inner.key, use_reentrant=False)  # type: ignore[no-any-return]

    for ours, other in zip(gradients_of(recomputed, call), plain, strict=True):
        assert torch.equal(ours, other)


def test_bfloat16_calls_under_autocast_keep_their_digits() -> None:
    call = make(torch.bfloat16)
    truth = call_probabilities(call)[..., IMAGE_ROWS, TEXT_KEYS]
    groups = torch.eye(TEXT)[None, :, :16]
    with torch.autocast("cpu", torch.bfloat16):
        by_columns = gradients.columns(call, TEXT_KEYS, IMAGE_ROWS)
        by_values = gradients.text_maps(call, TEXT_KEYS, IMAGE_ROWS, groups)
        for found in (by_columns, by_values):
            assert found.dtype == torch.float32
            assert (found - truth[..., : found.shape[-1]]).abs().max() < 2e-4


@pytest.mark.parametrize("groups", [None, torch.eye(TEXT)[None, :, :8]], ids=["columns", "values"])
def test_memory_grows_with_the_number_of_tokens_not_its_square(groups: Tensor | None) -> None:
    def kept(image: int) -> int:
        query, key = (torch.randn(1, 2, image + TEXT, 16, requires_grad=True) for _ in range(2))
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = gradients.text_maps(SDPACall(query, key, key), slice(image, None), slice(0, image), groups)
            kept_maps = maps.sum()
        assert kept_maps.requires_grad
        return sum(held.values())

    assert kept(2048) < 2.3 * kept(1024) < 2.3 * 4 * 2 * 1024 * (4 * TEXT + 6 * 16)
