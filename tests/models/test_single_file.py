"""Checkpoints in a single file, in the names of their authors: the weights of the folder, or a line on what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.load import load
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.single_file import base_of
from tests import tiny

NAMES = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2", "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
IN_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip


def by_its_authors(transformer: Any) -> dict[str, torch.Tensor]:
    """An SD3's weights in the names, and with the fused projections, of Stability's files."""
    weights, found = dict(transformer.state_dict()), {}
    for block in range(len(transformer.transformer_blocks)):
        inside, written = f"transformer_blocks.{block}", f"joint_blocks.{block}"
        for part in ("weight", "bias"):
            for side, parts in (
                ("x", ("to_q", "to_k", "to_v")),
                ("context", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                fused = [weights.pop(f"{inside}.attn.{name}.{part}") for name in parts]
                found[f"{written}.{side}_block.attn.qkv.{part}"] = torch.cat(fused)
            for name, theirs in IN_BLOCK.items():
                if f"{inside}.{name}.{part}" in weights:
                    found[f"{written}.{theirs}.{part}"] = weights.pop(f"{inside}.{name}.{part}")
    for name, value in weights.items():
        stem, _, part = name.rpartition(".")
        found[NAMES[name] if name in NAMES else f"{NAMES[stem]}.{part}"] = value
    last = f"joint_blocks.{len(transformer.transformer_blocks) - 1}.context_block.adaLN_modulation.1"
    for name in (f"{last}.weight", f"{last}.bias", "final_layer.adaLN_modulation.1.weight",
                 "final_layer.adaLN_modulation.1.bias"):  # fmt: skip
        found[name] = torch.cat(found[name].chunk(2)[::-1])  # they keep shift before scale
    return {name: value.contiguous() for name, value in found.items()}


@pytest.fixture
def known(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny pipeline where diffusers would look for Stability's."""
    monkeypatch.setattr(single_file_utils, "infer_diffusers_model_type", lambda shapes: "sd3")
    monkeypatch.setitem(
        single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS, "sd3",
        {"pretrained_model_name_or_path": str(tiny_directory)},
    )  # fmt: skip
    return tiny_directory


def test_a_file_is_the_pipeline_that_it_belongs_to_with_its_weights(known: Path, tmp_path: Path) -> None:
    file, transformer = tmp_path / "sd3.safetensors", tiny.transformer(pos_embed_max_size=16)
    save_file({f"model.diffusion_model.{name}": value for name, value in by_its_authors(transformer).items()}, file)
    model, base = load(file, device="cpu"), load(known, device="cpu")
    assert model.name == str(file) and type(model.pipeline) is type(base.pipeline)
    base.pipeline.register_modules(transformer=transformer)
    assert model.weight_hash == MMDiT(base.pipeline).weight_hash
    assert torch.equal(model.encode_prompt("a cat").prompt_embeds, base.encode_prompt("a cat").prompt_embeds)


def test_weights_with_scales_of_their_own_are_refused(known: Path, tmp_path: Path) -> None:
    """As ComfyUI stores float8: diffusers reads the numbers without their scales, and says nothing."""
    file, weights = tmp_path / "sd3.safetensors", by_its_authors(tiny.transformer(pos_embed_max_size=16))
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    scale = weights[name].abs().max() / 448
    stored = weights | {name: (weights[name] / scale).to(torch.float8_e4m3fn)}
    for more in ({name.replace("weight", "scale_weight"): scale[None]}, {"scaled_fp8": torch.zeros(2)}):
        save_file({f"model.diffusion_model.{key}": value for key, value in (stored | more).items()}, file)
        with pytest.raises(UserError, match=r"scales of their own \(e\.g\. .*scale.* take the file in bfloat16"):
            load(file, device="cpu")
    save_file(weights | {name: (100 * weights[name]).to(torch.int8)}, file)
    with pytest.raises(UserError, match=rf"scales of their own \(e\.g\. '{name}'"):
        load(file, device="cpu")
    # float8 without scales is what it says.
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, file)
    found = load(file, device="cpu").transformer.transformer_blocks[0].attn.to_q.weight
    torch.testing.assert_close(found, weights[name].to(torch.float8_e4m3fn).float()[: len(found)], atol=0, rtol=0)


def test_weights_that_are_missing_or_do_not_fit_are_a_failure(known: Path, tmp_path: Path) -> None:
    weights, file = by_its_authors(tiny.transformer()), tmp_path / "sd3.safetensors"
    save_file({name: value for name, value in weights.items() if "context_embedder" not in name}, file)
    with pytest.raises(RunError, match=r"cannot be loaded as the SD3Transformer2DModel of .*context_embedder"):
        load(file, device="cpu")
    save_file(by_its_authors(tiny.transformer(joint_attention_dim=24)), file)
    with pytest.raises(RunError, match="cannot be loaded as the SD3Transformer2DModel of"):
        load(file, device="cpu")


def test_the_pipeline_is_told_by_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    bias = "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"
    for patches, base in ((36864, "stable-diffusion-3-medium"), (147456, "stable-diffusion-3.5-medium")):
        save_file({bias: torch.zeros(9216), "model.diffusion_model.pos_embed": torch.zeros(1, patches, 1)}, file)
        assert base in base_of(str(file))
    for weights in ({"weight": torch.zeros(3)}, {bias: torch.zeros(9216)}):
        save_file(weights, file)
        with pytest.raises(UserError, match=r"no checkpoint of a transformer that diffusers can tell .* convert it"):
            load(file, device="cpu")
    file.write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"no safetensors file .*'gguf:FILE'"):
        load(file, device="cpu")


def test_gguf_takes_the_place_of_the_transformers_weights(tiny_directory: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file, transformer = tmp_path / "sd3.gguf", tiny.transformer()
    writer = gguf.GGUFWriter(file, "sd3")
    for name, value in by_its_authors(transformer).items():
        array = value.float().numpy()
        if name.endswith("mlp.fc1.weight"):
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    model, plain = load(tiny_directory, device="cpu", quantize=f"gguf:{file}"), load(tiny_directory, device="cpu")
    assert model.name == f"{tiny_directory}+gguf:{file}" and model.dtype == torch.float32
    plain.pipeline.register_modules(transformer=transformer)
    text, latents = plain.encode_prompt("a red ring"), torch.randn(1, 4, 8, 8)
    exact, found = (of.denoise(latents, 0.5, text) for of in (plain, model))
    assert 0 < (found - exact).abs().max() < 0.02 * exact.abs().max()
    with pytest.raises(UserError, match="both give the transformer's weights"):
        load(_plain_file(tmp_path), device="cpu", quantize=f"gguf:{file}")


def _plain_file(folder: Path) -> Path:
    file = folder / "plain.safetensors"
    bias = "joint_blocks.0.context_block.adaLN_modulation.1.bias"
    save_file({bias: torch.zeros(9216), "pos_embed": torch.zeros(1, 36864, 1)}, file)
    return file


def test_a_missing_gguf_file_is_named(tiny_directory: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=r"no file 'none\.gguf'"):
        load(tiny_directory, device="cpu", quantize="gguf:none.gguf")
