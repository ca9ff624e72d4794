"""Exactness: columns, masses and maps from the log-sum-exp against the float64 explicit softmax, with controls that
fail."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_probe.attention import exact, reference, tiles
from mmdit_probe.attention.call import SDPACall

IMAGE, TEXT = 48, 21
N = IMAGE + TEXT
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-5}


def make(dtype: torch.dtype = torch.float32, seed: int = 0, peak: float = 1.7, **options: Any) -> SDPACall:
    """Joint attention of 48 image and 21 text tokens, 3 heads; logits of standard deviation peak ** 2."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (peak * torch.randn(2, 3, N, 16, generator=generator) for _ in range(3))
    return SDPACall(query.to(dtype), key.to(dtype), value.to(dtype), **options)


def dense(call: SDPACall) -> Tensor:
    return reference.probabilities(call.query, call.key, call.attn_mask, call.is_causal, call.scale)


def mean_weights() -> Tensor:
    weights = torch.zeros(1, 2, N)
    weights[:, 0, :IMAGE], weights[:, 1, IMAGE:] = 1 / IMAGE, 1 / TEXT
    return weights


def bool_mask(dead_row: bool = False) -> Tensor:
    mask = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(5)) > 0.3
    mask[..., 0] = True
    if dead_row:
        mask[0, :, 3] = False
    return mask


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.11},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": bool_mask()},
    "key mask": {"attn_mask": torch.arange(N)[None, None, None] < N - 6},
    "float mask": {"attn_mask": torch.randn(1, 3, N, N, generator=torch.Generator().manual_seed(7))},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_attend_is_bitwise_stock_and_lse_is_right(case: str, dtype: torch.dtype) -> None:
    options = dict(CASES[case])
    if case == "float mask":
        options["attn_mask"] = options["attn_mask"].to(dtype)
    call = make(dtype, **options)
    output, lse = exact.attend(call)
    assert torch.equal(output, call.stock())
    assert lse is not None
    expected = reference.logsumexp(call.query, call.key, call.attn_mask, call.is_causal, call.scale)
    assert (lse - expected).abs().max() < (5e-6 if dtype == torch.float32 else 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_column_sums_match_the_explicit_softmax(case: str, dtype: torch.dtype) -> None:
    options = dict(CASES[case])
    if case == "float mask":
        options["attn_mask"] = options["attn_mask"].to(dtype)
    call = make(dtype, **options)
    _, lse = exact.attend(call)
    assert lse is not None
    sums = exact.reduce(call, lse, slice(IMAGE, N), query_weights=mean_weights())
    expected = torch.einsum("gn,bhnk->bhgk", mean_weights()[0].double(), dense(call)[..., IMAGE:])
    assert (sums - expected).abs().max() < TOLERANCE[dtype]
    assert (sums.sum(-1) - expected.sum(-1)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("use_lse", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_group_masses_match_and_sum_to_one(case: str, use_lse: bool) -> None:
    call = make(**CASES[case])
    groups = torch.randint(0, 5, (2, N), generator=torch.Generator().manual_seed(3))
    lse = exact.attend(call)[1] if use_lse else None
    masses = exact.group_masses(call, lse, groups, 5)
    expected = torch.stack([reference.group_masses(dense(call)[[b]], groups[b], 5)[0] for b in range(2)])
    assert (masses - expected).abs().max() < 2e-6  # per query, not averaged over queries
    assert (masses.sum(-1) - 1).abs().max() < 1e-5


def test_more_groups_than_the_head_is_wide_take_several_indicator_calls() -> None:
    call = make()
    masses = exact.group_masses(call, None, torch.arange(N), N)
    assert (masses - dense(call)).abs().max() < 2e-6


def test_a_wrong_lse_is_noticed() -> None:
    """The control of the tests above: were lse off by 1e-4, the masses would leave their tolerance."""
    call = make()
    _, lse = exact.attend(call)
    assert lse is not None
    expected = torch.einsum("gn,bhnk->bhgk", mean_weights()[0].double(), dense(call)[..., IMAGE:]).sum(-1)
    shifted = exact.reduce(call, lse + 1e-4, slice(IMAGE, N), query_weights=mean_weights()).sum(-1)
    assert (shifted - expected).abs().max() > 10 * TOLERANCE[torch.float32]


def test_bfloat16_columns_without_the_upcast_would_miss() -> None:
    """Why q and k are upcast: rounding the logits to bfloat16 leaves the tolerance."""
    call = make(torch.bfloat16)
    _, lse = exact.attend(call)
    assert lse is not None
    rounded = (call.query @ call.key[:, :, IMAGE:].transpose(-1, -2)).float() * call.scale_factor
    naive = torch.exp(rounded - lse[..., None])
    expected = dense(call)[..., IMAGE:]
    upcast = exact.reduce(call, lse, slice(IMAGE, N))
    assert (naive - expected).abs().max() > 1e-3
    assert (upcast - expected).abs().max() < 1e-4


def test_grouped_heads_are_repeated() -> None:
    full = make()
    grouped = SDPACall(full.query, full.key[:, :1], full.value[:, :1], enable_gqa=True)
    output, lse = exact.attend(grouped)
    assert lse is not None
    assert torch.equal(output, grouped.stock())
    assert (exact.reduce(grouped, lse, slice(IMAGE, N)) - dense(grouped)[..., IMAGE:]).abs().max() < 2e-6


def float_mask(hidden: float = 0.0) -> Tensor:
    """An additive mask whose query 3 sees nothing, if `hidden` is what hides."""
    mask = torch.randn(1, 4, N, N, generator=torch.Generator().manual_seed(7))
    if hidden:
        mask[:, :, 3] = hidden
    return mask


MASKS: dict[str, Tensor | None] = {
    "none": None,
    "bool": bool_mask(),
    "keys": (torch.arange(N) < torch.tensor([[N], [N - 6]]))[:, None, None],
    "dead row": bool_mask(dead_row=True),
    "two axes": bool_mask()[0, 0],
    "three axes": bool_mask()[0],
    "float": float_mask(),
    "float dead row": float_mask(float("-inf")),
}


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("mask", "causal"),
    # A causal mask beside one of three axes is what torch itself refuses.
    [*((mask, False) for mask in MASKS), *((mask, True) for mask in MASKS if mask != "three axes")],
)
def test_every_precision_mask_and_grouping_of_this_device(
    mask: str, dtype: torch.dtype, key_heads: int, causal: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        (1.7 * torch.randn(2, heads, N, 16, generator=generator)).to(dtype) for heads in (4, key_heads, key_heads)
    )
    given = MASKS[mask]
    given = given.to(dtype) if given is not None and given.dtype != torch.bool else given
    call = SDPACall(query, key, value, given, 0.0, causal, enable_gqa=key_heads != 4)
    output, lse = exact.attend(call)
    assert torch.equal(output.nan_to_num(), call.stock().nan_to_num())
    expected, true_lse = dense(call), reference.logsumexp(query, key, given, causal)
    live, half = true_lse.isfinite(), dtype in (torch.bfloat16, torch.float16)
    assert lse is not None and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (lse - true_lse)[live].abs().max() < (3e-4 if half else 5e-6)
    assert (exact.reduce(call, lse, slice(IMAGE, N)) - expected[..., IMAGE:]).abs().max() < (2e-4 if half else 3e-6)
    groups = (torch.arange(N) >= IMAGE).long()
    for at_hand in (lse, None):
        found = exact.group_masses(call, at_hand, groups, 2)
        assert (found - reference.group_masses(expected, groups, 2)).abs().max() < (2e-4 if half else 5e-6)
    seen = exact.live_queries(call)
    assert torch.equal(live, torch.ones_like(live) if seen is None else seen.expand_as(live))


@pytest.mark.parametrize("shape", [(2, 1, 1, N), (2, 1, N, N), (1, 4, N, N), (1, 1, N, 1), (1, 1, 1, 64)])
def test_masks_lie_as_the_efficient_kernel_wants_them(shape: tuple[int, ...]) -> None:
    """Xformers' kernel behind it refuses a mask whose rows do not begin at multiples of eight numbers."""
    keys, mask = (64 if shape[-1] == 64 else N), torch.randn(shape)
    whole = mask.expand(2, 4, N, keys)
    found = exact._aligned(mask, keys).expand(2, 4, N, -1)
    assert torch.equal(found, whole) and found.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in found.stride()[:-1]) and found.data_ptr() % 16 == 0


def test_rows_hidden_by_the_smallest_number_see_nothing_either() -> None:
    """Minus infinity is written so by many models; the softmax of such a row has no meaning, and no mass."""
    call = make(attn_mask=float_mask(torch.finfo(torch.float32).min)[:, :3])
    live = exact.live_queries(call)
    assert live is not None and not live[0, :, 3].any() and live[0, :, 4].all()
    _, lse = exact.attend(call)
    for at_hand in (lse, None):
        masses = exact.group_masses(call, at_hand, (torch.arange(N) >= IMAGE).long(), 2)
        assert masses[:, :, 3].abs().max() == 0
        assert (masses[:, :, 4:].sum(-1) - 1).abs().max() < 1e-5 and masses.min() >= -1e-6


def test_rows_that_see_nothing_have_no_mass() -> None:
    call = make(attn_mask=bool_mask(dead_row=True))
    live = exact.live_queries(call)
    assert live is not None and not live[0, 0, 3] and live[1, 0, 3]
    _, lse = exact.attend(call)
    groups = (torch.arange(N) >= IMAGE).long()
    for at_hand in (lse, None):
        masses = exact.group_masses(call, at_hand, groups, 2)
        assert masses[0, :, 3].abs().max() == 0
        assert (masses[1].sum(-1) - 1).abs().max() < 1e-5


def test_permuting_text_keys_permutes_columns() -> None:
    call = make()
    order = torch.randperm(TEXT, generator=torch.Generator().manual_seed(1))
    mixed = torch.cat([torch.arange(IMAGE), IMAGE + order])
    permuted = SDPACall(call.query, call.key[:, :, mixed], call.value[:, :, mixed])
    sums = [
        exact.reduce(c, lse, slice(IMAGE, N), query_weights=mean_weights())
        for c in (call, permuted)
        for lse in [exact.attend(c)[1]]
        if lse is not None
    ]
    assert torch.allclose(sums[0][..., order], sums[1], atol=1e-7)
    assert not torch.allclose(sums[0], sums[1], atol=1e-3)


def test_scaling_values_leaves_masses_alone() -> None:
    call = make()
    louder = SDPACall(call.query, call.key, 7.0 * call.value)
    lse, same = exact.attend(call)[1], exact.attend(louder)[1]
    assert lse is not None and same is not None and torch.equal(lse, same)


def test_transposed_inputs_give_the_same() -> None:
    """diffusers hands over q, k, v as transposed views."""
    call = make()
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (call.query, call.key, call.value)]
    assert not views[0].is_contiguous()
    seen = SDPACall(*views)
    (_, one), (_, two) = exact.attend(call), exact.attend(seen)
    assert one is not None and two is not None
    expected = exact.reduce(call, one, slice(IMAGE, N), query_weights=mean_weights())
    assert torch.allclose(exact.reduce(seen, two, slice(IMAGE, N), query_weights=mean_weights()), expected, atol=1e-7)


def test_results_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make(attn_mask=bool_mask())
    _, lse = exact.attend(call)
    assert lse is not None
    rows = torch.tensor([0, 5, 47, 50, 68])

    def everything() -> list[Tensor]:
        weights = torch.rand(2, 3, N, generator=torch.Generator().manual_seed(2))
        keys = torch.tensor([1, 48, 49, 60])
        spread = torch.rand(2, len(rows), 2, generator=torch.Generator().manual_seed(3))
        return [
            exact.reduce(call, lse, keys, query_weights=weights),
            exact.reduce(call, lse, slice(IMAGE, N), slice(0, IMAGE)),
            exact.reduce(call, lse, slice(0, IMAGE), rows, query_weights=spread.mT),
            exact.group_masses(call, lse, torch.arange(N) % 4, 4),
        ]

    whole = everything()
    monkeypatch.setitem(tiles.CHUNK_ELEMENTS, "cpu", 40)
    for small, large in zip(everything(), whole, strict=True):
        assert torch.allclose(small, large, atol=3e-6)  # complements of masses near 1 included


def test_maps_are_columns_and_rows_of_the_matrix() -> None:
    call = make()
    _, lse = exact.attend(call)
    assert lse is not None
    attention = dense(call)
    maps = exact.reduce(call, lse, slice(IMAGE, N), slice(0, IMAGE), head_mean=True)
    assert (maps - attention[:, :, :IMAGE, IMAGE:].mean(1)).abs().max() < 2e-6
    pair = torch.zeros(1, 1, TEXT)
    pair[..., [2, 4]] = 0.5
    rows = exact.reduce(call, lse, slice(0, IMAGE), slice(IMAGE, N), query_weights=pair)
    expected = attention[:, :, [IMAGE + 2, IMAGE + 4], :IMAGE].mean(2)
    assert (rows[:, :, 0] - expected).abs().max() < 2e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 60), torch.arange(60).flip(0)])
def test_queries_of_one_stride_are_multiplied_where_they_are(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, rows: slice | Tensor
) -> None:
    # Diffusers' layout, and blocks so small that every sample is cut into several. (bfloat16's lse is good to 5e-5.)
    monkeypatch.setitem(tiles.CHUNK_ELEMENTS, "cpu", 20 * tiles.padded(TEXT))
    packed = make(dtype)
    query, key = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (packed.query, packed.key))
    call = SDPACall(query, key, packed.value)
    assert tiles._in_place(query, torch.float32, 1) == (dtype == torch.float32)
    lse = exact.logsumexp(call)
    assert lse is not None
    assert len(list(tiles.blocks(call, lse, slice(IMAGE, N), rows))) > 2
    found = exact.reduce(call, lse, slice(IMAGE, N), rows)
    assert (found - dense(packed)[:, :, rows, IMAGE:]).abs().max() < tolerance


@pytest.mark.parametrize("other", [None, "worker", "IOPub"])
def test_the_process_wide_precision_is_touched_only_while_no_other_thread_multiplies(
    other: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, seen, done = matmul.fp32_precision, [], threading.Event()
    beside = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    monkeypatch.setattr(tiles, "IDLE_THREADS", (*tiles.IDLE_THREADS, *(thread.name for thread in beside)))

    def spy(product: Any, *operands: Tensor, **options: Any) -> Tensor:
        seen.append(matmul.fp32_precision)
        return product(*operands, **options)

    for name in ("bmm", "baddbmm"):
        monkeypatch.setattr(torch, name, functools.partial(spy, getattr(torch, name)))
    call = make(torch.bfloat16)
    lse = exact.logsumexp(call)
    assert lse is not None
    if other is not None:
        threading.Thread(target=done.wait, args=(60,), name=other, daemon=True).start()
    try:
        found = exact.reduce(call, lse, slice(IMAGE, N))
    finally:
        done.set()
    assert (found - dense(call)[..., IMAGE:]).abs().max() < 1e-4
    assert set(seen) == {before if other == "worker" else "bf16"} and matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        tiles._logits(call.query)(torch.ones(1), torch.ones(1, 2, 3), torch.ones(1, 2, 3), 1.0, torch.empty(1))
    assert matmul.fp32_precision == before


def test_the_output_keeps_its_gradient() -> None:
    call = make()
    queries = [call.query.clone().requires_grad_() for _ in range(2)]
    exact.attend(SDPACall(queries[0], call.key, call.value))[0].sum().backward()
    SDPACall(queries[1], call.key, call.value).stock().sum().backward()
    assert queries[0].grad is not None and queries[1].grad is not None
    assert torch.equal(queries[0].grad, queries[1].grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "scale", "key mask", "bool mask", "float mask"])
def test_cuda_output_and_lse(case: str, dtype: torch.dtype) -> None:
    options = dict(CASES[case])
    if case == "float mask":
        options["attn_mask"] = options["attn_mask"].to(dtype)
    call = make(dtype, **options)
    on_device = SDPACall(
        *(t.cuda() for t in (call.query, call.key, call.value)),
        attn_mask=None if call.attn_mask is None else call.attn_mask.cuda(),
        scale=call.scale,
    )
    output, lse = exact.attend(on_device)
    assert torch.equal(output, on_device.stock())
    expected = reference.logsumexp(call.query, call.key, call.attn_mask, call.is_causal, call.scale)
    assert lse is None or (lse.cpu() - expected).abs().max() < 2e-4
    groups = (torch.arange(N) >= IMAGE).long()
    masses = exact.group_masses(on_device, lse, groups, 2).mean(2).cpu()
    assert (masses - reference.group_masses(dense(call), groups, 2).mean(2)).abs().max() < TOLERANCE[dtype]
