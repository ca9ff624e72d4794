"""LoRA adapters on a pipeline: loaded by the stock loader, checked, with what the package wrote beside the weights.

    model = load("scenes-sd3", lora="runs/train-magnet/.../lora")
    read_metadata("runs/train-magnet/.../lora")["mmdit_probe"]

The format is diffusers' own. Files in the names of other programs (kohya's scripts, ComfyUI) load where diffusers
converts them: Flux, Qwen-Image and others, not SD3. `pipeline.unload_lora_weights()` takes an adapter off; `merge`
makes it part of the weights first.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mmdit_probe.errors import MISSHAPEN, ProbeWarning, RunError, UserError, first_line
from mmdit_probe.models.names import ADAPTER_FILE, QUANTIZERS, adapter_file, check_adapter
from mmdit_probe.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor

KEY = "mmdit_probe"
"""Entry of the safetensors header that holds our metadata as JSON."""
_HALVES = {"_A.weight": "_B.weight", ".down.weight": ".up.weight"}
"""Down and up projections by what follows ".lora" in their names."""
_ADVICE = (
    "export it in diffusers' format, or rename its tensors to transformer.MODULE.lora_A.weight and lora_B.weight, to_q,"
    " to_k and to_v apart, alpha / rank in lora_B"
)


def load_adapter(pipeline: Any, source: str, name: str | None = None) -> None:
    """Load a LoRA into a pipeline's transformer.

    Args:
        pipeline: a diffusers pipeline.
        source: a folder with `pytorch_lora_weights.safetensors`, such a file, or a hub id.
        name: adapter name; diffusers counts up if None.

    Raises:
        UserError: no adapter there, or it matches nothing in this transformer, or only a part of it, lacks tensors or
            has some that are not finite, or diffusers does not read its names, or loads none into this pipeline.
    """
    check_adapter(source)
    path = Path(source)
    if path.exists():
        _tell_base(source, _header(adapter_file(path))[1])
    transformer = pipeline.transformer
    before = set(getattr(transformer, "peft_config", {}))
    options: dict[str, Any] = {"use_safetensors": True} | ({"weight_name": path.name} if path.is_file() else {})
    folder = str(path.parent) if path.is_file() else source
    try:
        # The loader warns of every encoder that the adapter does not touch; what matters is checked here and below.
        with quiet(path):
            tensors = _converted(source, pipeline, folder, options)
            _check_fit(source, pipeline, list(tensors))
            _check_whole(source, tensors)
            pipeline.load_lora_weights(folder, adapter_name=name, **options)
    except UserError:
        raise
    except Exception as error:
        advice = f"; {_ADVICE}" if isinstance(error, ValueError | LookupError) and path.exists() else ""
        raise RunError(f"LoRA {source!r} cannot be loaded: {first_line(error)}{advice}") from error
    if set(getattr(transformer, "peft_config", {})) == before:
        raise UserError(
            f"LoRA {source!r} has no weights for this transformer; nothing was loaded. Where another program named its"
            f" tensors: {_ADVICE}"
        )


def _tell_base(source: str, header: Mapping[str, str]) -> None:
    """Warn of an adapter that was trained on top of another one: it holds no changes but its own."""
    base = ""
    with suppress(*MISSHAPEN):
        base = str(json.loads(header.get(KEY, "{}")).get("base", ""))
    first = next((part for part in base.split("+")[1:] if part.partition(":")[0] not in QUANTIZERS), None)
    if first is not None:
        text = f"LoRA {source!r} was trained on a model with the changes of {first!r} and holds its own alone"
        warnings.warn(f"{text}: the model has to have those, too", ProbeWarning, stacklevel=3)


def _converted(source: str, pipeline: Any, folder: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """An adapter's tensors by the names that diffusers has for them."""
    kind = type(pipeline).__name__
    if "transformer" not in getattr(pipeline, "_lora_loadable_modules", ()):
        raise UserError(
            f"diffusers loads no LoRA into a {kind}: add the changes of {source!r} to the transformer's weights, and"
            " load the folder that they are saved to"
        )
    try:
        return dict(pipeline.lora_state_dict(folder, **options))
    except Exception as error:
        if not Path(folder).exists():
            raise
        raise UserError(
            f"LoRA {source!r} has names that diffusers does not convert for a {kind} ({first_line(error)}): {_ADVICE}"
        ) from error


def _check_fit(source: str, pipeline: Any, names: list[str]) -> None:
    """Refuse an adapter of which a tensor, by its name in diffusers, belongs to no module of the pipeline."""
    foreign = [name for name in names if name.partition(".")[0] not in pipeline.components]
    if foreign:
        raise UserError(
            f"LoRA {source!r} names its tensors as another program does (e.g. {foreign[0]!r}), and diffusers does not"
            f" convert that for {type(pipeline).__name__}: {_ADVICE}"
        )
    wanted = _modules(names)
    own = {module for module, _ in pipeline.transformer.named_modules()}
    if not wanted <= own:
        missing = sorted(wanted - own)
        raise UserError(
            f"LoRA {source!r} does not fit this model: {len(missing)} of its {len(wanted)} modules are not there, e.g."
            f" {missing[0]!r}; it is another model's, or named in a way that diffusers does not convert: {_ADVICE}"
        )


def _check_whole(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter of which a module lacks a projection's counterpart, or what others have (a bias, DoRA's
    magnitude: diffusers makes it in all modules and leaves it empty), or with a number that is not finite."""
    found: dict[str, set[str]] = {}
    every: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"LoRA {source!r}: {name!r} is not finite (float16 overflow?)")
        module, mark, part = name.partition(".lora")
        if mark:
            found.setdefault(module, set()).add(part)
            every.setdefault(module.partition(".")[0], set()).add(part)
    for module, parts in found.items():
        wanted = every[module.partition(".")[0]]
        wanted |= {half for pair in _HALVES.items() if wanted & {*pair} for half in pair}
        for part in sorted(wanted - parts):
            raise UserError(
                f"LoRA {source!r} has '{module}.lora{min(parts)}' and lacks '{module}.lora{part}': it is cut off, or"
                " its modules differ in what they have, which diffusers does not load"
            )


def merge(pipeline: Any) -> None:
    """Make the loaded adapters part of the transformer's weights; nothing of peft is left in it."""
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()


def read_metadata(source: str | Path) -> dict[str, Any]:
    """Header of an adapter file: `lora` (rank, alpha, targets as peft names them) and `mmdit_probe` (ours), {} if none.

    Raises:
        UserError: no adapter there, or what stands in the header is no JSON.
    """
    file = adapter_file(Path(source))
    if not file.is_file():
        raise UserError(f"{str(source)!r} holds no {ADAPTER_FILE}; expected a LoRA folder as diffusers writes it")
    _, header = _header(file)
    try:
        return {name: json.loads(header.get(at, "{}")) for name, at in (("lora", "lora_adapter_metadata"), (KEY, KEY))}
    except MISSHAPEN as error:
        raise UserError(f"the header of {str(file)!r} is damaged: {first_line(error)}") from error


def _modules(keys: list[str]) -> set[str]:
    """Transformer modules that the tensors of an adapter belong to."""
    marks = (".lora_A.", ".lora_B.", ".lora.", ".lora_magnitude")
    inside = [key.removeprefix("transformer.") for key in keys if key.startswith("transformer.")]
    return {key.split(mark)[0] for key in inside for mark in marks if mark in key}


def _header(file: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors in a file, and what stands beside them."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys()), opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{str(file)!r} is no safetensors file ({error}); a LoRA is read from safetensors only: convert it"
        ) from error
