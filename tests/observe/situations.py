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
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import T5EncoderModel

from mmdit_probe.attention import reference
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.discover_layout import taint
from mmdit_probe.models.layout import unwrap
from mmdit_probe.models.pipeline_call import bind
from mmdit_probe.observe.mass import KeyGroups, attention_masses
from mmdit_probe.observe.observer import LayerCall, Observer
from mmdit_probe.observe.probe import probe
from tests import pipelines, tiny
from tests.families import CHANNELS, FIXTURES
from tests.observe.quantised import STORAGES, missing

DEVICE = "cpu"
"""Where the subjects run; a test on a GPU sets another one."""
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
            if torch.is_autocast_enabled(DEVICE):
                dtype = torch.get_autocast_dtype(DEVICE)
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
        keys = KeyGroups.of(seen.layout, groups, seen.call.query.device)
        masses, n_query = attention_masses(seen.call, seen.lse, keys)
        # [B, H, 2, image | other | text | references | frames]; by what moves them, references are "other".
        masses[..., 1] += masses[..., 3 : keys.count].sum(-1)
        masses = masses[..., :3]
        self.seen[seen.denoising.number, seen.layer.path] = (seen.denoising, masses.double().cpu(), n_query.cpu())


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
        refusal: of the error; empty if it is exact. steps: which are observed. needs: a package beyond the tests' own.
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
    needs: str = ""

    @property
    def lacks(self) -> str:
        """Why it cannot be tried here; empty if it can."""
        return f"{self.needs} is not installed" if self.needs and missing(self.needs) else ""

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
        sites = taint(plain, _in_float32(inputs)) if there else {}
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


def _in_float32(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _in_float32(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_in_float32(item) for item in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _batch(call: dict[str, Any]) -> int:
    return max(len(call["query"]), len(call["key"]))


def _expected(call: dict[str, Any], row: int, labels: list[Tensor]) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """Masses of one sample by the explicit softmax, as a function of the kinds of its keys."""

    def one(tensor: Tensor) -> Tensor:
        return (tensor[row : row + 1] if len(tensor) > 1 else tensor).cpu()

    def masses(kinds: Tensor) -> Tensor:
        mask = call.get("attn_mask")
        mask = None if mask is None else one(mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)))
        p = reference.probabilities(
            one(call["query"]), one(call["key"]), mask, call.get("is_causal", False), call.get("scale")
        )[0]  # [H, Nq, Nk]
        kinds = kinds.clone().cpu()
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
            outputs += _flat(model(**moved(model.test_inputs | changes), return_dict=False))
    return outputs


def moved(value: Any) -> Any:
    """Inputs on the device."""
    if isinstance(value, dict):
        return {name: moved(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item) for item in value)
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def model_of(family: str, arrange: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> Callable[[], Any]:
    def build() -> Any:
        model = FIXTURES[family].build().to(DEVICE)
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


class OwnAttention(TorchFunctionMode):
    """Somebody's own function mode, that computes every attention call in another way."""

    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.way = way

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not STOCK:
            return func(*args, **(kwargs or {}))
        call = SDPACall.bind(args, kwargs or {})
        return self.way(lambda **changes: replace(call, **changes).stock(), call.query, call.key, call.value)


OWN_ATTENTION: dict[str, tuple[Callable[..., Tensor], str]] = {
    "that answers for it": (lambda proceed, query, key, value: value.clone(), "OwnAttention skips it"),
    "by heads": (
        lambda proceed, query, key, value: torch.cat(
            [proceed(query=query[:, h], key=key[:, h], value=value[:, h]) for h in (slice(1), slice(1, None))], 1
        ),
        "no one softmax is the layer's",
    ),
    "twice": (
        lambda proceed, query, key, value: 0.5 * (proceed() + proceed(value=value)),
        "no one softmax is the layer's",
    ),
    "with one key more": (
        lambda proceed, query, key, value: proceed(
            key=torch.cat([key, key[:, :, :1]], 2), value=torch.cat([value, value[:, :, :1]], 2), attn_mask=None
        ),
        "text tokens in one softmax",
    ),
}  # fmt: skip
"""Ways that leave no softmax over image and text, and what refuses them."""


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


def rolled(proceed: Callable[..., Tensor], *call: Tensor) -> Tensor:
    """The same attention, of tokens that are joined in another order."""
    parts = zip(("query", "key", "value"), call, strict=True)
    return proceed(**{name: part.roll(5, 2) for name, part in parts}).roll(-5, 2)


def own_processors(way: Callable[..., Tensor] | None = None) -> Callable[[Any], Any]:
    """Processors of one's own, subclasses of the model's; their attention is called in a way of their own, if any."""

    def around(target: Any) -> Any:
        made: dict[type, Any] = {}
        for module in _transformer(target).modules():
            stock: Any = type(getattr(module, "processor", None))
            if hasattr(module, "set_processor"):
                made.setdefault(stock, type("OwnProcessor", (stock,), {"__call__": called(stock)}))
                module.set_processor(made[stock]())
        return nullcontext()

    def called(stock: Any) -> Any:
        @functools.wraps(stock.__call__)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with nullcontext() if way is None else OwnAttention(way):
                return stock.__call__(self, *args, **kwargs)

        return call

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
    model = _transformer(target)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    model.to(DEVICE)
    return nullcontext()


def layerwise_casting(target: Any) -> Any:
    _transformer(target).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return nullcontext()


def quantised(quantise: Callable[[Any], None]) -> Callable[[Any], Any]:
    def around(target: Any) -> Any:
        quantise(_transformer(target))
        return nullcontext()

    return around


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


def every_text_token(inputs: dict[str, Any]) -> dict[str, Any]:
    """Texts that are all as long as the longest."""
    return inputs | {"encoder_attention_mask": torch.ones_like(inputs["encoder_attention_mask"])}


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
    rows += of_families("autocast bfloat16", EVERY, around=lambda _: torch.autocast(DEVICE, torch.bfloat16))
    rows += of_families(
        "autocast float16",
        ["sd3", "sd35", "flux", "qwen_image"],
        around=lambda _: torch.autocast(DEVICE, torch.float16),
    )
    rows += of_families("a function mode that changes calls", EVERY, around=lambda _: LouderQueries())
    rows += of_families(
        "a function mode that changes calls, inside the probe",
        DISPATCHED,
        around=lambda _: LouderQueries(),
        inside=True,
    )
    for way, (attention, refusal) in OWN_ATTENTION.items():
        rows += of_families(
            f"a function mode of attention {way}", ["sd3", "flux", "z_image"],
            around=lambda _, attention=attention: OwnAttention(attention), refusal=refusal,
        )  # fmt: skip
        if refusal.startswith("no one softmax"):
            rows += of_families(
                f"a function mode of attention {way}, texts of one length", ["mochi"], arrange=every_text_token,
                around=lambda _, attention=attention: OwnAttention(attention), refusal=refusal,
            )  # fmt: skip
    for inside in (False, True):
        when = ", inside the probe" if inside else ""
        rows += of_families(
            f"processors of one's own{when}", ["sd3", "flux", "qwen_image", "z_image", "hunyuan_video", "cogvideox"],
            around=own_processors(), inside=inside,
        )  # fmt: skip
        rows += of_families(
            f"processors of one's own that join image and text in another order{when}", ["sd3", "flux", "cogvideox"],
            around=own_processors(rolled), inside=inside, refusal="OwnProcessor): the processor joins image and text",
        )  # fmt: skip
    rows += of_families("torch's default device", DISPATCHED, around=lambda _: torch.device(DEVICE))
    rows += of_families("torch's function replaced by a wrapper", ["sd3", "mochi", "flux"], around=replaced_function)
    rows += of_families("sdpa_kernel(MATH)", DISPATCHED, around=lambda _: sdpa_kernel(SDPBackend.MATH))
    rows += of_families("attention_backend('_native_math')", DISPATCHED, around=backend("_native_math"))
    rows += of_families(
        "attention_backend('_native_math'), inside the probe",
        DISPATCHED[:2],
        around=backend("_native_math"),
        inside=True,
    )
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


# --- ways of running a pipeline ---------------------------------------------------------------------------------------

PROMPT, NEGATIVE = "a red ring", "a blue house"
LONG = "a red ring, " * 130 + "then a house and a cat by the house"
"""About 700 tokens of the language models' tokenizers, one for each letter of most words."""
T5 = ("sd3", "flux", "chroma", "cogvideox")
"""Pipelines whose text length is set, to that of the tiny T5."""


@functools.cache
def _shared(name: str, device: str) -> Any:
    return (tiny.pipeline("sd3") if name == "sd3" else pipelines.build(name)).to(device)


def shared(name: str) -> Any:
    """A pipeline that no situation changes."""
    return _shared(name, DEVICE)


def fresh(name: str, kind: str = "") -> Callable[[], Any]:
    """A pipeline of one's own, or another one (`kind`, a class of diffusers) on its components."""

    def build() -> Any:
        import diffusers

        if kind:
            made = getattr(diffusers, kind)
            known = inspect.signature(made.__init__).parameters
            pipe = made(**{part: of for part, of in shared(name).components.items() if part in known})
        else:
            pipe = copy.deepcopy(shared(name))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def sample(pipe: Any, prompt: Any = PROMPT, steps: int = 2, **options: Any) -> list[Tensor]:
    """A short run of a pipeline by its own names of arguments."""
    known = inspect.signature(type(pipe).__call__).parameters
    size = 64 if "StableDiffusion3" in type(pipe).__name__ else 32
    options = {
        "prompt": prompt, "num_inference_steps": steps, "height": size, "width": size, "num_frames": 5,
        "output_type": "latent", "generator": torch.Generator().manual_seed(3), "use_dynamic_cfg": False,
    } | options  # fmt: skip
    if any(isinstance(module, T5EncoderModel) for module in pipe.components.values()):
        options.setdefault("max_sequence_length", tiny.T5_LENGTH)
    options = {name: value for name, value in options.items() if name in known}
    output = pipe(**options)
    return _flat(next(iter(output.values())))


def picture(side: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (side, side), (200, 30, 60))


def of_pipeline(name: str, way: str, kind: str = "", own: bool = False, **facts: Any) -> Situation:
    """A way of running a pipeline; its own copy where it is changed."""
    build = fresh(name, kind) if kind or own else functools.partial(shared, name)
    return Situation(f"{kind or name} pipeline", way, build, **facts)


def guided(name: str, **options: Any) -> Callable[[Any], list[Tensor]]:
    """The pipeline with classifier-free guidance."""
    scale = "true_cfg_scale" if name in ("flux", "qwen_image") else "guidance_scale"
    return lambda pipe: sample(pipe, **({scale: 3.0, "negative_prompt": NEGATIVE} | options))


def alternating(name: str, samples: int = 1, steps: int = 2) -> list[list[str]]:
    """Branches call by call, as the pipelines make them."""
    if name in ("flux", "qwen_image", "chroma"):
        return [["cond"] * samples, ["uncond"] * samples] * steps
    first, second = ("cond", "uncond") if name == "z_image" else ("uncond", "cond")
    return [[first] * samples + [second] * samples] * steps


MODULAR = {
    "sd3": "StableDiffusion3AutoBlocks", "flux": "FluxAutoBlocks", "flux2": "Flux2KleinAutoBlocks",
    "qwen_image": "QwenImageAutoBlocks", "z_image": "ZImageAutoBlocks",
}  # fmt: skip
"""Blocks that modular pipelines are made of."""


@functools.cache
def modular(name: str) -> Any:
    """A modular pipeline on the components of a stock one."""
    import diffusers

    pipe, parts = getattr(diffusers, MODULAR[name])().init_pipeline(), shared(name).components
    pipe.update_components(**{part: parts[part] for part in parts if part in pipe.component_names})
    return pipe


def sample_modular(pipe: Any, **options: Any) -> list[Tensor]:
    """A short run of a modular pipeline: `sample` goes by the names of arguments, and it has none."""
    side = 64 if "StableDiffusion3" in type(pipe).__name__ else 32
    options = {"height": side, "width": side, "num_inference_steps": 2, "max_sequence_length": 40} | options
    return _flat(pipe(prompt=PROMPT, output="latents", generator=torch.Generator().manual_seed(3), **options))


@functools.cache
def skyreels() -> Any:
    """HunyuanVideo that begins with a picture, whose latents are further channels."""
    from diffusers import HunyuanSkyreelsImageToVideoPipeline

    changes = {"in_channels": 2 * CHANNELS, "out_channels": CHANNELS, "guidance_embeds": False}
    network = pipelines.transformer("hunyuan_video", **changes).to(DEVICE)
    return HunyuanSkyreelsImageToVideoPipeline(**shared("hunyuan_video").components | {"transformer": network})


STRENGTH = {
    "sd3": "StableDiffusion3", "flux": "Flux", "qwen_image": "QwenImage", "chroma": "Chroma", "z_image": "ZImage",
}  # fmt: skip


def from_pictures() -> list[Situation]:
    """Image to image and inpainting begin at a later step."""
    rows = []
    for name, prefix in STRENGTH.items():
        side = 64 if name == "sd3" else 32
        given = {"image": picture(side), "strength": 0.6, "steps": 5}
        # The tiny SD3 has too few channels for inpainting, and Chroma's inpainting asks for a config it has not.
        for kind in (f"{prefix}Img2ImgPipeline", f"{prefix}InpaintPipeline")[: 1 if name in ("sd3", "chroma") else 2]:
            mask = {"mask_image": picture(side)} if "Inpaint" in kind else {}
            run = functools.partial(sample, guidance_scale=0.0, **given, **mask)
            labels = Labels(steps=[2, 3, 4], branches=[["cond"]] * 3, seeds={3}, prompts={PROMPT})
            way = "5 steps at strength 0.6"
            rows.append(of_pipeline(name, way, kind, run=run, labels=labels))
            rows.append(
                of_pipeline(name, f"{way}, step 3", kind, run=run, labels=Labels(steps=[3], seeds={3}), steps=3)
            )
            refusal = "no denoising call was at steps 0; the steps that ran are 2, 3, 4"
            rows.append(of_pipeline(name, f"{way}, step 0", kind, run=run, steps=0, refusal=refusal))
    return rows


def copied_pipeline(name: str) -> Callable[[Any], list[Tensor]]:
    """The run of a deep copy of the pipeline, which is nobody's call, and then the pipeline's own."""
    run = guided(name)

    def both(pipe: Any) -> list[Tensor]:
        twin = copy.deepcopy(pipe)
        assert not [attribute for attribute in twin.__dict__ if "mmdit" in attribute]
        return [*run(twin), *run(pipe)]

    return both


def two_prompts(name: str) -> Callable[[Any], list[Tensor]]:
    """Two prompts, a seed each, and one negative string for both."""
    return lambda pipe: guided(
        name, prompt=[PROMPT, "a cat"], generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)]
    )(pipe)


def own_noise(name: str) -> Callable[[Any], list[Tensor]]:
    """Latents that the caller drew, and a generator that draws none."""

    def run(pipe: Any) -> list[Tensor]:
        drawn: list[Tensor] = []
        prepare = pipe.prepare_latents

        def keep(*args: Any, **kwargs: Any) -> Any:
            result = prepare(*args, **kwargs)
            drawn.append(result[0] if isinstance(result, tuple) else result)
            raise InterruptedError

        pipe.prepare_latents = keep
        try:
            guided(name)(pipe)
        except InterruptedError:
            pass
        finally:
            del pipe.prepare_latents
        return guided(name, latents=drawn[0])(pipe)

    return run


def by_another(pipe: Any, kind: str) -> list[Tensor]:
    """A run of the pipeline, and the same of another one on its components."""
    off = {"guidance_scale": 0.0}
    return [*sample(pipe, **off), *sample(fresh_like(pipe, kind), **off)]


def fresh_like(pipe: Any, kind: str) -> Any:
    import diffusers

    other = getattr(diffusers, kind).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def blanked(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes the text in place."""
    tensors["prompt_embeds"].zero_()
    return {}


def ip_adapter(target: Any) -> Any:
    """An image prompt's processor in every layer, as `load_ip_adapter` puts it there."""
    from diffusers.models import attention_processor
    from diffusers.models.transformers import transformer_flux

    model = _transformer(target)
    torch.manual_seed(0)
    if "Flux" in type(model).__name__:
        model.transformer_blocks[0].attn.processor = transformer_flux.FluxIPAdapterAttnProcessor(
            32, 24, num_tokens=(4,)
        ).to(DEVICE)
        options: dict[str, Any] = {"ip_hidden_states": [torch.randn(2, 1, 4, 24)], "ip_adapter_masks": None}
    else:
        processor = attention_processor.SD3IPAdapterJointAttnProcessor2_0(32, 24, 16, timesteps_emb_dim=32)
        model.transformer_blocks[0].attn.processor = processor.to(DEVICE)
        options = {"ip_hidden_states": torch.randn(2, 4, 24), "temb": torch.randn(2, 32)}
    model.test_inputs |= {"joint_attention_kwargs": options}
    return nullcontext()


def pag(scale: float) -> Callable[[Any], Any]:
    """Perturbed-attention guidance in layer 1, beside classifier-free guidance of a scale."""
    return lambda pipe: sample(pipe, guidance_scale=scale, pag_scale=2.0, negative_prompt=NEGATIVE)


def guider(name: str) -> Callable[[Any], Any]:
    """A guider that runs the transformer once more with something left out of layer 1."""

    def around(pipe: Any) -> Any:
        from diffusers import LayerSkipConfig, guiders

        scores = name == "PerturbedAttentionGuidance"
        what = {"skip_attention": not scores, "skip_attention_scores": scores, "skip_ff": not scores}
        config = LayerSkipConfig(indices=[1], fqn="transformer_blocks", **what)
        prefix, config_name = (
            ("perturbed", "perturbed_guidance_config") if scores else ("skip_layer", "skip_layer_config")
        )
        options = {config_name: config, f"{prefix}_guidance_start": 0.0, f"{prefix}_guidance_stop": 1.0}
        pipe.guider = getattr(guiders, name)(guidance_scale=3.0, **options)
        return nullcontext()

    return around


def faster_cache(attention: bool) -> Callable[[Any], Any]:
    """FasterCache: every second step without the unconditional half; with `attention`, without its attention too."""
    return cache(
        "FasterCache", spatial_attention_block_skip_range=2, unconditional_batch_skip_range=2, tensor_format="BFCHW",
        spatial_attention_timestep_skip_range=(-1, 1001 if attention else 0), current_timestep_callback=lambda: 500,
        unconditional_batch_timestep_skip_range=(-1, 1001), attention_weight_callback=lambda _: 0.5,
    )  # fmt: skip


def pipeline_situations() -> list[Situation]:
    """Ways of running stock pipelines."""
    changed = "is not what"
    rows = from_pictures()
    for name in ("sd3", "flux", "qwen_image", "chroma", "z_image", "cogvideox"):
        one = Labels([0, 1], [["cond"]] * 2, {3}, {PROMPT})
        off = {"guidance_scale": 0.0 if name in ("z_image", "chroma") else 1.0}
        rows.append(of_pipeline(name, "without guidance", run=functools.partial(sample, **off), labels=one))
        both = Labels(branches=alternating(name), seeds={3}, prompts={PROMPT})
        rows.append(of_pipeline(name, "with guidance", run=guided(name), labels=both))
        rows.append(
            of_pipeline(
                name, "with guidance, under autocast", run=guided(name), labels=both,
                around=lambda _: torch.autocast(DEVICE, torch.bfloat16),
            )
        )  # fmt: skip
        rows.append(
            of_pipeline(name, "copy.deepcopy inside the probe", run=copied_pipeline(name), labels=both, own=True)
        )
        if name in ("flux", "qwen_image"):
            labels = Labels(branches=alternating(name, 2), seeds={3, 4}, prompts={PROMPT, "a cat"})
            rows.append(of_pipeline(name, "two prompts, one negative string", run=two_prompts(name), labels=labels))
        given = own_noise(name)
        rows.append(of_pipeline(name, "noise of one's own", run=given, labels=Labels(seeds={-1}, prompts={PROMPT})))
    for name in ("sd3", "flux", "chroma", "qwen_image"):
        inputs = {"callback_on_step_end": blanked, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        off = {"guidance_scale": 0.0 if name == "chroma" else 1.0}
        rows.append(
            of_pipeline(
                name, "a callback that changes prompt_embeds", run=functools.partial(sample, **off, **inputs),
                labels=Labels(prompts={PROMPT, ""}, seeds={3, -1}), note=changed,
            )
        )  # fmt: skip
    for name, prefix in STRENGTH.items():
        if name != "sd3":
            run = functools.partial(by_another, kind=f"{prefix}Pipeline")
            labels = Labels([0, 1, 0, 1], None, {3, -1}, {PROMPT, ""})
            rows.append(
                of_pipeline(name, "another pipeline on the transformer", run=run, labels=labels, note="probe that")
            )
    for name in MODULAR:
        row = of_pipeline(name, "as a modular pipeline", run=sample_modular, note="are not followed")
        steps = [0, 0, 1, 1] if name in ("sd3", "qwen_image") else [0, 1]  # with guidance by a second call
        rows.append(replace(row, build=functools.partial(modular, name), labels=Labels(steps, None, {-1}, {""})))
    begins = {"image": picture(32), "max_sequence_length": 300, "true_cfg_scale": 6.0, "negative_prompt": NEGATIVE}
    labels = Labels([0, 0, 1, 1], [["cond"], ["uncond"]] * 2, {3}, {PROMPT})
    run = functools.partial(sample, **begins)
    rows.append(Situation("SkyReels pipeline", "from a picture, with guidance", skyreels, run, labels=labels))
    for way, scale, branches in (
        ("PAG and guidance", 3.0, ["uncond", "cond", "perturbed"]),
        ("PAG without guidance", 0.0, ["cond", "perturbed"]),
    ):
        labels = Labels([0, 1], [branches] * 2, {3}, {PROMPT})
        rows.append(of_pipeline("sd3", way, "StableDiffusion3PAGPipeline", run=pag(scale), labels=labels))
    for name in ("PerturbedAttentionGuidance", "SkipLayerGuidance"):
        labels = Labels(branches=[["cond"], ["uncond"], ["cond"], ["uncond"], ["perturbed"]])
        rows.append(
            of_pipeline(
                "hunyuan_image", f"guider {name}", own=True, run=sample, around=guider(name), labels=labels,
                note="skips layers",
            )
        )  # fmt: skip
    texts = Labels(words={"cat": {"clip": 1}, "house": {"t5": 1}})
    run = functools.partial(sample, prompt="a cat", prompt_3="red house on grass", guidance_scale=1.0)
    rows.append(of_pipeline("sd3", "another text for T5 (prompt_3)", run=run, labels=texts))
    halves = Labels([0, 1, 2, 3], [["uncond", "cond"], ["cond"]] * 2, {3}, {PROMPT})
    every = Labels([0, 2], [["uncond", "cond"]] * 2, {3}, {PROMPT})
    for way, attention, labels, note in (
        ("FasterCache of half the batch", False, halves, "half of the batch"),
        ("FasterCache of attention", True, every, "reuses earlier results"),
    ):
        run, around = guided("cogvideox", steps=4), faster_cache(attention)
        rows.append(of_pipeline("cogvideox", way, own=True, around=around, run=run, labels=labels, note=note))
    for name in ("qwen_image", "cogview4", "krea2"):
        off = 0.0 if name == "krea2" else 1.0
        run = functools.partial(sample, prompt=LONG, max_sequence_length=1000, guidance_scale=off)
        labels = Labels([0, 1], [["cond"]] * 2, {3}, {LONG}, {"cat": {"llm": 4}, "then": {"llm": 5}})
        rows.append(of_pipeline(name, "a prompt of 700 tokens", run=run, labels=labels))
    rows.append(
        of_pipeline(
            "cogvideox", "PyramidAttentionBroadcast", own=True, around=CACHES["PyramidAttentionBroadcast"],
            run=functools.partial(sample, steps=4), note="PyramidAttentionBroadcast",
        )
    )  # fmt: skip
    for storage, (package, quantise) in STORAGES.items():
        for name in ("sd3", "flux", "qwen_image"):
            labels = Labels(branches=alternating(name), seeds={3}, prompts={PROMPT})
            rows.append(
                of_pipeline(
                    name, storage, own=True, around=quantised(quantise), run=guided(name), labels=labels, needs=package
                )
            )  # fmt: skip
    rows += of_families("an IP-Adapter", ["sd3", "flux"], around=ip_adapter, refusal="IPAdapter")
    return rows


_EVERY = (*transformer_situations(), *pipeline_situations())
SITUATIONS = {situation.name: situation for situation in _EVERY}
assert len(SITUATIONS) == len(_EVERY), "two situations of one name"


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
