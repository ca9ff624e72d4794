"""MAGNET on other families than SD3.0: the whole loop, its adapter in the stock loader, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdit_probe.data import Sample
from mmdit_probe.errors import UserError
from mmdit_probe.magnet.config import MagnetOptions
from mmdit_probe.magnet.trainer import train
from mmdit_probe.models.adapters import load_adapter
from mmdit_probe.models.mmdit import MMDiT
from tests import pipelines, tiny

SIDE = 64


class Pictures:
    """Two pictures whose left half is the one word and whose right half the other."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample:
        image = np.random.default_rng(index).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
        left = np.zeros((SIDE, SIDE), bool)
        left[:, : 30 + index] = True
        return Sample(f"picture {index}", image, "ring cat", np.stack([left, ~left]), ("ring", "cat"))

    def describe(self) -> dict[str, Any]:
        return {"data": "test pictures"}


def model_of(name: str) -> MMDiT:
    pipe = tiny.pipeline("sd35") if name == "sd35" else pipelines.build(name)
    return MMDiT(pipe, name, tiny.T5_LENGTH)


@pytest.mark.parametrize(("name", "layers"), [("sd35", (1,)), ("flux", (1, 3))])
def test_training_lowers_the_mask_loss_and_the_adapter_loads(
    name: str, layers: tuple[int, ...], tmp_path: Path
) -> None:
    config = MagnetOptions(
        layers=layers, rank=4, alpha=4, train_steps=20, batch=2, warmup=1, rate=0.03, lora_streams="joint",
        flow_weight=0.0, focal_weight=1.0, dice_weight=1.0,
    )  # fmt: skip
    model = model_of(name)
    result = train(model, Pictures(), config, out=tmp_path)
    log = result.log
    assert log["loss"][-5:].mean() < log["loss"][:3].mean()
    again = model_of(name)
    load_adapter(again.pipeline, str(result.lora))
    text = model.encode_prompt("ring cat")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = model_of(name).denoise(latents, 0.5, text)
    torch.testing.assert_close(again.denoise(latents, 0.5, text), model.denoise(latents, 0.5, text))
    assert not torch.allclose(again.denoise(latents, 0.5, text), plain)


def test_a_family_whose_prompts_differ_in_length_is_refused(tmp_path: Path) -> None:
    model = MMDiT(pipelines.build("qwen_image"))
    with pytest.raises(UserError, match="differ in length"):
        train(model, Pictures(), MagnetOptions(layers=(1,), train_steps=1, warmup=1), out=tmp_path)
