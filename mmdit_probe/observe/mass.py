"""AttentionMass: how much of its attention each kind of token gives to each kind of token (the paper's attention
budget, Fig. 2).

Per (sample, step, branch, layer, head): the mean over image queries, and over text queries, of the probability on image
keys, on other keys, and on each text span kind of each encoder stream. Blocks are named query -> key; I2T is the sum of
the rows with query "image" and key "text". The rows of one query kind sum to 1.

    with probe(model, AttentionMass(), layers="all") as run:
        model.generate("a red ring on grass")
    run[AttentionMass].table().query("query == 'image' and key == 'text'").groupby(["layer", "span"]).mass.mean()

Exact, by columns from the row log-sum-exp (`attention.exact`); the image mass is the complement. Not averaged over
heads or
samples: that is up to the reader of the table.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention import exact
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.models.layout import Layout
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.base import DenoisingCall, LayerCall, RowObserver
from mmdit_probe.specs import heads_at

QUERIES = ("image", "text")

COLUMNS = (
    "prompt", "seed", "step", "sigma", "branch", "layer", "head", "query", "key", "span", "stream", "mass", "n_query",
    "n_key", "uniform",
)  # fmt: skip

Leaf = tuple[str, str, str]
"""(key, span, stream) of a row: ("text", "word", "t5"), ("image", "all", ""), ("other", "all", "")."""


class AttentionMass(RowObserver):
    """Observer of attention masses.

    Args:
        sink: gets the finished rows after every denoising call, layer by layer: an object with `write(columns)` or a
            function of the columns; kept in memory if None.
        heads: which heads get rows: "all", 3, "0-3", [0, 5].

    Columns: prompt, seed, step, sigma, branch (cond | uncond | unknown), layer, head, query (image | text), key (image
    | text | other), span (bos | word | eos | pad | template | null | unknown; "all" for image and other keys), stream
    (clip | t5 | ...; "" for image and other keys), mass (mean over the query tokens), n_query, n_key, uniform (n_key /
    N, the mass that uniform attention would give). Spans that a prompt does not have get no row; `other` always has
    one.
    """

    needs: ClassVar[Literal["call", "lse"]] = "lse"

    columns = COLUMNS

    def observe(self, seen: LayerCall) -> None:
        tables = seen.tokens
        leaves = [_leaves(table) for table in tables]
        masses, n_query = attention_masses(seen.call, seen.lse, seen.layout, [_groups(t, of) for t, of in leaves])
        self._seen[seen.layer.index] = (seen.layout, [of for _, of in leaves], masses, n_query)

    def _rows(
        self,
        denoising: DenoisingCall,
        layer: int,
        layout: Layout,
        leaves: list[list[Leaf]],
        masses: Tensor,
        n_query: Tensor,
    ) -> dict[str, np.ndarray]:
        heads = np.array(heads_at(self.heads, layer, masses.shape[1]))
        values, counts = masses.double().cpu().numpy(), n_query.cpu().numpy()
        parts: list[dict[str, np.ndarray]] = []
        for row, of_row in enumerate(leaves):
            queries = [q for q in range(len(QUERIES)) if counts[row][q] > 0]
            keys = [_count(layout, denoising, row, leaf) for leaf in of_row]
            # A span whose every position is missing or masked in this sample is none it has.
            there = [place for place, (key, _, _) in enumerate(of_row) if key != "text" or keys[place] > 0]
            of_row, keys = [of_row[place] for place in there], [keys[place] for place in there]
            total = sum(layout.key_count(kind, row) for kind in ("image", "text", "other"))
            shape = (len(heads), len(queries), len(of_row))
            size = int(np.prod(shape))
            head, query, leaf = (axis.ravel() for axis in np.indices(shape))
            n_key = np.array(keys, dtype=np.int64)[leaf]
            parts.append(
                {
                    "prompt": _constant(denoising.prompts[row], size),
                    "seed": np.full(size, denoising.seeds[row], np.int64),
                    "step": np.full(size, denoising.step, np.int64),
                    "sigma": np.full(size, denoising.sigmas[row], np.float64),
                    "branch": _constant(denoising.branches[row], size),
                    "layer": np.full(size, layer, np.int64),
                    "head": heads[head].astype(np.int64),
                    "query": np.array([QUERIES[q] for q in queries], dtype=object)[query],
                    "key": np.array([key for key, _, _ in of_row], dtype=object)[leaf],
                    "span": np.array([span for _, span, _ in of_row], dtype=object)[leaf],
                    "stream": np.array([stream for _, _, stream in of_row], dtype=object)[leaf],
                    "mass": values[row][heads][:, queries][..., there].ravel(),
                    "n_query": counts[row][queries][query].astype(np.int64),
                    "n_key": n_key,
                    "uniform": n_key / total,
                }
            )
        return {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}


@torch.no_grad()
def attention_masses(
    call: SDPACall, lse: Tensor | None, layout: Layout, groups: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Mean attention masses of one call, exact, without the N x N matrix.

    Args:
        call: query [B, H, N, D] and key over the same N joint tokens.
        lse: [B, H, N] row log-sum-exp of the call; None takes the indicator-values path.
        layout: the kinds of the N tokens.
        groups: per sample, the group 2, 3, ... of every text position; groups 0 and 1 are image and other keys.

    Returns: masses [B, H, 2, G] float32, mean over image (0) and text (1) queries, sums to 1 over the G groups; and
    n_query [B, 2], the queries averaged over (queries with every key masked are left out).
    """
    device = call.query.device
    batch, _, n_rows, _ = call.query.shape
    count = 1 + max(1, *(max(of, default=1) for of in groups))
    of_key = torch.zeros(batch, n_rows, dtype=torch.long)
    of_key[:, layout.labels == 2] = 1
    of_key[:, layout.labels == 1] = torch.tensor(groups, dtype=torch.long).reshape(batch, -1)
    of_key = of_key.to(device)
    weights = torch.stack([layout.labels == 0, layout.labels == 1]).float().to(device)  # [2, N]
    if layout.queries is not None:
        weights = weights * layout.queries.to(device)[:, None].float()  # [B, 2, N]
    live = exact.live_rows(call)
    if live is not None:
        # Masks of this family of calls are the same for all heads; a query is dropped if no head sees anything.
        weights = weights * live.any(1).expand(batch, n_rows)[:, None].float()
    n_query = weights.sum(-1).expand(batch, 2)
    if lse is None:
        each = exact.group_masses(call, None, of_key, count)  # [B, H, N, G]
        sums = torch.einsum("bqn,bhng->bhqg", weights.expand(batch, 2, n_rows), each)
        return sums / n_query[:, None, :, None].clamp(min=1), n_query.long()
    keys = (layout.labels != 0).nonzero()[:, 0].to(device)
    contiguous = len(keys) > 0 and int(keys[-1] - keys[0]) + 1 == len(keys)
    columns = slice(int(keys[0]), int(keys[-1]) + 1) if contiguous else keys
    per_key = exact.column_sums(call, lse, columns, weights)  # [B, H, 2, K]
    indicator = torch.nn.functional.one_hot(of_key[:, columns], count).float()  # [B, K, G]
    masses = (per_key @ indicator[:, None]) / n_query[:, None, :, None].clamp(min=1)
    masses[..., 0] = 1.0 - masses[..., 1:].sum(-1)
    return masses, n_query.long()


def _leaves(table: TokenTable) -> tuple[TokenTable, list[Leaf]]:
    spans = dict.fromkeys(("text", token.kind, token.stream) for token in table.tokens)
    return table, [("image", "all", ""), ("other", "all", ""), *spans]


def _groups(table: TokenTable, leaves: list[Leaf]) -> list[int]:
    place = {leaf: index for index, leaf in enumerate(leaves)}
    return [place["text", token.kind, token.stream] for token in table.tokens]


def _count(layout: Layout, denoising: DenoisingCall, row: int, leaf: Leaf) -> int:
    key, span, stream = leaf
    if key != "text":
        return layout.key_count(key, row)
    table = denoising.tokens(layout.counts["text"])[row]
    there = [True] * len(table) if layout.keys is None else layout.keys[row][layout.labels == 1].tolist()
    return sum(
        is_key and token.kind == span and token.stream == stream
        for token, is_key in zip(table.tokens, there, strict=True)
    )


def _constant(value: str, size: int) -> np.ndarray:
    column = np.empty(size, dtype=object)
    column[:] = value
    return column
