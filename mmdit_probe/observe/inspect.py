"""What can be said of a model on disk: its joint-attention layers, the order of tokens in them, and the kernel.

    found = inspect_model("path/to/a/pipeline")
    found["layers"][0]                # {"index": 0, "path": "transformer_blocks.0.attn", "order": [["text", 512], ...]}

A pipeline directory is loaded and stopped at its first transformer call; that call's arguments are laid out
mechanically (`models.discover_layout`) and run once under a probe. It measures nothing. A family's entry, if any, is
compared.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdit_probe.attention import exact
from mmdit_probe.errors import RunError, UserError, first_line, unknown
from mmdit_probe.models.discover_layout import joint_sites, taint
from mmdit_probe.models.families.registry import find_family
from mmdit_probe.models.layout import unwrap
from mmdit_probe.models.load import pipeline_index
from mmdit_probe.models.names import embedded_models, source_of
from mmdit_probe.models.pipeline_call import first_call
from mmdit_probe.observe.observer import LayerCall, Observer
from mmdit_probe.observe.probe import probe
from mmdit_probe.quiet import quiet

PROMPT = "a red ring on grass"


class Kernels(Observer):
    """Observer of the kernel that each layer's attention call takes."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}

    def observe(self, seen: LayerCall) -> None:
        self.names[seen.layer.index] = exact.kernel(seen.call)


def inspect_model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Layout, layers, token order and kernel of a model.

    Args:
        path: an embedded model's name, or a diffusers pipeline directory.

    Returns: transformer (class), family (None without an entry), layers (index, path, order of the first sample's keys,
    kernel), other attention (path, order) and whether a family's entry agrees.

    Raises:
        UserError: no such directory, not a pipeline, or not an MM-DiT. RunError: it cannot be loaded or run.
    """
    known = embedded_models()
    source = Path(source_of(os.fspath(path))[0] if os.fspath(path) in known else path)
    if not source.is_dir():
        raise unknown("model (no embedded model or directory of this name)", os.fspath(path), known)
    pipeline = _pipeline(source)
    transformer = unwrap(pipeline.transformer)
    find_family(transformer)  # refuses what is known to be no MM-DiT, before it is run
    return inspect_call(transformer, first_call(pipeline, PROMPT))


def inspect_call(transformer: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same of a transformer and the arguments of one call of it. See `inspect_model`."""
    sites = taint(transformer, inputs)
    joint = joint_sites(transformer, sites)
    with torch.no_grad(), probe(transformer, Kernels()) as run:
        transformer(**inputs)
    family = find_family(transformer)
    kernels = run[Kernels].names
    return {
        "transformer": type(transformer).__name__,
        "family": None if family is None else family.name,
        "layers": [
            {"index": n, "path": place, "order": site.order(), "kernel": kernels.get(n, "unseen")}
            for n, (place, site) in enumerate(joint.items())
        ],
        "other attention": [
            {"path": place, "order": site.order()} for place, site in sites.items() if place not in joint
        ],
        "entry agrees": None if family is None else [layer.path for layer in run.all_layers] == list(joint),
    }


def _pipeline(source: Path) -> Any:
    from diffusers import DiffusionPipeline

    if not pipeline_index(str(source)).get("transformer"):
        raise UserError(f"{source} has no transformer: it is no MM-DiT")
    try:
        with quiet(source):
            pipeline = DiffusionPipeline.from_pretrained(source, use_safetensors=True)
    except Exception as error:
        raise RunError(f"{source} cannot be loaded: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
