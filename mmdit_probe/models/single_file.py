"""Checkpoints in a single file, in the names of their authors, as diffusers converts them.

    base = base_of("sd3_medium.safetensors")                 # "stabilityai/stable-diffusion-3-medium-diffusers"
    transformer = transformer_of("sd3_medium.safetensors", base, SD3Transformer2DModel, torch.float32)

A file holds weights only: the configuration, the scheduler, the text encoders and the autoencoder are those of the
pipeline that the file belongs to, which diffusers knows by the shapes and names in it. Not here: loading the rest of
the pipeline (`models.load`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmdit_probe.errors import RunError, UserError, counted, first_line

_ADVICE = "convert it to a pipeline folder (diffusers' scripts/convert_*_to_diffusers.py) and load that"
_SCALES = (
    "scaled_fp8",
    "scale_weight",
    "weight_scale",
    "scale_input",
    "input_scale",
    "comfy_quant",
    "absmax",
    "quant_map",
)
"""Last names of tensors that stored numbers are to be multiplied by, as ComfyUI and bitsandbytes write them."""
_NO_MODEL = "v1"
"""What diffusers takes a file for that it does not know."""


def base_of(file: str) -> str:
    """Hub id of the pipeline that a file of weights belongs to.

    Raises:
        UserError: not a safetensors file, or none that diffusers knows, or one of weights with scales, which diffusers
            would leave out.
    """
    from diffusers.loaders import single_file_utils

    shapes, kind = _shapes(file), _NO_MODEL
    with suppress(KeyError, UnboundLocalError, IndexError):  # a known name with a shape of no known model
        kind = single_file_utils.infer_diffusers_model_type(shapes)
    if kind == _NO_MODEL:
        raise UserError(f"{file} is no checkpoint of a transformer that diffusers can tell by its weights; {_ADVICE}")
    return str(single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def transformer_of(file: str, base: str, kind: str, dtype: torch.dtype, quantization: Any = None) -> Any:
    """The transformer of a safetensors or GGUF file.

    Args:
        base: directory or hub id of the pipeline whose configuration it has. kind: its class in diffusers.
        quantization: of GGUF; None for plain weights.

    Raises:
        UserError: no such file, or diffusers cannot read this class from one. RunError: it does not fit.
    """
    import diffusers

    if not Path(file).is_file():
        raise UserError(f"no file {file!r} with the weights of a {kind}")
    made = getattr(diffusers, kind)
    if not hasattr(made, "from_single_file"):
        raise UserError(f"diffusers reads no {kind} from a single file such as {file}; {_ADVICE}")
    try:
        transformer = made.from_single_file(
            file, config=base, subfolder="transformer", dtype=dtype, quantization_config=quantization
        )
    except Exception as error:
        raise RunError(f"{file} cannot be loaded as the {kind} of {base}: {first_line(error)}; {_ADVICE}") from error
    missing = [name for name, tensor in transformer.state_dict().items() if tensor.is_meta]
    if missing:
        raise RunError(f"{file} cannot be loaded: it lacks {counted(len(missing), 'weight')}, e.g. {missing[0]!r}")
    return transformer


def _shapes(file: str) -> dict[str, torch.Tensor]:
    """Every tensor of a file without its values."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
            _check_stored(file, slices)
            return {name: torch.empty(one.get_shape(), device="meta") for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is no safetensors file ({error}); weights are read from safetensors, or as quantize='gguf:FILE'"
        ) from error


def _check_stored(file: str, slices: dict[str, Any]) -> None:
    """Raises a UserError of weights that are numbers times scales: diffusers takes the numbers for the weights."""
    scaled = [name for name in slices if name.rpartition(".")[2] in _SCALES]
    packed = [name for name, one in slices.items() if name.endswith("weight") and one.get_dtype() in ("I8", "U8")]
    for name in (*scaled, *packed)[:1]:
        raise UserError(
            f"{file} stores its weights with scales of their own (e.g. {name!r}), which diffusers would leave out: take"
            " the file in bfloat16 (with quantize='fp8' it is as small), or a GGUF one (quantize='gguf:FILE')"
        )
