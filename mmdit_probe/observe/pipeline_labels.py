"""What the rows of a denoising call are: prompts, token tables, seeds and guidance branches of a running stock
pipeline.

The pipeline's own `encode_prompt` and `prepare_latents` are listened to on the instance, for the length of a probe.
Which branch of classifier-free guidance a row belongs to is told by the text it carries; where both branches have the
same text, by the order of the family's batch, the pipeline's own name for the call (`cache_context`), or the order of
calls at one noise level. Not here: embeddings that were computed elsewhere, or changed by a callback: their text is
unknown unless the caller passes token tables.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_probe.attention.intercept import Detach, interpose
from mmdit_probe.errors import ProbeWarning, UserError
from mmdit_probe.models.families.registry import Family
from mmdit_probe.models.layout import unwrap
from mmdit_probe.models.mmdit import Batch
from mmdit_probe.models.tokens import Token, TokenTable, picture_positions, token_tables

BOTH = ("cond", "uncond")
PERTURBED = "perturbed"


@dataclass
class _Branch:
    """One guidance branch as it was encoded: embeddings [T, C], prompt and token table per row."""

    embeddings: list[Tensor]
    prompts: list[str]
    tables: Sequence[TokenTable | None]

    def repeated(self, rows: int) -> _Branch:
        """With every row several times in a row, as pipelines do that repeat embeddings after encoding them."""
        copies = max(1, rows // len(self.embeddings))

        def each(items: Sequence[Any]) -> list[Any]:
            return [item for item in items for _ in range(copies)]

        return _Branch(each(self.embeddings), each(self.prompts), each(self.tables))


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
        self._drawn = False
        """Whether the noise was drawn, and no text encoded before: some pipelines draw first."""
        self._encoding: Any = None
        """Whose texts are being encoded: the frame of the pipeline's call, "" outside of one; None once they were."""
        self._last: tuple[str, float] | None = None

    def attach(self) -> list[Detach]:
        listeners = {"encode_prompt": self._on_encode, "prepare_latents": self._on_latents}
        return [interpose(self.pipeline, name, of) for name, of in listeners.items() if hasattr(self.pipeline, name)]

    @property
    def encoded(self) -> bool:
        """Whether the pipeline has encoded anything that is known."""
        return bool(self._branches)

    @property
    def one_generator(self) -> bool:
        """Whether a single generator draws the noise of all images."""
        return len(self._seeds) == 1

    def batch(self, text: Any, samples: int, context: str | None, moment: float) -> Batch | None:
        """The rows of a transformer call; None if its text is not what was encoded last.

        Args:
            text: its text input: [B or 1, T, C], or a list of [T, C].
            samples: B, the samples of the call.
            context: what the pipeline calls this call: "cond" or "uncond", or nothing of the kind.
            moment: its timestep.
        """
        self._encoding, self._drawn = None, False
        rows, known = list(text) * (samples if len(text) == 1 else 1), self._branches
        batched = [order for order in self._batched if set(order) <= {*known, PERTURBED}]
        fitting = [order for order in (*batched, *((branch,) for branch in known)) if self._carries(rows, order)]
        if not fitting:
            return None
        branches = self._chosen(fitting, context, moment)
        count = len(rows) // len(branches)
        parts = [self._encoded(branch).repeated(count) for branch in branches]
        # One generator for several images draws each one's noise after the last one's: no seed gives it again.
        seeds = self._seeds if len(self._seeds) == count else [-1] * count
        return Batch(
            tokens=[table for part in parts for table in part.tables],
            prompts=known["cond"].repeated(count).prompts * len(branches),
            seeds=seeds * len(branches),
            branches=[branch for branch in branches for _ in range(count)],
        )

    @property
    def _batched(self) -> list[tuple[str, ...]]:
        """Orders of branches in one call, as the pipeline makes them now."""
        guidance = self.family.guidance
        if guidance and getattr(self.pipeline, "do_perturbed_attention_guidance", False):
            return [(*guidance, PERTURBED), ("cond", PERTURBED)]
        return [guidance] if guidance else []

    def _encoded(self, branch: str) -> _Branch:
        """A branch as it was encoded: a perturbed one carries the prompt."""
        return self._branches["cond" if branch == PERTURBED else branch]

    def _carries(self, rows: list[Tensor], branches: Sequence[str]) -> bool:
        """Whether these rows are what was encoded for these branches, one branch after the other."""
        count, rest = divmod(len(rows), len(branches))
        known = [self._encoded(branch) for branch in branches]
        if rest or any(not part.embeddings or count % len(part.embeddings) for part in known):
            return False
        wanted = [row for part in known for row in part.repeated(count).embeddings]
        return all(_same(row, other) for row, other in zip(rows, wanted, strict=True))

    def _chosen(self, fitting: list[tuple[str, ...]], context: str | None, moment: float) -> tuple[str, ...]:
        """Which of the orders that fit it is: more than one does only where branches have the same text."""
        order = fitting[0]
        if len(order) == 1:
            if context in BOTH and (context,) in fitting:
                order = (context,)  # type: ignore[assignment]
            elif len(fitting) > 1 and self._last == ("cond", moment):
                order = ("uncond",)  # the second call at one noise level: every pipeline calls its prompt first
            self._last = order[0], moment
        return order

    def _on_encode(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(type(self.pipeline).encode_prompt).bind(self.pipeline, *args, **kwargs)
        bound.apply_defaults()
        # Lists are copied: some pipelines write the text with its template back into the caller's list.
        given = {name: list(value) if isinstance(value, list) else value for name, value in bound.arguments.items()}
        result = proceed(*args, **kwargs)
        parts = result if isinstance(result, tuple) else (result,)
        if len(parts) != len(self.family.encoded) or not all(isinstance(row, Tensor) for row in parts[0]):
            self._branches = {}  # another pipeline of this transformer: what it returns is not known
            return result
        encoded = dict(zip(self.family.encoded, parts, strict=True))
        streams = self.family.streams
        # Families whose negative prompt is encoded by a call of its own: prompt, then negative prompt, then latents.
        caller = _call(unwrap(self.pipeline.transformer)) or ""
        second = self._encoding is caller and "negative text" not in encoded
        self._encoding, before = caller, self._branches
        if not second:
            self._branches, self._last = {}, None
            self._seeds = self._seeds if self._drawn else []
        names = [name for stream in streams for name in stream.prompts] or ["prompt"]
        self._branches["uncond" if second else "cond"] = self._branch(
            encoded["text"], names, "prompt_embeds", given, second, before
        )
        if encoded.get("negative text") is not None and len(encoded["negative text"]):
            names = [name for stream in streams for name in stream.negatives] or ["negative_prompt"]
            self._branches["uncond"] = self._branch(
                encoded["negative text"], names, "negative_prompt_embeds", given, True, before
            )
        return result

    def _branch(
        self,
        embeddings: Any,
        names: Sequence[str],
        ready_made: str,
        given: dict[str, Any],
        negative: bool,
        before: dict[str, _Branch],
    ) -> _Branch:
        """One branch of an `encode_prompt` call; `ready_made` is the argument that replaces its texts by embeddings:
        those that the probe saw the pipeline encode `before` are known."""
        rows = [row.detach().clone() for row in embeddings]  # a callback may change them in place
        # A text that is not given is the prompt; one that is given as embeddings is unknown.
        first = next((given[n] for n in (ready_made.removesuffix("_embeds"), names[0]) if given.get(n)), None)
        if any(name.startswith(ready_made) and given[name] is not None for name in given) or (
            first is None and not negative
        ):
            seen = [told for of in before.values() for told in zip(of.embeddings, of.prompts, of.tables, strict=False)]
            same = [[told for told in seen if row.shape == told[0].shape and _same(row, told[0])] for row in rows]
            known: list[Any] = [told[0] if told else (None, "", None) for told in same]
            return _Branch(rows, [prompt for _, prompt, _ in known], [table for _, _, table in known])
        columns = []
        for name in names:
            value = given.get(name) or first or ""
            columns.append([value] if isinstance(value, str) else list(value))
        count = max(len(column) for column in columns)
        texts = [list(text) for text in zip(*(column * (count // len(column)) for column in columns), strict=True)]
        tables: list[TokenTable | None] = [None] * len(texts)
        if self.family.streams and not self._rewritten(given):
            length = given.get(self.family.length_argument)
            try:
                shown = picture_positions(self.pipeline, given.get("image"))
                tables = list(token_tables(self.pipeline, self.family, texts, length, negative, shown))
            except UserError as error:  # the pipeline runs with this tokenizer, so the probe must not stop it
                warnings.warn(f"the kinds of the text tokens stay unknown: {error}", ProbeWarning, stacklevel=2)
        copies = max(1, len(rows) // len(texts))
        # Some pipelines put zeros in place of an empty text, and encode none.
        null = Token(self.family.streams[0].name if self.family.streams else "", "null")
        tables = [
            table if table is None or bool(row.any()) else replace(table, tokens=(null,) * len(row))
            for row, table in zip(rows, (table for table in tables for _ in range(copies)), strict=False)
        ]
        return _Branch(rows, [text[0] for text in texts for _ in range(copies)], tables)

    def _rewritten(self, given: dict[str, Any]) -> bool:
        """Whether the caller has the prompt put into other text than the pipeline does by default."""
        known = inspect.signature(type(self.pipeline).encode_prompt).parameters
        names = [name for name in self.family.template_arguments if name in known]
        return any(given[name] != known[name].default for name in names)

    def _on_latents(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._drawn, self._encoding = self._encoding is None, None
        bound = inspect.signature(type(self.pipeline).prepare_latents).bind(self.pipeline, *args, **kwargs)
        generator = bound.arguments.get("generator") if bound.arguments.get("latents") is None else None
        self._seeds = []
        # Read before the draw: a generator's initial seed is what the caller set, whatever was drawn since.
        if isinstance(generator, torch.Generator):
            self._seeds = [generator.initial_seed()]
        elif isinstance(generator, Sequence):
            self._seeds = [g.initial_seed() for g in generator]
        return proceed(*args, **kwargs)


def is_pipeline(target: Any) -> bool:
    """Whether an object is a pipeline with a transformer and a scheduler."""
    return hasattr(target, "transformer") and hasattr(target, "scheduler") and not isinstance(target, nn.Module)


def calling_pipeline(transformer: nn.Module) -> Any:
    """The pipeline in whose `__call__` an unwrapped transformer is called just now; None if there is none."""
    frame = _call(transformer)
    return None if frame is None else frame.f_locals["self"]


def _call(transformer: nn.Module) -> FrameType | None:
    """The `__call__` in progress of a pipeline of this transformer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner: Any = frame.f_locals.get("self")
            if is_pipeline(owner) and unwrap(owner.transformer) is transformer:
                return frame
        frame = frame.f_back
    return None


def _same(row: Tensor, encoded: Tensor) -> bool:
    """Whether a row of a call is this text, as far as both go: pipelines pad, and cut padding off."""
    length = min(len(row), len(encoded))
    return row.shape[1:] == encoded.shape[1:] and torch.equal(row[:length], encoded[:length].to(row.device, row.dtype))
