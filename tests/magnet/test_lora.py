"""Adapters: which modules, and that what is saved comes back exactly, whatever alpha is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdit_probe import UserError, load
from mmdit_probe.errors import RunError
from mmdit_probe.magnet.lora import ADAPTER, attach, named_parameters, save_lora, target_modules
from mmdit_probe.models.adapters import KEY, merge, read_metadata
from mmdit_probe.models.families.entries import SD3
from mmdit_probe.models.names import ADAPTER_FILE
from tests import tiny
from tests.magnet.test_tap import inputs


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(), return_dict=False)[0]  # type: ignore[no-any-return]


def trained(pipe: Any, alpha: float = 7, streams: Any = "joint") -> Any:
    """The pipeline with an adapter of rank 3 that changes the output a lot."""
    attach(pipe.transformer, target_modules(SD3, pipe.transformer, "0,2", streams), rank=3, alpha=alpha, seed=4)
    torch.manual_seed(9)
    with torch.no_grad():
        for _, parameter in named_parameters(pipe.transformer):
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return pipe


def test_targets_of_the_image_stream_and_of_both() -> None:
    model = tiny.transformer("sd35")
    image = target_modules(SD3, model, [0])
    assert image == [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert len(target_modules(SD3, model, "all", "joint")) == 8 + 8 + 6  # the last block's text queries are dead
    with pytest.raises(UserError, match="did you mean 'joint'"):
        target_modules(SD3, model, "all", "jont")  # type: ignore[arg-type]


def test_only_the_named_modules_are_adapted() -> None:
    model = tiny.transformer("sd35")
    attach(model, target_modules(SD3, model, [1]), rank=2, alpha=2)
    names = {name.split(".lora_")[0] for name, _ in named_parameters(model)}
    assert names == {f"transformer_blocks.1.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}


def test_the_start_is_a_function_of_the_seed() -> None:
    def start(seed: int) -> Tensor:
        model = tiny.transformer()
        attach(model, target_modules(SD3, model), rank=2, alpha=2, seed=seed)
        return torch.cat([p.detach().flatten() for _, p in named_parameters(model)])

    torch.manual_seed(1)
    first = start(0)
    torch.manual_seed(2)
    assert torch.equal(first, start(0))
    assert not torch.equal(first, start(1))


@pytest.mark.parametrize("alpha", [3, 7, 0.5])
def test_round_trip_through_the_stock_loader(tmp_path: Path, alpha: float) -> None:
    pipe = trained(tiny.pipeline(), alpha)
    expected, untrained = output(pipe.transformer), output(tiny.pipeline().transformer)
    save_lora(pipe.transformer, tmp_path, {"layers": [0, 2]})
    fresh = tiny.pipeline()
    fresh.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(
        output(fresh.transformer), expected, atol=1e-5, rtol=1e-4
    )  # alpha over rank is rounded into the tensors
    assert alpha != 3 or torch.equal(output(fresh.transformer), expected)
    assert (expected - untrained).abs().max() > 1e-2
    assert [path.name for path in tmp_path.iterdir()] == [ADAPTER_FILE]


@pytest.mark.parametrize("alpha", [3, 7, 0.5])
def test_the_tensors_alone_are_the_adapter(tmp_path: Path, alpha: float) -> None:
    """As a state dict, and as a file that lost its header: the stock loader takes alpha to be the rank in both."""
    pipe = trained(tiny.pipeline(), alpha=alpha)
    trained_output, untrained = output(pipe.transformer), output(tiny.pipeline().transformer)
    file = save_lora(pipe.transformer, tmp_path / "whole", {})
    (tmp_path / "bare").mkdir()
    save_file(load_file(file), tmp_path / "bare" / ADAPTER_FILE, metadata={"format": "pt"})
    found = []
    for source in (str(tmp_path / "whole"), str(tmp_path / "bare"), load_file(file)):
        fresh = tiny.pipeline()
        fresh.load_lora_weights(source)
        found.append(output(fresh.transformer))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], trained_output, atol=1e-5, rtol=1e-4)
    assert (trained_output - untrained).abs().max() > 1e-2


def test_an_adapter_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    pipe = trained(tiny.pipeline())
    save_lora(pipe.transformer, tmp_path, {})
    before = load_file(tmp_path / ADAPTER_FILE)
    with torch.no_grad():
        named_parameters(pipe.transformer)[3][1][0, 0] = float("inf")
    with pytest.raises(RunError, match="is not finite: it is not saved"):
        save_lora(pipe.transformer, tmp_path, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(tmp_path / ADAPTER_FILE).items())
    assert [path.name for path in tmp_path.iterdir()] == [ADAPTER_FILE]


def test_metadata_says_rank_alpha_and_what_we_know(tmp_path: Path) -> None:
    save_lora(trained(tiny.pipeline(), alpha=7).transformer, tmp_path, {"layers": [0, 2], "seed": 5})
    found = read_metadata(tmp_path)
    assert (found["lora"]["transformer.r"], found["lora"]["transformer.lora_alpha"]) == (3, 3)  # as the tensors are
    assert found[KEY] == {"layers": [0, 2], "seed": 5}
    with pytest.raises(UserError, match="holds no pytorch_lora_weights"):
        read_metadata(tmp_path / "nowhere")
    for damaged in ("{not json", "[" * 100_000):
        save_file({"a": torch.ones(1)}, tmp_path / ADAPTER_FILE, metadata={KEY: damaged})
        with pytest.raises(UserError, match=f"header of .*{ADAPTER_FILE}.* is damaged"):
            read_metadata(tmp_path)


def test_merging_equals_the_adapter_and_unloading_restores(tmp_path: Path) -> None:
    save_lora(trained(tiny.pipeline()).transformer, tmp_path, {})
    pipe = tiny.pipeline()
    stock = output(pipe.transformer)
    pipe.load_lora_weights(str(tmp_path))
    adapted = output(pipe.transformer)
    merge(pipe)
    assert not hasattr(pipe.transformer.transformer_blocks[0].attn.to_q, "lora_A")
    torch.testing.assert_close(output(pipe.transformer), adapted, atol=2e-5, rtol=1e-4)
    pipe = tiny.pipeline()
    pipe.load_lora_weights(str(tmp_path))
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.transformer), stock)


def test_load_takes_a_lora_and_the_name_and_hash_say_so(tiny_directory: Path, tmp_path: Path) -> None:
    base = load(tiny_directory)
    save_lora(trained(load(tiny_directory).pipeline).transformer, tmp_path, {})
    for source in (tmp_path, tmp_path / ADAPTER_FILE):
        model = load(tiny_directory, lora=source)
        assert model.name == f"{tiny_directory}+{source}"
        assert model.weight_hash != base.weight_hash
        assert (output(model.transformer) - output(base.transformer)).abs().max() > 1e-3


def test_an_adapter_that_does_not_fit_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    large = tiny.transformer(num_layers=5)
    attach(large, target_modules(SD3, large), rank=2, alpha=2)
    save_lora(large, tmp_path, {})
    with pytest.raises(UserError, match=r"8 of its 20 modules are not there, e.g. 'transformer_blocks.3"):
        load(tiny_directory, lora=tmp_path)
    with pytest.raises(UserError, match="no LoRA 'nowhere'"):
        load(tiny_directory, lora="nowhere")
    with pytest.raises(UserError, match="holds no"):
        load(tiny_directory, lora=tiny_directory)
    assert ADAPTER == "magnet"
