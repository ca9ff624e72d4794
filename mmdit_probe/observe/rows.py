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
from typing import Any

import torch

from mmdit_probe.attention.intercept import Detach, interpose
from mmdit_probe.models.families import Family
from mmdit_probe.models.mmdit import Batch
from mmdit_probe.models.tokens import TokenTable, token_tables


class PipelineRows:
    """Listens to one pipeline and knows the rows of its next transformer call.

    Args:
        pipeline: a stock pipeline of the family.
        family: whose argument names apply.
    """

    def __init__(self, pipeline: Any, family: Family) -> None:
        self.pipeline, self.family = pipeline, family
        self._cond: list[tuple[str, TokenTable | None]] = []
        self._uncond: list[TokenTable | None] = []
        self._guided = False
        self._seeds: list[int] = []

    def attach(self) -> list[Detach]:
        return [
            interpose(self.pipeline, "encode_prompt", self._on_encode),
            interpose(self.pipeline, "prepare_latents", self._on_latents),
        ]

    def batch(self, rows: int) -> Batch | None:
        """The rows of a transformer call with this many of them; None if they do not fit what was heard."""
        count = len(self._cond)
        if count == 0 or rows not in (count, count * len(self.family.guidance)):
            return None
        seeds = self._seeds if len(self._seeds) == count else [-1] * count
        prompts = [prompt for prompt, _ in self._cond]
        tables: dict[str, Sequence[TokenTable | None]] = {
            "cond": [table for _, table in self._cond],
            "uncond": list(self._uncond) or [None] * count,
        }
        branches = self.family.guidance if rows != count else ("cond",)
        return Batch(
            tokens=[table for branch in branches for table in tables[branch]],
            prompts=prompts * len(branches),
            seeds=seeds * len(branches),
            branches=[branch for branch in branches for _ in range(count)],
        )

    def _on_encode(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = proceed(*args, **kwargs)
        bound = inspect.signature(type(self.pipeline).encode_prompt).bind(self.pipeline, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        copies = int(given.get("num_images_per_prompt") or 1)
        self._guided = bool(given.get(self.family.guidance_argument))
        self._seeds = []
        streams = self.family.streams
        main = given[streams[0].prompts[0]]
        if main is None:
            count = len(given["prompt_embeds"])
            self._cond = [("", None)] * (count * copies if copies > 1 else count)
        else:
            count = 1 if isinstance(main, str) else len(main)
            texts = self._texts([name for s in streams for name in s.prompts], given, count)
            self._cond = [pair for pair in zip(*self._tables(texts, given), strict=True) for _ in range(copies)]
        self._uncond = []
        if self._guided and given.get("negative_prompt_embeds") is None:
            texts = self._texts([name for s in streams for name in s.negatives], given, count)
            self._uncond = [table for table in self._tables(texts, given)[1] for _ in range(copies)]
        return result

    def _on_latents(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(type(self.pipeline).prepare_latents).bind(self.pipeline, *args, **kwargs)
        generator = bound.arguments.get("generator")
        # Read before the draw: a generator's initial seed is what the caller set, whatever was drawn since.
        if isinstance(generator, torch.Generator):
            self._seeds = [generator.initial_seed()] * len(self._cond)
        elif isinstance(generator, Sequence):
            self._seeds = [g.initial_seed() for g in generator]
        return proceed(*args, **kwargs)

    def _texts(self, names: Sequence[str], given: dict[str, Any], count: int) -> list[list[str]]:
        """Per sample, the text for every tokenizer; a text that is not given is the first one's."""
        columns = []
        for name in names:
            value = given.get(name) or given.get(names[0]) or ""
            columns.append([value] * count if isinstance(value, str) else list(value))
        return [list(texts) for texts in zip(*columns, strict=True)]

    def _tables(self, texts: list[list[str]], given: dict[str, Any]) -> tuple[list[str], list[TokenTable]]:
        length = given.get(self.family.length_argument)
        return [text[0] for text in texts], token_tables(self.pipeline, self.family, texts, length)
