"""Whole models under each attention kernel: masses, maps and norms against float64, the output bitwise the stock one.

Runs in small on the processor, too. Single calls are those of `attention.kernels`, ways of running those of
`situations`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from mmdit_probe import AttentionMass, TextMaps, ValueNorm, probe
from mmdit_probe.attention import reference
from mmdit_probe.attention.kernels import BACKENDS, KERNELS
from mmdit_probe.quiet import quiet
from tests.devices import DEVICES
from tests.families import FIXTURES
from tests.observe.situations import WrittenDown

GRID, TEXT = (8, 6), 9
IMAGE = GRID[0] * GRID[1]
LIMITS = {"float32": (2e-6, 5e-6, 1e-6), "bfloat16": (6e-5, 2e-4, 1e-6), "float16": (6e-5, 2e-4, 1e-6)}
"""Largest errors of a mean mass, of a single probability, and of a norm relative to itself."""


def output_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs, return_dict=False)[0]
    return found


def subject(family: str, dtype: str, device: str) -> tuple[Any, dict[str, Any]]:
    """A tiny model of one precision, and inputs whose text follows no tile."""
    kind = getattr(torch, dtype)
    with quiet():  # diffusers warns of casts
        model = FIXTURES[family].build().to(device, kind)
    inputs = FIXTURES[family].inputs(batch=2, grid=GRID, lengths=(TEXT, TEXT))
    keep = ("timestep", "img_ids", "txt_ids")
    return model, {
        name: value.to(device, kind if value.is_floating_point() and name not in keep else value.dtype)
        if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image"])
def test_masses_maps_and_norms_under_each_kernel(family: str, dtype: str, kernel: str, device: str) -> None:
    if kernel not in KERNELS[device]:
        pytest.skip(f"{device} has no kernel {kernel}")
    model, inputs = subject(family, dtype, device)
    with sdpa_kernel(BACKENDS[kernel]):
        written = WrittenDown(model)
        try:
            with written:
                stock = output_of(model, inputs)
        except RuntimeError as error:
            pytest.skip(f"torch does not take {kernel} for {dtype}: {error}")
        with probe(model, AttentionMass(), ValueNorm(), TextMaps()) as run:
            assert torch.equal(output_of(model, inputs), stock)
        assert torch.equal(output_of(model, inputs), stock)
    masses, norms, maps = run[AttentionMass].table(), run[ValueNorm].table(), run[TextMaps]
    mass_limit, map_limit, norm_limit = LIMITS[dtype]
    for number, layer in enumerate(run.layers):
        (call,) = written.calls[0][layer.path]
        dense = reference.probabilities(call["query"], call["key"], call.get("attn_mask")).cpu()
        start = 0 if family == "sd3" else TEXT  # the text comes first in Flux and Qwen-Image
        image = list(range(start, start + IMAGE))
        text = [position for position in range(IMAGE + TEXT) if position not in image]
        block = dense[:, :, image][..., text]  # [B, H, I, T]
        rows = masses[(masses.layer == number) & (masses["query"] == "image") & (masses.key == "text")]
        found = rows.groupby("head").mass.sum()
        wanted = block.sum(-1).mean(2).sum(0)  # both samples have rows of equal labels
        assert torch.allclose(torch.tensor(found.to_numpy()).double(), wanted, atol=2 * mass_limit, rtol=0)
        shown = maps.maps(number, branch=None).double().cpu().reshape(2, IMAGE, TEXT)
        assert (shown - block.mean(1)).abs().max() < map_limit
        value = call["value"].double().cpu().transpose(1, 2).flatten(2)[:, image].norm(dim=-1).mean(1)  # [B]
        whole = norms[(norms.layer == number) & (norms["head"] == -1) & (norms.token == "image")].norm
        assert torch.allclose(torch.tensor(whole.to_numpy()).double().sort()[0], value.sort()[0], rtol=norm_limit)
