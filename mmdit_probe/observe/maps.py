"""TextMaps: where each text token is looked for in the image, kept as maps (the I2T block of the paper's layer maps).

    with probe(model, TextMaps(words=["ring", "house"]), layers=9) as run:
        model.denoise(latents, 0.5, text)
    run[TextMaps].maps(layer=9).shape                # [B, h, w, 2]

Maps are columns of the exact attention probabilities: for `queries="image"` (I2T) the value at an image token is that
query's probability on the word; for `queries="text"` (T2I) it is the word's probability on that image token.

Unlike the other observers this one grows with every call it sees, because maps were asked for by name: choose layers
and steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmdit_probe.attention import exact
from mmdit_probe.errors import UserError, unknown
from mmdit_probe.models.tokens import TokenTable
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, Observer


class TextMaps(Observer):
    """Observer that keeps text maps.

    Args:
        words: None keeps every text position (T' = T); positions (ints) keep those; words or phrases (strings) keep one
            map each, over all positions of the word in all encoder streams, or in `stream` alone.
        heads: "mean" averages over heads, "all" keeps them.
        queries: "image" for I2T, the sum over a word's positions; "text" for T2I, the mean over a word's positions.
        stream: encoder stream to read words from; None takes all.

    A word that is not in a row's prompt gives zeros in rows of the unconditional branch, and an error elsewhere.
    """

    needs: ClassVar[Literal["call", "lse"]] = "lse"

    def __init__(
        self,
        words: Sequence[str] | Sequence[int] | None = None,
        heads: Literal["mean", "all"] = "mean",
        queries: Literal["image", "text"] = "image",
        stream: str | None = None,
    ) -> None:
        if heads not in ("mean", "all"):
            raise unknown("heads option", heads, ("mean", "all"))
        if queries not in ("image", "text"):
            raise unknown("queries option", queries, ("image", "text"))
        self.words = [words] if isinstance(words, str) else words
        self.heads, self.queries, self.stream = heads, queries, stream
        self._seen: dict[int, Tensor] = {}
        self._kept: dict[tuple[int, int], list[tuple[DenoisingCall, Tensor]]] = {}

    def observe(self, seen: LayerCall) -> None:
        frames = seen.layout.frames
        if seen.layout.grid is None or math.prod((frames, *seen.layout.grid)) != seen.layout.counts["image"]:
            raise UserError(f"the image tokens have no known grid: {seen.layout.counts['image']} tokens")
        groups = self._groups(seen)  # [B or 1, T, G]; None keeps every text position
        head_mean = self.heads == "mean"
        image, text = seen.layout.positions("image"), seen.layout.positions("text")
        call, lse = seen.call, seen.lse
        if self.queries == "image":
            if groups is not None:  # only the positions that some map reads
                read = groups.any(0).any(-1).nonzero()[:, 0]
                text, groups = torch.arange(seen.layout.total)[text][read].to(call.query.device), groups[:, read]
            if lse is not None:
                maps = exact.reduce(call, lse, text, image, key_weights=groups, head_mean=head_mean)
            else:
                maps = _without_lse(call, text, groups, head_mean, seen.layout.total)[..., image, :]
        else:
            if lse is None:
                raise UserError("T2I maps need a kernel that gives its log-sum-exp; this device has none")
            if seen.layout.queries is not None:
                asked = seen.layout.queries[:, text]
                if not asked.any():
                    raise UserError("text tokens are no queries in this model: it has no T2I maps")
                groups = torch.eye(seen.layout.counts["text"])[None] if groups is None else groups
                groups = groups * asked[..., None]
            if groups is not None:
                groups = (groups / groups.sum(1, keepdim=True).clamp(min=1)).to(call.query.device)
            weights = None if groups is None else groups.mT
            maps = exact.reduce(call, lse, image, text, query_weights=weights, head_mean=head_mean).mT
        h, w = seen.layout.grid
        space = (h, w) if frames == 1 else (frames, h, w)
        maps = maps.reshape(*maps.shape[:-2], *space, maps.shape[-1])
        # Small ones stay on the device until the call is over, so that it need not wait in every layer.
        self._seen[seen.layer.index] = maps if head_mean else maps.cpu()

    def end_call(self, denoising: DenoisingCall) -> None:
        for layer, maps in self._seen.items():
            self._kept.setdefault((layer, denoising.step), []).append((denoising, maps.cpu()))
        self._seen.clear()

    def abandon_call(self) -> None:
        self._seen.clear()

    @property
    def steps(self) -> list[int]:
        """Steps that maps were kept of."""
        return sorted({step for _, step in self._kept})

    def maps(self, layer: int, step: int | None = None, branch: str | None = "cond") -> Tensor:
        """Maps of one layer, [B, h, w, T'] float32 on the CPU, or [B, H, h, w, T'] with heads="all".

        Args:
            layer: joint-attention layer.
            step: sampling step; None averages over the steps that were kept.
            branch: guidance branch; None takes every row.

        Of a video's F frames: [B, F, h, w, T'] and [B, H, F, h, w, T'].

        Rows are in the order they were seen: batch rows within a call, calls in order. See `rows`.

        Raises:
            UserError: nothing was kept for this layer, step and branch.
        """
        steps = self.steps if step is None else [step]
        parts = []
        for at in steps:
            kept = [maps[_rows_of(call, branch)] for call, maps in self._kept.get((layer, at), [])]
            kept = [maps for maps in kept if len(maps)]
            if not kept:
                have = ", ".join(f"layer {of} step {s}" for of, s in sorted(self._kept)[:8]) or "nothing"
                branches = sorted({b for calls in self._kept.values() for call, _ in calls for b in call.branches})
                raise UserError(
                    f"no maps of layer {layer}, step {at}, branch {branch}; kept: {have}; branches: {branches}"
                )
            parts.append(torch.cat(kept))
        if any(part.shape != parts[0].shape for part in parts):
            raise UserError("the steps hold different numbers of samples; name a step")
        return torch.stack(parts).mean(0)

    def rows(self, layer: int, step: int | None = None, branch: str | None = "cond") -> list[tuple[str, int, float]]:
        """(prompt, seed, sigma) of every row that `maps` returns for one step (the first kept one if None)."""
        at = self.steps[0] if step is None and self.steps else step
        return [
            (call.prompts[row], call.seeds[row], call.sigmas[row])
            for call, _ in self._kept.get((layer, -1 if at is None else at), [])
            for row in _rows_of(call, branch)
        ]

    def _groups(self, seen: LayerCall) -> Tensor | None:
        """Which text positions make up each map, [B or 1, T, G] on the CPU; None for every position by itself."""
        length, words = seen.layout.counts["text"], self.words
        if words is None:
            return None
        if all(isinstance(word, int) for word in words):
            positions = torch.tensor(words, dtype=torch.long)
            if len(positions) == 0 or positions.min() < 0 or positions.max() >= length:
                raise UserError(f"text positions {list(words)}: expected positions in 0..{length - 1}")
            return torch.nn.functional.one_hot(positions, length).float().t()[None]
        groups = torch.zeros(len(seen.tokens), length, len(words))
        for row, table in enumerate(seen.tokens):
            for place, word in enumerate(words):
                groups[row, self._positions(table, str(word), seen.denoising.branches[row]), place] = 1.0
        return groups

    def _positions(self, table: TokenTable, word: str, branch: str) -> list[int]:
        try:
            spans = table.word_spans(word)
        except UserError:
            if branch == "uncond":
                return []
            raise
        return [p for stream, positions in spans.items() if self.stream in (None, stream) for p in positions]


def _rows_of(call: DenoisingCall, branch: str | None) -> list[int]:
    return [row for row, of in enumerate(call.branches) if branch is None or of == branch]


def _without_lse(
    call: exact.SDPACall, text: exact.Columns, groups: Tensor | None, head_mean: bool, total: int
) -> Tensor:
    """I2T maps of all rows where no kernel gives its log-sum-exp: every text position a group, by indicator values."""
    positions = torch.arange(total, device=call.query.device)[text]
    of_key = torch.zeros(total, dtype=torch.long, device=call.query.device)
    of_key[positions] = 1 + torch.arange(len(positions), device=call.query.device)
    masses = exact.group_masses(call, None, of_key, len(positions) + 1)[..., 1:]  # [B, H, N, T]
    maps = masses if groups is None else masses @ groups[:, None].to(masses.device)
    return maps.mean(1) if head_mean else maps
