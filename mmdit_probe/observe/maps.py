"""Maps of the joint attention: where each text token is looked for in the image, and whole blocks for segmentation.

    with probe(model, TextMaps(words=["ring", "house"]), layers=9) as run:
        model.denoise(latents, 0.5, text)
    run[TextMaps].maps(layer=9).shape                # [B, h, w, 2]

    blocks = JointBlocks(layers=[3, 4], keep=("i2t", "i2i"))
    with second_attention(model, layers=[3, 4]) as second, probe(model, blocks):
        model.denoise(latents, 0.5, text)
    blocks.kept[3]["i2t"].shape, second[3].shape     # [B, H, I, T], [B, I, I] (of dual-attention blocks)

Maps are columns of the exact attention probabilities. `TextMaps` grows with every call it sees: choose layers and
steps. Not here: what is made of maps (`segment`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention import exact, gradients
from mmdit_probe.attention.call import SDPACall, without_autocast
from mmdit_probe.errors import UserError, check_known, unknown
from mmdit_probe.models.layout import unwrap
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, Observer, not_finite
from mmdit_probe.plots.overlay import STRENGTH, overlay
from mmdit_probe.specs import HeadSpec, Spec, heads_at, layer_indices, named_of, reread, step_indices

PARTS = ("i2t", "i2t_logit", "i2i", "i2i_walk", "feat_out", "feat_proj")
"""What `JointBlocks` can keep."""

MASKED = -1e4
"""Logit that stands for the minus infinity of a masked key, so that sums of maps stay finite."""

DENSE = 64
"""Tokens up to which all eigenvalues are computed: that takes no longer."""

_QUERIES = 512
"""Queries per chunk of a second attention."""


class GridMaps(Observer):
    """Base of observers that keep maps over a picture's grid, which grow with every call.

    A subclass's `measure` gives [B, h, w, G], or [B, H, h, w, G] with heads="all".
    """

    needs = "lse"

    summed = True
    """Whether the map of several columns together is their sum; else their mean."""

    of: ClassVar[str]
    """What a map is of, for messages."""

    def __init__(self, heads: Literal["mean", "all"] = "mean") -> None:
        check_known("heads option", heads, ("mean", "all"))
        self.heads = heads
        self._pictures: list[Any] = []
        self._pictured = 0
        self._kept: dict[tuple[int, int], list[tuple[DenoisingCall, Tensor]]] = {}

    def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
        for layer, maps in measured.items():
            self._kept.setdefault((layer, denoising.step), []).append((denoising, maps.cpu()))
        self._pictures = []

    def pictured(self, made: Any) -> None:
        before, self._pictured = self._pictured, self._count()
        several = isinstance(made, list) and len(made) == self._pictured - before
        self._pictures = list(made) if several else []

    def _count(self) -> int:
        """How many samples `maps` returns."""
        return len(self.samples(min(self._kept)[0])) if self._kept else 0

    @property
    def of_picture(self) -> bool:
        """Whether the grid is that of the picture that is made, and not a reference's."""
        return True

    @property
    def steps(self) -> list[int]:
        """Steps that maps were kept of."""
        return sorted({step for _, step in self._kept})

    def maps(self, layer: int, step: int | None = None, branch: str | None = "cond") -> Tensor:
        """Maps of one layer, [B, h, w, T'] float32 on the CPU, or [B, H, h, w, T'] with heads="all".

        Args:
            layer: joint-attention layer.
            step: sampling step; None averages over the steps that were kept.
            branch: guidance branch; None takes every sample.

        Of a video's F frames: [B, F, h, w, T'] and [B, H, F, h, w, T'].

        Samples are in the order they were seen: those of a batch within a call, calls in order. See `samples`.

        Raises:
            UserError: nothing was kept for this layer, step and branch, or the steps hold different samples.
        """
        steps = self.steps if step is None else [step]
        self._check_samples(layer, steps, branch)
        parts = []
        for at in steps:
            kept = [maps[_samples_of(call, branch)] for call, maps in self._kept.get((layer, at), [])]
            kept = [maps for maps in kept if len(maps)]
            if not kept:
                have = ", ".join(f"layer {of} step {s}" for of, s in sorted(self._kept)[:8]) or "nothing"
                branches = sorted({b for calls in self._kept.values() for call, _ in calls for b in call.branches})
                raise UserError(
                    f"no maps of layer {layer}, step {at}, branch {branch}; kept: {have}; branches: {branches}"
                )
            parts.append(torch.cat(kept))
        return torch.stack(parts).mean(0)

    def _check_samples(self, layer: int, steps: Sequence[int], branch: str | None) -> None:
        """A mean over steps is one over the same samples: runs of other numbers of steps hold others.

        Raises:
            UserError: the steps hold different samples.
        """
        held = {step: [sample[:2] for sample in self.samples(layer, step, branch)] for step in steps}
        (first, samples), *others = [*filter(lambda one: one[1], held.items())] or [(0, [])]
        if differing := [step for step, here in others if here != samples]:
            raise UserError(f"steps {first} and {differing[0]} hold different samples; name steps that hold the same")

    def samples(self, layer: int, step: int | None = None, branch: str | None = "cond") -> list[tuple[str, int, float]]:
        """(prompt, seed, sigma) of every sample that `maps` returns for one step (the first kept one if None)."""
        at = self.steps[0] if step is None and self.steps else step
        return [
            (call.prompts[sample], call.seeds[sample], call.sigmas[sample])
            for call, _ in self._kept.get((layer, -1 if at is None else at), [])
            for sample in _samples_of(call, branch)
        ]

    def map(
        self,
        which: Any,
        *,
        layers: Spec = "all",
        steps: Spec = "all",
        heads: HeadSpec = "all",
        sample: int = 0,
        branch: str | None = "cond",
    ) -> np.ndarray:
        """One map, the mean over layers, steps and heads; [h, w] float32, [F, h, w] of a video.

        Args:
            which: of `TextMaps`, one of its words; without `words`, any word of the sample's prompt. Of
                `ReferenceMaps`, the number of a region.
            layers, steps: of those that were kept, by default all. heads: of maps that were kept per head.
            sample: which one of those that `maps` returns. branch: as for `maps`.

        Raises:
            UserError: nothing was kept there, the steps hold different samples, or the sample's prompt lacks the word.
        """
        if not self._kept:
            raise UserError("no maps were kept yet: call the model inside `with probe(...)`")
        if self.heads == "mean" and heads != "all":
            raise UserError(f'single heads were not kept; observe {type(self).__name__}(heads="all")')
        layers, steps, heads = reread(layers), reread(steps), reread(heads)
        kept = sorted({layer for layer, _ in self._kept})
        chosen = kept if layers == "all" else layer_indices(layers, kept[-1] + 1)
        at = self.steps if steps == "all" else step_indices(steps, self.steps[-1] + 1)
        found = []
        for layer in chosen:
            self._check_samples(layer, at, branch)
        for layer, step in itertools.product(chosen, at):
            maps = self.maps(layer, step, branch)
            if not 0 <= sample < len(maps):
                raise UserError(f"sample {sample} does not exist: there are {len(maps)}, from 0")
            one = maps[sample]
            if self.heads == "all":
                one = one[list(heads_at(heads, layer, len(one)))].mean(0)
            places = self._columns(which, layer, step, sample, branch, maps.shape[-1])
            one = one[..., places]
            found.append(one.sum(-1) if self.summed else one.mean(-1))
        mean = torch.stack(found).mean(0).numpy()
        if not mean.any():
            prompt = self.samples(chosen[0], at[0], branch)[sample][0]
            raise UserError(f"sample {sample}, {prompt!r}, has no {self.of} {which!r}")
        return mean

    def overlay(self, which: Any, image: Any = None, *, strength: float = STRENGTH, **where: Any) -> Any:
        """A picture, or a video, under one map: PIL, or a `results.clip.Clip`.

        Args:
            which: as for `map`. image: the picture whose grid it is over, PIL or uint8 [H, W, 3]; of a video the
                list of its frames. None is what the pipeline's last call made of the sample, as PIL.
            strength: of the colours, 0 to 1. where: as for `map`.

        Raises:
            UserError: as `map`; or no picture is given, and none of the sample is known.
        """
        heat = self.map(which, **where)
        return overlay(self._picture(**where) if image is None else image, heat, strength)

    def _picture(self, sample: int = 0, branch: str | None = "cond", **where: Any) -> Any:
        place = sample - self._count() + len(self._pictures)
        if branch != "cond" or not self.of_picture or not 0 <= place < len(self._pictures):
            said = "those of the pipeline's last call are known, where it gives PIL"
            raise UserError(f"no picture of sample {sample} to lay the map over ({said}): overlay({self.of}, image)")
        return self._pictures[place]

    def _columns(self, which: Any, layer: int, step: int, sample: int, branch: str | None, length: int) -> list[int]:
        """Which of a sample's kept columns make up one map."""
        raise NotImplementedError


class TextMaps(GridMaps):
    """Observer that keeps text maps.

    Args:
        words: None keeps every text position (T' = T); positions (ints) keep those; words or phrases (strings) keep one
            map each, over all positions of the word in all encoder streams, or in `streams` alone; so do kinds of
            span of a stream, as ("bos", "clip").
        heads: "mean" averages over heads, "all" keeps them.
        queries: "image" for I2T, the sum over a word's positions; "text" for T2I, the mean over a word's positions.
        streams: encoder streams to read words from; None takes all.
        reference: number of the reference picture whose tokens stand for those of the image, from 0: its maps are R2T
            and T2R; None is the image.

    A word that is not in a sample's prompt gives zeros; one that no conditional sample of a call has is an error.

        with probe(pipe, TextMaps(["ring"]), layers=9) as run: image = pipe("a red ring").images[0]
        run[TextMaps].map("ring")                    # [h, w]
        run[TextMaps].overlay("ring")                # PIL
    """

    of = "word"

    def __init__(
        self,
        words: Sequence[str | int | tuple[str, str]] | None = None,
        heads: Literal["mean", "all"] = "mean",
        queries: Literal["image", "text"] = "image",
        streams: Collection[str] | None = None,
        reference: int | None = None,
    ) -> None:
        super().__init__(heads)
        check_known("queries option", queries, ("image", "text"))
        self.words = [words] if isinstance(words, str) else reread(words)
        self.queries, self.reference = queries, reference
        self.streams = (streams,) if isinstance(streams, str) else streams
        self.summed = queries == "image"

    @property
    def of_picture(self) -> bool:
        return self.reference is None

    def measure(self, seen: LayerCall) -> Tensor:
        layout, call, picture = seen.layout, seen.call, seen.picture(self.reference)
        groups = self._groups(seen)  # [B or 1, T, G]; None keeps every text position
        head_mean = self.heads == "mean"
        image, text = picture.positions, layout.positions("text")
        if self.queries == "image":
            if groups is not None:  # only the positions that some map reads
                read = groups.any(0).any(-1).nonzero()[:, 0]
                text, groups = layout.indices("text")[read].to(call.query.device), groups[:, read]
            maps = exact.reduce(call, seen.logsumexp, text, image, key_weights=groups, head_mean=head_mean)
        else:
            weights = _query_mean(seen, groups)
            maps = exact.reduce(call, seen.logsumexp, image, text, query_weights=weights, head_mean=head_mean).mT
        maps = maps.unflatten(-2, picture.space)
        # Small ones stay on the device until the call is over, so that it need not wait in every layer.
        return maps if head_mean else maps.cpu()

    def _columns(
        self, word: str | int, layer: int, step: int, sample: int, branch: str | None, length: int
    ) -> list[int]:
        """Which of a sample's kept maps are a word's."""
        if self.words is not None:
            if word not in self.words:
                raise unknown("word", str(word), [str(one) for one in self.words])
            return [list(self.words).index(word)]
        if isinstance(word, int):
            return [word]
        calls = [(call, of) for call, _ in self._kept[layer, step] for of in _samples_of(call, branch)]
        call, of = calls[sample]
        spans = call.tokens(length)[of].word_spans(word)
        return [p for stream, positions in spans.items() if self._reads(stream) for p in positions]

    def _groups(self, seen: LayerCall) -> Tensor | None:
        """Which text positions make up each map, [B or 1, T, G] on the CPU; None for every position by itself."""
        length, words = seen.layout.counts["text"], self.words
        if words is None:
            return None
        if len(words) == 0:
            raise UserError("no words and no text positions are named; expected one or more, or None for all")
        groups = torch.zeros(len(seen.tokens), length, len(words))
        for place, word in enumerate(words):
            if isinstance(word, int):
                if not 0 <= word < length:
                    raise UserError(f"text positions {list(words)}: expected positions in 0..{length - 1}")
                groups[:, word, place] = 1.0
                continue
            if isinstance(word, str):
                found = self._positions(seen, word)
            else:
                found = [table.positions(*word) for table in seen.tokens]
            for sample, positions in enumerate(found):
                groups[sample, positions, place] = 1.0
        return groups[:1] if all(isinstance(word, int) for word in words) else groups

    def _positions(self, seen: LayerCall, word: str) -> list[list[int]]:
        """A word's positions per sample; none where a prompt does not have it."""
        spans = [table.word_spans(word, missing_ok=True) for table in seen.tokens]
        told = [sample for sample, branch in enumerate(seen.denoising.branches) if branch != "uncond"]
        found = [[p for stream, of in span.items() if self._reads(stream) for p in of] for span in spans]
        if told and not any(found[sample] for sample in told):
            reading = next((sample for sample in told if spans[sample]), told[0])
            streams = ", ".join(seen.tokens[reading].word_spans(word))  # says why, where none has it
            raise UserError(f"{word!r} is read by {streams}; expected one of these in streams, found {self.streams}")
        return found

    def _reads(self, stream: str) -> bool:
        return self.streams is None or stream in self.streams


class JointBlocks(Observer):
    """Observer that keeps parts of the joint attention of some layers, of the last denoising call in float32.

        i2t       [B, H, I, T]   columns of the joint softmax at the text keys, exact (Seg4Diff, eq. 4)
        i2t_logit [B, H, I, T]   the same before the softmax: scaled products and the mask's bias, at least `MASKED`
        i2i       [B, I, I]      mean over heads of the image-image block; rows sum to 1 minus the text mass
        i2i_walk  [B, I, I]      the same, heads weighted by |lambda_2| of their renormalised block (TokenRank)
        feat_out  [B, I, E]      attention output of the image tokens before the output projection
        feat_proj [B, I, E]      after it

    I2I is built over chunks of queries, so that beside the result (4 I^2 bytes a layer: 64 MiB at 64 x 64 tokens) only
    one chunk of probabilities is held; "i2i_walk" holds one head's block more.

    Args:
        layers: 0-based layers to keep; others that the probe watches are ignored.
        keep: which of `PARTS`.
        heads: heads that count in the mean of "i2i"; None takes all.
        heads_apart: False keeps the mean over heads of "i2t" and "i2t_logit", [B, 1, I, T].
        reference: number of the reference picture whose tokens stand for those of the image; None is the image.

    Attributes:
        kept: layer -> part -> tensor. grid: (h, w) of the tokens that are kept.
    """

    needs = "lse"

    def __init__(
        self,
        layers: Iterable[int],
        keep: Iterable[str] = ("i2t",),
        heads: Iterable[int] | None = None,
        heads_apart: bool = True,
        reference: int | None = None,
    ) -> None:
        self.layers, self.keep, self.reference = frozenset(layers), tuple(keep), reference
        named_of("part of the joint attention", self.keep, PARTS)
        self.heads, self.heads_apart = None if heads is None else list(heads), heads_apart
        if self.heads == []:
            raise UserError("no heads to average over; name at least one")
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.grid: tuple[int, int] | None = None

    def measure(self, seen: LayerCall) -> dict[str, Tensor]:
        if seen.layer.index not in self.layers:
            return {}
        self.grid = seen.picture(self.reference).grid if self.reference is not None else seen.layout.grid
        return {part: self._part(part, seen).detach().float().contiguous() for part in self.keep}

    def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
        self.kept = {layer: parts for layer, parts in measured.items() if layer in self.layers}

    def _part(self, part: str, seen: LayerCall) -> Tensor:
        text = seen.layout.positions("text")
        image = seen.layout.positions("image") if self.reference is None else seen.picture(self.reference).positions
        if part == "i2t":
            maps = exact.reduce(seen.call, seen.logsumexp, text, image, head_mean=not self.heads_apart)
            return maps if self.heads_apart else maps[:, None]
        if part == "i2t_logit":
            logits = gradients.logits(seen.call, text, image).float().clamp(min=MASKED)
            return logits if self.heads_apart else logits.mean(1, keepdim=True)
        if part == "i2i":
            return exact.reduce(*_of_heads(seen, self.heads), image, image, head_mean=True)
        if part == "i2i_walk":
            return _walk_mean(seen, image)
        features = seen.output[:, :, image].transpose(1, 2).flatten(2)  # [B, I, H * D]
        projection: Any = seen.record.module_call.module
        if part == "feat_out":
            return features
        with seen.autocast():
            return torch.as_tensor(projection.to_out[0](features))


def second_eigenvalue(chain: Tensor) -> Tensor:
    """|lambda_2| of row-stochastic matrices [B, I, I], float32 [B]: the second largest modulus, by ARPACK in float64.

    How slowly a random walk forgets its start (TokenRank, arXiv:2507.17657): a head whose attention falls into few
    well separated groups is near 1, one that mixes at once is near 0, and told as 1e-12: heads are weighted by it.
    """
    return torch.tensor([_second(one.double().cpu().numpy()) for one in chain], dtype=torch.float32).clamp(min=1e-12)


def _second(chain: np.ndarray) -> float:
    from scipy.sparse.linalg import ArpackError, eigs

    if not np.isfinite(chain).all():
        return float("nan")
    if len(chain) == 1:
        return 0.0
    found = None
    if len(chain) > DENSE:
        start = np.random.default_rng(0).random(len(chain))  # the same for every chain, in any batch
        with suppress(ArpackError):
            found = eigs(chain, k=2, v0=start, return_eigenvectors=False)
    return float(np.sort(np.abs(np.linalg.eigvals(chain) if found is None else found))[-2])


@contextmanager
def second_attention(model: MMDiT, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """The image-only attention of dual-attention blocks (SD3.5-medium, layers 0-12), of the last call in the context:
    fills a dict, layer -> its mean over heads [B, I, I], float32 on the CPU.

    Text does not enter it: an alternative to the image-image block of the joint softmax wherever a method spreads maps
    over the image. Queries and keys are computed again from the module's input, so the forward stays bitwise the stock
    one. Memory: 4 I^2 bytes a layer and one chunk of one head.

    Raises:
        UserError: a layer has no second attention; the message names those that have one. RunError: it is not finite.
    """
    transformer, layers = unwrap(model.transformer), list(layers)
    modules: dict[int, Any] = {
        layer.index: getattr(transformer.get_submodule(layer.path.rpartition(".")[0]), "attn2", None)
        for layer in model.layers
    }
    missing = [layer for layer in layers if modules[layer] is None]
    if missing:
        dual = [index for index, module in modules.items() if module is not None]
        raise UserError(
            f"layers {missing} have no second, image-only attention (attn2); "
            + (f"those that have one: {dual}" if dual else f"{model.name} has none, its blocks are not dual")
        )
    kept: dict[int, Tensor] = {}
    handles = [
        modules[layer].register_forward_pre_hook(partial(_keep_second, kept, layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _keep_second(
    kept: dict[int, Tensor], layer: int, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
    query, key = (
        getattr(module, name)(hidden).unflatten(-1, (module.heads, -1)).transpose(1, 2) for name in ("to_q", "to_k")
    )
    if getattr(module, "norm_q", None) is not None:
        query, key = module.norm_q(query), module.norm_k(key)
    batch, heads, tokens, width = query.shape
    total = torch.zeros(batch, tokens, tokens, device=query.device)
    with without_autocast(query.device.type):
        for head in range(heads):
            keys = key[:, head].float().mT * width**-0.5
            for start in range(0, tokens, _QUERIES):
                chunk = slice(start, start + _QUERIES)
                total[:, chunk] += (query[:, head, chunk].float() @ keys).softmax(-1)
    kept[layer] = (total / heads).cpu()
    if not kept[layer].isfinite().all():
        raise not_finite(layer, "the second attention", query.dtype)


def _samples_of(call: DenoisingCall, branch: str | None) -> list[int]:
    return [sample for sample, of in enumerate(call.branches) if branch is None or of == branch]


def _query_mean(seen: LayerCall, groups: Tensor | None) -> Tensor | None:
    """Weights [B or 1, G, T] of text queries in the mean over each group; None for every position by itself."""
    layout = seen.layout
    if layout.queries is not None:
        are_queries = layout.queries[:, layout.positions("text")]
        if not are_queries.any():
            raise UserError("text tokens are no queries in this model: it has no T2I maps")
        groups = (torch.eye(layout.counts["text"])[None] if groups is None else groups) * are_queries[..., None]
    return None if groups is None else (groups / groups.sum(1, keepdim=True).clamp(min=1)).mT


def _of_heads(seen: LayerCall, heads: list[int] | None) -> tuple[SDPACall, Tensor]:
    """The call and its log-sum-exp with some of the heads; all if None."""
    call = seen.call
    if heads is None:
        return call, seen.logsumexp
    mask = call.attn_mask
    if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask[:, heads]
    chosen = replace(
        call, query=call.query[:, heads], key=call.expanded_key()[:, heads], value=call.expanded_value()[:, heads],
        attn_mask=mask, enable_gqa=False,
    )  # fmt: skip
    return chosen, seen.logsumexp[:, heads]


def _walk_mean(seen: LayerCall, image: exact.Columns) -> Tensor:
    """Image-image block [B, I, I], rows renormalised, heads weighted by how slowly their walk mixes."""
    total, weights = torch.zeros(()), torch.zeros(())
    for head in range(seen.call.query.shape[1]):
        block = exact.reduce(*_of_heads(seen, [head]), image, image)[:, 0]
        block /= block.sum(-1, keepdim=True).clamp(min=1e-12)
        weight = second_eigenvalue(block.cpu()).to(block.device)[:, None, None]
        total, weights = block.mul_(weight).add_(total.to(block.device)), weight + weights.to(block.device)
    return total / weights
