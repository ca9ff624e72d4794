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

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention import exact
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.models.layout import Layout
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, RowObserver
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

    # What the layers of one denoising call have in common: how masses are taken, and the rows but for their numbers.
    _plan: tuple[Sequence[TokenTable], Layout, list[list[Leaf]], Plan] | None = None
    _frame: Any = None

    def observe(self, seen: LayerCall) -> None:
        tables, layout = seen.tokens, seen.layout
        if self._plan is None or self._plan[0] is not tables or self._plan[1] is not layout:
            leaves = [_leaves(table) for table in tables]
            groups = [_groups(table, of) for table, of in zip(tables, leaves, strict=True)]
            self._plan = (tables, layout, leaves, plan_masses(layout, groups, seen.call.query.device))
        *_, leaves, plan = self._plan
        masses, n_query = planned_masses(seen.call, seen.lse, plan)
        self._seen[seen.layer.index] = (layout, leaves, masses, n_query)

    def end_call(self, denoising: DenoisingCall) -> None:
        super().end_call(denoising)
        self._plan = self._frame = None

    def abandon_call(self) -> None:
        super().abandon_call()
        self._plan = self._frame = None

    def _rows(
        self,
        denoising: DenoisingCall,
        layer: int,
        layout: Layout,
        leaves: list[list[Leaf]],
        masses: Tensor,
        n_query: Tensor,
    ) -> dict[str, np.ndarray]:
        values, counts = masses.double().cpu().numpy(), n_query.cpu().numpy()
        heads = np.array(heads_at(self.heads, layer, masses.shape[1]))
        key = (id(layout), id(leaves), counts.tobytes(), heads.tobytes())
        if self._frame is None or self._frame[0] != key:
            self._frame = (key, *_frame(denoising, layout, leaves, counts, heads))
        _, columns, picked = self._frame
        mass = np.concatenate([values[row][np.ix_(*of_row)].ravel() for row, of_row in enumerate(picked)])
        columns = columns | {"mass": mass, "layer": np.full(len(mass), layer, np.int64)}
        return {name: columns[name] for name in COLUMNS}


def _frame(
    denoising: DenoisingCall, layout: Layout, leaves: list[list[Leaf]], counts: np.ndarray, heads: np.ndarray
) -> tuple[dict[str, np.ndarray], list[tuple[np.ndarray, list[int], list[int]]]]:
    """Rows without layer and mass, and per sample the (heads, queries, leaves) that the rows are of."""
    parts: list[dict[str, np.ndarray]] = []
    picked = []
    for row, of_row in enumerate(leaves):
        queries = [q for q in range(len(QUERIES)) if counts[row][q] > 0]
        keys = _counts(layout, denoising.tokens(layout.counts["text"])[row], row, of_row)
        # A span whose every position is missing or masked in this sample is none it has.
        there = [place for place, (key, _, _) in enumerate(of_row) if key != "text" or keys[place] > 0]
        picked.append((heads, queries, there))
        named = np.array(of_row, dtype=object)[there]  # [leaves, 3]
        total = sum(layout.key_count(kind, row) for kind in ("image", "text", "other"))
        head, query, leaf = (axis.ravel() for axis in np.indices((len(heads), len(queries), len(there))))
        size = len(head)
        n_key = np.array(keys, dtype=np.int64)[there][leaf]
        parts.append(
            {
                "prompt": _constant(denoising.prompts[row], size),
                "seed": np.full(size, denoising.seeds[row], np.int64),
                "step": np.full(size, denoising.step, np.int64),
                "sigma": np.full(size, denoising.sigmas[row], np.float64),
                "branch": _constant(denoising.branches[row], size),
                "head": heads[head].astype(np.int64),
                "query": np.array([QUERIES[q] for q in queries], dtype=object)[query],
                "key": named[leaf, 0],
                "span": named[leaf, 1],
                "stream": named[leaf, 2],
                "n_query": counts[row][queries][query].astype(np.int64),
                "n_key": n_key,
                "uniform": n_key / total,
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, picked


@dataclass(frozen=True)
class Plan:
    """What the masses of calls with one layout and one grouping have in common.

    Attributes:
        of_key: [B, N] group of every key. count: number of groups G.
        columns: the keys that are no image tokens. indicator: [B, K, G] their groups.
        weights: [B or 1, 2, N] which queries are averaged over: image (0) and text (1) ones.
    """

    of_key: Tensor
    count: int
    columns: exact.Columns
    indicator: Tensor
    weights: Tensor


def plan_masses(layout: Layout, groups: list[list[int]], device: torch.device) -> Plan:
    """The plan of a layout; `groups` as in `attention_masses`."""
    count = 1 + max(1, *(max(of, default=1) for of in groups))
    of_key = torch.zeros(len(groups), layout.total, dtype=torch.long)
    of_key[:, layout.labels == 2] = 1
    of_key[:, layout.labels == 1] = torch.tensor(groups, dtype=torch.long).reshape(len(groups), -1)
    weights = torch.stack([layout.labels == 0, layout.labels == 1]).float()[None]
    if layout.queries is not None:
        weights = weights * layout.queries[:, None].float()
    keys = (layout.labels != 0).nonzero()[:, 0]
    contiguous = len(keys) > 0 and int(keys[-1] - keys[0]) + 1 == len(keys)
    columns = slice(int(keys[0]), int(keys[-1]) + 1) if contiguous else keys.to(device)
    indicator = torch.nn.functional.one_hot(of_key[:, keys], count).float()
    return Plan(of_key.to(device), count, columns, indicator.to(device), weights.to(device))


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
    return planned_masses(call, lse, plan_masses(layout, groups, call.query.device))


@torch.no_grad()
def planned_masses(call: SDPACall, lse: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    """`attention_masses` by a plan made before."""
    batch, _, n_rows, _ = call.query.shape
    weights = plan.weights
    live = exact.live_queries(call)
    if live is not None:
        # Masks of this family of calls are the same for all heads; a query is dropped if no head sees anything.
        weights = weights * live.any(1).expand(batch, n_rows)[:, None].float()
    n_query = weights.sum(-1).expand(batch, 2)
    if lse is None:
        each = exact.group_masses(call, None, plan.of_key, plan.count)  # [B, H, N, G]
        sums = torch.einsum("bqn,bhng->bhqg", weights.expand(batch, 2, n_rows), each)
        return sums / n_query[:, None, :, None].clamp(min=1), n_query.long()
    sums = exact.reduce(call, lse, plan.columns, key_weights=plan.indicator, query_weights=weights)  # [B, H, 2, G]
    masses = sums / n_query[:, None, :, None].clamp(min=1)
    masses[..., 0] = 1.0 - masses[..., 1:].sum(-1)
    return masses, n_query.long()


def _leaves(table: TokenTable) -> list[Leaf]:
    """The groups 0, 1, 2, ... of a sample's keys."""
    spans = dict.fromkeys(("text", token.kind, token.stream) for token in table.tokens)
    return [("image", "all", ""), ("other", "all", ""), *spans]


def _groups(table: TokenTable, leaves: list[Leaf]) -> list[int]:
    place = {leaf: index for index, leaf in enumerate(leaves)}
    return [place["text", token.kind, token.stream] for token in table.tokens]


def _counts(layout: Layout, table: TokenTable, row: int, leaves: list[Leaf]) -> list[int]:
    """Keys of each group that a sample has."""
    there = [True] * len(table) if layout.keys is None else layout.keys[row][layout.labels == 1].tolist()
    spans = Counter((token.kind, token.stream) for token, is_key in zip(table.tokens, there, strict=True) if is_key)
    return [layout.key_count(key, row) if key != "text" else spans[span, stream] for key, span, stream in leaves]


def _constant(value: str, size: int) -> np.ndarray:
    column = np.empty(size, dtype=object)
    column[:] = value
    return column
