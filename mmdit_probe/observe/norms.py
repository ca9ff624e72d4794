"""ValueNorm: how long the value vectors are that each kind of token brings into the joint attention (the paper's Fig. 4
and 28; arXiv:2509.18096, section 3.3).

Per (sample, step, branch, layer): the mean over tokens of the L2 norm of the value, for image tokens and for every text
span kind of each encoder stream. It stands for how strongly a key can push its readers: what a query receives is the
mass it gives times the value it meets.

    with probe(model, ValueNorm(), layers="all") as run:
        model.generate("a red ring on grass")
    run[ValueNorm].table().query("head == -1").groupby(["layer", "token", "span"]).norm.mean()

Read from the values that enter attention, so LoRA counts. Rows of head -1 are the norm of the heads' concatenation (the
paper's curves, as far as it says), rows of heads 0..H-1 each head's own. Not here: masses (`observe.mass`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

CONCATENATED = -1
from mmdit_probe.models.layout import Layout
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, RowObserver
from mmdit_probe.specs import heads_at

if TYPE_CHECKING:
    pass

COLUMNS = (
    "prompt", "seed", "step", "sigma", "branch", "layer", "head", "token", "span", "stream", "norm", "spread",
    "n_token",
)  # fmt: skip

_TOKENS = 256
"""Tokens upcast at once, so that the copy stays in a processor's cache."""

Leaf = tuple[str, str, str]
"""(token, span, stream) of a row: ("text", "word", "t5"), ("image", "all", ""), ("other", "all", "")."""


class ValueNorm(RowObserver):
    """Observer of value norms.

    Args:
        sink: gets the finished rows after every denoising call: an object with `write(columns)` or a function of the
            columns; kept in memory if None.
        heads: which heads get rows beside the concatenation: "all", 3, "0-3", [0, 5].

    Columns: prompt, seed, step, sigma, branch, layer, head (-1: all heads concatenated), token (image | text | other),
    span (bos | word | eos | pad | template | null | unknown; "all" for image and other tokens), stream (encoder; "" for
    image and other tokens), norm (mean over the tokens), spread (their standard deviation), n_token. Spans that a
    prompt does not have get no row.
    """

    needs: ClassVar[Literal["call", "lse"]] = "call"

    columns = COLUMNS

    def observe(self, seen: LayerCall) -> None:
        # Reduced when the call is over: reading numbers here would make the device wait in every layer.
        self._seen[seen.layer.index] = (seen.layout, seen.tokens, value_norms(seen.call.value))

    def _rows(
        self, denoising: DenoisingCall, layer: int, layout: Layout, tables: list[TokenTable], norms: Tensor
    ) -> dict[str, np.ndarray]:
        norms = norms.cpu()  # [B, H + 1, N]
        places = {kind: _indices(layout.positions(kind), norms.shape[-1]) for kind in ("image", "text", "other")}
        leaves, counts, means, spreads = [], [], [], []
        for row, table in enumerate(tables):
            of_leaf: dict[Leaf, Tensor] = {
                (kind, "all", ""): places[kind] for kind in ("image", "other") if len(places[kind])
            }
            for kind, stream in dict.fromkeys((token.kind, token.stream) for token in table.tokens):
                of_leaf["text", kind, stream] = places["text"][table.positions(kind=kind, stream=stream)]
            if layout.keys is not None:  # tokens that this sample lacks, or that its mask hides
                there = layout.keys[row]
                of_leaf = {name: index[there[index]] for name, index in of_leaf.items() if there[index].any()}
            chosen = [norms[row][:, index] for index in of_leaf.values()]
            leaves.append(list(of_leaf))
            counts.append([part.shape[-1] for part in chosen])
            means.append(torch.stack([part.mean(-1) for part in chosen], -1).numpy())  # [H + 1, leaves]
            spreads.append(torch.stack([part.std(-1, correction=0) for part in chosen], -1).numpy())
        heads = np.array([CONCATENATED, *heads_at(self.heads, layer, means[0].shape[0] - 1)])
        parts: list[dict[str, np.ndarray]] = []
        for row, of_row in enumerate(leaves):
            head, leaf = (axis.ravel() for axis in np.indices((len(heads), len(of_row))))
            size = len(head)
            # Place 0 of the norms is the concatenation, place 1 is head 0.
            values, widths = means[row][heads + 1], spreads[row][heads + 1]
            parts.append(
                {
                    "prompt": np.full(size, denoising.prompts[row], dtype=object),
                    "seed": np.full(size, denoising.seeds[row], np.int64),
                    "step": np.full(size, denoising.step, np.int64),
                    "sigma": np.full(size, denoising.sigmas[row], np.float64),
                    "branch": np.full(size, denoising.branches[row], dtype=object),
                    "layer": np.full(size, layer, np.int64),
                    "head": heads[head].astype(np.int64),
                    "token": np.array([token for token, _, _ in of_row], dtype=object)[leaf],
                    "span": np.array([span for _, span, _ in of_row], dtype=object)[leaf],
                    "stream": np.array([stream for _, _, stream in of_row], dtype=object)[leaf],
                    "norm": values.astype(np.float64).ravel(),
                    "spread": widths.astype(np.float64).ravel(),
                    "n_token": np.array(counts[row], dtype=np.int64)[leaf],
                }
            )
        return {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}


@torch.no_grad()
def value_norms(value: Tensor) -> Tensor:
    """L2 norms of values [B, H, N, D] -> [B, H + 1, N] float32: the heads' concatenation first, then each head."""
    by_token = value.transpose(1, 2)  # as diffusers lays them out: reading in this order is three times as fast
    norms = torch.cat([
        torch.linalg.vector_norm(by_token[:, start : start + _TOKENS], dim=-1, dtype=torch.float32)
        for start in range(0, by_token.shape[1], _TOKENS)
    ], 1).transpose(1, 2)  # fmt: skip
    return torch.cat([torch.linalg.vector_norm(norms, dim=1, keepdim=True), norms], 1)


def _indices(positions: slice | Tensor, total: int) -> Tensor:
    return torch.arange(total)[positions]
