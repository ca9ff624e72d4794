"""The attention budget (arXiv:2509.18096, Fig. 2): sample prompts, or noise real pictures, and measure the masses.

    from mmdit_probe import load
    from mmdit_probe.experiments.budget_items import attention_budget, summarise
    table = attention_budget(load("scenes-sd3"), ["a red ring on grass"], layers="all", steps="last-8")
    print(summarise(table))

The table is long: one row per prompt, step, guidance branch, layer, head and kind of key, with the noise level sigma
beside the step. `Budget` is the same thing in parts, for programs that write to disk and resume. Not here: which
layer grounds words; high mass on text may be a sink (see the span kinds).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np

from mmdit_probe.errors import UserError
from mmdit_probe.experiments.budget_summary import summarise
from mmdit_probe.experiments.controls import Variant, variants
from mmdit_probe.observe.mass import COLUMNS, AttentionMass
from mmdit_probe.observe.observer import MemorySink, Observer, Sink
from mmdit_probe.observe.probe import probe
from mmdit_probe.specs import HeadSpec, Spec, heads_at, layer_indices, step_indices

if TYPE_CHECKING:
    import pandas as pd

    from mmdit_probe.data.images import Picture
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.models.tokens import TokenTable

__all__ = ["Budget", "attention_budget", "summarise"]


class ItemSink(Protocol):
    """Where items go; `results.TableWriter` is one. `item(k)` is a context that yields a `Sink`."""

    done: set[int]

    def item(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Item:
    """One thing to measure: a prompt to sample, or a picture with its prompt."""

    index: int
    prompt: str
    seed: int
    picture: Picture | None = None


class Budget:
    """A measurement that is ready to run: checked, with its record, item by item. Use `of_prompts` or `of_pictures`.

    Attributes:
        request: everything that decides the numbers, as JSON values; equal requests give equal tables.
        facts: what else a record should say (device, scheduler, sigmas).
        variants: the measurement itself and its controls; `run` measures every item under each of them.
        remarks: one line for each prompt of which some encoder does not see every word.
    """

    observer: ClassVar[Callable[..., Observer]] = AttentionMass
    """What measures: called with a sink and `heads`. A subclass names another observer of finished rows."""

    def __init__(
        self, model: MMDiT, items: Sequence[Item], layers: Spec, heads: HeadSpec, controls: Sequence[str] = (),
        **request: Any,
    ) -> None:  # fmt: skip
        self.model = model
        self.items = list(items)
        self.variants = variants(model, controls, len(self.items))
        self.layers = layer_indices(layers, len(model.layers))
        self.heads: HeadSpec = heads_at(heads, -1, model.heads)
        if isinstance(heads, Mapping):
            self.heads = {layer: heads_at(heads, layer, model.heads) for layer in self.layers}
        self.remarks = [
            line for table in model.token_tables([item.prompt for item in items]) for line in _unread(table)
        ]
        self.request: dict[str, Any] = {
            "model": model.name,
            "weight_hash": model.weight_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": list(self.layers),
            "heads": _plain_heads(self.heads),
            "text_length": model.text_length,
            "controls": list(controls),
            **request,
            "items": [[item.prompt, item.seed, *([item.picture.name] if item.picture else [])] for item in self.items],
        }
        self.facts: dict[str, Any] = {
            "model": {
                "id": model.name,
                "family": model.family.name,
                "weight_hash": model.weight_hash,
                "dtype": self.request["dtype"],
                "layers": len(model.layers),
                "heads": model.heads,
                "text_length": model.text_length,
            },
            "device": str(model.device),
            "seed": self.items[0].seed,
            "capture": {
                "observer": getattr(type(self).observer, "__name__", ""),
                "layers": list(self.layers),
                "heads": self.request["heads"],
            },
            "remarks": self.remarks,
        }

    @classmethod
    def of_prompts(
        cls, model: MMDiT, prompts: Sequence[str], *, layers: Spec = "all", heads: HeadSpec = "all",
        steps: Spec = "all", num_steps: int = 28, guidance: float = 7.5, seed: int = 0,
        max_sequence_length: int | None = None, controls: Sequence[str] = (),
    ) -> Self:  # fmt: skip
        """Sample each prompt with the stock pipeline and measure while it runs; prompt k uses seed + k.

        Args:
            controls: of `experiments.controls`; not shuffled: a sampled image has no other caption.
        """
        if not prompts:
            raise UserError("no prompt is given; expected one or more")
        if "shuffled" in controls:
            raise UserError("shuffled captions need pictures: a sampled image has no caption but its prompt")
        model = _with_length(model, max_sequence_length)
        chosen = step_indices(steps, num_steps)
        items = [Item(index, prompt, seed + index) for index, prompt in enumerate(prompts)]
        budget = cls(
            model, items, layers, heads, controls, mode="sample", steps=list(chosen), num_steps=num_steps,
            guidance=guidance,
        )  # fmt: skip
        scheduler = model.scheduler
        budget.facts |= {
            "scheduler": {"class": type(scheduler).__name__, **dict(scheduler.config)},
            "sigmas": model.sigmas(num_steps),
            "steps": list(chosen),
        }
        return budget

    @classmethod
    def of_pictures(
        cls, model: MMDiT, pictures: Sequence[Picture], prompts: Sequence[str] = (), *, layers: Spec = "all",
        heads: HeadSpec = "all", sigma: float = 0.515, seed: int = 0, max_sequence_length: int | None = None,
        controls: Sequence[str] = (),
    ) -> Self:  # fmt: skip
        """Encode each picture by the VAE, noise it to `sigma` and measure one denoising call; picture k uses seed + k.

        Args:
            prompts: none (each picture's own caption), one for all, or one per picture.
            controls: of `experiments.controls`.
        """
        if not 0.0 <= sigma <= 1.0:
            raise UserError(f"--sigma {sigma} is no noise level; expected 0 (clean) to 1 (noise)")
        if not pictures:
            raise UserError("no picture is given; expected one or more")
        if len(prompts) not in (0, 1, len(pictures)):
            raise UserError(
                f"{len(prompts)} prompts for {len(pictures)} pictures; expected none, one, or one per picture"
            )
        model = _with_length(model, max_sequence_length)
        captions = [picture.prompt for picture in pictures] if not prompts else list(prompts)
        captions *= len(pictures) // len(captions)
        pairs = enumerate(zip(captions, pictures, strict=True))
        items = [Item(index, caption, seed + index, picture) for index, (caption, picture) in pairs]
        budget = cls(model, items, layers, heads, controls, mode="pictures", sigma=sigma)
        budget.facts |= {"sigmas": [sigma], "steps": [0]}
        return budget

    def __len__(self) -> int:
        return len(self.items) * len(self.variants)

    def under(self, variant: Variant) -> Self:
        """The same measurement under a control."""
        other = copy.copy(self)
        other.variants = [variant]
        other.model = variant.model
        prompts = variant.texts([item.prompt for item in self.items])
        other.items = [replace(item, prompt=prompt) for item, prompt in zip(self.items, prompts, strict=True)]
        return other

    def run(self, sink: ItemSink, advance: Callable[[], None] = lambda: None) -> None:
        """Measure the items that `sink` does not hold yet, controls last. `advance` is called after each."""
        for number, variant in enumerate(self.variants):
            first = number * len(self.items)
            left = [item.index for item in self.items if first + item.index not in sink.done]
            measurement = self.under(variant) if left else self
            for index in left:
                with sink.item(first + index) as rows:
                    measurement.measure(measurement.items[index], _Labelled(rows, {"control": variant.name}))
                advance()

    def measure(self, item: Item, sink: Sink) -> None:
        """Measure one item; `sink` gets the rows of each denoising call as soon as they are there."""
        variant = self.variants[0]
        labels = {"item": item.index} | ({"picture": item.picture.name} if item.picture else {})
        observer = type(self).observer(_Labelled(sink, labels), heads=self.heads)
        steps = self.request.get("steps", "all")
        with probe(self.model, observer, layers=self.layers, steps=steps, edits=variant.edits):
            if item.picture is None:
                self.model.generate(
                    item.prompt, steps=self.request["num_steps"], guidance=self.request["guidance"], seed=item.seed,
                    output_type="latent",
                )  # fmt: skip
            else:
                latents = self.model.encode_image(item.picture.open(self.model.default_size))
                noised = self.model.noise(latents, self.request["sigma"], item.seed)
                text = self.model.encode_prompt([item.prompt])
                self.model.denoise(noised, self.request["sigma"], text, seeds=item.seed)


def _plain_heads(heads: Any) -> Any:
    return {str(layer): list(of) for layer, of in heads.items()} if isinstance(heads, Mapping) else list(heads)


class _Labelled:
    """A sink that puts constant columns before the rows of another."""

    def __init__(self, sink: Sink, labels: dict[str, int | str]) -> None:
        self.sink, self.labels = sink, labels

    def write(self, columns: dict[str, np.ndarray]) -> None:
        count = len(next(iter(columns.values())))
        constant = {
            name: np.full(count, value, dtype=object if isinstance(value, str) else np.int64)
            for name, value in self.labels.items()
        }
        self.sink.write(constant | columns)


def attention_budget(
    model: MMDiT, prompts: str | Sequence[str], *, layers: Spec = "all", heads: Spec = "all", steps: Spec = "all",
    num_steps: int = 28, guidance: float = 7.5, seed: int = 0, max_sequence_length: int | None = None,
    sink: Sink | None = None,
) -> pd.DataFrame | None:  # fmt: skip
    """Sample prompts and measure where attention goes.

    Args:
        model: from `load`.
        prompts: one or more; prompt k is sampled with seed + k.
        layers, heads, steps: which to keep, as in `mmdit_probe.specs`.
        num_steps, guidance: of the sampling; guidance at most 1 runs without the unconditional branch.
        max_sequence_length: T5 positions (model's own if None).
        sink: gets the rows of each denoising call, `write(columns)`; nothing is kept in memory then.

    Returns: the table (None with a sink): `item`, the index of the prompt, and the columns of `AttentionMass`. Masses
    of one query modality sum to 1.

    Raises:
        UserError: a layer, head or step that does not exist, or a prompt with words that no encoder reads.
    """
    budget = Budget.of_prompts(
        model, [prompts] if isinstance(prompts, str) else prompts, layers=layers, heads=heads, steps=steps,
        num_steps=num_steps, guidance=guidance, seed=seed, max_sequence_length=max_sequence_length,
    )  # fmt: skip
    memory = MemorySink()
    for item in budget.items:
        budget.measure(item, memory if sink is None else sink)
    return memory.table()[["item", *COLUMNS]] if sink is None else None


def _with_length(model: MMDiT, length: int | None) -> MMDiT:
    """The same pipeline read with another text length; the caller's model keeps its own."""
    if length is None or length == model.max_sequence_length:
        return model
    return type(model)(model.pipeline, model.name, length)


def _unread(table: TokenTable) -> list[str]:
    """Remarks on words that some encoder cut off.

    Raises:
        UserError: words that every encoder cut off: nothing about them can be measured.
    """
    lost = table.unread
    start = table.prompt if len(table.prompt) <= 40 else f"{table.prompt[:37]}..."
    if lost and not table.truncated:
        raise UserError(f"prompt {start!r}: the text encoders place {_some(lost)} differently; write it without them")
    if lost:
        what = f"prompt {start!r} is longer than the text encoders"
        raise UserError(f"{what}: {_some(lost)} fell off; shorten it to the words before")
    return [
        f"prompt {start!r}: {_some(words)} fell off the end of {stream}; the other encoders read them"
        for stream, words in table.truncated.items()
    ]


def _some(words: Sequence[str], limit: int = 12) -> str:
    rest = f" and {len(words) - limit} more words" if len(words) > limit else ""
    return f"{' '.join(words[:limit])!r}{rest}"
