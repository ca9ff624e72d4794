"""What the rows of a denoising call are: prompts, token tables, seeds and guidance branches of a running stock
pipeline.

The pipeline's own `encode_prompt` and `prepare_latents` are listened to on the instance, for the length of a probe;
their arguments say which prompt, which negative prompt and which generator every row has, and whether the batch is
doubled for guidance. Nothing is changed and nothing is patched globally.

Not here: embeddings that were computed elsewhere. Their text is unknown unless the caller passes token tables.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdit_probe.attention.intercept import Detach, interpose
from mmdit_probe.models.families import Family
from mmdit_probe.models.mmdit import Batch
from mmdit_probe.models.tokens import TokenTable, token_tables


@dataclass
class _Branch:
    """One guidance branch of an `encode_prompt` call: embeddings [rows, T, C], prompt and token table per row."""

    embeddings: Tensor
    prompts: list[str]
    tables: Sequence[TokenTable | None]


class PipelineRows:
    """Listens to one pipeline and knows the rows of its next transformer call.

    Args:
        pipeline: a stock pipeline of the family.
        family: whose argument names apply.
    """

    def __init__(self, pipeline: Any, family: Family) -> None:
        self.pipeline, self.family = pipeline, family
        self._branches: dict[str, _Branch] = {}
        self._seeds: list[int] = []
        self._encoding = False

    def attach(self) -> list[Detach]:
        return [
            interpose(self.pipeline, "encode_prompt", self._on_encode),
            interpose(self.pipeline, "prepare_latents", self._on_latents),
        ]

    def batch(self, text: Tensor) -> Batch | None:
        """The rows of a transformer call with this text input [B, T, C]; None if it is not what was encoded last.

        The embeddings themselves are compared: a batch of two may be two prompts, or one prompt with and without text.
        """
        known = self._branches
        for branches in (self.family.guidance, *((branch,) for branch in known)):
            if not all(branch in known for branch in branches):
                continue
            expected = [known[branch].embeddings for branch in branches]
            if len(text) == sum(len(part) for part in expected) and all(
                torch.equal(rows, part) for rows, part in zip(text.chunk(len(branches)), expected, strict=True)
            ):
                count = len(expected[0])
                seeds = self._seeds * count if len(self._seeds) == 1 else self._seeds
                seeds = seeds if len(seeds) == count else [-1] * count
                return Batch(
                    tokens=[table for branch in branches for table in known[branch].tables],
                    prompts=known["cond"].prompts * len(branches),
                    seeds=seeds * len(branches),
                    branches=[branch for branch in branches for _ in range(count)],
                )
        return None

    def _on_encode(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = proceed(*args, **kwargs)
        bound = inspect.signature(type(self.pipeline).encode_prompt).bind(self.pipeline, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        encoded = dict(zip(self.family.encoded, result, strict=True))
        copies = int(given.get("num_images_per_prompt") or 1)
        streams = self.family.streams
        names = [name for stream in streams for name in stream.prompts]
        # Families that run their branches one by one encode them so too: prompt, then negative prompt, then latents.
        branch = "uncond" if self._encoding and not self.family.guidance else "cond"
        if branch == "cond":
            self._branches, self._seeds = {}, []
        self._encoding = True
        self._branches[branch] = self._branch(encoded["text"], names, "prompt_embeds", given, copies)
        if given.get(self.family.guidance_argument) and encoded["negative text"] is not None:
            names = [name for stream in streams for name in stream.negatives]
            self._branches["uncond"] = self._branch(
                encoded["negative text"], names, "negative_prompt_embeds", given, copies
            )
        return result

    def _branch(
        self, embeddings: Tensor, names: Sequence[str], ready_made: str, given: dict[str, Any], copies: int
    ) -> _Branch:
        """One branch of an `encode_prompt` call; `ready_made` is the argument that replaces its texts by embeddings."""
        rows = len(embeddings)
        if given.get(ready_made) is not None:
            return _Branch(embeddings, [""] * rows, [None] * rows)
        columns = []
        for name in names:
            # A text that is not given is the first one's; an empty list of texts cannot occur.
            value = given.get(name) or given.get(names[0]) or given.get(ready_made.removesuffix("_embeds")) or ""
            columns.append([value] * (rows // copies) if isinstance(value, str) else list(value))
        texts = [list(of_sample) for of_sample in zip(*columns, strict=True)]
        tables = token_tables(self.pipeline, self.family, texts, given.get(self.family.length_argument))
        return _Branch(
            embeddings,
            [text[0] for text in texts for _ in range(copies)],
            [table for table in tables for _ in range(copies)],
        )

    def _on_latents(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._encoding = False
        bound = inspect.signature(type(self.pipeline).prepare_latents).bind(self.pipeline, *args, **kwargs)
        generator = bound.arguments.get("generator")
        # Read before the draw: a generator's initial seed is what the caller set, whatever was drawn since.
        if isinstance(generator, torch.Generator):
            self._seeds = [generator.initial_seed()]
        elif isinstance(generator, Sequence):
            self._seeds = [g.initial_seed() for g in generator]
        return proceed(*args, **kwargs)
