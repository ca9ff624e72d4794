"""Load a model by name: an embedded one, a diffusers pipeline directory, or a hub id.

    model = load("scenes-sd3")                                          # ships with the package
    model = load("path/to/a/pipeline", device="cuda", t5=False)
    model = load("stabilityai/stable-diffusion-3-medium-diffusers")     # gated: accept its licence and log in first

Weights are read from safetensors only. A random-weight twin ("scenes-sd3-random") shares everything with its base but
the
transformer, which is built from the same configuration with seeded random weights: the control of every analysis.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmdit_probe import assets
from mmdit_probe.errors import RunError, UserError, unknown
from mmdit_probe.models.adapters import load_adapter
from mmdit_probe.models.families.registry import FAMILIES, Family
from mmdit_probe.models.mmdit import MMDiT, default_length

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    t5: bool = True,
    lora: str | os.PathLike[str] | None = None,
) -> MMDiT:
    """Load an MM-DiT in its stock pipeline.

    Args:
        name_or_path: an embedded model's name, a diffusers pipeline directory, or a hub id ("owner/name").
        device: "cpu", "cuda", "mps", ...; "auto" takes the first there is of cuda, mps, cpu.
        dtype: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on cuda and float32 elsewhere.
        t5: False leaves out the text streams of the large language encoder: their positions hold zeros, as many as
        before.
        lora: an adapter for the transformer: a folder as diffusers writes it, its file, or a hub id.

    Raises:
        UserError: no such model, not a pipeline directory, not an MM-DiT, gated, an unknown device or dtype, or an
            adapter that does not fit.
        RunError: the files are there and cannot be read.
    """
    name = os.fspath(name_or_path)
    where = pick_device(device)
    precision = pick_dtype(dtype, where)
    source, twin = _source(name)
    index = _pipeline_index(source)
    pipeline, length = _pipeline(source, index, precision, t5)
    if twin is not None:
        pipeline.register_modules(transformer=random_twin(pipeline.transformer, int(twin["seed"])))
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        load_adapter(pipeline, os.fspath(lora))
        name = f"{name}+{os.fspath(lora)}"
    return MMDiT(pipeline.to(where), name, length)


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
    return twin.to(transformer.dtype).eval()


def _family(transformer: str) -> Family:
    return next(family for family in FAMILIES.values() if family.transformer == transformer)


def embedded_models() -> list[str]:
    """Names of the embedded models that `load` takes: pipeline directories and random-weight twins."""
    found = [(name, assets.path(name)) for name in assets.names()]
    return [name for name, path in found if path.suffix == ".json" or (path / "model_index.json").is_file()]


def _source(name: str) -> tuple[str, dict[str, Any] | None]:
    """The directory or hub id to read, and the description of the random-weight twin if it is one."""
    if name in embedded_models():
        path = assets.path(name)
        if path.suffix != ".json":
            return str(path), None
        twin = json.loads(path.read_text())
        return str(assets.path(twin["base"])), twin
    if Path(name).exists():
        return name, None
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name, None
    raise unknown("model (no embedded model, directory or hub id of this name)", name, embedded_models())


def _pipeline_index(source: str) -> dict[str, Any]:
    """`model_index.json` of a directory or hub id, checked for a transformer that can be probed."""
    from diffusers import DiffusionPipeline

    if Path(source).exists():
        path = Path(source) / "model_index.json"
        if not path.is_file():
            raise UserError(f"{source} is not a diffusers pipeline directory: it has no model_index.json")
        try:
            index = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path} cannot be read: {error}") from error
    else:
        try:
            index = DiffusionPipeline.load_config(source)
        except Exception as error:
            raise _hub_error(source, error) from error
    component = index.get("transformer")
    known = [family.transformer for family in FAMILIES.values()]
    if not component or component[1] not in known:
        found = component[1] if component else "unet" if index.get("unet") else "no transformer"
        raise UserError(
            f"{source} ({index.get('_class_name', 'unknown pipeline')}, {found}) is not a known MM-DiT; "
            f"known transformers: {', '.join(known)}"
        )
    family = _family(component[1])
    if index.get("_class_name") not in family.pipelines:
        taken = " or ".join(family.pipelines)
        raise UserError(
            f"{source} is a {index.get('_class_name', 'pipeline without a class')}: load it with diffusers and give the"
            " pipeline to `probe`; commands and `load` take "
            + (f"{taken} of the {family.name} family" if taken else f"no pipeline of the {family.name} family")
        )
    return index


def _pipeline(source: str, index: dict[str, Any], dtype: torch.dtype, t5: bool) -> tuple[Any, int]:
    """The stock pipeline, and the length of its text streams without a fixed one (kept when their encoder is left
    out)."""
    from diffusers import DiffusionPipeline

    family = _family(index["transformer"][1])
    if not t5 and len({stream.length == "tokenizer" for stream in family.streams}) < 2:
        raise UserError(f"{source} reads its prompt with one text encoder only; it cannot be left out")
    # A directory saved without an optional encoder loads only if it is passed as None again.
    left_out: dict[str, None] = {
        name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None
    }
    left_out = {name: None for name in left_out if name in _stream_components(family)}
    if not t5:
        left_out |= dict.fromkeys(
            name for stream in family.streams if stream.length != "tokenizer" for name in stream.encoders
        )
    try:
        with _quiet(Path(source).exists()):
            pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **left_out)
    except Exception as error:
        if Path(source).exists():
            raise RunError(f"{source} cannot be loaded: {_first_line(error)}") from error
        raise _hub_error(source, error) from error
    # Read before the tokenizer goes: without its encoder the stream keeps its length and holds zeros.
    length = default_length(pipeline, family)
    if not t5:
        pipeline.register_modules(
            **dict.fromkeys(name for s in family.streams if s.length != "tokenizer" for name in s.tokenizers)
        )
    return pipeline, length


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """No progress bars for files that are here already: they end before they can be read."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loud = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    try:
        for module in loud if local else ():
            module.disable_progress_bar()
        yield
    finally:
        for module in loud:
            module.enable_progress_bar()


def _stream_components(family: Family) -> set[str]:
    return {name for stream in family.streams for name in (*stream.encoders, *stream.tokenizers)}


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def pick_device(device: str | torch.device) -> torch.device:
    """The device of this name; "auto" is the first there is of cuda, mps, cpu.

    Raises:
        UserError: unknown, or not there.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise unknown("device", device, ["auto", "cpu", "cuda", "mps"]) from None
    if (found.type == "cuda" and not torch.cuda.is_available()) or (
        found.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise UserError(f"device {found.type!r} is not available here; use --device auto or cpu")
    return found


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of this name; "auto" is bfloat16 on cuda and float32 elsewhere.

    Raises:
        UserError: unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, ["auto", *_DTYPES])
    return _DTYPES[dtype]
