"""LoRA files in the names of other programs: loaded as diffusers converts them, or refused with what to do."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.adapters import load_adapter
from mmdit_probe.models.names import ADAPTER_FILE, contents_of
from tests import pipelines, tiny

RANK, WIDTH = 2, 32
KOHYA, PEFT = ("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")


def written(folder: Path, module: str, names: tuple[str, str], alpha: float | None = None) -> tuple[Path, torch.Tensor]:
    """A file with one fused projection, and the change of weights that it means, [3 * WIDTH, WIDTH]."""
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*shape, generator=generator) for shape in ((3 * WIDTH, RANK), (RANK, WIDTH)))
    tensors = {f"{module}.{names[0]}": up, f"{module}.{names[1]}": down}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    file = folder / "lora.safetensors"
    save_file(tensors, file)
    return file, (1.0 if alpha is None else alpha / RANK) * up @ down


def changes(pipe: Any, file: Path) -> list[torch.Tensor]:
    """What an adapter adds to q, k and v of the first layer's image tokens."""
    layers = [getattr(pipe.transformer.transformer_blocks[0].attn, name) for name in ("to_q", "to_k", "to_v")]
    before = [layer.weight.detach().clone() for layer in layers]
    load_adapter(pipe, str(file))
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    layers = [getattr(pipe.transformer.transformer_blocks[0].attn, name) for name in ("to_q", "to_k", "to_v")]
    return [layer.weight.detach() - old for layer, old in zip(layers, before, strict=True)]


@pytest.mark.parametrize(
    "module", ["lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"]
)
def test_fused_projections_of_kohya_and_comfyui_arrive_in_flux(tmp_path: Path, module: str) -> None:
    file, expected = written(tmp_path, module, KOHYA, alpha=1.0)
    found = torch.cat(changes(pipelines.build("flux"), file))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("module", "names"),
    [("lora_unet_joint_blocks_0_x_block_attn_qkv", KOHYA), ("diffusion_model.joint_blocks.0.x_block.attn.qkv", PEFT),
     ("transformer_blocks.0.attn.to_q", PEFT)],
)  # fmt: skip
def test_names_that_diffusers_does_not_convert_are_refused_with_what_to_do(
    tmp_path: Path, module: str, names: tuple[str, str]
) -> None:
    file, _ = written(tmp_path, module, names)
    message = rf"e\.g\. '{module}.* does not convert that for StableDiffusion3Pipeline: export it in diffusers' format"
    pipe = tiny.pipeline("sd3")
    with pytest.raises(UserError, match=message):
        load_adapter(pipe, str(file))
    assert not hasattr(pipe.transformer, "peft_config")


@pytest.mark.parametrize(
    ("family", "module", "names", "told"),
    [("cogview4", "transformer.transformer_blocks.0.attn1.to_q", KOHYA, "cannot be loaded: Invalid LoRA checkpoint"),
     ("krea2", "diffusion_model.transformer_blocks.0.attn.to_q", PEFT, r"does not convert for a Krea2Pipeline \("),
     ("lumina2", "diffusion_model.layers.0.attn.to_q", PEFT, r"does not convert for a Lumina2Pipeline \("),
     ("chroma", "lora_unet_transformer_blocks_0_attn_to_q", KOHYA, r"does not convert for a ChromaPipeline \("),
     ("flux2", "lora_unet_transformer_blocks_0_attn_to_q", KOHYA, "no weights for this transformer; nothing was load"),
     ("z_image", "lora_transformer_layers_0_attention_to_q", KOHYA, "does not fit this model: 1 of its 1 modules")],
)  # fmt: skip
def test_names_at_which_the_conversion_stops_are_refused_with_what_to_do(
    tmp_path: Path, family: str, module: str, names: tuple[str, str], told: str
) -> None:
    file, _ = written(tmp_path, module, names, alpha=1.0 if names is KOHYA else None)
    with pytest.raises(
        (UserError, RunError), match=told + r".*[:;] export it in diffusers' format, or rename its tensors"
    ):
        load_adapter(pipelines.build(family), str(file))


@pytest.mark.parametrize(("family", "kind"), [("bria", "BriaPipeline"), ("prx", "PRXPipeline")])
def test_a_pipeline_into_which_diffusers_loads_none_is_named(tmp_path: Path, family: str, kind: str) -> None:
    """PRX's has a loader, which is that of U-Nets."""
    file, _ = written(tmp_path, "transformer.transformer_blocks.0.attn.to_q", PEFT)
    with pytest.raises(UserError, match=f"diffusers loads no LoRA into a {kind}: add the changes of"):
        load_adapter(pipelines.build(family), str(file))


@pytest.mark.parametrize(
    ("lacks", "value", "told"),
    [("lora_B", 1.0, r"has '.*lora_A\.weight' and lacks '.*lora_B\.weight': it is cut off"),
     ("lora_A", 1.0, r"has '.*lora_B\.weight' and lacks '.*lora_A\.weight': it is cut off"),
     ("", float("nan"), r"'.*to_q\.lora_A\.weight' is not finite"),
     ("", float("inf"), r"'.*to_q\.lora_A\.weight' is not finite")],
)  # fmt: skip
def test_adapters_that_lack_a_half_or_are_not_finite_are_refused(
    tmp_path: Path, lacks: str, value: float, told: str
) -> None:
    """The one ended in torch's error of tensors without contents, the other was loaded."""
    module, file = "transformer.transformer_blocks.{}.attn.to_q.{}.weight", tmp_path / "lora.safetensors"
    halves = {"lora_A": (RANK, WIDTH), "lora_B": (WIDTH, RANK)}
    tensors = {module.format(k, half): torch.full(shape, 1.0) for k in (0, 1) for half, shape in halves.items()}
    tensors[module.format(0, "lora_A")] *= value
    tensors.pop(module.format(1, lacks), None)
    save_file(tensors, file)
    pipe = tiny.pipeline("sd3")
    with pytest.raises(UserError, match=told):
        load_adapter(pipe, str(file))
    assert not hasattr(pipe.transformer, "peft_config")


@pytest.mark.parametrize("part", ["lora_B.bias", "lora_magnitude_vector"])
def test_adapters_whose_modules_differ_in_what_they_have_are_refused(tmp_path: Path, part: str) -> None:
    """They were loaded, and the model ended in torch's error of tensors without contents."""
    module, file = "transformer.transformer_blocks.{}.attn.to_q.{}", tmp_path / "lora.safetensors"
    halves = {"lora_A.weight": (RANK, WIDTH), "lora_B.weight": (WIDTH, RANK), part: (WIDTH,)}
    tensors = {module.format(k, name): torch.ones(shape) for k in (0, 1) for name, shape in halves.items()}
    save_file(tensors, file)
    load_adapter(tiny.pipeline("sd3"), str(file))
    del tensors[module.format(1, part)]
    save_file(tensors, file)
    with pytest.raises(UserError, match=rf"has '.*1\.attn\.to_q\..*' and lacks '.*1\.attn\.to_q\.{part}'"):
        load_adapter(tiny.pipeline("sd3"), str(file))


def test_a_module_that_is_not_there_after_conversion_is_named(tmp_path: Path) -> None:
    file, _ = written(tmp_path, "lora_unet_double_blocks_9_img_attn_qkv", KOHYA, alpha=1.0)
    with pytest.raises(UserError, match=r"3 of its 3 modules are not there, e\.g\. 'transformer_blocks\.9\.attn"):
        load_adapter(pipelines.build("flux"), str(file))


def test_what_a_path_holds_tells_checkpoints_apart(tmp_path: Path) -> None:
    """Weights, or what a processor reads, exchanged under the same path; notes beside them are no part of it."""
    path, other = tmp_path / "clip", tmp_path / "lora"
    path.mkdir()
    other.mkdir()
    assert contents_of(None, str(path), "nowhere/at-all") == {}
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "preprocessor_config.json").write_bytes(b"{}")
    (other / ADAPTER_FILE).write_bytes(b"adapter")
    first = contents_of(str(path), str(other), "scenes-clip")
    assert set(first) == {str(path), str(other), "scenes-clip"}
    assert first[str(other)] == hashlib.sha256(b"adapter").hexdigest()
    (path / "notes.md").write_text("trained on Monday", encoding="utf-8")
    assert contents_of(str(path)) == {str(path): first[str(path)]}
    for name, data in (("preprocessor_config.json", b"[]"), ("model.safetensors", b"others")):
        before = contents_of(str(path))
        (path / name).write_bytes(data)
        assert contents_of(str(path)) != before
