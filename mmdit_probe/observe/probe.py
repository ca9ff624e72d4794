"""probe: watch a model's joint attention while it runs, and leave it as it was.

    with probe(model, AttentionMass(), layers="7-11") as run:       # an MMDiT, a stock pipeline, or a bare transformer
        model.generate("a cat by the window")
    run[AttentionMass].table()

With observers only, the model's output is bitwise the stock output. Everything is restored when the context ends, after
an error too. A selected layer whose attention is never seen raises: an empty result must not look like a result.

Layers are 0-based joint-attention layers in forward order; steps are 0-based sampling steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from mmdit_probe.attention.intercept import Detach, Edit, ModuleCall, Record, Stage, Transform, interpose, watch
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.discover_layout import bind
from mmdit_probe.models.families.facts import Family
from mmdit_probe.models.layout import Layer, Layout, Places, arranged, unwrap
from mmdit_probe.models.mmdit import Batch, MMDiT
from mmdit_probe.models.tokens import TokenTable, fitted
from mmdit_probe.observe.backend import backend_of, native_attention
from mmdit_probe.observe.facts import Facts, facts_of
from mmdit_probe.observe.observer import DenoisingCall, LayerCall, Observer, check_finite
from mmdit_probe.observe.pipeline_labels import PipelineRows
from mmdit_probe.observe.sample_order import canonical, canonical_hidden, hidden_keys, joined
from mmdit_probe.specs import Spec, layer_indices, step_indices

Seen = TypeVar("Seen", bound=Observer)


class ModelEdit(Protocol):
    """An intervention that `probe(edits=...)` attaches: its layers, its stage, and a handler for each layer."""

    @property
    def layers(self) -> Spec: ...

    @property
    def stage(self) -> Stage | Literal["block"]: ...

    def handler(self, layer: Layer, run: Run) -> Transform | Edit | Callable[..., Any]:
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
) -> Run:
    """A context manager that observes (and edits) joint attention.

    Args:
        target: an `MMDiT`, a stock diffusers pipeline, or a bare transformer.
        observers: what to measure, e.g. `AttentionMass()`.
        layers: "all", 9, "7-11", "0,9" or [0, 9].
        steps: sampling steps to observe: "all", "last-8", 20, "0,20", ...; the others run at stock cost. Calls of
            `MMDiT.denoise` are always observed.
        edits: interventions, each with layers of its own.
        tokens: token tables for prompts that came as embeddings: one for all rows, or one per row of the batch.
        branches: for a bare transformer, the branches of a batch in order, e.g. ("uncond", "cond").

    Raises:
        UserError: not an MM-DiT, unknown layers. RunError (on exit): a selected layer was never seen.
    """
    every = [edits] if hasattr(edits, "handler") else list(edits)  # type: ignore[arg-type]
    return Run(target, observers, layers, steps, every, tokens, branches)


class Run:
    """A probe in progress, and its observers afterwards: `run[AttentionMass]` is the observer of that class."""

    def __init__(
        self,
        target: Any,
        observers: Sequence[Observer],
        layers: Spec = "all",
        steps: Spec = "all",
        edits: Sequence[Any] = (),
        tokens: TokenTable | Sequence[TokenTable] | None = None,
        branches: Sequence[str] | None = None,
    ) -> None:
        self.model = target if isinstance(target, MMDiT) else None
        self.pipeline = target.pipeline if isinstance(target, MMDiT) else target if _is_pipeline(target) else None
        outer = target if self.pipeline is None else self.pipeline.transformer
        if not isinstance(outer, nn.Module):
            raise UserError(f"cannot probe {type(target).__name__}: expected an MMDiT, a pipeline or a transformer")
        self._outer = outer
        self.transformer = unwrap(outer)
        self._facts: Facts = facts_of(self.transformer)
        self._wanted = layers
        self.all_layers: list[Layer] = []
        self.layers: list[Layer] = []
        if self._facts.layers is not None:
            self._choose(self._facts.layers)
        self.observers = list(observers)
        self.edits = list(edits)
        self.steps = steps
        self.current: DenoisingCall | None = None
        self._tokens = tokens
        self._branches = tuple(branches) if branches is not None else None
        follow = self.pipeline is not None and bool(self.family.encoded)
        self._rows = PipelineRows(self.pipeline, self.family) if follow else None
        self._context: str | None = None
        self._layouts: dict[str, tuple[Layout, Places | None]] = {}
        self._stack = ExitStack()
        self._calls = 0
        self._seen: dict[int, int] = {}
        self._observing = False
        self._step: int | None = None
        self._skipped: Sequence[int] = ()
        self._clock: tuple[int, float] = (-1, float("nan"))
        if self._scheduler is None and "last" in str(steps):
            raise UserError(f"steps {steps!r} of a bare transformer: the number of steps is unknown; name the indices")

    @property
    def family(self) -> Family:
        """The facts that apply."""
        return self._facts.family

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

    def _choose(self, layers: list[Layer]) -> None:
        self.all_layers = layers
        self.layers = [layers[index] for index in layer_indices(self._wanted, len(layers))]

    def __getitem__(self, kind: type[Seen]) -> Seen:
        """The observer of a class.

        Raises:
            UserError: there is none, or more than one.
        """
        found = [observer for observer in self.observers if isinstance(observer, kind)]
        if len(found) != 1:
            names = ", ".join(type(observer).__name__ for observer in self.observers) or "none"
            raise UserError(f"{len(found)} observers of class {kind.__name__}; this probe has: {names}")
        return found[0]

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            stack.enter_context(native_attention(self.transformer))
            if self._rows is not None:
                for detach in self._rows.attach():
                    stack.callback(detach)
            # Hooks of the module that is called: they outlive a replaced `forward` (model offload re-wraps it after
            # every pipeline call), and `always_call` runs the second one after an error too.
            stack.callback(self._outer.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(self._outer.register_forward_hook(self._after, with_kwargs=True, always_call=True).remove)
            if hasattr(type(self.transformer), "cache_context"):
                # Pipelines that call the transformer once per guidance branch say here which one it is.
                stack.callback(interpose(self.transformer, "cache_context", self._on_context))
            self._watch(stack)
            self._stack = stack.pop_all()
        return self

    def _watch(self, stack: ExitStack) -> None:
        for layer in self.layers:
            stack.callback(watch(layer.module, _LayerRecorder(self, layer), "record"))
        for edit in self.edits:
            for index in layer_indices(edit.layers, len(self.all_layers)) if self.all_layers else ():
                stack.callback(self._attach(edit, self.all_layers[index]))

    def _attach(self, edit: ModelEdit, layer: Layer) -> Detach:
        """Put an edit around the layer's attention calls, or around the forward of the block that holds it."""
        handler: Any = edit.handler(layer, self)
        if edit.stage == "block":
            return interpose(self.block(layer), "forward", handler)
        return watch(layer.module, handler, edit.stage)

    def _on_context(self, proceed: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        # Guiders say "pred_cond" and "pred_uncond", and "pred_cond_skip" or the like of their perturbed forward.
        self._context = name.removeprefix("pred_")
        if name.startswith("pred_cond_"):
            self._context = "perturbed"
        return proceed(name, *args, **kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if error is None and self._calls == 0:
            raise RunError(
                "no denoising call was made while probing: call the probed model inside the `with` block"
                f" (watched: {type(self.transformer).__name__})"
            )

    def at(self, steps: Spec) -> bool:
        """Whether the denoising call in progress is at one of these sampling steps; calls of `MMDiT.denoise` are."""
        return steps == "all" or self._step is None or self._step in step_indices(steps, self._step_count)

    # The bookkeeping of a call is no part of a compiled graph.
    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A transformer call begins: find out what it is."""
        inputs = bind(self.transformer, args, kwargs)
        self._calls += 1
        found = self._facts.arrange(inputs)
        if not self.all_layers and self._facts.layers is not None:
            self._choose(self._facts.layers)
            self._watch(self._stack)
        self._layouts = {path: arranged(arrangement) for path, arrangement in found.items()}
        self._seen, self._observing, self._skipped = {}, True, inputs.get(self.family.skip_input) or ()
        self.current = self._label(inputs)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A transformer call is over: hand finished rows on. `output` is None if the call raised."""
        denoising, self.current = self.current, None
        try:
            if denoising is None or output is None:
                return
            self._check_seen()
            if self._observing:
                check_finite(self.observers, denoising)
                for observer in self.observers:
                    observer.end_call(denoising)
        finally:
            for observer in self.observers:
                observer.abandon_call()

    @property
    def _scheduler(self) -> Any:
        return getattr(self.pipeline, "scheduler", None)

    def _label(self, inputs: dict[str, Any]) -> DenoisingCall:
        """What is known of the call that begins; says too whether it is to be observed."""
        image, text = inputs[self.family.image_input], inputs[self.family.text_input]
        rows = len(image)
        layout = next(iter(self._layouts.values()))[0]
        step, sigmas = self._when(inputs.get(self.family.timestep_input), rows)
        batch = self.model.batch if self.model is not None else None
        if batch is None and self._rows is not None and self._branches is None:
            batch = self._rows.batch(text, self._context, sigmas[0])
        if batch is None:
            batch = Batch(None, [""] * rows, [-1] * rows, self._named_branches(rows))
        self._step = step if batch.step is None else None
        self._observing = self.at(self.steps)
        length = layout.counts["text"]
        tables = self._given_tables(rows, length) or fitted(self.family, batch.tokens or (), length)
        prompts = [
            prompt or (table.prompt if table is not None else "")
            for prompt, table in zip(batch.prompts, tables or [None] * rows, strict=True)
        ]
        return DenoisingCall(
            number=self._calls - 1,
            step=step if batch.step is None else batch.step,
            sigmas=sigmas if batch.sigmas is None else batch.sigmas,
            prompts=prompts,
            seeds=batch.seeds,
            branches=["perturbed"] * rows if self._skipped or self._context == "perturbed" else batch.branches,
            grid=layout.grid or (0, 0),
            _tokens=tables,
        )

    def _given_tables(self, rows: int, length: int) -> list[TokenTable | None]:
        """The caller's token tables, one per row; none if none were given."""
        if self._tokens is None:
            return []
        tables = [self._tokens] * rows if isinstance(self._tokens, TokenTable) else list(self._tokens)
        if len(tables) != rows or any(len(table) != length for table in tables):
            raise UserError(
                f"tokens: {len(tables)} tables of {sorted({len(table) for table in tables})} positions for {rows} rows"
                f" of {length} text positions; expected one table, or one per row, of that many positions"
            )
        return list(tables)

    @property
    def _step_count(self) -> int:
        return len(self._scheduler.timesteps) if self._scheduler is not None else 1 << 30

    def _named_branches(self, rows: int) -> list[str]:
        branches = self._branches
        if branches is None:
            # Where nothing was encoded here, pipelines still say whether they double their batch.
            told = self._rows is not None and not self._rows.encoded and bool(self.family.guidance)
            if not told or not getattr(self.pipeline, "do_classifier_free_guidance", False) or rows % 2:
                return [self._context if self._context in ("cond", "uncond") else "unknown"] * rows
            branches = self.family.guidance
        if rows % len(branches):
            raise UserError(f"{rows} rows cannot be divided into the branches {', '.join(branches)}")
        return [branch for branch in branches for _ in range(rows // len(branches))]

    def _when(self, timestep: Any, rows: int) -> tuple[int, list[float]]:
        """Step and sigmas of a call: the scheduler's where the timestep is one of its own, else counted and scaled."""
        given = float("nan") if timestep is None else timestep
        values = torch.as_tensor(given).detach().double().cpu().reshape(-1).tolist()
        values = values * rows if len(values) == 1 else values
        sigmas = [self.family.sigma(value) for value in values]
        if self._scheduler is not None and len(set(values)) == 1:
            place = self._scheduled(values[0], sigmas[0])
            if place is not None:
                levels = getattr(self._scheduler, "sigmas", None)
                return place, sigmas if levels is None else [float(levels[place])] * rows
        count, last = self._clock
        if sigmas[0] != last:
            # Sampling runs from noise to image: a rise of the noise level is the start of another image.
            self._clock = (0 if sigmas[0] > last else count + 1, sigmas[0])
        return self._clock[0], sigmas

    def _scheduled(self, timestep: float, sigma: float) -> int | None:
        """The scheduler's place of a timestep, its own or rescaled to a noise level; None if it has none such."""
        known = self._scheduler.timesteps.double().cpu()
        now = getattr(self._scheduler, "step_index", None) or 0
        # A rescaled timestep is one of the scheduler's by chance only: 1.0 is the first level and the last timestep.
        rescaled = self.family.timesteps == 1.0
        places = [] if rescaled else (known == timestep).nonzero()[:, 0].tolist()
        if places:
            return next((place for place in places if place >= now), places[0])
        # A rescaled timestep has gone through the latents' precision, so it is only near.
        return now if now < len(known) and abs(1000.0 * sigma - float(known[now])) < 8.0 else None

    def _check_seen(self) -> None:
        for layer in self.layers:
            if not self._seen.get(layer.index) and layer.index not in self._skipped:
                processor = type(getattr(layer.module, "processor", layer.module)).__name__
                raise RunError(
                    f"layer {layer.index} ({layer.path}, {processor}, backend {backend_of(layer.module)!r}) made no"
                    " scaled_dot_product_attention call: its attention runs in a kernel that hides it (flash-attn,"
                    " sage, xformers, flex or a sliced/plain processor). Set the model's default attention processor"
                    " and the native backend, then probe again"
                )


class _LayerRecorder:
    """Hands one layer's attention calls to the observers of a run."""

    def __init__(self, run: Run, layer: Layer) -> None:
        self.run, self.layer = run, layer
        self._number, self._parts = -1, list[Record]()

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
        run._seen[self.layer.index] = run._seen.get(self.layer.index, 0) + 1
        if not run._observing or not run.observers:
            return "nothing"
        return "lse" if any(observer.needs == "lse" for observer in run.observers) else "call"

    def record(self, record: Record) -> None:
        run = self.run
        assert run.current is not None
        layout, places = run.arranged(self.layer)
        rows = len(run.current.prompts)
        if len(record.call.query) != rows:
            # One attention call per sample: they are looked at together when the last one is there.
            if self._number != run.current.number:
                self._number, self._parts = run.current.number, []
            self._parts.append(record)
            if sum(len(part.call.query) for part in self._parts) < rows:
                return
            record, self._parts = joined(self._parts), []
        self._check(record, layout, places)
        hidden = hidden_keys(record.call)
        if hidden is not None and bool(hidden.any()):
            layout = layout.without(hidden if places is None else canonical_hidden(hidden, places))
        seen = LayerCall(self.layer, layout, run.current, record if places is None else canonical(record, places))
        for observer in run.observers:
            observer.observe(seen)

    def _check(self, record: Record, layout: Layout, places: Places | None) -> None:
        n_query, n_key = record.call.query.shape[-2], record.call.key.shape[-2]
        if places is None:
            fits = layout.total == n_query == n_key
        else:
            fits = int(places.keys.max()) < n_key and int(places.queries.max()) < n_query
        if not fits:
            raise RunError(
                f"layer {self.layer.index} ({self.layer.path}) attends from {n_query} to {n_key} tokens; expected"
                f" {layout.counts['image']} image and {layout.counts['text']} text tokens in one softmax"
            )


def _is_pipeline(target: Any) -> bool:
    return hasattr(target, "transformer") and hasattr(target, "scheduler") and not isinstance(target, nn.Module)
