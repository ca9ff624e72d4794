"""Mixed precision: bfloat16 executed on the CPU, float16 refused there, and both on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdit_probe import UserError, load, probe
from mmdit_probe.magnet import TextMapTap
from mmdit_probe.magnet.trainer import TrainResult, train
from mmdit_probe.models.mmdit import MMDiT
from tests.magnet.test_tap import inputs
from tests.magnet.test_trainer import CONFIG, Pictures, assert_equal, fresh, run, weights


def seen_dtypes(model: MMDiT) -> set[torch.dtype]:
    """Dtypes of what the first block's feed-forward puts out, collected as it runs."""
    found: set[torch.dtype] = set()
    block: Any = model.transformer.transformer_blocks[0].ff
    block.register_forward_hook(lambda module, given, out: found.add(out.dtype))
    return found


def trained(tmp_path: Path, precision: Any, **options: Any) -> tuple[TrainResult, set[torch.dtype]]:
    model = fresh()
    dtypes = seen_dtypes(model)
    config = replace(CONFIG, train_steps=3, precision=precision, **options)
    return train(model, Pictures(), config, out=tmp_path / f"{precision}"), dtypes


@pytest.mark.parametrize("space", ["logit", "probability"])
def test_bf16_runs_in_bfloat16_and_follows_float32(tmp_path: Path, space: Any) -> None:
    plain, none = trained(tmp_path, "no", space=space)
    mixed, half = trained(tmp_path, "bf16", space=space)
    assert (none, half) == ({torch.float32}, {torch.bfloat16})
    for name in ("loss", "flow", "focal", "dice"):
        np.testing.assert_allclose(mixed.log[name], plain.log[name], rtol=0.1)
    ours, other = weights(mixed), weights(plain)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    moved = sum(float((tensor - other[name]).norm()) ** 2 for name, tensor in ours.items()) ** 0.5
    whole = sum(float(tensor.norm()) ** 2 for tensor in other.values()) ** 0.5
    assert 0 < moved < 0.3 * whole


def test_bf16_is_resumed_exactly(tmp_path: Path) -> None:
    config = replace(CONFIG, precision="bf16", train_steps=4, save_every=2)
    whole = run(tmp_path / "whole", config)

    def stop() -> None:
        left.append(1)
        if len(left) == 3:
            raise KeyboardInterrupt

    left: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", config, advance=stop)
    assert_equal(whole, run(tmp_path / "killed", config, resume=True))


def test_maps_are_float32_under_autocast() -> None:
    """The loss reads maps computed in float32 from what bfloat16 layers give, not rounded again."""
    model, given = fresh().transformer, inputs()
    tap = TextMapTap([1], space="probability")
    with probe(model, edits=tap), torch.autocast("cpu", torch.bfloat16):
        tap.begin()
        model(**given, return_dict=False)
        maps = tap.take()[1]
    assert maps.dtype == torch.float32
    assert (maps != maps.bfloat16().float()).any()


def test_a_bfloat16_model_trains_a_float32_adapter(tiny_directory: Path, tmp_path: Path) -> None:
    model = load(tiny_directory, dtype="bfloat16")
    result = train(model, Pictures(), replace(CONFIG, train_steps=2), out=tmp_path)
    assert np.isfinite(result.log.loss).all()
    assert {tensor.dtype for tensor in weights(result).values()} == {torch.float32}
    assert any(float(t.abs().max()) > 0 for name, t in weights(result).items() if "lora_B" in name)


def test_fp16_on_a_cpu_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU; on a CPU train with bf16 or no"):
        run(tmp_path / "run", replace(CONFIG, precision="fp16"))
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_a_gpu(tiny_directory: Path, tmp_path: Path, precision: Any) -> None:
    """Trains, with the loss scaler where there is one, and its state is kept."""
    plain = train(load(tiny_directory, device="cuda", dtype="float32"), Pictures(), replace(CONFIG, train_steps=3),
                  out=tmp_path / "no")  # fmt: skip
    model = load(tiny_directory, device="cuda", dtype="float32")
    mixed = train(model, Pictures(), replace(CONFIG, train_steps=3, precision=precision), out=tmp_path / "mixed")
    np.testing.assert_allclose(mixed.log.flow, plain.log.flow, rtol=0.05)
    assert {tensor.dtype for tensor in weights(mixed).values()} == {torch.float32}
