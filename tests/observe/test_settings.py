"""The settings people run models in: compiled, with LoRA, fused projections, nested probes, callbacks, checkpointing,
and models that nobody has described."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from mmdit_probe.errors import RunError, UserError
from mmdit_probe.observe.maps import TextMaps
from mmdit_probe.observe.mass import AttentionMass
from mmdit_probe.observe.probe import probe
from tests.families import FIXTURES


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**inputs, return_dict=False)[0]
    return output


def masses(model: Any, inputs: dict[str, Any]) -> Tensor:
    with probe(model, AttentionMass()) as watched:
        run(model, inputs)
    return torch.tensor(watched[AttentionMass].table().mass.to_numpy())


def test_a_compiled_model_is_probed_whole() -> None:
    torch.compiler.reset()
    model, inputs = FIXTURES["flux"].build(num_layers=1, num_single_layers=1), FIXTURES["flux"].inputs()
    stock, plain = run(model, inputs), masses(model, inputs)
    with probe(model, AttentionMass()) as before:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        seen = run(compiled, inputs)
    torch.testing.assert_close(seen, stock, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(before[AttentionMass].table().mass.to_numpy()), plain, atol=1e-6, rtol=0)
    # Gone when the probe is; and attached again after compiling, noticed.
    torch.testing.assert_close(run(compiled, inputs), stock, atol=1e-5, rtol=0)
    with probe(compiled, AttentionMass(), layers=[1]) as after:
        run(compiled, inputs)
    assert set(after[AttentionMass].table().layer) == {1}


@pytest.mark.parametrize("name", ["qwen_image", "lumina2"])
def test_masked_and_packed_families_are_probed_whole_when_compiled(name: str) -> None:
    torch.compiler.reset()
    model, inputs = FIXTURES[name].build(num_layers=1), FIXTURES[name].inputs()
    whole = model
    if (
        name == "lumina2"
    ):  # its rotary embedding counts tokens in Python: no graph of the whole model, with or without us
        whole = model.layers[0]
    stock, plain = run(model, inputs), masses(model, inputs)
    with probe(model, AttentionMass()) as before:
        whole.compile(fullgraph=True, backend="eager")
        seen = run(model, inputs)
    torch.testing.assert_close(seen, stock, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(before[AttentionMass].table().mass.to_numpy()), plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(masses(model, inputs), plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(run(model, inputs), stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", ["probe", "compile"])
def test_compiled_repeated_blocks_are_each_seen(first: str) -> None:
    torch.compiler.reset()
    model, inputs = FIXTURES["flux"].build(), FIXTURES["flux"].inputs()
    stock, plain = run(model, inputs), masses(model, inputs)
    options = {"fullgraph": True, "backend": "eager"}
    if first == "compile":
        model.compile_repeated_blocks(**options)
        run(model, inputs)
    with probe(model, AttentionMass()) as watched:
        if first == "probe":
            model.compile_repeated_blocks(**options)
        seen = run(model, inputs)
    torch.testing.assert_close(seen, stock, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(watched[AttentionMass].table().mass.to_numpy()), plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(run(model, inputs), stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", ["probe", "offload"])
def test_weights_that_are_offloaded_to_the_cpu(first: str) -> None:
    from accelerate import cpu_offload

    model, inputs = FIXTURES["flux"].build(), FIXTURES["flux"].inputs()
    stock, plain = run(model, inputs), masses(model, inputs)
    if first == "offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert next(model.parameters()).device.type == "meta"
        found = masses(model, inputs)
    else:
        with probe(model, AttentionMass()) as watched:
            cpu_offload(model, execution_device=torch.device("cpu"))
            assert torch.equal(run(model, inputs), stock)
        found = torch.tensor(watched[AttentionMass].table().mass.to_numpy())
    assert torch.equal(found, plain) and torch.equal(run(model, inputs), stock)


def test_a_compiled_model_has_its_gradient_under_the_probe() -> None:
    torch.compiler.reset()
    model, inputs = FIXTURES["sd3"].build(num_layers=1), FIXTURES["sd3"].inputs()
    weight = model.transformer_blocks[0].attn.to_q.weight
    table = masses(model, inputs)

    def gradient(callee: Any) -> Tensor:
        model.zero_grad()
        callee(**inputs, return_dict=False)[0].square().mean().backward()
        return weight.grad.clone()

    plain = gradient(model)
    with probe(model, AttentionMass()) as watched:
        found = gradient(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(watched[AttentionMass].table().mass.to_numpy()), table, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["flux", "hunyuan_video"])
@pytest.mark.parametrize("first", ["lora", "probe"])
def test_lora_before_or_after_attaching_is_seen(name: str, first: str) -> None:
    from peft import LoraConfig

    model, inputs = FIXTURES[name].build(), FIXTURES[name].inputs()
    plain = masses(model, inputs)
    config = LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False)
    torch.manual_seed(0)
    if first == "lora":
        model.add_adapter(config)
        found = masses(model, inputs)
    else:
        with probe(model, AttentionMass()) as watched:
            model.add_adapter(config)
            run(model, inputs)
        found = torch.tensor(watched[AttentionMass].table().mass.to_numpy())
    again = masses(model, inputs)
    torch.testing.assert_close(found, again, atol=0, rtol=0)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_fused_projections_give_the_same_masses(name: str) -> None:
    model, inputs = FIXTURES[name].build(), FIXTURES[name].inputs()
    plain = masses(model, inputs)
    model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(masses(model, inputs), plain, atol=1e-6, rtol=0)
    model.unfuse_qkv_projections()
    with probe(model, AttentionMass()) as watched:
        model.fuse_qkv_projections()
        run(model, inputs)
    found = torch.tensor(watched[AttentionMass].table().mass.to_numpy())
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)


def test_probes_nest_and_each_has_its_own_layers() -> None:
    model, inputs = FIXTURES["mochi"].build(), FIXTURES["mochi"].inputs()
    stock, plain = run(model, inputs), masses(model, inputs)
    with probe(model, AttentionMass()) as outer, probe(model, AttentionMass(), layers=1) as inner:
        assert torch.equal(run(model, inputs), stock)
    with probe(model, AttentionMass()) as first:
        second = probe(model, AttentionMass())
        second.__enter__()
        run(model, inputs)
    # Left in the wrong order: the second goes on, and takes nothing with it.
    run(model, inputs)
    second.__exit__(None, None, None)
    assert torch.equal(run(model, inputs), stock)
    for watched in (outer, first):
        assert torch.equal(torch.tensor(watched[AttentionMass].table().mass.to_numpy()), plain)
    assert set(inner[AttentionMass].table().layer) == {1}
    assert len(second[AttentionMass].table()) == 2 * len(plain)


def test_a_probe_inside_a_pipeline_callback_sees_its_own_call_only(pipe: Any) -> None:
    tables = []
    extra = {"hidden_states": torch.zeros(1, 4, 8, 8), "timestep": torch.tensor([500.0])}

    def look(pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        text = {"encoder_hidden_states": kwargs["prompt_embeds"][:1], "pooled_projections": torch.zeros(1, 24)}
        with probe(pipeline.transformer, AttentionMass()) as watched, torch.no_grad():
            pipeline.transformer(**extra, **text)
        tables.append(watched[AttentionMass].table())
        return {}

    stock = pipe("a cat", num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))
    seen = pipe(
        "a cat", num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0),
        callback_on_step_end=look, callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )  # fmt: skip
    assert torch.equal(stock.images, seen.images) and len(tables) == 2
    assert all(table.sigma.unique().tolist() == [0.5] for table in tables)


@pytest.mark.parametrize("name", ["flux", "cogview4"])
def test_checkpointing_is_counted_once_and_keeps_the_gradient(name: str) -> None:
    model, inputs = FIXTURES[name].build(), FIXTURES[name].inputs()
    weight = next(p for n, p in model.named_parameters() if n.endswith("to_q.weight"))

    def gradient() -> Tensor:
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return weight.grad.clone()

    plain, table = gradient(), masses(model, inputs)
    model.train()
    model.enable_gradient_checkpointing()
    with probe(model, AttentionMass()) as watched:
        found = gradient()
    torch.testing.assert_close(found, plain, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(watched[AttentionMass].table().mass.to_numpy()), table, atol=1e-6, rtol=0)


def stranger(name: str) -> Any:
    """The model of a family in a class that no entry names."""
    model = FIXTURES[name].build()

    class Stranger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **kwargs: Any) -> Any:
            return self.inner(hidden_states, encoder_hidden_states=encoder_hidden_states, timestep=timestep, **kwargs)

    return Stranger()


def frames_together(table: pd.DataFrame) -> pd.DataFrame:
    """A table of masses with one row for all frames, which only an entry tells apart."""
    others = table["span"] == "other frames"
    with_others = table["mass"] + table["mass"].where(others, 0.0).shift(-1, fill_value=0.0)
    whole = table.assign(mass=with_others)[~others]
    sample = whole.groupby(["layer", "head", "query", "key", "span"], observed=True).cumcount()
    return whole.assign(sample=sample).sort_values(["sample", "layer", "head", "query", "key"], ignore_index=True)


@pytest.mark.parametrize("name", ["flux", "aura_flow", "lumina2", "mochi", "prx"])
def test_an_unknown_model_is_laid_out_mechanically(name: str) -> None:
    model, inputs = stranger(name), FIXTURES[name].inputs()
    known, plain = FIXTURES[name].build(), FIXTURES[name].inputs()
    with probe(known, AttentionMass(), layers=[1]) as expected:
        run(known, plain)
    with probe(model, AttentionMass(), layers=[1]) as watched:
        stock = run(model, inputs)
    assert torch.equal(stock, run(known, plain))
    found, entry = (frames_together(watched[AttentionMass].table()) for watched in (watched, expected))
    columns = ["layer", "head", "query", "key", "n_query"]
    # Padding of a shorter sample is no token by the entry, and an "other" one that the mask hides mechanically.
    assert found[columns].equals(entry[columns])
    torch.testing.assert_close(
        torch.tensor(found.mass.to_numpy()), torch.tensor(entry.mass.to_numpy()), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("timesteps", [(0.6, 0.4), (0.4, 0.6)])
def test_an_unknown_models_calls_at_one_timestep_are_one_step(timesteps: tuple[float, ...]) -> None:
    """The branches of guidance in calls of their own; whether its timesteps fall or rise is not known."""
    model, inputs = stranger("aura_flow"), FIXTURES["aura_flow"].inputs()
    with probe(model, AttentionMass(rows="layer"), layers=[0]) as watched:
        for timestep in timesteps:
            for _ in range(2):
                run(model, inputs | {"timestep": torch.full_like(inputs["timestep"], timestep)})
    table = watched[AttentionMass].table()
    assert table.groupby("step").size().nunique() == 1 and set(table["step"]) == {0, 1}


def test_an_unknown_models_grid_is_guessed_from_its_latents() -> None:
    model, inputs = stranger("aura_flow"), FIXTURES["aura_flow"].inputs()
    with probe(model, TextMaps()) as watched:
        run(model, inputs)
    assert watched[TextMaps].maps(0, branch=None).shape == (2, 3, 4, 7)


def test_an_unknown_model_without_joint_attention_is_refused() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(4, 4)

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            q, k = hidden_states[:, None], self.key(encoder_hidden_states)[:, None]
            return nn.functional.scaled_dot_product_attention(q, k, k)

    with pytest.raises(UserError, match="Cross is not an MM-DiT"), probe(Cross(), AttentionMass()) as watched:
        watched.transformer(torch.randn(1, 5, 4), torch.randn(1, 3, 4))


def test_a_cached_call_that_shows_not_all_keys_is_an_error() -> None:
    model, inputs = FIXTURES["flux"].build(), FIXTURES["flux"].inputs()
    inputs["img_ids"] = inputs["img_ids"][:8]
    with pytest.raises((RunError, RuntimeError)), probe(model, AttentionMass()):
        run(model, inputs)
