"""Operations on blocks against the stock model's own skipping, hooks of torch, and float64 attention."""

from __future__ import annotations

import functools
import inspect
from functools import partial
from typing import Any

import pytest
import torch

from mmdit_probe import AttentionMass, probe
from mmdit_probe.attention import reference
from mmdit_probe.edit import RemoveBlock, ScaleText
from mmdit_probe.edit.guidance import guided_calls
from mmdit_probe.errors import UserError
from mmdit_probe.models.families.registry import family_of
from mmdit_probe.models.layout import find_layers
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.observer import Observer
from tests import tiny
from tests.edit.test_edits import sample
from tests.families import FIXTURES


def given(rows: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(rows, 4, 8, 8, generator=draw),
        "encoder_hidden_states": torch.randn(rows, 7, 40, generator=draw),
        "pooled_projections": torch.randn(rows, 24, generator=draw),
        "timestep": torch.tensor([500.0] * rows),
    }


@torch.no_grad()
def output(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    return model(**inputs, **options, return_dict=False)[0]


@pytest.mark.parametrize("variant", ["sd3", "sd35"])
@pytest.mark.parametrize("layers", [[0], [1, 2], "all"])
def test_a_removed_block_is_the_stock_models_skipped_one(variant: str, layers: Any) -> None:
    model, inputs = tiny.transformer(variant), given()
    skipped = list(range(len(model.transformer_blocks))) if layers == "all" else layers
    stock, expected = output(model, inputs), output(model, inputs, skip_layers=skipped)
    with probe(model, AttentionMass(), edits=RemoveBlock(layers)) as run:
        assert torch.equal(output(model, inputs), expected)
    assert not torch.equal(stock, expected)
    assert len(run[AttentionMass].table()) > 0  # the block still runs, and is observed
    assert torch.equal(output(model, inputs), stock)


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_scaled_text_is_what_a_hook_of_torch_makes_of_the_blocks_input(factor: float) -> None:
    model, inputs = tiny.transformer(), given()

    def scaled(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"encoder_hidden_states": factor * kwargs["encoder_hidden_states"]}

    hook = model.transformer_blocks[1].register_forward_pre_hook(scaled, with_kwargs=True)
    expected = output(model, inputs)
    hook.remove()
    with probe(model, edits=ScaleText([1], factor=factor)):
        assert torch.equal(output(model, inputs), expected)
    assert not torch.equal(output(model, inputs), expected)


def test_silenced_text_gives_the_attention_of_zero_text_in_float64() -> None:
    """The layer's text keys and values are those of text that was zero before norm, modulation and projection."""
    model, inputs = tiny.transformer(), given()
    model.double()
    inputs = {name: tensor.double() for name, tensor in inputs.items()}
    block, seen = model.transformer_blocks[1], {}

    class Keep(Observer):
        def observe(self, call: Any) -> None:
            seen["call"], seen["output"] = call.call, call.output

    block.norm1_context.register_forward_hook(lambda module, args, kwargs, out: seen.update(emb=kwargs["emb"]),
                                              with_kwargs=True)  # fmt: skip
    with probe(model, Keep(), layers=[1], edits=ScaleText([1], factor=0.0)):
        output(model, inputs)
    shift = block.norm1_context.linear(torch.nn.functional.silu(seen["emb"])).chunk(6, dim=1)[0]  # [B, C]
    text = shift[:, None].expand(-1, 7, -1)  # the norm of zeros is zero
    call, attention = seen["call"], block.attn
    for tensor, projection in ((call.key, attention.add_k_proj), (call.value, attention.add_v_proj)):
        heads = projection(text).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        torch.testing.assert_close(tensor[:, :, 16:], heads)
    torch.testing.assert_close(seen["output"], reference.probabilities(call.query, call.key) @ call.value)


@pytest.mark.parametrize("name", ["flux", "aura_flow", "qwen_image", "mochi", "lumina2", "z_image", "cogview4", "prx"])
def test_every_order_of_streams_and_single_sequences(name: str) -> None:
    """A removed block leaves its tokens as they came, whether text comes first, last or in the same sequence."""
    model, inputs = FIXTURES[name].build(), FIXTURES[name].inputs()
    layers = find_layers(family_of(model), model)
    for layer in (layers[0], layers[-1]):
        block = model.get_submodule(layer.path.rpartition(".")[0])
        own = type(block).forward

        def untouched(*args: Any, block: Any = block, own: Any = own, **kwargs: Any) -> Any:
            found = own(block, *args, **kwargs)
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim == 3]
            like = {x.shape: x for x in reversed(tensors)}
            return tuple(like[x.shape] for x in found) if isinstance(found, tuple) else like[found.shape]

        block.forward = untouched
        expected = torch.stack(list(output(model, inputs)))
        del block.forward
        with probe(model, edits=RemoveBlock([layer.index])):
            assert torch.equal(torch.stack(list(output(model, inputs))), expected)
        assert not torch.equal(torch.stack(list(output(model, inputs))), expected)


def tokens_into(kept: list[torch.Tensor], module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    kept += [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim == 3]


def forwarded(inner: Any, kept: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """The block's own forward, whose tokens are kept: what arrives behind the edit."""
    by_name = inspect.signature(inner).bind(*args, **kwargs).arguments
    tokens_into(kept, None, (), by_name)
    return inner(*args, **kwargs)


@pytest.mark.parametrize("name", ["flux", "aura_flow", "qwen_image", "lumina2", "z_image"])
def test_scaled_text_scales_text_alone(name: str) -> None:
    """Registers, which share the text's stream in AuraFlow, and image tokens in one sequence stay as they are."""
    model, inputs = FIXTURES[name].build(), FIXTURES[name].inputs()
    layers = find_layers(family_of(model), model)
    for layer in (layers[0], layers[-1]):
        block = model.get_submodule(layer.path.rpartition(".")[0])
        before, after = [], []
        hook = block.register_forward_pre_hook(partial(tokens_into, before), with_kwargs=True)
        inner = block.forward
        block.forward = partial(forwarded, inner, after)
        with probe(model, edits=ScaleText([layer.index], factor=3.0)) as run:
            output(model, inputs)
            layout, places = run.arranged(layer)
        hook.remove()
        del block.forward
        samples = len(before[0])
        text = (
            samples * layout.counts["text"] if places is None else int((places.keys[:, layout.labels == 1] >= 0).sum())
        )
        changed = sum(int((one != other).any(-1).sum()) for one, other in zip(before, after, strict=True))
        assert changed == text
        assert all(torch.equal(other[one != other], 3.0 * one[one != other])
                   for one, other in zip(before, after, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    "edit",
    [RemoveBlock(branches=("perturbed",)), RemoveBlock().no_op(), ScaleText(factor=1.0), ScaleText().no_op()],
    ids=lambda edit: f"{edit.record()}",
)
def test_no_op_settings_are_bitwise_neutral(pipe: Any, edit: Any) -> None:
    stock = sample(pipe)
    with probe(pipe, edits=edit):
        assert torch.equal(sample(pipe), stock)
    assert all("forward" not in block.__dict__ for block in pipe.transformer.transformer_blocks)


@pytest.mark.parametrize("make", [RemoveBlock, ScaleText])
def test_steps_and_branches_are_addressed(pipe: Any, make: Any) -> None:
    stock = sample(pipe)
    images = {}
    for address in ({"steps": 0}, {"steps": 1}, {"steps": "last"}, {"branches": ("cond",)}, {}):
        with probe(pipe, edits=make([1], **address)):
            images[str(address)] = sample(pipe)
    first, second, last, cond, every = images.values()
    assert torch.equal(second, last)
    distinct = [stock, first, second, cond, every]
    assert all(not torch.equal(a, b) for k, a in enumerate(distinct) for b in distinct[:k])


def test_guidance_by_a_removed_block_is_skip_layer_guidance() -> None:
    """The stock pipeline's own: c + s (c - skipped), beside classifier-free guidance."""
    model = MMDiT(tiny.pipeline())
    options: dict[str, Any] = {"steps": 2, "seed": 5, "guidance": 4.0, "output_type": "latent"}
    expected = model.generate(
        "a red ring", skip_guidance_layers=[1], skip_layer_guidance_scale=2.0, skip_layer_guidance_start=-1.0,
        skip_layer_guidance_stop=2.0, **options,
    )  # fmt: skip
    with guided_calls(model, RemoveBlock([1]), scale=2.0, guidance=4.0):
        found = model.generate("a red ring", **options)
    assert (found - expected).abs().max() < 1e-4


def test_a_block_that_gives_one_stream_another_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.transformer()
    stock = type(model.transformer_blocks[1]).forward

    @functools.wraps(stock)
    def wider(*args: Any, **kwargs: Any) -> Any:
        text, image = stock(*args, **kwargs)
        return text, image.repeat(1, 1, 2)

    monkeypatch.setattr(type(model.transformer_blocks[1]), "forward", wider)
    with probe(model, edits=RemoveBlock([0])), pytest.raises(UserError, match="other shapes than its inputs"):
        output(model, given())


def test_bad_operations_are_refused() -> None:
    with pytest.raises(UserError, match="cond"):
        RemoveBlock(branches=("con",))
    with pytest.raises(UserError, match="finite"):
        ScaleText(factor=float("inf"))
    model = tiny.transformer()
    inputs = given() | {"encoder_hidden_states": torch.randn(2, 16, 40)}  # as many text tokens as image tokens
    with probe(model, edits=RemoveBlock([0])), pytest.raises(UserError, match="which of its 2 outputs is the image"):
        output(model, inputs)
