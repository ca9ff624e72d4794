"""Sinks and outlier channels: which single tokens take the attention, and which channels carry outsized activations.

    with probe(model, KeyMass(), Channels()) as run:
        model.denoise(latents, 0.5, text)
    run[KeyMass].table()                # mass received by every key, per layer and head
    run[Channels].table()               # largest channel over median channel, per layer, kind and modality

A key's mass is the mean, over the queries of one modality, of the probability on that one key; 1 / N is uniform. A sink
is a key that takes far more (`top_keys`, `SINK`). Removing sinks from I2T maps and renormalising the rest (`SinkFree`)
changes how maps look, but not which word wins at a pixel within a head: every word there is divided by the same number.
What it does to a mean over heads, and to how one word's map ranks pixels, is measured in `experiments.sink_quality`.
Not here: masses by kind of token (`observe.mass`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention import exact
from mmdit_probe.errors import UserError
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, MemorySink, Observer

if TYPE_CHECKING:
    import pandas as pd

SINK = 10.0
"""A key is called a sink if it takes this many times the uniform share."""

OUTLIER = 10.0
"""A channel is called an outlier if its size is this many times the median channel's."""

MODALITIES = ("image", "text")


class KeyMass(Observer):
    """Mass received by every single key. Keeps N numbers per row, layer, head and query modality of each call.

    Columns: prompt, seed, step, sigma, branch, layer, head, query, position (joint), token (image | text | other),
    span, stream, word ("" without), place (position among the keys of its modality), mass, uniform (1 / N).
    """

    needs: ClassVar[Literal["call", "lse"]] = "lse"

    def __init__(self) -> None:
        self._memory = MemorySink()
        self._seen: dict[int, tuple[LayerCall, Tensor]] = {}

    def observe(self, seen: LayerCall) -> None:
        if seen.lse is None:
            raise UserError("the mass of single keys needs a kernel that gives its log-sum-exp; this device has none")
        labels = seen.layout.labels
        weights = torch.stack([labels == 0, labels == 1]).float()
        weights = (weights / weights.sum(1, keepdim=True).clamp(min=1)).to(seen.call.query.device)
        masses = exact.reduce(seen.call, seen.lse, slice(None), query_weights=weights[None])  # [B, H, 2, N]
        self._seen[seen.layer.index] = (seen, masses.cpu())

    def end_call(self, denoising: DenoisingCall) -> None:
        for layer in sorted(self._seen):
            self._write(denoising, layer, *self._seen[layer])
        self._seen.clear()

    def abandon_call(self) -> None:
        self._seen.clear()

    def table(self) -> pd.DataFrame:
        """All rows so far."""
        return self._memory.table()

    def _write(self, denoising: DenoisingCall, layer: int, seen: LayerCall, masses: Tensor) -> None:
        _, heads, _, total = masses.shape
        kinds = np.array(["text", "other", "image"], dtype=object)
        labels = seen.layout.labels.numpy()
        tokens = np.where(labels == 0, kinds[2], np.where(labels == 1, kinds[0], kinds[1]))
        places = np.zeros(total, np.int64)
        for kind in np.unique(tokens):
            places[tokens == kind] = np.arange((tokens == kind).sum())
        for row, table in enumerate(seen.tokens):
            size = heads * 2 * total
            head, query, key = (axis.ravel() for axis in np.indices((heads, 2, total)))
            span, stream, word = _names(table, tokens)
            self._memory.write(
                {
                    "prompt": np.full(size, denoising.prompts[row], dtype=object),
                    "seed": np.full(size, denoising.seeds[row], np.int64),
                    "step": np.full(size, denoising.step, np.int64),
                    "sigma": np.full(size, denoising.sigmas[row], np.float64),
                    "branch": np.full(size, denoising.branches[row], dtype=object),
                    "layer": np.full(size, layer, np.int64),
                    "head": head.astype(np.int64),
                    "query": np.array(MODALITIES, dtype=object)[query],
                    "position": key.astype(np.int64),
                    "token": tokens[key],
                    "span": span[key],
                    "stream": stream[key],
                    "word": word[key],
                    "place": places[key],
                    "mass": masses[row].double().numpy().ravel(),
                    "uniform": np.full(size, 1.0 / total),
                }
            )


class Channels(Observer):
    """Outlier channels: RMS per channel of q, k, v and output over the tokens of a modality, largest over median.

    Columns: step, layer, kind (query | key | value | output), token, channel (the largest; heads concatenated), ratio
    (to the median channel), outliers (how many channels exceed `OUTLIER` times the median). Means over all rows of a
    call.
    """

    needs: ClassVar[Literal["call", "lse"]] = "call"

    def __init__(self) -> None:
        self._memory = MemorySink()
        self._seen: dict[int, list[tuple[str, str, int, float, int]]] = {}

    def observe(self, seen: LayerCall) -> None:
        call = seen.call
        rows = []
        for kind, tensor in (("query", call.query), ("key", call.key), ("value", call.value), ("output", seen.output)):
            for token in MODALITIES:
                part = tensor[:, :, seen.layout.positions(token)].float()
                if part.shape[2]:
                    size = part.square().mean((0, 2)).sqrt().flatten()  # [H * D]
                    relative = size / size.median().clamp(min=1e-12)
                    many = int((relative > OUTLIER).sum())
                    rows.append((kind, token, int(size.argmax()), float(relative.max()), many))
        self._seen[seen.layer.index] = rows

    def end_call(self, denoising: DenoisingCall) -> None:
        for layer, rows in sorted(self._seen.items()):
            kinds, tokens, channels, ratios, outliers = zip(*rows, strict=True)
            self._memory.write(
                {
                    "step": np.full(len(rows), denoising.step, np.int64),
                    "layer": np.full(len(rows), layer, np.int64),
                    "kind": np.array(kinds, dtype=object),
                    "token": np.array(tokens, dtype=object),
                    "channel": np.array(channels, np.int64),
                    "ratio": np.array(ratios, np.float64),
                    "outliers": np.array(outliers, np.int64),
                }
            )
        self._seen.clear()

    def abandon_call(self) -> None:
        self._seen.clear()

    def table(self) -> pd.DataFrame:
        """All rows so far."""
        return self._memory.table()


class SinkFree(Observer):
    """I2T maps of every text position, as they are and with sinks removed and the rest renormalised, of the last call.

    Removed are keys, image or text, that take more than `SINK` times the uniform share of a head's image queries, in
    that head and sample, content words excepted: a word that draws the image's attention is what maps are for. Every
    query's other probabilities are divided by what they sum to.
    """

    needs: ClassVar[Literal["call", "lse"]] = "lse"

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def observe(self, seen: LayerCall) -> None:
        if seen.lse is None or seen.layout.grid is None:
            raise UserError("maps without sinks need a kernel that gives its log-sum-exp and a known token grid")
        layout, call, lse = seen.layout, seen.call, seen.lse
        device = call.query.device
        weights = (layout.labels == 0).float()[None]
        weights = (weights / weights.sum().clamp(min=1)).to(device)
        masses = exact.reduce(call, lse, slice(None), query_weights=weights[None])[:, :, 0]  # [B, H, N]
        sinks = masses > SINK / layout.total
        image, text = layout.positions("image"), layout.positions("text")
        words = torch.zeros(len(seen.tokens), layout.counts["text"], dtype=torch.bool)
        for row, table in enumerate(seen.tokens):
            words[row, table.positions(kind="word")] = True
        spared = torch.zeros(len(words), layout.total, dtype=torch.bool)
        spared[:, text] = words
        sinks &= ~spared[:, None].to(device)
        plain = exact.reduce(call, lse, text, image)  # [B, H, I, T]
        places = sinks.flatten(0, 1).any(0).nonzero()[:, 0]
        taken = torch.zeros_like(plain[..., 0])
        if len(places):
            there = exact.reduce(call, lse, places, image)  # [B, H, I, U]
            taken = (there * sinks[:, :, None, places]).sum(-1)
        # Masked rather than divided by one minus the removed share, which rounds away where sinks take nearly all.
        bias = torch.zeros(sinks.shape, device=device).masked_fill_(sinks, float("-inf"))[:, :, None]  # [B, H, 1, N]
        known = call.additive_mask(torch.float32)
        bias = (bias if known is None else bias + known).to(call.query.dtype)
        without = replace(call, attn_mask=bias.expand(*call.query.shape[:3], layout.total))
        rest = exact.logsumexp(without)
        if rest is None:
            raise UserError("maps without sinks need a kernel that gives the log-sum-exp of masked attention")
        clean = exact.reduce(without, rest, text, image)
        plain, clean = (maps.unflatten(2, layout.grid).cpu() for maps in (plain, clean))
        self._seen[seen.layer.index] = (plain, clean, taken.mean(-1).cpu())

    def end_call(self, denoising: DenoisingCall) -> None:
        self._kept, self._seen = self._seen, {}

    def abandon_call(self) -> None:
        self._seen.clear()

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


def top_keys(table: pd.DataFrame, query: str = "image", branch: str = "cond") -> pd.DataFrame:
    """Per layer and head: the share of attention on sinks (keys above `SINK` times uniform), mean over rows, and the
    kind of token that takes most of it.

    Returns: layer, head, rows (n), sinks (mean number), sink_mass, largest (mean mass of the largest key), kind (of the
    largest key: text span and stream, or "image"; the most frequent over rows), kind_share (of the rows).
    """
    import pandas as pd

    part = table[(table["query"] == query) & (table["branch"] == branch)]
    if part.empty:
        raise UserError(f"no keys were seen from {query} queries of branch {branch}")
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


def _names(table: TokenTable, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Span, encoder stream and word of every joint position; "all", "" and "" of what is no text."""
    span, stream, word = (np.full(len(tokens), fill, dtype=object) for fill in ("all", "", ""))
    text = np.flatnonzero(tokens == "text")
    for position, token in zip(text, table.tokens, strict=True):
        span[position], stream[position], word[position] = token.kind, token.stream, token.word or ""
    return span, stream, word
