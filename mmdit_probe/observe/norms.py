"""ValueNorm: how long the value vectors are that each kind of token brings into the joint attention (the paper's Fig. 4
and 28; arXiv:2509.18096, section 3.3).

    with probe(model, ValueNorm(), layers="all") as run:
        model.generate("a red ring on grass")
    run[ValueNorm].table().query("head == -1").groupby(["layer", "token", "span"]).norm.mean()

Per (sample, step, branch, layer): the mean over tokens of the L2 norm of the value, for image tokens, for every
reference picture and for every text span kind of each encoder stream. Read from the values that enter attention, so
LoRA counts. Not here: masses (`observe.mass`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdit_probe.models.layout import Layout
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.observer import LayerCall, RowBatch, RowObserver, token_groups
from mmdit_probe.specs import ALL_HEADS

COLUMNS = (
    "prompt", "seed", "step", "sigma", "branch", "layer", "head", "token", "span", "stream", "norm", "spread",
    "n_token",
)  # fmt: skip

_TOKENS = 256
"""Tokens upcast at once, so that the copy stays in a processor's cache."""


class ValueNorm(RowObserver):
    """Observer of value norms.

    Args:
        sink, heads: as in `RowObserver`; `heads` get rows beside the concatenation.
        rows: "head", or "layer" for the concatenation alone.

    Columns: prompt, seed, step, sigma, branch, layer, head (-1: all heads concatenated), token (image | text |
    reference | other), span (bos | word | eos | pad | template | vision | null | unknown; of references the number,
    from 0; "all" for image and other tokens), stream (encoder; "" for tokens that are no text), norm (mean over the
    tokens), spread (their standard deviation), n_token. Spans that a prompt does not have get no row.
    """

    reads = "the value"

    columns = COLUMNS

    def measure(self, seen: LayerCall) -> tuple[Layout, list[TokenTable], Tensor]:
        # Reduced when the call is over: reading numbers here would make the device wait in every layer.
        return seen.layout, seen.tokens, value_norms(seen.call.value)

    def add_rows(self, batch: RowBatch, measured: dict[int, Any]) -> None:
        alike: dict[Any, list[int]] = {}
        for layer, (layout, tables, norms) in measured.items():
            heads = () if self.rows == "layer" else self._heads(layer, norms.shape[1] - 1)
            alike.setdefault((id(layout), id(tables), norms.shape, heads), []).append(layer)
        for (*_, heads), layers in alike.items():
            layout, tables, _ = measured[layers[0]]
            # Place 0 of the norms is the concatenation, place 1 is head 0.
            kept = torch.stack([measured[layer][2] for layer in layers])[:, :, [0, *(head + 1 for head in heads)]].cpu()
            for sample, table in enumerate(tables):
                there, known = layout.present(sample), token_groups(layout, table, sample)
                groups = {group: index for group, of in known.items() if len(index := of[there[of]])}
                chosen = [kept[:, sample, :, index] for index in groups.values()]  # [L, H + 1, tokens] each
                token, span, stream = zip(*groups, strict=True)
                counts = [part.shape[-1] for part in chosen]
                batch.add(
                    sample,
                    [
                        {"layer": layers},
                        {"head": [ALL_HEADS, *heads]},
                        {"token": token, "span": span, "stream": stream, "n_token": counts},
                    ],
                    norm=torch.stack([part.mean(-1) for part in chosen], -1).numpy(),
                    spread=torch.stack([part.std(-1, correction=0) for part in chosen], -1).numpy(),
                )


@torch.no_grad()
def value_norms(value: Tensor) -> Tensor:
    """L2 norms of values [B, H, N, D] -> [B, H + 1, N] float32: the heads' concatenation first, then each head."""
    by_token = value.transpose(1, 2)  # as diffusers lays them out: reading in this order is three times as fast
    norms = torch.cat([
        torch.linalg.vector_norm(by_token[:, start : start + _TOKENS], dim=-1, dtype=torch.float32)
        for start in range(0, by_token.shape[1], _TOKENS)
    ], 1).transpose(1, 2)  # fmt: skip
    return torch.cat([torch.linalg.vector_norm(norms, dim=1, keepdim=True), norms], 1)
