"""probe: watch a model's joint attention while it runs, and leave it as it was.

    with probe(model, AttentionMass(), layers="7-11") as run:       # an MMDiT, a stock pipeline, or a bare transformer
        model.generate("a cat by the window")
    run[AttentionMass].table()

With observers only, the model's output is bitwise the stock output. A selected layer whose attention is never seen
raises: an empty result must not look like a result. Where a cache or a guider leaves out layers of some steps, the
others are reported, with a warning: `run.notes`.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mmdit_probe.attention.call import SDPACall, without_autocast
from mmdit_probe.attention.intercept import (
    Detach,
    InputHandler,
    ModuleCall,
    OutputHandler,
    Record,
    Stage,
    attached,
    hook,
    interpose,
    watch,
)
from mmdit_probe.errors import ProbeWarning, RunError, UserError, brief, counted
from mmdit_probe.models.families.facts import Family
from mmdit_probe.models.layout import Layer, Layout, Places, arranged, of_samples, unwrap
from mmdit_probe.models.layout_source import layout_source
from mmdit_probe.models.mmdit import Batch, MMDiT, default_length, is_embedded
from mmdit_probe.models.pipeline_call import bind
from mmdit_probe.models.tokens import TokenTable, fitted
from mmdit_probe.observe.backend import (
    drops_unconditional,
    hiding,
    processor_of,
    refuse_reordered,
    refuse_sharded,
    skipping,
)
from mmdit_probe.observe.clock import Clock
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, Observer, check_finite
from mmdit_probe.observe.pipeline_labels import PERTURBED, PipelineRows, calling_pipeline, is_pipeline
from mmdit_probe.observe.sample_order import canonical, canonical_hidden, hidden_keys, joined
from mmdit_probe.specs import Spec, check_spec, layer_indices, reread, step_indices

Seen = TypeVar("Seen", bound=Observer)


_WATCHING: set[int] = set()
"""Identities of the observers in a probe that is attached."""


class ForwardEnded(Exception):
    """Ends the forward of a transformer that need not run to its end; see `probe(to_end=False)`."""


class ModelEdit(Protocol):
    """An intervention that `probe(edits=...)` attaches: its layers, its stage, and a handler for each layer."""

    @property
    def layers(self) -> Spec: ...

    @property
    def stage(self) -> Stage | Literal["block"]: ...

    def handler(self, layer: Layer, run: Run) -> InputHandler | OutputHandler | Callable[..., Any]:
        """The handler for one layer; `run.current` is the denoising call in progress.

        Of stage "block" it is called with the forward of the transformer block and that forward's arguments.
        """
        ...


def probe(
    target: Any,
    *observers: Observer,
    layers: Spec = "all",
    steps: Spec = "all",
    edits: ModelEdit | Iterable[ModelEdit] = (),
    tokens: TokenTable | Sequence[TokenTable] | None = None,
    branches: Sequence[str] | None = None,
    to_end: bool = True,
) -> Run:
    """A context manager that observes (and edits) joint attention.

    Args:
        target: an `MMDiT`, a stock diffusers pipeline, or a bare transformer.
        observers: what to measure, e.g. `AttentionMass()`.
        layers: "all", 9, "7-11", "0,9" or [0, 9]: what the observers see; without observers, none.
        steps: sampling steps to observe: "all", "last-8", 20, "0,20", ...; the others run at stock cost. Calls of
            `MMDiT.denoise` are always observed.
        edits: interventions, each with layers of its own.
        tokens: token tables for prompts that came as embeddings: one for all rows, or one per row of the batch.
        branches: for a bare transformer, the branches of a batch in order, e.g. ("uncond", "cond").
        to_end: False ends each forward with the last attention that is watched, for calls whose output is not wanted:
            what is observed stays the same, and the call raises `ForwardEnded`. One that is compiled or wrapped, or
            whose later modules have hooks (of another probe, of diffusers' offloading and caches), runs to its end.

    Raises:
        UserError: not an MM-DiT, unknown layers; on exit, no call was at the selected steps. RunError: a selected layer
            was not seen, or only in part of the samples.
    """
    every = list(edits) if isinstance(edits, Iterable) else [edits]
    return Run(target, observers, layers, steps, every, tokens, branches, to_end)


class Run:
    """A probe in progress, and its observers afterwards: `run[AttentionMass]` is the observer of that class.

    Attributes:
        notes: what the tables lack or do not know, one sentence each; every one was a warning.
        current: the denoising call in progress.
    """

    def __init__(
        self,
        target: Any,
        observers: Sequence[Observer],
        layers: Spec = "all",
        steps: Spec = "all",
        edits: Sequence[Any] = (),
        tokens: TokenTable | Sequence[TokenTable] | None = None,
        branches: Sequence[str] | None = None,
        to_end: bool = True,
    ) -> None:
        self.model = target if isinstance(target, MMDiT) else None
        self.pipeline = target.pipeline if isinstance(target, MMDiT) else target if is_pipeline(target) else None
        outer = target if self.pipeline is None else self.pipeline.transformer
        if not isinstance(outer, nn.Module):
            why = "expected an MMDiT, a pipeline or a transformer"
            if outer is None:
                why = "its transformer is not loaded (None)"
            raise UserError(f"cannot probe {type(target).__name__}: {why}")
        self._outer = outer
        self.transformer = unwrap(outer)
        self._source = layout_source(self.transformer)
        self._wanted = reread(layers)
        self.all_layers: list[Layer] = []
        self.layers: list[Layer] = []
        for one in (*observers, *edits):
            if isinstance(one, type):
                raise UserError(f"{one.__name__} is a class; expected an observer or an edit: {one.__name__}(...)")
        given: Sequence[Any] = observers
        for observer in given:
            if not isinstance(observer, Observer):
                hint = "; edits are given as edits=" if hasattr(observer, "handler") else ""
                raise UserError(f"{brief(observer)} is no observer; expected such as AttentionMass(), by comma{hint}")
        for edit in edits:
            if not hasattr(edit, "handler"):
                hint = "; observers are given before it, without edits=" if isinstance(edit, Observer) else ""
                raise UserError(f"{brief(edit)} is no edit; expected such as Blur(...), or a list of them{hint}")
        self.observers = list(observers)
        self.edits = list(edits)
        if self._source.layers is not None:
            self._choose(self._source.layers)
        self.steps = reread(steps)
        check_spec(self.steps, step_indices)
        self.current: DenoisingCall | None = None
        self.notes: list[str] = []
        self._tokens = tokens
        self._branches = tuple(branches) if branches is not None else None
        self._to_end = to_end
        follow = self.pipeline is not None and bool(self.family.encoded)
        self._rows = PipelineRows(self.pipeline, self.family) if follow else None
        self._context: str | None = None
        self._layouts: dict[str, tuple[Layout, Places | None]] = {}
        self._hidden: tuple[Layout, Tensor, Layout] | None = None
        self._stack, self._entered = ExitStack(), False
        self._calls = 0
        self._recorders: list[_LayerRecorder] = []
        self._handlers: list[tuple[ModelEdit, Any]] = []
        self._observing = False
        self._step: int | None = None
        self._steps_run: set[int] = set()
        self._at_steps = False
        self._thread = 0
        self._left_out: Sequence[int] = ()
        self._device = "cpu"
        self._clock = Clock(getattr(self.pipeline, "scheduler", None))
        _count_for(self.steps, self._clock.steps)

    def __repr__(self) -> str:
        held = ", ".join(type(one).__name__ for one in [*self.observers, *self.edits]) or "nothing"
        layers = ", ".join(str(layer.index) for layer in self.layers) or str(self._wanted)
        return f"Run of {type(self.transformer).__name__}: {held}; layers {layers}; {self._calls} denoising calls"

    def __getstate__(self) -> Any:
        raise UserError(
            "a probe belongs to the model that it watches, and is neither pickled nor copied: pickle its observers,"
            " such as run[AttentionMass], or their tables"
        )

    @property
    def family(self) -> Family:
        """The facts that apply."""
        return self._source.family

    def layout(self, layer: Layer) -> Layout:
        """Which token is which at one layer, in the order of its own attention call, in the denoising call in progress.

        Raises:
            UserError: the samples of this call differ in it, so there is no one order.
        """
        layout, places = self.arranged(layer)
        if places is not None:
            raise UserError(
                f"the samples of this {self.family.name} call differ in their order of tokens (or text is no query)"
            )
        return layout

    def block(self, layer: Layer) -> nn.Module:
        """The transformer block that holds a layer's attention."""
        return self.transformer.get_submodule(layer.path.rpartition(".")[0])

    def arranged(self, layer: Layer) -> tuple[Layout, Places | None]:
        """The canonical layout at one layer, and where its tokens are in the layer's own call (None: in this order)."""
        return self._layouts[layer.path] if layer.path in self._layouts else self._layouts[""]

    def without(self, layout: Layout, hidden: Tensor) -> Layout:
        """`layout.without(hidden)`: one object for all layers that hide the same, whose groups of keys are one then."""
        before, known, found = self._hidden or (None, hidden, layout)
        hidden = hidden.cpu()
        if before is not layout or not torch.equal(known, hidden):
            found = layout.without(hidden)
            self._hidden = layout, hidden, found
        return found

    def _choose(self, layers: list[Layer]) -> None:
        self.all_layers = layers
        self.layers = [layers[index] for index in layer_indices(self._wanted, len(layers))] if self.observers else []

    def __getitem__(self, kind: type[Seen]) -> Seen:
        """The observer of a class.

        Raises:
            UserError: no class, there is none of it, or more than one.
        """
        if not isinstance(kind, type):
            raise UserError(f"run[{brief(kind)}]: expected the class of an observer, such as run[AttentionMass]")
        found = [observer for observer in self.observers if isinstance(observer, kind)]
        if len(found) != 1:
            names = ", ".join(type(observer).__name__ for observer in self.observers) or "none"
            raise UserError(f"{len(found)} observers of class {kind.__name__}; this probe has: {names}")
        return found[0]

    def __enter__(self) -> Run:
        if self._entered:
            raise UserError("this probe is attached already: leave its `with` block first, or make another one")
        refuse_sharded(self.transformer)
        with ExitStack() as stack:
            for observer in self.observers:
                if id(observer) in _WATCHING:
                    raise UserError(
                        f"one {type(observer).__name__} is given twice, or to two probes at once: it would count"
                        " everything twice; give each its own"
                    )
                _WATCHING.add(id(observer))
                stack.callback(_WATCHING.discard, id(observer))
            if self._rows is not None:
                for detach in self._rows.attach():
                    stack.callback(detach)
            stack.callback(hook(self._outer, self._before, self._after))
            if hasattr(type(self.transformer), "cache_context"):
                # Pipelines that call the transformer once per guidance branch say here which one it is.
                stack.callback(interpose(self.transformer, "cache_context", self._on_context))
            for name, method in (("image_processor", "postprocess"), ("video_processor", "postprocess_video")):
                if hasattr(processor := getattr(self.pipeline, name, None), method):
                    stack.callback(interpose(processor, method, self._on_pictures))
            self._watch(stack)
            self._stack = stack.pop_all()
        self._entered = True
        return self

    def _watch(self, stack: ExitStack) -> None:
        edited: dict[int, list[ModelEdit]] = {}
        for edit in self.edits:
            for index in layer_indices(edit.layers, len(self.all_layers)) if self.all_layers else ():
                edited.setdefault(index, []).append(edit)
        observed, self._handlers = {layer.index for layer in self.layers}, []
        self._recorders = [
            _LayerRecorder(self, layer, self.observers if layer.index in observed else [])
            for layer in self.all_layers
            if layer.index in observed or layer.index in edited
        ]
        for recorder in self._recorders:
            layer = recorder.layer
            stack.callback(watch(layer.module, recorder, "record"))
            for edit in edited.get(layer.index, ()):
                stack.callback(self._attach(edit, layer))
        # Not knowing its layers before a call, a probe cannot tell which will be the last one.
        if self._recorders and not self._to_end and self._nobody_waits():
            self._recorders[-1].ends = True

    def _nobody_waits(self) -> bool:
        """Whether a forward may end in the last watched layer: nothing else is told of what comes behind it."""
        if self._outer is not self.transformer or len(self._outer._forward_hooks) > 1:
            return False  # a wrapper may have split or compiled it; another probe, or hooks of others
        modules: dict[nn.Module, None] = {}
        for layer in self.all_layers[self._recorders[-1].layer.index :]:
            modules |= dict.fromkeys(self.block(layer).modules())
        return not any(map(_heard, modules)) and not _stateful(self.transformer)

    def end_forward(self) -> None:
        """Hand on what was measured, and end the forward in progress.

        Raises:
            ForwardEnded: always, unless something is wrong with what was measured.
        """
        assert self.current is not None
        # Not when the forward is over: torch hides errors of hooks behind the error that ended it.
        self._finish(self.current)
        raise ForwardEnded

    def _attach(self, edit: ModelEdit, layer: Layer) -> Detach:
        """Put an edit around the layer's attention calls, or around the forward of the block that holds it."""
        handler: Any = edit.handler(layer, self)
        self._handlers.append((edit, handler))
        if edit.stage == "block":
            return interpose(self.block(layer), "forward", handler)
        return watch(layer.module, handler, edit.stage)

    def _on_context(self, proceed: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        # Guiders say "pred_cond" and "pred_uncond", and "pred_cond_skip" or the like of their perturbed forward.
        self._context = name.removeprefix("pred_")
        if name.startswith("pred_cond_"):
            self._context = PERTURBED
        return proceed(name, *args, **kwargs)

    def _on_pictures(self, proceed: Any, *args: Any, **kwargs: Any) -> Any:
        made = proceed(*args, **kwargs)
        for observer in self.observers:
            observer.pictured(made)
        return made

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._entered = False
        if error is not None:
            return
        if self._calls == 0:
            raise RunError(
                "no denoising call was made while probing: call the probed model inside the `with` block"
                f" (watched: {type(self.transformer).__name__})"
            )
        if self.observers and self._steps_run and not self._at_steps:
            ran = ", ".join(map(str, sorted(self._steps_run)))
            raise UserError(f"no denoising call was at steps {self.steps!r}; the steps that ran are {ran}")
        for recorder in self._recorders:
            if not recorder.ever and recorder.skipped_by:
                raise RunError(
                    f"{recorder.name} did not run at any selected step: {recorder.skipped_by} skips it or reuses an"
                    " earlier result; switch that off (a cache: transformer.disable_cache()) or select other layers"
                )
        for edit in self.edits:
            missed = [getattr(handler, "missed", "") for one, handler in self._handlers if one is edit]
            if missed and all(missed):
                self.note(f"{type(edit).__name__} edited nothing: no sample of a call had its {missed[0]}")

    def note(self, text: str) -> None:
        """Say once what the tables lack or do not know."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, ProbeWarning, stacklevel=3)

    def at(self, steps: Spec) -> bool:
        """Whether the denoising call in progress is at one of these sampling steps; calls of `MMDiT.denoise` are."""
        if steps == "all" or self._step is None:
            return True
        return self._step in step_indices(steps, _count_for(steps, self._clock.steps))

    # The bookkeeping of a call is no part of a compiled graph.
    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A transformer call begins: find out what it is."""
        if self.current is not None and self._thread != threading.get_ident():
            raise RunError(
                "a denoising call began in one thread while another thread's was in progress: a probe follows one call"
                " at a time; run them one after the other, or give each thread a model and a probe of its own"
            )
        self._thread = threading.get_ident()
        inputs = bind(self.transformer, args, kwargs)
        self._calls += 1
        arrangements = self._source.arrange(inputs)
        if not self.all_layers and self._source.layers is not None:
            self._choose(self._source.layers)
            self._watch(self._stack)
        samples = _batch_size(inputs[self.family.image_input], inputs[self.family.text_input])
        self._layouts = {path: _spread(*arranged(of), samples) for path, of in arrangements.items()}
        self._left_out = inputs.get(self.family.skip_input) or ()
        self._device = next(iter(inputs[self.family.image_input])).device.type
        for recorder in self._recorders:
            recorder.begin()
        self.current = self._label(inputs, samples)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A transformer call is over: hand finished rows on. `output` is None if the call raised."""
        if self._thread != threading.get_ident():
            return  # refused, while another thread's call goes on
        denoising, self.current = self.current, None
        try:
            if denoising is not None and output is not None:
                self._finish(self._that_ran(denoising))
        finally:
            for observer in self.observers:
                observer.abandon_call()

    def _finish(self, denoising: DenoisingCall) -> None:
        """All watched layers have run: hand what was measured on."""
        for recorder in self._recorders:
            self._check_seen(recorder, denoising)
        if self._observing:
            with without_autocast(self._device):
                for observer in self.observers:
                    observer.settle()
                check_finite(self.observers, denoising)
                for observer in self.observers:
                    observer.end_call(denoising)

    def _that_ran(self, denoising: DenoisingCall) -> DenoisingCall:
        """The call with the samples that its layers were given, where a hook left out the first half of them."""
        half, rest = divmod(len(denoising.prompts), 2)
        ran = {recorder.waiting for recorder in self._recorders if recorder.calls}
        if rest or ran != {half} or not drops_unconditional(self.transformer):
            return denoising
        rows = slice(half, None)
        denoising = denoising.of_samples(rows)
        for recorder in self._recorders:
            if recorder.parts:
                parts, recorder.parts = recorder.parts, []
                recorder.show(parts, denoising, *of_samples(*self.arranged(recorder.layer), rows))
        hook = skipping(self.transformer, recorder.layer.path)
        self.note(
            f"{hook} runs half of the batch at some steps: the other half has no rows there"
            " (transformer.disable_cache() ends a cache)"
        )
        return denoising

    def _label(self, inputs: dict[str, Any], samples: int) -> DenoisingCall:
        """What is known of the call that begins; says too whether it is to be observed."""
        layout = next(iter(self._layouts.values()))[0]
        caller = calling_pipeline(self.transformer) if self.pipeline is not None else None
        if caller is not None:
            self._clock.scheduler = caller.scheduler
        step, sigmas = self._clock.at(inputs.get(self.family.timestep_input), samples, self.family)
        batch = self.model.batch if self.model is not None else None
        if batch is None and self.pipeline is not None and self._branches is None:
            batch = self._followed(caller, inputs[self.family.text_input], samples, sigmas[0])
        if batch is None:
            batch = Batch(None, [""] * samples, [-1] * samples, self._named_branches(samples))
        self._step = step if batch.step is None else None
        self._observing = self.at(self.steps)
        self._at_steps |= self._observing
        if self._step is not None:
            self._steps_run.add(self._step)
        length = layout.counts["text"]
        tables = self._given_tables(samples, length) or fitted(self.family, batch.tokens or (), length)
        if any(batch.tokens or ()) and not any(tables):
            self.note(
                f"{type(self.pipeline).__name__} put other text than the prompt alone before the transformer: its words"
                " are unknown"
            )
        prompts = batch.prompts
        if self._tokens is not None:
            prompts = [prompt or getattr(table, "prompt", "") for prompt, table in zip(prompts, tables, strict=True)]
        return DenoisingCall(
            number=self._calls - 1,
            step=step if batch.step is None else batch.step,
            sigmas=sigmas if batch.sigmas is None else batch.sigmas,
            prompts=prompts,
            seeds=batch.seeds,
            branches=[PERTURBED] * samples if self._left_out or self._context == PERTURBED else batch.branches,
            _tokens=tables,
        )

    def _followed(self, caller: Any, text: Any, samples: int, sigma: float) -> Batch | None:
        """The labels that the pipeline's own calls give; None, with a note, if it did not encode this text."""
        name = type(self.pipeline).__name__
        if caller is not None and caller is not self.pipeline:
            self.note(
                f"the transformer was called by another pipeline ({type(caller).__name__}) than the probed one: its"
                " prompts, seeds and branches are unknown; probe that pipeline"
            )
            return None
        batch = None if self._rows is None else self._rows.batch(text, samples, self._context, sigma)
        if batch is not None and self._rows is not None and self._rows.one_generator and -1 in batch.seeds:
            self.note(
                "one generator draws the noise of several images, whose seeds are unknown: give a list of generators,"
                " one for each"
            )
        if batch is not None and not hasattr(self.pipeline, "prepare_latents"):
            self.note(f"{name} draws its noise out of a probe's sight: seeds are unknown")
        if self._tokens is not None:
            return batch
        if self._rows is None or (batch is None and not self._rows.encoded):
            self.note(f"prompts, words, seeds and branches of {name} are not followed: they are unknown")
        elif batch is None:
            self.note(
                f"the text of a denoising call is not what {name}.encode_prompt gave (did a callback change it?): its"
                " prompt, words, seed and branch are unknown"
            )
        elif not any(batch.tokens or ()):
            self.note(f"{name} was given its text as embeddings, or in another template: its words are unknown")
        else:
            self._note_length(next(table for table in batch.tokens or () if table is not None))
        return batch

    def _note_length(self, table: TokenTable) -> None:
        """Say that an embedded model is given more text positions than it was trained with."""
        length, argument = default_length(self.pipeline, self.family), self.family.length_argument
        for stream in self.family.streams:
            found = len(table.positions(stream=stream.name))
            if stream.length == argument and 0 < length < found and is_embedded(self.pipeline):
                self.note(
                    f"{stream.name} has {found} text positions, and this embedded model was trained with {length}: give"
                    f" {argument}={length}"
                )

    def _given_tables(self, rows: int, length: int) -> list[TokenTable | None]:
        """The caller's token tables, one per row; none if none were given."""
        if self._tokens is None:
            return []
        tables = [self._tokens] * rows if isinstance(self._tokens, TokenTable) else list(self._tokens)
        if len(tables) != rows or any(len(table) != length for table in tables):
            held = sorted({len(table) for table in tables})
            raise UserError(
                f"tokens: {counted(len(tables), 'table')} of {held} positions for {counted(rows, 'row')} of {length}"
                " text positions; expected one table, or one per row, of that many positions"
            )
        return list(tables)

    def _named_branches(self, rows: int) -> list[str]:
        branches = self._branches
        if branches is None:
            # Where nothing was encoded here, pipelines still say whether they double their batch.
            told = self._rows is not None and not self._rows.encoded and bool(self.family.guidance)
            if not told or not getattr(self.pipeline, "do_classifier_free_guidance", False) or rows % 2:
                return [self._context if self._context in ("cond", "uncond") else "unknown"] * rows
            branches = self.family.guidance
        if rows % len(branches):
            raise UserError(f"{counted(rows, 'row')} cannot be divided into the branches {', '.join(branches)}")
        return [branch for branch in branches for _ in range(rows // len(branches))]

    def _check_seen(self, recorder: _LayerRecorder, denoising: DenoisingCall) -> None:
        layer = recorder.layer
        if recorder.parts:
            why = skipping(self.transformer, layer.path) or hiding(layer.module)
            raise RunError(
                f"{recorder.name} ran {recorder.waiting} of the {len(denoising.prompts)} samples of step"
                f" {denoising.step}, it is unknown which ({why}); switch that off (a cache:"
                " transformer.disable_cache())"
            )
        if recorder.calls or layer.index in self._left_out:
            return
        recorder.skipped_by = skipping(self.transformer, layer.path)
        if not attached(layer.module):
            raise RunError(
                f"{recorder.name} was given another forward inside the `with` block (a hook taken off, that was there"
                " before): change hooks before the probe or after it"
            )
        if not recorder.skipped_by:
            raise RunError(
                f"layer {layer.index} ({layer.path}, {hiding(layer.module)}) made no scaled_dot_product_attention call:"
                " its attention runs in a kernel that hides it (flash-attn, sage, xformers, flex or a sliced/plain"
                " processor). Set the model's default attention processor and a native backend"
                " (transformer.set_attention_backend('native')), then probe again"
            )
        self.note(
            f"{recorder.skipped_by} skips layers or reuses earlier results: layers have no rows at steps where they did"
            " not run (transformer.disable_cache() ends a cache)"
        )


class _LayerRecorder:
    """Hands one layer's attention calls to the observers of a run.

    Attributes:
        calls: attention calls in the denoising call in progress. ever: whether an observed call was ever seen.
        parts: calls of some samples each, until all samples are there. skipped_by: what left the layer out last.
        ends: whether forwards end with this layer's attention.
    """

    def __init__(self, run: Run, layer: Layer, observers: Sequence[Observer]) -> None:
        self.run, self.layer, self.observers = run, layer, observers
        self.calls, self.ever, self.skipped_by, self.ends = 0, False, "", False
        self.parts: list[Record] = []

    @property
    def name(self) -> str:
        return f"layer {self.layer.index} ({self.layer.path}, {processor_of(self.layer.module)})"

    @property
    def waiting(self) -> int:
        """Samples of the calls that wait for the others."""
        return sum(len(part.call.query) for part in self.parts)

    def begin(self) -> None:
        """A denoising call begins."""
        self.calls, self.parts = 0, []

    def wants(self, module_call: ModuleCall) -> Literal["nothing", "call", "lse"]:
        run = self.run
        if run.current is None:
            # Gradient checkpointing recomputes layers in the backward pass; anything else would be lost in silence.
            if torch._C._current_graph_task_id() != -1:
                return "nothing"
            raise RunError(
                f"layer {self.layer.index} ({self.layer.path}) ran outside the transformer's own call, so its step and"
                " prompt are unknown: call the probed model or transformer itself, not its forward or its blocks"
            )
        self.calls += 1
        if not run._observing:
            return "nothing"
        self.ever = True
        if not self.observers:
            return "nothing"
        return "lse" if any(observer.needs == "lse" for observer in self.observers) else "call"

    def record(self, record: Record) -> None:
        run = self.run
        assert run.current is not None
        # Several attention calls of some samples each are looked at together when the last one is there.
        self.parts.append(record)
        if self.waiting >= len(run.current.prompts):
            parts, self.parts = self.parts, []
            self.show(parts, run.current, *run.arranged(self.layer))

    def show(self, parts: Sequence[Record], denoising: DenoisingCall, layout: Layout, places: Places | None) -> None:
        """Let the observers see the attention of all samples of a denoising call, in calls of some samples each."""
        whole = all(self.layer.attends(part.call.query.shape[1]) for part in parts)
        if parts[-1].module_call.calls > len(parts) or not whole:
            raise RunError(
                f"{self.name} calls attention for some of its heads at a time, or several times for a sample (a"
                " function mode or a processor that works in parts): no one softmax is the layer's"
            )
        rows = iter(() if places is None else places.keys)
        for part in parts:
            if not _placed(part.call, list(itertools.islice(rows, len(part.call.query)))):
                raise _foreign(self.name, part.call, layout, len(denoising.prompts))
        record = parts[0] if len(parts) == 1 else joined(parts)
        self._check(record, len(denoising.prompts), layout, places)
        hidden = hidden_keys(record.call)
        if hidden is not None and bool(hidden.any()):
            layout = self.run.without(layout, hidden if places is None else canonical_hidden(hidden, places))
        seen = LayerCall(self.layer, layout, denoising, record if places is None else canonical(record, places))
        refuse_reordered(self.layer, layout, seen.call, record.module_call)
        for observer in self.observers:
            observer.observe(seen)
        if self.ends:
            self.run.end_forward()

    def _check(self, record: Record, expected: int, layout: Layout, places: Places | None) -> None:
        samples, n_query, n_key = len(record.call.query), record.call.query.shape[-2], record.call.key.shape[-2]
        if places is None:
            fits = layout.total == n_query == n_key
        else:
            fits = int(places.keys.max()) < n_key and int(places.queries.max()) < n_query
        if not fits or samples != expected:
            raise _foreign(self.name, record.call, layout, expected)


def _foreign(name: str, call: SDPACall, layout: Layout, samples: int) -> RunError:
    count = call.key.shape[-2]
    more = (
        ". A processor that attends to more than these (an IP-Adapter's), or that splits them, cannot be probed: unload"
        " it"
    )
    return RunError(
        f"{name} attends from {call.query.shape[-2]} to {count} tokens in {len(call.query)} samples; expected"
        f" {layout.counts['image']} image and {layout.counts['text']} text tokens in one softmax, in {samples}"
        f" samples{more if count >= layout.total else ': the transformer leaves some of its inputs out'}"
    )


def _placed(call: SDPACall, places: Sequence[Tensor]) -> bool:
    """Whether every key of a call that a query sees is at a known place, [N] of each sample (none: not asked)."""
    if not places:
        return True
    keys, count = torch.stack(list(places)), call.key.shape[-2]
    known = torch.zeros(len(keys), count + 1, dtype=torch.bool)
    known.scatter_(1, torch.where((keys < 0) | (keys > count), count, keys), True)
    hidden = hidden_keys(call)
    return bool((known[:, :count] if hidden is None else known[:, :count] | hidden.cpu()).all())


def _count_for(steps: Spec, count: int | None) -> int:
    """The number of sampling steps by which a specification is read; more than there ever are where nobody says.

    Raises:
        UserError: nobody says, and it counts from the end.
    """
    if count is None and "last" in str(steps):
        raise UserError(f"steps {steps!r} of a bare transformer: the number of steps is unknown; name the indices")
    return count or 1 << 30


def _stateful(module: nn.Module) -> bool:
    """Whether a module is compiled, or diffusers keeps state over its forwards."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod") or hasattr(module, "_diffusers_hook")


def _heard(module: nn.Module) -> bool:
    """Whether anyone is told of a module's forwards, or they must not be cut short."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or _stateful(module)


def _batch_size(image: Any, text: Any) -> int:
    """B, the samples of a transformer call: one image or one text broadcasts."""
    several = len(image) == 1 and all(not isinstance(value, Tensor) or value.ndim > 2 for value in (image, text))
    return len(text) if several else len(image)


def _spread(layout: Layout, places: Places | None, samples: int) -> tuple[Layout, Places | None]:
    """A layout, and the places of its tokens, for every sample where one stands for all."""

    def spread(which: Tensor | None) -> Tensor | None:
        return which if which is None or len(which) != 1 else which.expand(samples, -1)

    if samples == 1 or places is None:
        return layout, places
    keys, queries = places.keys, places.queries
    if len(keys) == 1:
        places = Places(keys.expand(samples, -1), queries.expand(samples, -1))
    return replace(layout, keys=spread(layout.keys), queries=spread(layout.queries)), places
