"""Names of models, adapters, devices and precisions, checked before torch is imported.

    source_of("scenes-sd3")         # the folder, or the hub id, that a name means
    check_device("gpu")             # UserError: unknown device 'gpu'

Not here: whether a hub id exists (`models.load`).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmdit_probe import assets
from mmdit_probe.errors import MISSHAPEN, UserError, check_known, unknown

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")

OFFLOADS = ("model", "sequential", "group")
"""Whole models, single weights, or single layers with the next one on its way while one computes."""

QUANTIZERS = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes", "gguf": "gguf"}
"""Kind -> the package that does it, an extra of that name."""

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""File name of an adapter in its folder; diffusers' default."""


def embedded_models() -> list[str]:
    """Names of the embedded models that `load` takes: pipeline directories and random-weight twins."""
    found = [(name, assets.path(name)) for name in assets.names()]
    return [name for name, path in found if path.suffix == ".json" or (path / "model_index.json").is_file()]


def source_of(name: str) -> tuple[str, dict[str, Any] | None]:
    """The directory or hub id to read, and the description of the random-weight twin if it is one.

    Raises:
        UserError: no embedded model, directory or hub id has this name.
    """
    if name in embedded_models():
        path = assets.path(name)
        if path.suffix != ".json":
            return str(path), None
        twin = json.loads(path.read_text(encoding="utf-8"))
        return str(assets.path(twin["base"])), twin
    if Path(name).exists():
        if Path(name).is_dir():
            index_of(name)
        return name, None
    if _may_be_on_hub(name):
        return name, None
    raise unknown("model (no embedded model, directory or hub id OWNER/NAME)", name, embedded_models())


def index_of(folder: str) -> Path:
    """The `model_index.json` of a pipeline's folder.

    Raises:
        UserError: it has none.
    """
    path = Path(folder) / "model_index.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline directory: it has no model_index.json")
    return path


LAYER_COUNTS = ("num_layers", "num_single_layers", "num_mmdit_layers", "num_single_dit_layers", "n_layers", "depth")
HEAD_COUNTS = ("num_attention_heads", "n_heads", "num_heads")
"""What configurations of transformers call them; the kinds of layers add up."""


def counts_of(name: str) -> tuple[int, int] | None:
    """Joint-attention layers and heads of a model whose configuration lies on this machine, read without its weights.

    Returns: None for a hub id, a single file, or a configuration that does not tell; else no fewer than there are.
    """
    folder, _ = source_of(name)
    try:
        config = json.loads((Path(folder) / "transformer" / "config.json").read_text(encoding="utf-8"))
        layers = sum(int(config.get(key) or 0) for key in LAYER_COUNTS)
        heads = next((int(config[key]) for key in HEAD_COUNTS if config.get(key)), 0)
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # whatever is wrong with it, loading says it better
    return (layers, heads) if layers and heads else None


def model_name(text: str) -> str:
    """What a script's `--model` is read by. Errors as `source_of`."""
    source_of(text)
    return text


def device_name(text: str) -> str:
    """What a script's `--device` is read by. Errors as `check_device`."""
    check_device(text)
    return text


def streams_of(name: str) -> tuple[str, ...] | None:
    """The text encoder streams of a model whose index lies on this machine; None where it does not tell."""
    from mmdit_probe.models.families.registry import FAMILIES

    try:
        index = json.loads((Path(source_of(name)[0]) / "model_index.json").read_text(encoding="utf-8"))
        found = index["transformer"][1]
    except (OSError, *MISSHAPEN):
        return None
    names = [[stream.name for stream in family.streams] for family in FAMILIES.values() if family.transformer == found]
    return tuple(names[0]) if names else None


def size_limits(name: str) -> tuple[int, int | None] | None:
    """What sides of pictures are multiples of, in pixels, and the most tokens a side (None: any number), for an SD3
    whose configuration lies on this machine."""
    folder = Path(source_of(name)[0])
    try:
        network, vae = (
            json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in ("transformer", "vae")
        )
        is_sd3 = network["_class_name"] == "SD3Transformer2DModel" and vae["_class_name"] == "AutoencoderKL"
        if not is_sd3:
            return None
        most = network.get("pos_embed_max_size")
        return int(network["patch_size"]) << len(vae["block_out_channels"]) - 1, None if most is None else int(most)
    except (OSError, *MISSHAPEN):
        return None


def check_device(name: str, count: Callable[[str], int | None] | None = None) -> None:
    """A device has this name, one of `DEVICES`, perhaps with a number, and is there.

    Args:
        count: how many devices of a kind there are, None if it cannot tell; by default what is known without torch.

    Raises:
        UserError: unknown, or not there.
    """
    found = re.fullmatch(rf"(auto)|({'|'.join(DEVICES[1:])})(?::(\d+))?", name)
    if found is None:
        if name.lower().startswith("gpu"):
            raise UserError(f"unknown device {name!r}: a GPU of NVIDIA or AMD is cuda, of Apple mps, of Intel xpu")
        raise unknown("device", name, DEVICES)
    there = 1 if found[1] else (count or devices)(found[2])
    if there is not None and int(found[3] or 0) >= there:
        many = f"there is no {found[2]} device" if there == 0 else f"the last one is {found[2]}:{there - 1}"
        raise UserError(f"device {name!r} is not available here: {many} for this torch; use device auto or cpu")


def devices(kind: str) -> int | None:
    """How many devices of a kind this machine has for the torch that is installed, which is not imported for it.

    Returns: None where torch alone can tell (ROCm, XPU).
    """
    if kind == "mps":
        return int(sys.platform == "darwin" and platform.machine() == "arm64")
    if kind == "cpu":
        return 1
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    built = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
    if kind == "cuda" and built.get("hip") is None:
        return _cuda_devices() if built.get("cuda") else 0
    return None if built.get("hip" if kind == "cuda" else "xpu") else 0


def _cuda_devices() -> int:
    """Devices that NVIDIA's driver shows this process."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):  # no driver
        return 0
    return 0 if failed else count.value


def check_memory_options(offload: str | None, quantize: str | None) -> None:
    """Ways of keeping and storing weights have these names, and their packages are there.

    Raises:
        UserError: unknown, a package that is not installed, or "gguf" without a file.
    """
    if offload is not None:
        check_known("offload", offload, OFFLOADS)
    if quantize is None:
        return
    kind, _, file = quantize.partition(":")
    if kind not in QUANTIZERS:
        raise unknown("quantization", quantize, [*list(QUANTIZERS)[:3], "gguf:FILE"])
    if (kind == "gguf") != bool(file):
        raise UserError(f"quantization {quantize!r}: expected gguf:FILE, or {', '.join(list(QUANTIZERS)[:3])} alone")
    package = QUANTIZERS[kind]
    if find_spec(package) is None:
        raise UserError(f"quantization {kind!r} needs {package}: pip install 'mmdit-probe[{package}]'")


def check_adapter(source: str) -> None:
    """An adapter's folder, file or hub id may be one.

    Raises:
        UserError: there is no such file or folder, or no adapter in the folder.
    """
    path = Path(source)
    if path.exists() and not adapter_file(path).is_file():
        raise UserError(f"{source!r} holds no {ADAPTER_FILE}; expected a LoRA folder as diffusers writes it")
    if not path.exists() and not _may_be_on_hub(source):
        raise UserError(f"no LoRA {source!r}: expected a folder with {ADAPTER_FILE}, such a file, or a hub id")


def check_checkpoint(option: str, name: str | None, *known: str) -> None:
    """A checkpoint of transformers may be one of those that are known by name, a folder, or a hub id; None: none.

    Raises:
        UserError: there is no such folder, or it has no config.json.
    """
    if name is None or name in known or (Path(name) / "config.json").is_file():
        return
    if Path(name).exists():
        raise UserError(f"{option} {name!r} holds no config.json; expected a folder as transformers writes it")
    if not _may_be_on_hub(name):
        raise unknown(f"{option} (no folder or hub id OWNER/NAME)", name, known)


def _may_be_on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def adapter_file(path: Path) -> Path:
    """The weights in an adapter's folder, or the file itself."""
    return path / ADAPTER_FILE if path.is_dir() else path


def other_parts(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The networks beside the transformer whose weights are others in two descriptions of a model (`parts`), of those
    that both of them have: "other weights of vae"; "" where none are."""
    was, now = (of.get("parts") or {} for of in (first, second))
    changed = [name for name in now if was.get(name, now[name]) != now[name]]
    return f"other weights of {', '.join(changed)}" if changed else ""


def contents_of(*names: str | None) -> dict[str, str]:
    """Name -> SHA-256 of what an adapter, or a checkpoint with what its processors read, holds; of those on this
    machine: a path does not tell what is under it, and a hub id is of one repository."""
    found: dict[str, str] = {}
    for name in filter(None, names):
        place = assets.path(name) if name in assets.names() else Path(name)
        of_folder = sorted(one for kind in ("safetensors", "json", "txt") for one in place.glob(f"*.{kind}"))
        if files := [adapter_file(place)] if adapter_file(place).is_file() else of_folder:
            found[name] = _digest(files)
    return found


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as data:
            hashlib.file_digest(data, lambda: digest)
    return digest.hexdigest()
