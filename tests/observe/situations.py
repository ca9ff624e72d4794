"""What works with what: a table of ways to run a transformer or a pipeline, each tried with and without the probe.

    situation = SITUATIONS["autocast bfloat16 | flux"]
    outcome = situation.check()                      # raises AssertionError where the probe is wrong or silent
    print(markdown([outcome]))

Every situation is run twice: once without the probe, with each attention call written down as torch gets it, and once
under the probe. The output must be bitwise the same, the masses those of the float64 softmax over the calls written
down, the labels those that the situation states; a layer that did not run has no rows and a note says what left it out;
or the situation is refused, and the refusal names what stands in the way. Nothing may be silent.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mmdit_probe.attention import reference
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.discover_layout import bind, taint
from mmdit_probe.models.layout import unwrap
from mmdit_probe.observe.mass import attention_masses
from mmdit_probe.observe.observer import LayerCall, Observer
from mmdit_probe.observe.probe import probe
from tests.families import FIXTURES

STOCK = torch.nn.functional.scaled_dot_product_attention
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-5, torch.float16: 6e-5}
"""Of a mean mass; half precision carries the error of its kernel's log-sum-exp."""


class WrittenDown(TorchFunctionMode):
    """Attention calls as torch gets them: entered first, so every other mode comes before. Nothing of the probe."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer, self.running = transformer, [""]
        self.calls: list[dict[str, list[dict[str, Any]]]] = []
        """By denoising call and module path: the arguments of every attention call."""
        self.inputs: list[dict[str, Any]] = []

    def __enter__(self) -> WrittenDown:
        self.stack = ExitStack()
        for path, module in self.transformer.named_modules():
            if path == "":
                handle = module.register_forward_pre_hook(self._begin, with_kwargs=True)
                self.stack.callback(handle.remove)
            elif hasattr(module, "processor") or "ttention" in type(module).__name__:
                enter = module.register_forward_pre_hook(lambda *_, path=path: self.running.append(path))
                leave = module.register_forward_hook(lambda *_: self.running.pop() and None, always_call=True)
                self.stack.callback(enter.remove)
                self.stack.callback(leave.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls.append({})
        self.inputs.append(bind(self.transformer, args, kwargs))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is STOCK and self.calls:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            call = dict(zip(names, args, strict=False)) | (kwargs or {})
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu")
                call |= {name: call[name].to(dtype) for name in ("query", "key", "value")}
            self.calls[-1].setdefault(self.running[-1], []).append(call)
        return func(*args, **(kwargs or {}))


class Watched(Observer):
    """Masses and labels of every layer of every denoising call."""

    needs = "lse"

    def __init__(self) -> None:
        self.seen: dict[tuple[int, str], tuple[Any, Tensor, Tensor]] = {}

    def observe(self, seen: LayerCall) -> None:
        groups = [[2] * seen.layout.counts["text"] for _ in seen.denoising.prompts]
        masses, n_query = attention_masses(seen.call, seen.lse, seen.layout, groups)  # [B, H, 2, image | other | text]
        self.seen[seen.denoising.number, seen.layer.path] = (seen.denoising, masses.double(), n_query)


@dataclass(frozen=True)
class Labels:
    """What a situation's samples are, denoising call by denoising call; None is not checked."""

    steps: list[int] | None = None
    branches: list[list[str]] | None = None
    seeds: set[int] | None = None
    prompts: set[str] | None = None
    words: dict[str, dict[str, int]] | None = None
    """word -> stream -> number of its positions in the first sample of branch cond."""


@dataclass(frozen=True)
class Situation:
    """One way of running one subject.

    Attributes:
        subject: a family's transformer, or "PIPELINE pipeline". way: how it is run.
        build: makes the transformer or pipeline anew. run: runs it and gives tensors.
        around: a context for the run, given the subject. inside: whether it is entered after the probe.
        labels: what is known of the samples. note: of the warning; None if there may be none.
        refusal: of the error; empty if it is exact. steps: which are observed.
    """

    subject: str
    way: str
    build: Callable[[], Any]
    run: Callable[[Any], Any]
    around: Callable[[Any], Any] = lambda target: nullcontext()
    inside: bool = False
    labels: Labels = field(default_factory=Labels)
    note: str | None = None
    refusal: str = ""
    steps: str | int = "all"

    @property
    def name(self) -> str:
        return f"{self.way} | {self.subject}"

    def check(self) -> Outcome:
        """Run it with and without the probe and compare."""
        target = self.build()
        written = WrittenDown(unwrap(_transformer(target)))
        with written, self.around(target):
            stock = _flat(self.run(target))
        target, watched = self.build(), Watched()
        with warnings.catch_warnings(record=True) as caught, ExitStack() as stack:
            warnings.simplefilter("always")
            if not self.inside:
                stack.enter_context(self.around(target))
            try:
                with probe(target, watched, steps=self.steps) as run:
                    if self.inside:
                        stack.enter_context(self.around(target))
                    seen = _flat(self.run(target))
            except (UserError, RunError) as error:
                return self._refused(str(error))
        assert not self.refusal, f"not refused: {self.refusal}"
        assert len(stock) == len(seen) and all(torch.equal(a, b) for a, b in zip(stock, seen, strict=True)), "output"
        plain = unwrap(_transformer(self.build()))
        error = _largest_error(plain, written, watched, [layer.path for layer in run.layers], self.steps == "all")
        self._check_labels(watched)
        said = " ".join(run.notes)
        assert all(any(note in str(item.message) for item in caught) for note in run.notes)
        assert (self.note is None) == (not run.notes) and (self.note or "") in said, f"notes: {said or 'none'}"
        return Outcome(self, "rows of what ran, and a note" if self.note else "exact", error, said)

    def _refused(self, message: str) -> Outcome:
        assert self.refusal and self.refusal in message and "\n" not in message, message
        return Outcome(self, "refused", 0.0, message)

    def _check_labels(self, watched: Watched) -> None:
        calls = list({number: seen[0] for (number, _), seen in watched.seen.items()}.values())
        want = self.labels
        found = Labels(
            [call.step for call in calls], [call.branches for call in calls],
            {seed for call in calls for seed in call.seeds}, {prompt for call in calls for prompt in call.prompts},
        )  # fmt: skip
        for name in ("steps", "branches", "seeds", "prompts"):
            expected = getattr(want, name)
            assert expected is None or getattr(found, name) == expected, (name, getattr(found, name), expected)
        for word, streams in (want.words or {}).items():
            row = calls[0].branches.index("cond")
            table = next(iter(calls[0]._tables.values()), None) or calls[0]._tokens
            spans = table[row].word_spans(word)
            assert {stream: len(span) for stream, span in spans.items()} == streams, (word, spans)


@dataclass(frozen=True)
class Outcome:
    """What came out: "exact", "rows of what ran, and a note" or "refused"; the largest error of a mass, the words."""

    situation: Situation
    kind: str
    error: float
    text: str


def _transformer(target: Any) -> Any:
    return target if isinstance(target, nn.Module) else target.transformer


def _flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in _flat(part)]


def _largest_error(
    plain: nn.Module, written: WrittenDown, watched: Watched, paths: list[str], every_step: bool
) -> float:
    """Of all masses; every layer that made attention calls was seen, and no other."""
    errors = [torch.zeros(())]
    for number, (calls, inputs) in enumerate(zip(written.calls, written.inputs, strict=True)):
        ran = {path for path in paths if path in calls}
        there = {path for at, path in watched.seen if at == number}
        assert there == ran or (not every_step and not there), f"call {number}: layers {ran ^ there} differ"
        sites = taint(plain, inputs) if there else {}
        for path in there:
            rows = [_expected(call, row, sites[path].labels) for call in calls[path] for row in range(_batch(call))]
            _, masses, n_query = watched.seen[number, path]
            assert len(rows) == len(masses), f"{len(masses)} samples, {len(rows)} ran"
            for sample, (labels_of, wanted) in enumerate(rows):
                expected = wanted(labels_of[min(sample, len(labels_of) - 1)])  # [H, 2, image | other | text]
                for query in range(2):
                    if n_query[sample, query]:
                        dtype = calls[path][0]["query"].dtype
                        error = (masses[sample, :, query] - expected[:, query]).abs().max()
                        assert error < TOLERANCE[dtype], f"{path}: error {error:.1e}"
                        errors.append(error)
    return float(torch.stack(errors).max())


def _batch(call: dict[str, Any]) -> int:
    return max(len(call["query"]), len(call["key"]))


def _expected(call: dict[str, Any], row: int, labels: list[Tensor]) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """Masses of one sample by the explicit softmax, as a function of the kinds of its keys."""

    def one(tensor: Tensor) -> Tensor:
        return tensor[row : row + 1] if len(tensor) > 1 else tensor

    def masses(kinds: Tensor) -> Tensor:
        mask = call.get("attn_mask")
        mask = None if mask is None else one(mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)))
        p = reference.probabilities(
            one(call["query"]), one(call["key"]), mask, call.get("is_causal", False), call.get("scale")
        )[0]  # [H, Nq, Nk]
        kinds = kinds.clone()
        if mask is not None:
            kept = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            kinds[~kept.expand(1, -1, -1, len(kinds))[0].any(0).any(0)] = -1
        queries = kinds if p.shape[-2] == len(kinds) else kinds[kinds == 0]
        blocks = [p[:, queries == query].mean(1) for query in (0, 1)]  # [H, Nk] each
        return torch.stack([torch.stack([b[:, kinds == k].sum(-1) for k in (0, 2, 1)], -1) for b in blocks], 1)

    return labels, masses


# --- ways of running a transformer -----------------------------------------------------------------------------------


def forward(model: Any, times: int = 1, **changes: Any) -> list[Tensor]:
    """The model's own forward on the inputs of its family, `times` times."""
    outputs = []
    context = model.cache_context("cond") if hasattr(model, "cache_context") else nullcontext()
    with torch.no_grad(), context:
        for _ in range(times):
            outputs += _flat(model(**(model.test_inputs | changes), return_dict=False))
    return outputs


def model_of(family: str, arrange: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> Callable[[], Any]:
    def build() -> Any:
        model = FIXTURES[family].build()
        model.test_inputs = arrange(FIXTURES[family].inputs())
        return model

    return build


class LouderQueries(TorchFunctionMode):
    """Somebody's own function mode, that changes attention calls."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is STOCK:
            args, kwargs = (
                ((1.5 * args[0], *args[1:]), kwargs) if args else (args, kwargs | {"query": 1.5 * kwargs["query"]})
            )
        return func(*args, **kwargs)


@contextmanager
def replaced_function(target: Any) -> Iterator[None]:
    """Torch's function replaced by one of Python that calls it, as some packages do."""

    def louder(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return STOCK(1.5 * query, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = louder
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = STOCK


def backend(name: str) -> Callable[[Any], Any]:
    def around(target: Any) -> Any:
        from diffusers.models.attention_dispatch import attention_backend

        return attention_backend(name)

    return around


def own_backend(name: str) -> Callable[[Any], Any]:
    @contextmanager
    def around(target: Any) -> Iterator[None]:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        before = _AttentionBackendRegistry._active_backend
        _transformer(target).set_attention_backend(name)
        try:
            yield
        finally:
            _AttentionBackendRegistry._active_backend = before

    return around


def layer_skip(layers: Sequence[int] = (1,), **options: bool) -> Callable[[Any], Any]:
    def around(target: Any) -> Any:
        from diffusers import LayerSkipConfig
        from diffusers.hooks.layer_skip import apply_layer_skip

        config = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False} | options
        apply_layer_skip(_transformer(target), LayerSkipConfig(indices=list(layers), **config))
        return nullcontext()

    return around


def cache(name: str, **options: Any) -> Callable[[Any], Any]:
    def around(target: Any) -> Any:
        import diffusers

        _transformer(target).enable_cache(getattr(diffusers, f"{name}Config")(**options))
        return nullcontext()

    return around


CACHES: dict[str, Callable[[Any], Any]] = {
    "FirstBlockCache": cache("FirstBlockCache", threshold=0.5),
    "PyramidAttentionBroadcast": cache(
        "PyramidAttentionBroadcast", spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001), current_timestep_callback=lambda: 500,
    ),
    "TaylorSeerCache": cache("TaylorSeerCache", cache_interval=2, disable_cache_before_step=1),
}  # fmt: skip


def lora(target: Any) -> Any:
    from peft import LoraConfig

    torch.manual_seed(0)
    _transformer(target).add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    return nullcontext()


def layerwise_casting(target: Any) -> Any:
    _transformer(target).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return nullcontext()


def copied(model: Any) -> list[Tensor]:
    """The run of a deep copy, which is nobody's call, and then the model's own."""
    twin = copy.deepcopy(model)
    assert not [name for module in twin.modules() for name in module.__dict__ if "mmdit" in name or "deepcopy" in name]
    assert not [module for module in twin.modules() if "forward" in module.__dict__]
    from_copy = [twin.get_parameter(name) is not value for name, value in model.named_parameters()]
    assert all(from_copy)
    return [*forward(twin), *forward(model)]


def one_text(inputs: dict[str, Any]) -> dict[str, Any]:
    """One text for two images: what a list of prompts with one negative string comes to."""
    names = [name for name in inputs if name.startswith("encoder_")]
    changed = inputs | {name: inputs[name][:1] for name in names}
    return changed | {"encoder_hidden_states_mask": None} if "encoder_hidden_states_mask" in inputs else changed


def of_families(way: str, families: Sequence[str], **facts: Any) -> list[Situation]:
    """The same way for several families' transformers."""
    arrange, run = facts.pop("arrange", dict), facts.pop("run", forward)
    return [Situation(family, way, model_of(family, arrange), run, **facts) for family in families]


EVERY = sorted(FIXTURES)
DISPATCHED = ["flux", "qwen_image", "chroma", "z_image", "cogview4", "hunyuan_video", "mochi"]
"""Families whose processors ask diffusers' dispatch for a kernel."""


def transformer_situations() -> list[Situation]:
    """Ways of running a bare transformer."""
    reused, never = "reuses earlier results", "did not run at any selected step"
    rows: list[Situation] = []
    rows += of_families("autocast bfloat16", EVERY, around=lambda _: torch.autocast("cpu", torch.bfloat16))
    rows += of_families(
        "autocast float16", ["sd3", "sd35", "flux", "qwen_image"], around=lambda _: torch.autocast("cpu", torch.float16)
    )
    rows += of_families("a function mode that changes calls", EVERY, around=lambda _: LouderQueries())
    rows += of_families("the same, inside the probe", DISPATCHED, around=lambda _: LouderQueries(), inside=True)
    rows += of_families("torch's default device", DISPATCHED, around=lambda _: torch.device("cpu"))
    rows += of_families("torch's function replaced by a wrapper", ["sd3", "mochi", "flux"], around=replaced_function)
    rows += of_families("sdpa_kernel(MATH)", DISPATCHED, around=lambda _: sdpa_kernel(SDPBackend.MATH))
    rows += of_families("attention_backend('_native_math')", DISPATCHED, around=backend("_native_math"))
    rows += of_families("the same, inside the probe", DISPATCHED[:2], around=backend("_native_math"), inside=True)
    rows += of_families("set_attention_backend('_native_math')", DISPATCHED, around=own_backend("_native_math"))
    rows += of_families(
        "attention_backend('flex')", ["flux", "qwen_image"], around=backend("flex"), refusal="backend 'flex'"
    )
    for inside in (False, True):
        when = ", inside the probe" if inside else ""
        rows += of_families(
            f"layer skip of attention scores{when}", ["qwen_image", "cogview4"], inside=inside,
            around=layer_skip(skip_attention_scores=True), refusal="AttentionProcessorSkipHook skips it",
        )  # fmt: skip
        rows += of_families(
            f"layer skip of attention{when}", ["cogview4"], inside=inside,
            around=layer_skip(skip_attention=True), refusal="AttentionProcessorSkipHook skips it",
        )  # fmt: skip
        rows += of_families(
            f"layer skip of a block{when}", ["flux", "cogvideox", "hunyuan_video", "mochi", "qwen_image"],
            inside=inside, around=layer_skip(skip_attention=True, skip_ff=True),
            refusal="TransformerBlockSkipHook skips it",
        )  # fmt: skip
    for name, around in CACHES.items():
        families = ["flux", "qwen_image", "hunyuan_video", "mochi", "cogvideox"]
        families = families[:3] if name.startswith("TaylorSeer") else families
        rows += of_families(name, families, around=around, run=lambda model: forward(model, 3), note=reused)
    rows += of_families(
        "FirstBlockCache, only a reused step", ["flux"], around=CACHES["FirstBlockCache"], steps=1,
        run=lambda model: [*forward(model, timestep=torch.ones(2)), *forward(model, timestep=0.9 * torch.ones(2))],
        refusal=never,
    )  # fmt: skip
    rows += of_families("LoRA", ["sd3", "flux", "qwen_image"], around=lora)
    rows += of_families("layerwise casting to float8", ["sd3", "flux", "mochi"], around=layerwise_casting)
    rows += of_families("copy.deepcopy inside the probe", EVERY, run=copied)
    rows += of_families("inference mode", ["sd3", "flux", "z_image"], around=lambda _: torch.inference_mode())
    rows += of_families("one text for two images", ["sd3", "flux", "qwen_image", "chroma"], arrange=one_text)
    return rows


SITUATIONS = {situation.name: situation for situation in transformer_situations()}


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table of outcomes by way: subjects, what comes out, the largest error of a mass, the words of a refusal."""
    lines = ["| way of running | of | outcome | largest error of a mass |", "|-|-|-|-|"]
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.situation.way, outcome.kind), []).append(outcome)
    for (way, kind), group in groups.items():
        subjects = ", ".join(outcome.situation.subject for outcome in group)
        error = f"{max(outcome.error for outcome in group):.0e}" if kind != "refused" else ""
        words = f": {group[0].text}" if group[0].text else ""
        lines.append(f"| {way} | {subjects} | {kind}{words} | {error} |".replace("\n", " "))
    return "\n".join(lines)
