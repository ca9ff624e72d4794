"""Maps with gradients out of the stock transformer: values, gradients, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_probe import TextMaps, probe
from mmdit_probe.attention.intercept import watch
from mmdit_probe.errors import RunError
from mmdit_probe.magnet.lora import attach, named_parameters, target_modules
from mmdit_probe.magnet.tap import TextMapTap
from mmdit_probe.models.families.entries import SD3
from mmdit_probe.models.families.registry import family_of
from mmdit_probe.models.layout import find_layers
from mmdit_probe.models.mmdit import MMDiT
from tests import tiny
from tests.families import FIXTURES

GRID = (4, 4)


def adapted(variant: str = "sd3", layers: Any = "all") -> Any:
    torch.manual_seed(0)
    model = tiny.transformer(variant)
    attach(model, target_modules(SD3, model, layers, "joint"), rank=2, alpha=3, seed=1)
    with torch.no_grad():
        for _, parameter in named_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def inputs(rows: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "hidden_states": torch.randn(rows, 4, 8, 8),
        "encoder_hidden_states": torch.randn(rows, 7, 40),
        "pooled_projections": torch.randn(rows, 24),
        "timestep": torch.tensor([500.0] * rows),
    }


def dense_loss(model: Any, given: dict[str, Tensor], weights: Tensor, layers: list[int], space: str) -> Tensor:
    """The same scalar from a second forward whose attention is written out."""
    kept: dict[int, Tensor] = {}
    detach = []
    for index in layers:

        def write_out(call: Any, module_call: Any, proceed: Any, index: int = index) -> Tensor:
            scores = call.scale_factor * call.query @ call.key.transpose(-1, -2)
            block = (scores if space == "logit" else scores.softmax(-1))[:, :, :16, 16:]
            kept[index] = block
            return scores.softmax(-1) @ call.value

        detach.append(watch(model.transformer_blocks[index].attn, write_out, "output"))
    velocity = model(**given, return_dict=False)[0]
    for off in detach:
        off()
    return velocity.square().mean() + sum((kept[i] * weights).sum() for i in layers)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("space", ["logit", "probability"])
@pytest.mark.parametrize("variant", ["sd3", "sd35"])
def test_gradients_of_lora_equal_the_written_out_softmax(variant: str, space: Any, checkpointing: bool) -> None:
    given, layers = inputs(), [0, 2]
    weights = torch.randn(2, 2, 16, 7)  # [B, H, I, T]
    model = adapted(variant)
    dense_loss(model, given, weights, layers, space).backward()
    expected = {name: p.grad.clone() for name, p in named_parameters(model)}
    model.zero_grad()
    if checkpointing:
        model.enable_gradient_checkpointing()
    tap = TextMapTap(layers, space=space)
    with probe(model, edits=tap):
        tap.begin()
        velocity = model(**given, return_dict=False)[0]
        maps = tap.take()
        assert maps[0].shape == (2, 2, 7, *GRID)
        as_blocks = [m.flatten(-2).transpose(-1, -2) for m in maps.values()]
        (velocity.square().mean() + sum((m * weights).sum() for m in as_blocks)).backward()
    for name, parameter in named_parameters(model):
        assert (parameter.grad - expected[name]).norm() <= 2e-5 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["flux", "aura_flow"])
def test_gradients_through_double_and_single_blocks(name: str, checkpointing: bool) -> None:
    model, given = FIXTURES[name].build(), FIXTURES[name].inputs()
    layers = find_layers(family_of(model), model)
    paths = [layers[index].path for index in (1, 3)]  # one of each kind
    start, grid = (0 if name == "flux" else 8), (3, 4)  # registers come first
    text, image = slice(start, start + 7), slice(start + 7, start + 19)
    weights = torch.randn(2, 2, 12, 7, generator=torch.Generator().manual_seed(0))
    kept: dict[str, Tensor] = {}
    detach = []
    for path in paths:

        def write_out(call: Any, module_call: Any, proceed: Any, path: str = path) -> Tensor:
            p = (call.scale_factor * call.query @ call.key.transpose(-1, -2)).softmax(-1)
            kept[path] = p[:, :, image, text]
            return p @ call.value

        detach.append(watch(model.get_submodule(path), write_out, "output"))
    model(**given, return_dict=False)
    sum((kept[path] * weights).sum() for path in paths).backward()
    for off in detach:
        off()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()
    tap = TextMapTap([1, 3], space="probability")
    with probe(model, edits=tap):
        tap.begin()
        velocity = model(**given, return_dict=False)[0]
        maps = tap.take()
        assert {m.shape[-2:] for m in maps.values()} == {grid}
        loss = sum((m.flatten(-2).transpose(-1, -2) * weights).sum() for m in maps.values())
        (loss + 0.0 * velocity.sum()).backward()
    assert len(expected) > 10
    for name, parameter in model.named_parameters():
        if name in expected:
            assert (parameter.grad - expected[name]).norm() <= 2e-4 * expected[name].norm() + 1e-6, name


def test_output_is_bitwise_stock_and_the_model_is_left_as_it_was() -> None:
    model, given = adapted(), inputs()
    stock = model(**given, return_dict=False)[0]
    tap = TextMapTap("all")
    with probe(model, edits=tap):
        tap.begin()
        assert torch.equal(model(**given, return_dict=False)[0], stock)
        tap.take()
    assert torch.equal(model(**given, return_dict=False)[0], stock)
    assert all("forward" not in block.attn.__dict__ for block in model.transformer_blocks)


def test_word_maps_are_those_of_the_observer(pipe: Any) -> None:
    model = MMDiT(pipe)
    text = model.encode_prompt(["a red ring", "a cat"])
    latents = torch.randn(2, 4, 8, 8)
    with probe(model, TextMaps(), layers=[1]) as run:
        model.denoise(latents, 0.5, text)
    expected = run[TextMaps].maps(1)  # [B, h, w, T]
    groups = torch.rand(2, model.text_length, 3)
    tap = TextMapTap([1], space="probability", reduce=True)
    with probe(model, edits=tap):
        tap.begin(groups)
        model.denoise(latents, 0.5, text, grad=True)
        found = tap.take()[1]
    torch.testing.assert_close(found.permute(0, 2, 3, 1), expected @ groups[:, None], atol=1e-6, rtol=1e-5)


def test_a_layer_that_was_not_seen_is_an_error() -> None:
    model, given = adapted(), inputs()
    tap = TextMapTap([1])
    with probe(model, edits=tap):
        tap.begin()
        with pytest.raises(RunError, match=r"layers \[1\] made no"):
            tap.take()
        model(**given)


def test_a_layer_that_attends_to_other_tokens_is_an_error() -> None:
    def shortened(call: Any, module_call: Any) -> Any:
        return replace(call, key=call.key[:, :, 1:], value=call.value[:, :, 1:])

    model, given, tap = adapted(), inputs(), TextMapTap([1])
    detach = watch(model.transformer_blocks[1].attn, shortened, "input")
    with probe(model, edits=tap):
        model(**given)
        tap.begin()
        with pytest.raises(RunError, match=r"layer 1 attends to 22 tokens; expected 23, of which \(4, 4\) image"):
            model(**given)
    detach()


def test_forwards_that_nobody_began_cost_nothing() -> None:
    """Validation samples images with the tap attached."""
    model, given = adapted(), inputs()
    tap = TextMapTap([1])
    with probe(model, edits=tap):
        with torch.no_grad():
            model(**given)
        assert not tap._maps


def test_chosen_heads_and_their_mean() -> None:
    model, given = adapted(), inputs()

    def taken(**options: Any) -> Tensor:
        tap = TextMapTap([1], **options)
        with probe(model, edits=tap):
            tap.begin()
            model(**given)
        return tap.take()[1]

    every = taken()
    assert torch.equal(taken(heads={1: [1]}), every[:, [1]])
    torch.testing.assert_close(taken(heads=0, reduce=True), every[:, 0])
    torch.testing.assert_close(taken(reduce=True), every.mean(1))
