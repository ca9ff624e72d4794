"""Sinks and outlier channels: which single tokens take the attention, and which channels carry outsized activations.

    with probe(model, KeyMass(), Channels()) as run:
        model.denoise(latents, 0.5, text)
    run[KeyMass].table()                # mass received by every key, per layer and head
    run[Channels].table()               # largest channel over median channel, per layer, kind and modality

A key's mass is the mean, over the queries of one modality, of the probability on that one key; a sink takes far more
than 1 / N. Tokens that a sample lacks, or that a mask hides, are neither keys nor queries, nor counted in N. Removing
sinks (`SinkFree`) does not change which word wins at a pixel within a head; what it does to a mean over heads is
measured in `experiments.scenes_quality`. Not here: masses by kind of token (`observe.mass`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention import exact, gradients
from mmdit_probe.errors import UserError
from mmdit_probe.models.layout import KINDS, MODALITIES
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, Observer, RowBatch, RowObserver
from mmdit_probe.specs import ALL_HEADS

if TYPE_CHECKING:
    import pandas as pd

SINK = 10.0
"""A key is called a sink if it takes this many times the uniform share."""

OUTLIER = 10.0
"""A channel is called an outlier if its size is this many times the median channel's."""


class KeyMass(RowObserver):
    """Mass received by every single key: N rows per sample, layer, head and query modality of each call.

    Args:
        sink, heads, rows: as in `RowObserver`.

    Columns: prompt, seed, step, sigma, branch, layer, head (-1: mean over heads), query, position (joint), token (image
    | text | reference | other), span, stream, word ("" without), place (position among the keys of its modality), mass,
    uniform (what uniform attention gives: 1 / N, and 0 to a token that is no key of the sample).
    """

    needs = "lse"

    columns = (
        "prompt", "seed", "step", "sigma", "branch", "layer", "head", "query", "position", "token", "span", "stream",
        "word", "place", "mass", "uniform",
    )  # fmt: skip

    def measure(self, seen: LayerCall) -> tuple[LayerCall, Tensor]:
        weights = _query_weights(seen, *seen.layout.modalities)
        masses = exact.reduce(seen.call, seen.logsumexp, slice(None), query_weights=weights)
        return seen, masses.cpu()  # [B, H, Q, N]

    def add_rows(self, batch: RowBatch, measured: dict[int, Any]) -> None:
        for layer, (seen, masses) in measured.items():
            heads = self._heads(layer, masses.shape[1])
            kept = masses[:, list(heads)].double().numpy()
            if self.rows == "layer":
                kept, heads = kept.mean(1, keepdims=True), (ALL_HEADS,)
            tokens = np.array(KINDS)[seen.layout.labels.numpy()]
            places = np.zeros(len(tokens), np.int64)
            for kind in KINDS:
                places[tokens == kind] = np.arange((tokens == kind).sum())
            key = {"position": np.arange(len(tokens)), "token": tokens, "place": places}
            uniform = _uniform(seen).double().numpy()
            for sample, table in enumerate(seen.tokens):
                keys = key | {"uniform": uniform[sample]} | _names(table, tokens)
                queries = {"query": seen.layout.modalities}
                batch.add(sample, [{"layer": [layer]}, {"head": heads}, queries, keys], mass=kept[sample])


class Channels(RowObserver):
    """Outlier channels: RMS per channel of q, k, v and output over the tokens of a modality, largest over median.

    Args:
        sink: as in `RowObserver`.

    Columns: step, layer, kind (query | key | value | output), token, channel (the largest; heads concatenated), ratio
    (to the median channel), outliers (how many channels exceed `OUTLIER` times the median). Means over all samples of a
    call.
    """

    reads = "query, key, value or output"

    columns = ("step", "layer", "kind", "token", "channel", "ratio", "outliers")

    def __init__(self, sink: Any = None) -> None:
        super().__init__(sink)

    def measure(self, seen: LayerCall) -> dict[tuple[str, str], Tensor]:
        call, sizes = seen.call, {}
        for kind, tensor in (("query", call.query), ("key", call.key), ("value", call.value), ("output", seen.output)):
            for token in MODALITIES:
                positions = seen.layout.positions(token)
                there = _there(seen, kind in ("query", "output"))[:, positions].to(tensor.device)  # [B, n]
                if there.any():
                    squares = tensor[:, :, positions].float().square() * there[:, None, :, None]
                    sizes[kind, token] = (squares.sum((0, 2)) / there.sum()).sqrt().flatten()  # [H * D]
        return sizes

    def add_rows(self, batch: RowBatch, measured: dict[int, Any]) -> None:
        for layer, sizes in measured.items():
            relative = {name: (size / size.median().clamp(min=1e-12)).cpu() for name, size in sizes.items()}
            kind, token = zip(*relative, strict=True)
            row = {
                "kind": kind,
                "token": token,
                "channel": [int(size.argmax()) for size in relative.values()],
                "ratio": [float(size.max()) for size in relative.values()],
                "outliers": [int((size > OUTLIER).sum()) for size in relative.values()],
            }
            batch.add(None, [{"layer": [layer]}, row])


class SinkFree(Observer):
    """I2T maps of every text position, as they are and with sinks removed and the rest renormalised, of the last call.

    Removed are keys, image or text, that take more than `SINK` times the uniform share of a head's image queries, in
    that head and sample, content words excepted: a word that draws the image's attention is what maps are for. Every
    query's other probabilities are divided by what they sum to.
    """

    needs = "lse"

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def measure(self, seen: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        layout, call, lse, space = seen.layout, seen.call, seen.logsumexp, seen.space
        image, text = layout.positions("image"), layout.positions("text")
        sinks = _sinks(seen)  # [B, H, N]
        plain = exact.reduce(call, lse, text, image)  # [B, H, I, T]
        taken = torch.zeros_like(plain[..., 0])
        places = sinks.flatten(0, 1).any(0).nonzero()[:, 0]
        if len(places):
            taken = (exact.reduce(call, lse, places, image) * sinks[:, :, None, places]).sum(-1)  # [B, H, I]
        # Masked rather than divided by one minus the removed share, which rounds away where sinks take nearly all.
        bias = torch.zeros(sinks.shape, device=sinks.device).masked_fill_(sinks, float("-inf"))[:, :, None]
        known = call.additive_mask(torch.float32)
        bias = (bias if known is None else bias + known).to(call.query.dtype)  # [B, H, 1 or N, N]
        without = replace(call, attn_mask=bias.expand(*call.query.shape[:3], layout.total))
        clean = exact.reduce(without, gradients.row_lse(without), text, image)
        return plain.unflatten(2, space).cpu(), clean.unflatten(2, space).cpu(), taken.mean(-1).cpu()

    def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
        self._kept = measured

    def maps(self, layer: int) -> tuple[Tensor, Tensor]:
        """As they are and without sinks, [B, H, h, w, T] float32 each, on the CPU; a removed token's map is 0."""
        return self._of(layer)[:2]

    def removed(self, layer: int) -> Tensor:
        """Mean share of the image queries' attention that lay on sinks, [B, H]."""
        return self._of(layer)[2]

    def _of(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        if layer not in self._kept:
            raise UserError(f"no maps of layer {layer}; kept: {sorted(self._kept) or 'nothing'}")
        return self._kept[layer]


def top_keys(table: pd.DataFrame) -> pd.DataFrame:
    """Per layer and head, of image queries of branch cond: the share of attention on sinks (keys above `SINK` times
    uniform), mean over rows, and the kind of token that takes most of it.

    Returns: layer, head, rows (n), sinks (mean number), sink_mass, largest (mean mass of the largest key), kind (of the
    largest key: text span and stream, or "image"; the most frequent over rows), kind_share (of the rows).
    """
    import pandas as pd

    part = table[(table["query"] == "image") & (table["branch"] == "cond")]
    if part.empty:
        raise UserError("no keys were seen from image queries of branch cond")
    text = part["span"].astype(str) + " " + part["stream"].astype(str)
    part = part.assign(kind=np.where(part["token"] == "text", text, part["token"].astype(str)))
    part = part.assign(sink=part["mass"] > SINK * part["uniform"])
    rows = []
    for (layer, head), group in part.groupby(["layer", "head"], observed=True):
        by_row = group.groupby(["prompt", "seed", "step"], observed=True)
        largest = group.loc[by_row["mass"].idxmax()]
        kinds = largest["kind"].value_counts()
        taken = group.assign(taken=group["mass"] * group["sink"]).groupby(["prompt", "seed", "step"], observed=True)
        rows.append(
            {"layer": layer, "head": head, "rows": len(largest), "sinks": float(by_row["sink"].sum().mean()),
             "sink_mass": float(taken["taken"].sum().mean()), "largest": float(largest["mass"].mean()),
             "kind": str(kinds.index[0]), "kind_share": float(kinds.iloc[0] / kinds.sum())}
        )  # fmt: skip
    return pd.DataFrame(rows)


def sink_mass(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Share of the image queries' attention on sinks, mean over heads: columns item, control, layer, value.

    Args:
        tables: parts of `KeyMass` rows with the columns item and control, each of whole items.
    """
    import pandas as pd

    parts = []
    for table in tables:
        part = table[(table["query"] == "image") & (table["branch"] != "uncond")]
        taken = part["mass"].where(part["mass"] > SINK * part["uniform"], 0.0)
        cells = part.assign(value=taken).groupby(["item", "control", "layer", "step", "head"], observed=True)["value"]
        parts.append(cells.sum().groupby(["item", "control", "layer"], observed=True).mean().reset_index())
    return pd.concat(parts, ignore_index=True)


def without_sinks(maps: Tensor, keep: list[int]) -> Tensor:
    """I2T maps [.., h, w, T] with only the `keep` positions, renormalised per pixel: [.., h, w, K], sum 1."""
    kept = maps[..., keep]
    return kept / kept.sum(-1, keepdim=True).clamp(min=1e-12)


def _query_weights(seen: LayerCall, *modalities: str) -> Tensor:
    """Weight of every query of a sample in the mean over those of each modality, [B or 1, Q, N] on the device."""
    chosen = seen.layout.query_masks(*modalities)
    return (chosen / chosen.sum(-1, keepdim=True).clamp(min=1)).to(seen.call.query.device)


def _uniform(seen: LayerCall) -> Tensor:
    """What uniform attention gives to every token of a sample, [B, N] on the CPU: nothing to one that is no key."""
    there = _there(seen).float()
    return there / there.sum(-1, keepdim=True)


def _there(seen: LayerCall, as_queries: bool = False) -> Tensor:
    """Which tokens every sample has as keys, or as queries, [B, N] boolean on the CPU."""
    layout, shape = seen.layout, (len(seen.tokens), seen.layout.total)
    known = layout.queries if as_queries else layout.keys
    return (torch.ones(shape, dtype=torch.bool) if known is None else known).expand(shape)


def _sinks(seen: LayerCall) -> Tensor:
    """Keys, content words excepted, that take more than `SINK` times the uniform share of a head's image queries:
    boolean [B, H, N]."""
    total = seen.layout.total
    weights = _query_weights(seen, "image")
    masses = exact.reduce(seen.call, seen.logsumexp, slice(None), query_weights=weights)[:, :, 0]
    text = seen.layout.indices("text")
    words = torch.zeros(len(seen.tokens), total, dtype=torch.bool)
    for sample, table in enumerate(seen.tokens):
        words[sample, text[table.positions(kind="word")]] = True
    return (masses > SINK * _uniform(seen)[:, None].to(masses.device)) & ~words[:, None].to(masses.device)


def _names(table: TokenTable, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Span, encoder stream and word of every joint position; "all", "" and "" of what is no text."""
    names = {
        name: np.full(len(tokens), fill, dtype=object) for name, fill in (("span", "all"), ("stream", ""), ("word", ""))
    }
    for position, token in zip(np.flatnonzero(tokens == "text"), table.tokens, strict=True):
        names["span"][position], names["stream"][position] = token.kind, token.stream
        names["word"][position] = token.word or ""
    return names
