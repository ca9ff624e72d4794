"""Load a model by name: an embedded one, a diffusers pipeline directory, a hub id, or a single file of weights.

    model = load("scenes-sd3")                                          # ships with the package
    model = load("path/to/a/pipeline", device="cuda", t5=False)
    model = load("stabilityai/stable-diffusion-3-medium-diffusers")     # gated: accept its licence and log in first
    model = load("sd3_medium.safetensors", offload="model")             # what is not in the file: from that hub id

Weights are read from safetensors only, and all of them must be there. A random-weight twin ("scenes-sd3-random") shares
everything with its base but the transformer, which has seeded random weights: the control of every analysis.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from mmdit_probe.errors import RunError, UserError, brief, check_known, counted, first_line
from mmdit_probe.models.adapters import load_adapter
from mmdit_probe.models.families.registry import BY_CLASS, Family, refuse_class
from mmdit_probe.models.memory import mend_empty_rows, place, quantizer
from mmdit_probe.models.mmdit import MMDiT, check_references, default_length
from mmdit_probe.models.names import DTYPES, check_device, check_memory_options, embedded_models, index_of, source_of
from mmdit_probe.models.single_file import base_of, transformer_of
from mmdit_probe.models.weights import compute_dtype
from mmdit_probe.quiet import quiet, reached

_ENDLESS = 1 << 30
"""Tokenizers that do not say how long their texts are say more than this."""


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    t5: bool = True,
    lora: str | os.PathLike[str] | None = None,
    offload: str | None = None,
    quantize: str | None = None,
) -> MMDiT:
    """Load an MM-DiT in its stock pipeline.

    Args:
        name_or_path: an embedded model's name, a diffusers pipeline directory, a hub id ("owner/name"), or a
            safetensors file of a transformer in its authors' names (`models.single_file`).
        device: "cpu", "cuda", "mps", ...; "auto" takes the first there is of cuda, mps, cpu.
        dtype: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on cuda and float32 elsewhere.
        t5: False leaves out the text streams of the large language encoder: their positions hold zeros, as many as
            before.
        lora: an adapter for the transformer: a folder as diffusers writes it, its file, or a hub id.
        offload: "model", "sequential" or "group": what of the weights waits in the processor's memory.
        quantize: "int8", "fp8", "nf4", or "gguf:FILE" in place of the transformer's own weights (`models.memory`).

    Raises:
        UserError: no such model, not a pipeline directory, not an MM-DiT, gated, an unknown device or dtype, an
            adapter that does not fit, or a quantiser that is not installed.
        RunError: the files are there and cannot be read.
    """
    for what, given in (("model", name_or_path), ("lora", lora)):
        if not isinstance(given, str | os.PathLike) and (given is not None or what == "model"):
            raise UserError(f"{what} is {brief(given)}; expected a name, a folder or a hub id")
    name = os.fspath(name_or_path)
    where = pick_device(device)
    precision = pick_dtype(dtype, where)
    check_memory_options(offload, quantize)
    if offload == "sequential" and where.type == "cpu":
        raise UserError(f"offload {offload!r} moves weights to an accelerator; the device is cpu: leave it out")
    source, twin = source_of(name)
    with quiet(source):
        file = source if Path(source).is_file() else None
        if file is not None and (quantize or "").startswith("gguf:"):
            raise UserError(f"{file} and quantize={quantize!r} both give the transformer's weights; take one of them")
        source = source if file is None else base_of(file)
        index, family = _checked_index(source)
        parts = _transformer_parts(source, family, precision, file, quantize)
        pipeline, length = _pipeline(source, index, family, precision, t5, parts)
        if quantize == "fp8":
            mend_empty_rows(pipeline.transformer)
        if twin is not None:
            pipeline.register_modules(transformer=random_twin(pipeline.transformer, int(twin["seed"])))
        pipeline.set_progress_bar_config(disable=True)
        if lora is not None:
            load_adapter(pipeline, os.fspath(lora))
        name = "+".join([name, *(os.fspath(more) for more in (lora, quantize) if more is not None)])
        return MMDiT(place(pipeline, where, offload), name, length, offload, quantize)


def random_twin(transformer: Any, seed: int) -> Any:
    """A transformer of the same configuration with random weights from `seed`, every path live.

    The class's own initialisation, and a normal of standard deviation 0.02 for parameters that it leaves at zero: a
    zero-initialised projection would hide all that passes through it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = type(transformer).from_config(transformer.config)
        with torch.no_grad():
            for parameter in twin.parameters():
                if not parameter.any():
                    parameter.normal_(0.0, 0.02)
    with quiet():  # diffusers warns of a cast that rounds nothing here
        return twin.to(compute_dtype(transformer)).eval()


def pipeline_index(source: str) -> dict[str, Any]:
    """`model_index.json` of a pipeline directory or hub id: component -> [library, class].

    Raises:
        UserError: there is none, or the hub does not give it. RunError: it cannot be read, or describes no pipeline.
    """
    from diffusers import DiffusionPipeline

    if not Path(source).exists():
        try:
            with quiet(source), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # diffusers names an option that the hub's client has no more
                found: Any = DiffusionPipeline.load_config(source, **reached(source))
        except Exception as error:
            raise _hub_error(source, error) from error
        return found
    path = index_of(source)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} describes no pipeline: it holds a {type(found).__name__}, expected names of components")
    for name, entry in found.items():
        if name == "transformer" and not (isinstance(entry, list) and [type(part) for part in entry] == [str, str]):
            raise RunError(f"{path}: {name} is {entry!r}, expected [library, class]")
    return found


def _checked_index(source: str) -> tuple[dict[str, Any], Family]:
    """The index, checked for a transformer that can be probed and a pipeline that is run here, and the family."""
    index = pipeline_index(source)
    kind = index.get("_class_name", "pipeline without a class")
    found = index["transformer"][1] if index.get("transformer") else ""
    refuse_class(found)
    if found not in BY_CLASS:
        found = found or ("unet" if index.get("unet") else "no transformer")
        raise UserError(f"{source} ({kind}, {found}) is not a known MM-DiT; known transformers: {', '.join(BY_CLASS)}")
    family = BY_CLASS[found]
    if kind not in family.pipelines:
        taken = " or ".join(family.pipelines) or "no pipeline"
        why = f": {family.not_loaded}" if family.not_loaded else ""
        raise UserError(
            f"{source} is a {kind}: load it with diffusers and give the pipeline to `probe`; commands and `load` take"
            f" {taken} of the {family.name} family{why}"
        )
    return index, family


def _transformer_parts(
    source: str, family: Family, dtype: torch.dtype, file: str | None, quantize: str | None
) -> dict[str, Any]:
    """What the pipeline's loader is told of a transformer whose weights are not simply its own."""
    from diffusers import PipelineQuantizationConfig

    kind, _, other = (quantize or "").partition(":")
    if not kind and file is None:
        return {}
    how = quantizer(kind, dtype) if kind else None
    if other or file:
        return {"transformer": transformer_of(other or str(file), source, family.transformer, dtype, how)}
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={"transformer": how})}


def _pipeline(
    source: str, index: dict[str, Any], family: Family, dtype: torch.dtype, t5: bool, parts: dict[str, Any]
) -> tuple[Any, int]:
    """The stock pipeline, and the length of its text streams without a fixed one (kept when their encoder is left
    out)."""
    from diffusers import DiffusionPipeline

    if not t5 and not _optional_encoder(family):
        raise UserError(f"{source} reads its prompt with one text encoder only; it cannot be left out")
    open_ended = [stream for stream in family.streams if stream.length != "tokenizer"]
    # A directory saved without an optional encoder loads only if it is passed as None again.
    left_out: dict[str, None] = {
        name: None
        for stream in family.streams
        for name in (*stream.encoders, *stream.tokenizers)
        if isinstance(index.get(name), list) and index[name][0] is None
    }
    if not t5:
        left_out |= dict.fromkeys(name for stream in open_ended for name in stream.encoders)
    try:
        with quiet(source) as notices:
            options = {**left_out, **parts, **reached(source)}
            pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    except Exception as error:
        if Path(source).exists():
            raise RunError(f"{source} cannot be loaded: {first_line(error)}") from error
        raise _hub_error(source, error) from error
    _check_complete(source, pipeline, family, notices)
    # Read before the tokenizer goes: without its encoder the stream keeps its length and holds zeros.
    length = default_length(pipeline, family)
    if not t5:
        pipeline.register_modules(**dict.fromkeys(name for stream in open_ended for name in stream.tokenizers))
    return pipeline, length


def check_references_of(name: str, count: int) -> None:
    """Whether the pipeline that `load(name)` gives takes so many pictures beside the prompt, before it is loaded.

    Raises:
        UserError: it does not, or what `load` refuses.
    """
    import diffusers

    source = source_of(name)[0]
    index, family = _checked_index(base_of(source) if Path(source).is_file() else source)
    # An old name of a class, as Lumina 2's pipelines were saved with, is known to diffusers' loader alone.
    with quiet():  # its module is imported here
        kind = next(name for name in (index["_class_name"], *family.pipelines) if hasattr(diffusers, name))
        pipeline = getattr(diffusers, kind)
    check_references(pipeline, family, count)


def can_leave_out_t5(name: str) -> bool:
    """Whether `load(name, t5=False)` has an encoder to leave out and another one to read with. Errors as `load`."""
    return _optional_encoder(_checked_index(source_of(name)[0])[1])


def _optional_encoder(family: Family) -> bool:
    return len({stream.length == "tokenizer" for stream in family.streams}) > 1


def _check_complete(source: str, pipeline: Any, family: Family, notices: list[str]) -> None:
    """Refuse files that lack a weight or a vocabulary: the libraries make up what is missing."""
    for notice in notices:
        if "newly initialized" in notice:
            missing = re.findall(r"'([\w.]+)'|^([\w.]+)\s*\|\s*MISSING", notice, re.MULTILINE)
            names = [first or second for first, second in missing] or [notice.splitlines()[0]]
            what = counted(len(names), "weight is", "weights are")
            raise RunError(f"{source} cannot be loaded: {what} missing in its files, e.g. {names[0]!r}; fetch it again")
    for stream in family.streams:
        for name, encoder in zip(stream.tokenizers, stream.encoders, strict=False):
            if getattr(pipeline, name, None) is None and getattr(pipeline, encoder, None) is not None:
                raise RunError(f"{source} cannot be loaded: it has {encoder} but no {name}")
        for name in stream.tokenizers:
            component = getattr(pipeline, name, None)
            tokenizer = getattr(component, "tokenizer", component)
            if tokenizer is None:
                continue
            files = {"tokenizer.json", *tokenizer.vocab_files_names.values()} - {"tokenizer_config.json"}
            folder = Path(source) / name
            if Path(source).exists() and tokenizer.vocab_files_names and not any((folder / f).is_file() for f in files):
                raise RunError(f"{source} cannot be loaded: {folder} has no vocabulary ({' or '.join(sorted(files))})")
            if stream.length == "tokenizer" and tokenizer.model_max_length > _ENDLESS:
                raise RunError(
                    f"{source} cannot be loaded: {folder / 'tokenizer_config.json'} sets no model_max_length"
                )


def _hub_error(source: str, error: Exception) -> UserError:
    text = f"{type(error).__name__} {error}".lower()
    if "gated" in text or "401" in text or "403" in text:
        return UserError(f"{source} is gated: accept its licence on its hub page, then log in with `hf auth login`")
    if "repositorynotfound" in text or "404" in text:
        return UserError(f"{source} is not on the hub and is no directory here; check the spelling or the access")
    return UserError(
        f"{source} is no directory here and the hub cannot be reached; download it first, or use an embedded model"
        f" ({', '.join(embedded_models()) or 'none installed'})"
    )


def pick_device(device: str | torch.device) -> torch.device:
    """The device of this name; "auto" is the first there is of cuda, mps, cpu.

    Raises:
        UserError: unknown, or not there.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    backends = {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count, "mps": torch.mps.device_count}
    check_device(str(device), lambda kind: backends.get(kind, lambda: 1)())
    return torch.device(device)


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of this name; "auto" is bfloat16 on cuda and float32 elsewhere.

    Raises:
        UserError: unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    check_known("dtype", dtype, DTYPES)
    return getattr(torch, dtype)  # type: ignore[no-any-return]
