"""Models larger than their GPU: offloaded ones give the same pictures and masses, quantised ones say what they are."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe import AttentionMass, probe
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.experiments.experiment import described
from mmdit_probe.models import names
from mmdit_probe.models.load import load
from mmdit_probe.models.mmdit import MMDiT
from tests.devices import DEVICES, GPU


def sampled(model: MMDiT) -> tuple[np.ndarray, pd.DataFrame]:
    with probe(model, AttentionMass()) as run:
        picture = model.generate("a red ring", seed=0, steps=2)[0]
    return np.asarray(picture), run[AttentionMass].table()


@pytest.mark.parametrize(
    ("offload", "device"),
    [*((way, "cpu") for way in ("model", "group")),
     *(pytest.param(way, "cuda", marks=GPU) for way in names.OFFLOADS)],
)  # fmt: skip
def test_offloading_changes_nothing_but_where_weights_wait(tiny_directory: Path, offload: str, device: str) -> None:
    stock, plain = sampled(load(tiny_directory, device=device))
    model = load(tiny_directory, device=device, offload=offload)
    picture, masses = sampled(model)
    assert np.array_equal(picture, stock) and masses.equals(plain)
    assert model.device.type == device and model.weight_hash == load(tiny_directory, device="cpu").weight_hash
    latents = model.encode_image(picture)
    assert latents.device.type == device and torch.isfinite(model.denoise(latents, 0.5, model.encode_prompt("a"))).all()
    assert described(model)["model"]["offload"] == offload


def test_sequential_offloading_needs_something_to_move_weights_to(tiny_directory: Path) -> None:
    with pytest.raises(UserError, match="'sequential' moves weights to an accelerator; the device is cpu"):
        load(tiny_directory, device="cpu", offload="sequential")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "groups"}, "unknown offload 'groups': did you mean 'group'"),
        ({"quantize": "int4"}, "unknown quantization 'int4'.* Known: int8, fp8, nf4, gguf:FILE"),
        ({"quantize": "gguf"}, "'gguf': expected gguf:FILE"),
        ({"quantize": "int8:file"}, "'int8:file': expected gguf:FILE, or int8, fp8, nf4 alone"),
    ],
)
def test_what_cannot_be_met_is_refused_before_loading(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("no/such-model", device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4", "gguf:some.gguf"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    package = names.QUANTIZERS[kind.partition(":")[0]]
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'mmdit-probe\[{package}\]'"):
        load("scenes-sd3", device="cpu", quantize=kind)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.03), ("fp8", 0.2), ("nf4", 0.3)])
def test_a_quantised_transformer_is_probed_and_told_apart(
    tiny_directory: Path, kind: str, error: float, device: str
) -> None:
    if find_spec(names.QUANTIZERS[kind]) is None:
        pytest.skip(f"{names.QUANTIZERS[kind]} is not installed")
    if kind == "nf4" and device == "cpu":
        with pytest.raises(RunError, match="GPU is needed"):
            load(tiny_directory, device=device, quantize=kind)
        return
    plain, model = load(tiny_directory, device=device), load(tiny_directory, device=device, quantize=kind)
    assert model.name == f"{tiny_directory}+{kind}" and model.weight_hash != plain.weight_hash
    assert described(model)["model"]["quantize"] == kind
    table = sampled(model)[1]
    assert 0 < (table.mass - sampled(plain)[1].mass).abs().max() < error
    sums = table.groupby(["layer", "step", "branch", "head", "query"]).mass.sum()
    assert np.allclose(sums, 1, atol=1e-5)


def test_rows_without_weights_stay_0_in_fp8() -> None:
    """torchao scales each row by its largest weight, here 0; the embedded model has such rows."""
    pytest.importorskip("torchao")
    plain, model = load("scenes-sd3", device="cpu"), load("scenes-sd3", device="cpu", quantize="fp8")
    weights, empty = dict(plain.transformer.named_parameters()), 0
    for name, weight in model.transformer.named_parameters():
        if hasattr(weight, "qdata"):
            stored, own = weight.dequantize(), weights[name]
            empty += int((own == 0).all(1).sum())
            assert (stored - own).abs().max() <= 0.0626 * own.abs().max()  # 3 bits after the leading one
            assert not stored[(own == 0).all(1)].any()
    latents, text = torch.randn(1, 8, 24, 24), plain.encode_prompt("a red ring on grass")
    exact, found = (of.denoise(latents, 0.5, text) for of in (plain, model))
    assert empty and 0 < (found - exact).abs().max() < 0.1 * exact.abs().max()


def test_commands_take_and_record_it(tiny_directory: Path, tmp_path: Path) -> None:
    line = ["attention-budget", "--model", str(tiny_directory), "--offload", "group", "--device", "cpu"]
    line += ["--prompts", "a red ring", "--num-steps", "1", "--control", "none"]
    line += ["--out", str(tmp_path / "run"), "--quiet"]
    done = subprocess.run([sys.executable, "-m", "mmdit_probe", *line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "run" / "run.json").read_text())["model"]
    assert (told["offload"], told["quantize"]) == ("group", None)
