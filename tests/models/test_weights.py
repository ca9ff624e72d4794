"""Weights of any storage: the dtype a model computes in, its hash, and one call of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from mmdit_probe.errors import UserError
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.weights import compute_dtype, weight_hash, weight_state
from tests import tiny


class Packed(Tensor):
    """Quantised blocks as bytes, as GGUF and 4-bit parameters are: no floating point, a type of its own."""

    quant_type: str

    @staticmethod
    def of(values: Tensor, quant_type: str) -> Packed:
        packed = values.as_subclass(Packed)
        packed.quant_type = quant_type
        return packed

    def detach(self) -> Packed:  # a state dict detaches
        return Packed.of(super().detach(), self.quant_type)


class PackedLinear(nn.Module):
    """A linear layer that unpacks its bytes as it runs."""

    def __init__(self, linear: nn.Linear, quant_type: str = "Q8") -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127.0
        levels = (linear.weight.detach() / self.scale).round().to(torch.int8).view(torch.uint8)
        self.weight = nn.Parameter(Packed.of(levels, quant_type), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.as_subclass(Tensor).view(torch.int8).to(x.dtype) * self.scale
        return nn.functional.linear(x, weight, self.bias)


def packed(transformer: Any, quant_type: str = "Q8") -> Any:
    """Every linear layer of the attention packed, and the first parameter of all one of bytes."""
    for module in list(transformer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, quant_type))
    transformer.pos_embed.proj.weight.requires_grad_(False)
    return transformer


def layerwise(transformer: Any) -> Any:
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return transformer


STORED = {"packed": packed, "layerwise": layerwise}


@pytest.mark.parametrize("storage", sorted(STORED))
def test_a_model_of_any_storage_denoises(pipe: Any, storage: str) -> None:
    stored = STORED[storage](tiny.transformer())
    assert any(parameter.dtype not in (torch.float32,) for parameter in stored.parameters())
    pipe.register_modules(transformer=stored)
    model = MMDiT(pipe, max_sequence_length=tiny.T5_LENGTH)
    assert model.dtype == torch.float32
    text, latents = model.encode_prompt("a red ring"), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        stock = stored(
            hidden_states=latents, timestep=torch.tensor([500.0]), encoder_hidden_states=text.prompt_embeds,
            pooled_projections=text.pooled,
        ).sample  # fmt: skip
    assert torch.equal(model.denoise(latents, 0.5, text), stock) and bool(stock.isfinite().all())
    assert model.weight_hash == weight_hash(stored) != weight_hash(tiny.transformer())


def test_the_dtype_is_one_of_computation() -> None:
    bytes_only = nn.Linear(4, 4)
    for parameter in bytes_only.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.uint8)
    with pytest.raises(UserError, match="no weight of a dtype that it could compute in"):
        compute_dtype(bytes_only)
    config = SimpleNamespace(bnb_4bit_compute_dtype=torch.bfloat16)
    bytes_only.hf_quantizer = SimpleNamespace(quantization_config=config)  # type: ignore[assignment]
    assert compute_dtype(bytes_only) == torch.bfloat16
    stored = nn.Sequential(nn.Linear(2, 2).to(torch.float8_e4m3fn), nn.LayerNorm(2, dtype=torch.float16))
    assert compute_dtype(stored) == torch.float16


def test_a_hash_follows_the_values_of_any_storage() -> None:
    def wrapped(value: float, second: float = 2.0, kind: type[Any] = TwoTensor) -> nn.Module:
        module = nn.Linear(2, 2, bias=False)
        module.weight = nn.Parameter(kind(torch.full((2, 2), value), torch.full((2, 2), second)))
        return module

    first = weight_hash(wrapped(1.0))
    assert (
        first == weight_hash(wrapped(1.0))
        and len({first, weight_hash(wrapped(3.0)), weight_hash(wrapped(1.0, 3.0))}) == 3
    )
    one, other = (packed(tiny.transformer(), kind) for kind in ("Q8", "Q4"))
    other.load_state_dict({name: value.as_subclass(Tensor) for name, value in one.state_dict().items()})
    assert weight_hash(one) != weight_hash(other)


def test_the_state_of_wrapped_weights_tells_of_changes_in_place() -> None:
    module = nn.Linear(2, 2, bias=False)
    module.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    before = weight_state(module)
    assert weight_state(module) == before
    with torch.no_grad():
        module.weight.mul_(2.0)
    assert weight_state(module) != before != weight_state(None)


def test_the_state_of_offloaded_weights_stays_when_they_come_and_go() -> None:
    from accelerate import cpu_offload

    module = nn.Linear(2, 2)
    cpu_offload(module, execution_device=torch.device("cpu"))
    before, placeholder = weight_state(module), module.weight
    module(torch.ones(1, 2))
    assert module.weight is not placeholder and weight_state(module) == before


def test_the_hash_tells_how_strong_adapters_are() -> None:
    """Scales are no tensors: a run at half the strength was continued at the whole one."""
    from peft import LoraConfig

    def lora(name: str, layer: str) -> None:
        transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=[layer], init_lora_weights=False), name)

    transformer = tiny_model()
    lora("one", "to_q")
    model = MMDiT(tiny.pipeline(), "tiny")
    model.pipeline.register_modules(transformer=transformer)
    loaded = model.weight_hash
    plain = hashlib.sha256()  # of the tensors alone, as it was before adapters' scales were looked at
    for name, value in sorted(transformer.state_dict().items()):
        plain.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    assert loaded == plain.hexdigest()
    transformer.set_adapters(["one"], [0.5])
    half = model.weight_hash
    transformer.disable_adapters()
    off = model.weight_hash
    transformer.enable_adapters()
    transformer.set_adapters(["one"], [1.0])
    assert model.weight_hash == loaded and len({loaded, half, off}) == 3
    lora("two", "to_v")
    transformer.set_adapters(["one", "two"])
    both = model.weight_hash
    transformer.set_adapters(["one"])
    assert len({loaded, both, model.weight_hash}) == 3


@pytest.mark.filterwarnings("ignore")
def test_dynamic_int8_has_a_hash() -> None:
    def quantised(change: float = 0.0) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.no_grad():
            module[1].weight[0, 0] += change
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)

    assert weight_hash(quantised()) == weight_hash(quantised()) != weight_hash(quantised(0.5))
    channels = nn.Module()
    values = torch.quantize_per_channel(
        torch.randn(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
    )
    channels.register_buffer("values", values)
    assert len(weight_hash(channels)) == 64


def test_offloading_leaves_the_hash_alone(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    expected = weight_hash(tiny_model())
    assert weight_hash(cpu_offload(tiny_model(), torch.device("cpu"))) == expected
    on_disk = tiny_model()
    on_disk.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert list(tmp_path.glob("*.safetensors")) and weight_hash(on_disk) == expected
    with pytest.raises(UserError, match="not loaded"):
        weight_hash(nn.Linear(2, 2, device="meta"))


def tiny_model() -> Any:
    torch.manual_seed(3)
    return tiny.transformer()
