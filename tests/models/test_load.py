"""Loading: stock pipelines by name, and one line for everything that can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_probe import assets
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.load import load, pick_device, random_twin
from mmdit_probe.models.mmdit import MMDiT
from tests import tiny


def test_a_directory_loads_as_the_stock_pipeline(tiny_directory: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    model = load(tiny_directory, device="cpu")
    assert type(model.pipeline) is StableDiffusion3Pipeline
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    assert [layer.index for layer in model.layers] == [0, 1, 2]
    assert model.text_length == tiny.CLIP_LENGTH + tiny.T5_LENGTH
    assert model.default_size == (64, 64) and model.size_multiple == 16
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_directory)
    assert model.weight_hash == MMDiT(stock).weight_hash


def test_a_single_changed_weight_changes_the_hash(tiny_directory: Path) -> None:
    one, two = load(tiny_directory, device="cpu"), load(tiny_directory, device="cpu")
    with torch.no_grad():
        two.transformer.proj_out.bias[0] += 1e-3
    assert one.weight_hash != two.weight_hash


def test_without_t5_the_text_keeps_its_length(tiny_directory: Path) -> None:
    model = load(tiny_directory, device="cpu", t5=False)
    assert model.pipeline.text_encoder_3 is None and model.pipeline.tokenizer_3 is None
    assert model.text_length == tiny.CLIP_LENGTH + tiny.T5_LENGTH
    text = model.encode_prompt("a red ring")
    assert text.prompt_embeds.shape[1] == model.text_length
    assert text.tokens[0].kinds.count("null") == tiny.T5_LENGTH


def test_a_directory_saved_without_t5_loads(tmp_path: Path) -> None:
    model = load(tiny.build(tmp_path, "no-t5"), device="cpu")
    assert model.pipeline.text_encoder_3 is None
    assert model.max_sequence_length == 256


def test_a_random_twin_shares_all_but_the_transformer(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_directory, tmp_path / "worlds")
    (tmp_path / "worlds-random.json").write_text(json.dumps({"base": "worlds", "seed": 3}))
    monkeypatch.setattr(assets, "_ROOT", tmp_path)
    trained, twin, again = (load(name, device="cpu") for name in ("worlds", "worlds-random", "worlds-random"))
    assert twin.weight_hash == again.weight_hash != trained.weight_hash
    assert twin.transformer.config.num_layers == trained.transformer.config.num_layers
    prompt = "a red ring"
    assert torch.equal(twin.encode_prompt(prompt).prompt_embeds, trained.encode_prompt(prompt).prompt_embeds)
    assert all(parameter.any() for parameter in twin.transformer.parameters())
    with pytest.raises(UserError, match="did you mean 'worlds'"):
        load("world")


def test_building_a_twin_leaves_the_random_state_alone(pipe: Any) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    random_twin(pipe.transformer, 0)
    assert torch.equal(torch.rand(1), expected)


def test_bad_names_and_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown model"):
        load("no-such-model")
    with pytest.raises(UserError, match="model_index"):
        load(tmp_path)
    with pytest.raises(UserError, match="hub cannot be reached"):
        load("nobody/nothing")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]})
    )
    with pytest.raises(UserError, match=r"unet.*not a known MM-DiT.*SD3Transformer2DModel"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        load(tmp_path)


def test_missing_weights_are_a_failure_in_one_line(tiny_directory: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_directory, broken)
    for file in (broken / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(RunError, match="cannot be loaded") as error:
        load(broken, device="cpu")
    assert "\n" not in str(error.value)


def test_devices_and_dtypes(tiny_directory: Path) -> None:
    with pytest.raises(UserError, match="unknown dtype"):
        load(tiny_directory, dtype="float23")
    with pytest.raises(UserError, match="unknown device"):
        pick_device("gpu")
    assert load(tiny_directory, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="not available"):
            pick_device("cuda")


def test_a_gated_or_missing_repository_says_which() -> None:
    from mmdit_probe.models.load import _hub_error

    class GatedRepoError(Exception):
        pass

    assert "gated" in str(_hub_error("a/b", GatedRepoError("401 Client Error")))
    assert "spelling" in str(_hub_error("a/b", OSError("404 Client Error. Entry Not Found")))
