"""What attention-budget and value-norms have in common: an observer of rows, on sampled prompts or on pictures.

A subclass names the observer and says how the rows of one denoising call are reduced. Every item is reduced while its
rows are at hand, so that neither summary nor claims need the long table again, and `rows="summary"` can leave it out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.data.sources import NAMES
from mmdit_probe.errors import UserError, counted
from mmdit_probe.experiments import controls
from mmdit_probe.experiments.experiment import Experiment, Study, one_per_item, plain, request_of, scheduled
from mmdit_probe.experiments.options import (
    SAMPLED,
    Control,
    Input,
    LayersAndHeads,
    Output,
    Prompts,
    Referring,
    Sampling,
    captions_of,
    notes_on,
    prompts_of,
    samples_of,
)
from mmdit_probe.options import Option, changed
from mmdit_probe.results.tables import MemorySink
from mmdit_probe.specs import HeadSpec, Spec, step_indices

if TYPE_CHECKING:
    from mmdit_probe.data import Sample
    from mmdit_probe.experiments.controls import Variant
    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import Rows, TaskRecord
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.models.tokens import TokenTable
    from mmdit_probe.observe.observer import RowObserver

DEFAULT_PROMPTS = 20


@dataclass(frozen=True)
class Item:
    """One thing to measure: a prompt to sample, or a picture with its prompt."""

    index: int
    prompt: str
    seed: int
    picture: Sample | None = None


@dataclass(frozen=True, kw_only=True)
class TokenRows(LayersAndHeads, Sampling, Referring, Experiment):
    """Rows per prompt, step, branch, layer, head and kind of token."""

    early = True
    reads: ClassVar[tuple[str, ...]]
    """The columns that `reduce` needs."""

    prompts: Prompts = None
    limit: Annotated[
        int | None,
        Input("Use the first LIMIT prompts or pictures.", min=1,
              shown_default=f"{DEFAULT_PROMPTS}, or all of --prompts or --images")
    ] = None  # fmt: skip
    images: Annotated[
        str | Path | Sequence[Any] | None,
        Input("Probe real pictures instead of sampling: a folder, or scenes:train|val|test.", values=NAMES),
    ] = None
    sigma: Annotated[
        float, Option("Noise level of --images, 0 clean to 1 noise (the paper's t=8: 0.515).", min=0, max=1)
    ] = 0.515
    steps: Annotated[Spec, Option("Sampling steps: all, 0,20, 0-4; last-8 is the 8th from the clean end.")] = "all"
    control: Control = "none"
    rows: Annotated[
        Literal["head", "layer", "summary"],
        Output("What the table keeps: a row per head, per layer (mean over heads), or per item only."),
    ] = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if "shuffled" in self.chosen_controls() and self.images is None:
            raise UserError("shuffled captions need pictures: a sampled image has no caption but its prompt")
        unread = changed(self, *(("sigma",) if self.images is None else ("steps", *SAMPLED)))
        if unread:
            raise UserError(
                f"{unread} is of pictures (--images); sampling has --steps" if self.images is None
                else f"{unread} is of sampling; pictures are read at --sigma"
            )  # fmt: skip
        if self.images is None:
            step_indices(self.steps, self.num_steps)

    @property
    def stem(self) -> str:
        return self.name.replace("-", "_")

    @property
    def tables(self) -> tuple[str, ...]:  # type: ignore[override]
        reduced = f"{self.stem}_by_item"
        return (reduced,) if self.rows == "summary" else (self.stem, reduced)

    @abstractmethod
    def observer(self, sink: Any, heads: HeadSpec) -> RowObserver:
        """What measures."""

    @abstractmethod
    def reduce(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows of an item, `reads` of them, as one per branch, layer and group: means over steps, heads and
        tokens."""

    def gather(self, scenes: bool) -> tuple[list[str], list[Sample]]:
        """Prompts to sample, or pictures and the texts that replace their captions."""
        if self.images is None:
            return prompts_of(self.prompts, self.limit, scenes, DEFAULT_PROMPTS), []
        pictures = samples_of(self.images, self.limit)
        return captions_of(self.prompts, pictures), pictures

    def prepare(self, model: MMDiT, inputs: tuple[list[str], list[Sample]]) -> Study:
        texts, pictures = inputs
        items = [
            Item(index, text, self.seed + index, pictures[index] if pictures else None)
            for index, text in enumerate(texts)
        ]
        chosen = self.chosen_controls()
        variants = controls.variants(model, chosen)
        layers, heads = self.places(model)
        notes = [line for table in model.token_tables(texts) for line in unread(table)]
        notes += model.notes_on_words([text for text in texts if text or not pictures])
        notes += notes_on(model, pictures, texts, model.default_size) if pictures else []
        request = request_of(
            model,
            layers=list(layers),
            heads=plain(heads),
            controls=list(chosen),
            rows=self.rows,
            **self._how(),
            items=[[i.prompt, i.seed, *([i.picture.fingerprint()] if i.picture else [])] for i in items],
        )
        facts: dict[str, Any] = {"remarks": notes}
        if pictures:
            facts |= {"pictures": [picture.name for picture in pictures], "sigmas": [self.sigma], "steps": [0]}
        else:
            facts |= scheduled(model, self.num_steps) | {"steps": request["steps"]}
        # All items of the measurement itself come first, then those of each control.
        tasks = [(variant, item) for variant in variants for item in _under(variant, items)]
        unit = "pictures" if pictures else "prompts"
        return Study(model, request, tasks, unit, facts=facts, notes=notes, state=(layers, heads))

    def _how(self) -> dict[str, Any]:
        if self.images is not None:
            return {"mode": "pictures", "sigma": self.sigma}
        steps = list(step_indices(self.steps, self.num_steps))
        return {"mode": "sample", "steps": steps, "num_steps": self.num_steps, "guidance": self.guidance}

    def measure(self, study: Study, task: tuple[Variant, Item], record: TaskRecord) -> None:
        from mmdit_probe.observe.probe import probe

        (variant, item), (layers, heads) = task, study.state
        labels: dict[str, Any] = {"control": variant.name, "item": item.index}
        labels |= {"picture": item.picture.name} if item.picture else {}
        kept, seen = MemorySink(), set[int]()

        def take(rows: Rows) -> None:
            kept.write({name: rows[name] for name in self.reads})
            if (step := int(rows["step"][0])) not in seen:  # guidance may take two calls a step
                seen.add(step)
                record.advance(0.999 * part)  # the last thousandth is the task's end: what is written
            if self.rows != "summary":
                record.write(self.stem, rows, **labels)

        steps: Spec = "all" if item.picture else study.request["steps"]
        part = 1 if item.picture else 1 / len(study.request["steps"])
        with probe(variant.model, self.observer(take, heads), layers=layers, steps=steps, edits=variant.edits):
            if item.picture is None:
                variant.model.generate(
                    item.prompt, steps=self.num_steps, guidance=self.guidance, seed=item.seed, output_type="latent"
                )
            else:
                denoise_picture(variant.model, item.picture, item.prompt, self.sigma, item.seed)
        record.write(f"{self.stem}_by_item", self.reduce(kept.table()), **labels)

    def setting(self, result: Result, count: int) -> str:
        """What was averaged over and how it was run, for the figure's title and the line below the table."""
        request = result.request
        if request["mode"] == "pictures":
            return f"n = {counted(count, 'picture')}, sigma {request['sigma']}"
        steps, total = len(request["steps"]), request["num_steps"]
        return f"n = {counted(count, 'prompt')}, {steps} of {counted(total, 'step')}, guidance {request['guidance']}"

    def by_item(self, result: Result, branch: str = "cond") -> pd.DataFrame:
        """The reduced rows of one guidance branch.

        Raises:
            UserError: it was not measured.
        """
        table = result.held(f"{self.stem}_by_item")
        chosen = table[table["branch"] == branch]
        if chosen.empty:
            raise UserError(f"the table has no rows of branch {branch!r}; expected cond or uncond of a guided run")
        labels = [n for n in chosen.columns if chosen[n].dtype.kind != "f" and n not in ("item", "picture")]
        return one_per_item(chosen, result.request["items"], labels)


def denoise_picture(model: MMDiT, picture: Sample, text: str, sigma: float, seed: int) -> None:
    """Encode a picture by the VAE, noise it to `sigma` and run one denoising call."""
    latents = model.noise(model.encode_image(picture.open(model.default_size)), sigma, seed)
    model.denoise(latents, sigma, model.encode_prompt([text]), seeds=seed)


def _under(variant: Variant, items: Sequence[Item]) -> list[Item]:
    texts = variant.texts([item.prompt for item in items])
    return [Item(item.index, text, item.seed, item.picture) for item, text in zip(items, texts, strict=True)]


def cut_off(model: MMDiT, prompts: Sequence[str]) -> list[str]:
    """Remarks on words of prompts that every encoder cut off."""
    return [*filter(None, map(_cut_off, model.token_tables(prompts) if prompts else []))]


def _cut_off(table: TokenTable) -> str:
    if not (table.truncated and (lost := table.unread)):
        return ""
    return f"prompt {_start(table)!r} is longer than the text encoders: {_some(lost)} fell off"


def unread(table: TokenTable) -> list[str]:
    """Remarks on words that some encoder cut off, or that none is given.

    Raises:
        UserError: words that every encoder cut off or misplaced: nothing about them can be measured.
    """
    lost, start = table.unread, _start(table)
    if what := _cut_off(table):
        raise UserError(f"{what}; shorten it to the words before")
    if lost and table.disputed:
        raise UserError(f"prompt {start!r}: the text encoders place {_some(lost)} differently; write it without them")
    remarks = [f"prompt {start!r}: no text encoder reads {_some(lost)}: there is no text token of it"] if lost else []
    return remarks + [
        f"prompt {start!r}: {_some(words)} fell off the end of {stream}; the other encoders read them"
        for stream, words in table.truncated.items()
    ]


def _start(table: TokenTable) -> str:
    return table.prompt if len(table.prompt) <= 40 else f"{table.prompt[:37]}..."


def _some(words: Sequence[str], limit: int = 12) -> str:
    rest = f" and {counted(len(words) - limit, 'more word')}" if len(words) > limit else ""
    return f"{' '.join(words[:limit])!r}{rest}"
