"""JointBlocks: what segmentation methods read from one forward, kept per selected layer: I2T per head, I2I, features.

    blocks = JointBlocks(layers=[3, 4], keep=("i2t", "i2i"))
    with probe(model, blocks):
        model.denoise(latents, 0.5, text)
    blocks.kept[3]["i2t"].shape                     # [B, H, I, T]

Parts, each only when asked for (float32, moved to the CPU):

    i2t       [B, H, I, T]   columns of the joint softmax at the text keys, exact (Seg4Diff, eq. 4)
    i2t_logit [B, H, I, T]   the same before the softmax: scaled products, and the mask's bias
    i2i       [B, I, I]      mean over heads of the image-image block; rows sum to 1 minus the text mass
    i2i_walk  [B, I, I]      the same, heads weighted by |lambda_2| of their renormalised block (TokenRank)
    feat_out  [B, I, E]      attention output of the image tokens before the output projection
    feat_proj [B, I, E]      after it

Memory: I2I is built head by head over chunks of queries, so that beside the result (4 I^2 bytes a layer: 64 MiB at
64 x 64 tokens) only one chunk of probabilities is held; "i2i_walk" holds one head's block more. Not here: any method.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmdit_probe.attention import exact, gradients
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.errors import UserError, unknown
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, Observer

PARTS = ("i2t", "i2t_logit", "i2i", "i2i_walk", "feat_out", "feat_proj")

_LSE_ROWS = 128
"""Queries per chunk where the log-sum-exp must be computed here."""


class JointBlocks(Observer):
    """Observer that keeps parts of the joint attention of some layers, for the last denoising call seen.

    Args:
        layers: 0-based layers to keep; others that the probe watches are ignored.
        keep: which of `PARTS`.
        heads: heads that count in the mean of "i2i"; None takes all.
    """

    needs: ClassVar[Literal["call", "lse"]] = "lse"

    def __init__(
        self, layers: Iterable[int], keep: Iterable[str] = ("i2t",), heads: Iterable[int] | None = None
    ) -> None:
        self.layers, self.keep = frozenset(layers), tuple(keep)
        for part in self.keep:
            if part not in PARTS:
                raise unknown("part of the joint attention", part, PARTS)
        self.heads = None if heads is None else list(heads)
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.grid: tuple[int, int] | None = None
        self._seen: dict[int, dict[str, Tensor]] = {}

    def observe(self, seen: LayerCall) -> None:
        if seen.layer.index not in self.layers:
            return
        if seen.layout.grid is None:
            raise UserError(f"the image tokens have no known grid: {seen.layout.counts['image']} tokens")
        self.grid = seen.layout.grid
        image, text = seen.layout.positions("image"), seen.layout.positions("text")
        call = seen.call
        found: dict[str, Tensor] = {}
        if "i2t_logit" in self.keep:
            found["i2t_logit"] = gradients.logits(call, text, image).float()
        if set(self.keep) & {"i2t", "i2i", "i2i_walk"}:
            lse = seen.lse if seen.lse is not None else _logsumexp(call)
            if "i2t" in self.keep:
                found["i2t"] = exact.reduce(call, lse, text, image)
            if "i2i" in self.keep:
                found["i2i"] = self._head_mean(call, lse, image)
            if "i2i_walk" in self.keep:
                found["i2i_walk"] = _walk_mean(call, lse, image)
        if set(self.keep) & {"feat_out", "feat_proj"}:
            features = seen.output[:, :, image].transpose(1, 2).flatten(2)  # [B, I, H * D]
            if "feat_out" in self.keep:
                found["feat_out"] = features.float()
            if "feat_proj" in self.keep:
                projection: Any = seen.record.module_call.module.to_out
                found["feat_proj"] = projection[0](features).float()
        self._seen[seen.layer.index] = {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def end_call(self, denoising: DenoisingCall) -> None:
        self.kept = dict(self._seen)
        self._seen.clear()

    def abandon_call(self) -> None:
        self._seen.clear()

    def _head_mean(self, call: SDPACall, lse: Tensor, image: exact.Columns) -> Tensor:
        heads = range(call.query.shape[1]) if self.heads is None else self.heads
        total: Tensor | None = None
        for head in heads:
            one = _one_head(call, head)
            block = exact.reduce(one, lse[:, head : head + 1], image, image)[:, 0]
            total = block if total is None else total.add_(block)
        if total is None:
            raise UserError("no heads to average over; name at least one")
        return total / len(heads)


def second_eigenvalue(chain: Tensor, rounds: int = 40, vectors: int = 4) -> Tensor:
    """|lambda_2| of row-stochastic matrices [B, I, I], float32 [B], by orthogonal iteration on the deflated chain.

    How slowly a random walk forgets its start (TokenRank, arXiv:2507.17657): a head whose attention falls into few
    well separated groups is near 1, one that mixes at once is near 0. The stationary part 1 pi^T is taken out, so the
    largest eigenvalue left is the second one.
    """
    batch, tokens, _ = chain.shape
    chain = chain.double()
    pi = torch.full((batch, 1, tokens), 1.0 / tokens, dtype=chain.dtype)
    for _ in range(rounds):
        pi = pi @ chain
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(batch, tokens, min(vectors, tokens), generator=generator, dtype=chain.dtype)
    value = torch.zeros(batch, dtype=chain.dtype)
    for _ in range(rounds):
        basis, _ = torch.linalg.qr(chain @ basis - (pi @ basis))
    projected = basis.mT @ (chain @ basis - pi @ basis)
    value = torch.linalg.eigvals(projected).abs().amax(-1)
    return value.float()


def _walk_mean(call: SDPACall, lse: Tensor, image: exact.Columns) -> Tensor:
    """Image-image block [B, I, I], rows renormalised, heads weighted by how slowly their walk mixes."""
    total: Tensor | None = None
    weights: Tensor | None = None
    for head in range(call.query.shape[1]):
        block = exact.reduce(_one_head(call, head), lse[:, head : head + 1], image, image)[:, 0]
        block = block / block.sum(-1, keepdim=True).clamp(min=1e-12)
        weight = second_eigenvalue(block.cpu()).to(block.device)
        weights = weight if weights is None else weights + weight
        block *= weight[:, None, None]
        total = block if total is None else total.add_(block)
    assert total is not None and weights is not None
    return total / weights[:, None, None].clamp(min=1e-12)


def _one_head(call: SDPACall, head: int) -> SDPACall:
    mask = call.attn_mask
    if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask[:, head : head + 1]
    key, value = call.expanded_key(), call.expanded_value()
    return SDPACall(
        call.query[:, head : head + 1], key[:, head : head + 1], value[:, head : head + 1], mask, 0.0,
        call.is_causal, call.scale_factor,
    )  # fmt: skip


def _logsumexp(call: SDPACall) -> Tensor:
    """Row log-sum-exp [B, H, N] over chunks of rows, for devices whose kernels give none."""
    if call.attn_mask is not None or call.is_causal:
        raise UserError("masked attention on a device whose kernels give no log-sum-exp; run on cpu or cuda")
    key = call.expanded_key().float().mT
    parts = [
        (call.query[:, :, start : start + _LSE_ROWS].float() @ key * call.scale_factor).logsumexp(-1)
        for start in range(0, call.query.shape[-2], _LSE_ROWS)
    ]
    return torch.cat(parts, -1)
