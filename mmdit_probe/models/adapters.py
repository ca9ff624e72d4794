"""LoRA adapters on a pipeline: loaded by the stock loader, checked, with what the package wrote beside the weights.

    model = load("scenes-sd3", lora="runs/train-magnet/.../lora")
    read_metadata("runs/train-magnet/.../lora")["mmdit_probe"]

The format is diffusers' own. `pipeline.unload_lora_weights()` takes an adapter off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmdit_probe.errors import RunError, UserError, first_line
from mmdit_probe.models.quiet import quiet

FILE = "pytorch_lora_weights.safetensors"
"""File name of an adapter in its folder; diffusers' default."""
KEY = "mmdit_probe"
"""Entry of the safetensors header that holds our metadata as JSON."""


def load_adapter(pipeline: Any, source: str, name: str | None = None) -> None:
    """Load a LoRA into a pipeline's transformer.

    Args:
        pipeline: a diffusers pipeline.
        source: a folder with `pytorch_lora_weights.safetensors`, such a file, or a hub id.
        name: adapter name; diffusers counts up if None.

    Raises:
        UserError: no adapter there, or it matches nothing in this transformer, or only a part of it.
    """
    path = Path(source)
    if path.exists() and not _file(path).is_file():
        raise UserError(f"{source!r} holds no {FILE}; expected a LoRA folder as diffusers writes it")
    if not path.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"no LoRA {source!r}: expected a folder with {FILE}, such a file, or a hub id")
    wanted = _modules(path) if path.exists() else None
    transformer = pipeline.transformer
    before = set(getattr(transformer, "peft_config", {}))
    own = {module for module, _ in transformer.named_modules()}
    if wanted is not None and not wanted <= own:
        missing = sorted(wanted - own)
        raise UserError(
            f"LoRA {source!r} does not fit this model: {len(missing)} of its {len(wanted)} modules are not there, e.g."
            f" {missing[0]!r}"
        )
    options = {"weight_name": path.name} if path.is_file() else {}
    folder = str(path.parent) if path.is_file() else source
    try:
        # The loader warns of every encoder that the adapter does not touch; what matters is checked above and below.
        with quiet(bars=wanted is None):
            pipeline.load_lora_weights(folder, adapter_name=name, use_safetensors=True, **options)
    except Exception as error:
        raise RunError(f"LoRA {source!r} cannot be loaded: {first_line(error)}") from error
    if set(getattr(transformer, "peft_config", {})) == before:
        raise UserError(f"LoRA {source!r} has no weights for this transformer; nothing was loaded")


def merge(pipeline: Any) -> None:
    """Make the loaded adapters part of the transformer's weights; nothing of peft is left in it."""
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()


def read_metadata(source: str | Path) -> dict[str, Any]:
    """Header of an adapter file: `lora` (rank, alpha, targets as peft names them) and `mmdit_probe` (ours), {} if none.

    Raises:
        UserError: no adapter there.
    """
    file = _file(Path(source))
    if not file.is_file():
        raise UserError(f"{str(source)!r} holds no {FILE}; expected a LoRA folder as diffusers writes it")
    _, header = _header(file)
    return {"lora": json.loads(header.get("lora_adapter_metadata", "{}")), KEY: json.loads(header.get(KEY, "{}"))}


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _modules(path: Path) -> set[str]:
    """Transformer modules that an adapter file has weights for."""
    keys, _ = _header(_file(path))
    marks = (".lora_A.", ".lora_B.", ".lora.", ".lora_magnitude")
    inside = [key.removeprefix("transformer.") for key in keys if key.startswith("transformer.")]
    return {key.split(mark)[0] for key in inside for mark in marks if mark in key}


def _header(file: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors in a file, and what stands beside them.

    Raises:
        UserError: not a safetensors file.
    """
    try:
        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys()), opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{str(file)!r} is no safetensors file ({error}); a LoRA is read from safetensors only: convert it"
        ) from error
