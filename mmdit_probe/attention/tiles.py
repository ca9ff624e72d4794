"""Columns of the attention matrix block by block, in one reused buffer that stays in a processor's cache.

    >>> import torch
    >>> q = torch.randn(1, 2, 6, 16)
    >>> call = SDPACall(q, q, q)
    >>> lse = (q @ q.mT / 4).logsumexp(-1)
    >>> [tuple(block.values.shape) for block in blocks(call, lse, slice(4, 6), slice(None))]
    [(1, 2, 6, 16)]

Each block is exp(scale q k^T + bias - lse) in float32. Its keys are padded to a multiple of `ALIGNED` by copies of the
last key, cut off by whoever reduces: `values[..., :K]`. Nothing here is differentiable, and nothing holds two blocks.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit_probe.attention.call import SDPACall

Columns = slice | Tensor
"""A set of token positions: a contiguous slice, or a LongTensor of indices."""

CHUNK_ELEMENTS = {"cpu": 3 << 17, "cuda": 1 << 24}
"""Probabilities held at once: on a CPU per thread, 1.5 MiB of float32, which stays in a core's second-level cache; on a
GPU in all, enough to fill it."""

IDLE_THREADS = ("tqdm", "ipykernel", "IPython", "IOPub", "Control")
"""Threads that multiply nothing, by their name or their class's package: of progress bars and of notebooks."""

ALIGNED = 16
"""Keys per block are a multiple of this: a cache line, or a vector register, of float32."""


@dataclass(frozen=True)
class Block:
    """Probabilities of some samples, heads and queries, in a buffer that the next block reuses.

    Attributes:
        samples, heads, queries: slices of the batch, of the heads and of the queries asked for.
        pairs: slice of the B * H pairs of sample and head: one sample's heads, or all heads of several samples.
        flat: [b * h, r, K padded] float32.
    """

    samples: slice
    heads: slice
    queries: slice
    pairs: slice
    flat: Tensor

    @property
    def values(self) -> Tensor:
        """The probabilities as [b, h, r, K padded]."""
        return self.flat.unflatten(0, (self.samples.stop - self.samples.start, self.heads.stop - self.heads.start))


def size(call: SDPACall, positions: Columns, keys: bool = True) -> int:
    """How many positions a set has, among the keys or among the queries of a call."""
    if isinstance(positions, Tensor):
        return len(positions)
    return len(range((call.key if keys else call.query).shape[-2])[positions])


def padded(count: int) -> int:
    """`count` keys with the pads of a block."""
    return -(-count // ALIGNED) * ALIGNED


def blocks(call: SDPACall, lse: Tensor, keys: Columns, queries: Columns) -> Iterator[Block]:
    """All blocks of exp(scale q k^T + bias - lse) of some keys and queries, by queries, then samples, then heads.

    Args:
        call: the attention call. lse: [B, H, Nq] row log-sum-exp.
        keys: the K key positions. queries: the Q query positions.
    """
    query, key = call.query[:, :, queries], _prepared(call, keys)
    shift = lse[:, :, queries].float().neg().flatten(0, 1)[..., None]
    batch, heads, n_queries, width = query.shape
    n_keys, count, scale = key.shape[-1], size(call, keys), call.scale_factor
    many, heads_at_once, queries_at_once = _shape(query, n_keys)
    # One buffer for all blocks: a fresh allocation per block costs more in page faults than the exponentials.
    at_once = many * heads_at_once * queries_at_once
    scores = torch.empty(at_once * n_keys, device=key.device)
    in_place = _in_place(query, key.dtype, many)
    copied = torch.empty(0 if in_place else at_once * width, device=key.device, dtype=key.dtype)
    biased, logits = call.attn_mask is not None or call.is_causal, _logits(call.query)
    for start, sample, head in itertools.product(
        range(0, n_queries, queries_at_once), range(0, batch, many), range(0, heads, heads_at_once)
    ):
        stop, last, end = (
            min(start + queries_at_once, n_queries),
            min(sample + many, batch),
            min(head + heads_at_once, heads),
        )
        samples, group, part = slice(sample, last), slice(head, end), slice(start, stop)
        flat, n = (last - sample) * (end - head), stop - start
        pairs = slice(sample * heads + head, sample * heads + head + flat)
        left = query[samples, group, part]
        if not in_place:
            left = copied[: flat * n * width].view(left.shape).copy_(left)
        values = scores[: flat * n * n_keys].view(flat, n, n_keys)
        logits(shift[pairs, part], left.view(flat, n, width), key[pairs], scale, values)
        block = Block(samples, group, part, pairs, values)
        if biased:
            bias = bias_of(call, keys, _within(call, queries, part))
            assert bias is not None
            bias = bias[samples] if bias.shape[0] > 1 else bias
            block.values[..., :count] += bias[:, group] if bias.shape[1] > 1 else bias
        values.exp_()
        yield block


def bias_of(call: SDPACall, keys: Columns, queries: Columns) -> Tensor | None:
    """The additive mask of some queries and keys, [B or 1, H or 1, Q or 1, K or 1] float32, causal part included."""
    bias = call.additive_mask(torch.float32)
    if bias is not None:
        bias = bias[:, :, queries] if bias.shape[2] > 1 else bias
        bias = bias[..., keys] if bias.shape[3] > 1 else bias
    if call.is_causal:
        device = call.query.device
        row = torch.arange(call.query.shape[-2], device=device)[queries]
        column = torch.arange(call.key.shape[-2], device=device)[keys]
        causal = torch.zeros(len(row), len(column), device=device)
        causal.masked_fill_(column[None] > row[:, None], float("-inf"))
        bias = causal[None, None] if bias is None else bias + causal
    return bias


def _prepared(call: SDPACall, keys: Columns) -> Tensor:
    """The keys of every pair of sample and head as right operand, [B * H, D, K padded]; 16-bit only on a GPU."""
    key = call.expanded_key()[:, :, keys]
    dtype = key.dtype if _mixed_products(key) else torch.float32
    count, total = key.shape[-2], padded(key.shape[-2])
    # Row-major, not a transposed view: a batched product of the view is half as fast on a CPU.
    right = torch.empty(*key.shape[:2], key.shape[-1], total, device=key.device, dtype=dtype)
    right[..., :count] = key.mT
    if count < total:
        right[..., count:] = right[..., count - 1 : count]
    return right.flatten(0, 1)


def _shape(query: Tensor, n_keys: int) -> tuple[int, int, int]:
    """Samples, heads and queries at once: on a CPU many queries of one head a thread, on a GPU everything that fits."""
    batch, heads, n_queries, _ = query.shape
    cpu = query.device.type != "cuda"
    limit = max(1, CHUNK_ELEMENTS["cpu" if cpu else "cuda"] // max(1, n_keys))
    queries = max(1, min(n_queries, limit if cpu else max(256, limit // heads)))
    queries = -(-n_queries // -(-n_queries // queries)) if n_queries else 1  # equal parts
    # A head for each thread: threads that share one wait for each other after every operation.
    limit *= torch.get_num_threads() if cpu else 1
    heads_at_once = min(heads, max(1, limit // queries))
    return (min(batch, max(1, limit // (queries * heads))) if heads_at_once == heads else 1), heads_at_once, queries


def _within(call: SDPACall, queries: Columns, part: slice) -> Columns:
    """Positions of a slice of the queries asked for."""
    if isinstance(queries, Tensor):
        return queries[part]
    chosen = range(call.query.shape[-2])[queries][part]
    return slice(chosen.start, chosen.stop, chosen.step)


def _mixed_products(tensor: Tensor) -> bool:
    """Whether 16-bit operands can be multiplied with a float32 result: on CUDA, where the product takes `out_dtype`."""
    return tensor.device.type == "cuda" and tensor.dtype in (torch.bfloat16, torch.float16)


def _in_place(query: Tensor, dtype: torch.dtype, many: int) -> bool:
    """Whether queries can be multiplied where they are: of the product's dtype, rows of one stride, samples too.

    Diffusers' queries are transposed views [B, N, H, D]; a matrix product takes such a stride, and copying every block
    is a sixth of the cost of the columns.
    """
    together = many == 1 or query.stride(0) == query.shape[1] * query.stride(1)
    return query.dtype == dtype and together and query.stride(-1) == 1 and query.stride(-2) >= query.shape[-1]


def _logits(origin: Tensor) -> Callable[[Tensor, Tensor, Tensor, float, Tensor], object]:
    """The function (shift, left, right, scale, out) that writes shift + scale * left @ right in float32.

    Operands are float32, or 16-bit, with values of `origin`'s dtype. A 16-bit matmul would round its *output* logits
    and lose two digits; here the result is float32 in every way. On a CPU, products of upcast bfloat16 values run on
    bfloat16 units where there are some: they are exact either way, and accumulation and result stay float32 (checked:
    closer to float64 than the plain float32 matmul, three times faster). Torch's switch for that is process-wide: it is
    on during those products alone, but a float32 product of another thread at that moment would be rounded. So they run
    there only while no other thread can multiply.
    """
    if _mixed_products(origin):
        return _on_tensor_cores
    if origin.dtype == torch.bfloat16 and origin.device.type == "cpu" and _no_other_thread():
        return _on_bfloat16_units
    # The shift is where the product starts adding, so that no pass of its own goes over the block.
    return lambda shift, left, right, scale, out: torch.baddbmm(shift, left, right, alpha=scale, out=out)


def _no_other_thread() -> bool:
    """Whether no Python thread but this one can be at work."""
    here = threading.current_thread()
    others = (thread for thread in threading.enumerate() if thread is not here)
    return all({thread.name, type(thread).__module__.split(".")[0]} & set(IDLE_THREADS) for thread in others)


def _on_tensor_cores(shift: Tensor, left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    torch.bmm(left, right, out_dtype=torch.float32, out=out)
    torch.add(shift, out, alpha=scale, out=out)


def _on_bfloat16_units(shift: Tensor, left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        torch.bmm(left, right, out=out)
    finally:
        matmul.fp32_precision = before
    torch.add(shift, out, alpha=scale, out=out)
