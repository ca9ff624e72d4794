"""probe: neutrality, restoration, labels, guard rails."""

from __future__ import annotations

import functools
import gc
import itertools
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from mmdit_probe import AttentionMass, Blur, MMDiT, TextMaps, assets, load, probe
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.edit import Scale
from mmdit_probe.errors import ProbeWarning, RunError, UserError
from mmdit_probe.models.layout import Layout, Places
from mmdit_probe.observe.observer import LayerCall, Observer
from mmdit_probe.observe.probe import ForwardEnded, _LayerRecorder, _spread
from tests import tiny
from tests.devices import DEVICES
from tests.families import FIXTURES

PROMPTS = ["a red ring", "a cat"]


def sample(pipe: Any, prompts: Any = None, steps: int = 2, guidance: float = 5.0, seed: int = 0, **options: Any) -> Any:
    prompts = PROMPTS if prompts is None else prompts
    options = {"generator": torch.Generator().manual_seed(seed), "output_type": "np"} | options
    return pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=tiny.T5_LENGTH,
        **options,
    ).images


def state(pipe: Any) -> list[tuple[str, list[str], int, int]]:
    """Everything a probe could leave behind: instance attributes and hooks of every module, and the pipeline's own."""
    modules = [
        (name, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in pipe.transformer.named_modules()
    ]
    return [*modules, ("pipeline", sorted(pipe.__dict__), 0, 0)]


@pytest.mark.parametrize("variant", ["sd3", "sd35", "no-t5"])
def test_observing_is_bitwise_neutral_and_leaves_nothing(variant: str) -> None:
    pipe = tiny.pipeline(variant)
    stock, before = sample(pipe), state(pipe)
    with probe(pipe, AttentionMass(), TextMaps()):
        assert np.array_equal(sample(pipe), stock)
    assert state(pipe) == before
    assert np.array_equal(sample(pipe), stock)


def test_observing_bfloat16_is_bitwise_neutral(pipe: Any) -> None:
    pipe.transformer.to(torch.bfloat16)
    inputs = bare_inputs(dtype=torch.bfloat16)
    stock = pipe.transformer(**inputs, return_dict=False)[0]
    with probe(pipe.transformer, AttentionMass()):
        assert torch.equal(pipe.transformer(**inputs, return_dict=False)[0], stock)


def test_the_output_does_change_under_an_edit(pipe: Any) -> None:
    """The control of neutrality: were the output compared with itself, this would fail."""
    stock = sample(pipe)
    with probe(pipe, edits=ScaleTextValues()):
        assert not np.array_equal(sample(pipe), stock)
    assert np.array_equal(sample(pipe), stock)


def test_an_error_inside_restores_everything(pipe: Any) -> None:
    stock, before = sample(pipe), state(pipe)
    observer = AttentionMass()

    def interrupt(*args: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), probe(pipe, observer):
        sample(pipe, callback_on_step_end=interrupt)
    assert state(pipe) == before and np.array_equal(sample(pipe), stock)
    assert set(observer.table()["step"]) == {0}


def test_an_error_in_the_middle_of_a_call_drops_its_half_finished_rows(pipe: Any) -> None:
    observer = AttentionMass()
    sample(pipe)
    before = state(pipe)

    class Fails(Observer):
        def observe(self, seen: LayerCall) -> None:
            if seen.layer.index == 1 and seen.denoising.step == 1:
                raise ValueError("broken observer")

    with pytest.raises(ValueError, match="broken observer"), probe(pipe, observer, Fails()):
        sample(pipe)
    assert state(pipe) == before
    table = observer.table()
    assert set(table["step"]) == {0} and set(table["layer"]) == {0, 1, 2}
    # Layer 0 of the broken call was measured; it must not come out with the next call's rows.
    with probe(pipe, observer, layers=2):
        sample(pipe, steps=1)
    assert set(observer.table().iloc[len(table) :]["layer"]) == {2}


def test_step_sigma_branch_prompt_and_seed(pipe: Any) -> None:
    with probe(pipe, AttentionMass()) as run:
        sample(pipe, steps=3, generator=[torch.Generator().manual_seed(seed) for seed in (11, 12)])
    table = run[AttentionMass].table()
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:3]]
    found = table[["step", "sigma"]].drop_duplicates().sort_values("step")
    assert found["step"].tolist() == [0, 1, 2] and found["sigma"].tolist() == pytest.approx(sigmas)
    assert set(table["branch"]) == {"cond", "uncond"} and set(table["seed"]) == {11, 12}
    assert set(map(tuple, table[["prompt", "seed"]].values)) == set(zip(PROMPTS, (11, 12), strict=True))
    # The unconditional half is the empty prompt: no words, the conditional half has some.
    assert set(table.query("span == 'word'")["branch"]) == {"cond"}
    assert table.groupby(["prompt", "branch", "step"]).size().nunique() <= 2


def test_the_seed_of_one_generator_is_that_of_one_image(pipe: Any) -> None:
    """The second image of two is not what its seed alone gives."""

    def images(prompts: Any) -> Tensor:
        with probe(pipe, AttentionMass()) as run:
            found: Tensor = sample(pipe, prompts=prompts, seed=11, output_type="latent")
        seeds.append(set(run[AttentionMass].table()["seed"]))
        return found

    seeds: list[set[int]] = []
    alone = images(PROMPTS[1])
    with pytest.warns(ProbeWarning, match="seeds are unknown: give a list of generators"):
        together = images(PROMPTS)
    assert (alone[0] - together[1]).abs().max() > 0.1
    assert seeds == [{11}, {-1}]


def test_without_guidance_every_row_is_conditional(pipe: Any) -> None:
    with probe(pipe, AttentionMass()) as run:
        sample(pipe, guidance=1.0)
    table = run[AttentionMass].table()
    assert set(table["branch"]) == {"cond"} and set(table["prompt"]) == set(PROMPTS)


def test_negative_prompts_and_copies_are_told_apart(pipe: Any) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
    with probe(pipe, TextMaps()) as run:
        pipe(
            PROMPTS,
            negative_prompt=["house", "grass grass"],
            num_images_per_prompt=2,
            num_inference_steps=1,
            max_sequence_length=tiny.T5_LENGTH,
            generator=generators,
            output_type="latent",
        )
    rows = run[TextMaps].samples(0)
    assert [row[:2] for row in rows] == [("a red ring", 1), ("a red ring", 2), ("a cat", 3), ("a cat", 4)]
    assert run[TextMaps].maps(0, branch=None).shape[0] == 8


def test_the_negative_prompt_has_its_own_words(pipe: Any) -> None:
    with pytest.raises(UserError, match="unknown word 'grass'"), probe(pipe, TextMaps(["grass"]), layers=0):
        sample(pipe, prompts="a red ring", negative_prompt="grass")
    with probe(pipe, TextMaps(["ring"]), layers=0) as run:
        sample(pipe, prompts="a red ring", negative_prompt="grass")
    assert run[TextMaps].maps(0, branch="cond").abs().max() > 0
    assert run[TextMaps].maps(0, branch="uncond").abs().max() == 0


def test_embeddings_made_elsewhere_are_unknown_unless_named(pipe: Any) -> None:
    model = MMDiT(pipe)
    text = model.encode_prompt("a red ring")
    given = {"prompt_embeds": text.prompt_embeds, "pooled_prompt_embeds": text.pooled}
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "max_sequence_length": 10}
    with probe(pipe, AttentionMass()) as run:
        pipe(**given, **options, generator=torch.Generator().manual_seed(0))
    table = run[AttentionMass].table()
    assert set(table.query("key == 'text'")["span"]) == {"unknown"} and set(table["branch"]) == {"cond"}
    with probe(pipe, AttentionMass(), tokens=text.tokens[0]) as run:
        pipe(**given, **options, generator=torch.Generator().manual_seed(0))
    named = run[AttentionMass].table()
    assert {"word", "bos"} <= set(named["span"]) and set(named["prompt"]) == {"a red ring"}
    assert named.query("key == 'text'")["mass"].sum() == pytest.approx(table.query("key == 'text'")["mass"].sum())


def test_labels_follow_the_embeddings_not_the_batch_size(pipe: Any) -> None:
    """Two prompts without guidance and one with it give the same batch; text edited by a callback is nobody's
    prompt."""

    def blank(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    with probe(pipe, AttentionMass()) as run:
        sample(pipe, steps=2, callback_on_step_end=blank, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    table = run[AttentionMass].table()
    assert set(table.query("step == 0")["branch"]) == {"cond", "uncond"}
    assert set(table.query("step == 1")["branch"]) == {"unknown"}


def bare_inputs(rows: int = 2, dtype: torch.dtype = torch.float32, timestep: float = 500.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(rows, 4, 8, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(rows, 22, 40, generator=generator).to(dtype),
        "pooled_projections": torch.randn(rows, 24, generator=generator).to(dtype),
        "timestep": torch.full((rows,), timestep),
    }


def test_a_bare_transformer_counts_steps_and_scales_timesteps() -> None:
    transformer = tiny.transformer()
    with probe(transformer, AttentionMass(), branches=("uncond", "cond")) as run:
        for timestep in (1000.0, 400.0, 1000.0):
            transformer(**bare_inputs(timestep=timestep))
    table = run[AttentionMass].table()
    assert table[["step", "sigma"]].drop_duplicates().values.tolist() == [[0.0, 1.0], [1.0, 0.4]]
    assert set(table["branch"]) == {"uncond", "cond"} and set(table["prompt"]) == {""}
    assert set(table.query("key == 'text'")["span"]) == {"unknown"}
    with pytest.raises(UserError, match="cannot be divided"), probe(transformer, branches=("a", "b")):
        transformer(**bare_inputs(rows=3))
    with pytest.raises(UserError, match="number of steps is unknown"):
        probe(transformer, AttentionMass(), steps="last-8")
    with pytest.raises(UserError, match="number of steps is unknown"), probe(transformer, edits=Scale(steps="last-1")):
        transformer(**bare_inputs())


def test_an_iterator_or_an_array_names_layers_steps_and_heads_as_a_list_does(pipe: Any) -> None:
    tables = []
    for of in (list, iter, np.array, pd.Series):
        edit = Scale(layers=of([0, 1]), steps=of([1, 2]), heads={0: of([1])})
        with probe(pipe, AttentionMass(heads=of([0])), layers=of([0, 2]), steps=of([0, 2]), edits=edit) as run:
            sample(pipe, steps=3)
        tables.append(run[AttentionMass].table())
    assert all(table.equals(tables[0]) for table in tables[1:])
    assert tables[0][["layer", "head", "step"]].drop_duplicates().values.tolist() == [
        [0, 0, 0], [2, 0, 0], [0, 0, 2], [2, 0, 2],
    ]  # fmt: skip


def test_maps_take_arrays_and_iterators_as_they_take_lists(pipe: Any) -> None:
    found = []
    for of in (list, iter, np.array):
        edit = Blur(layers=[0], words=of(["ring"]))
        with probe(pipe, TextMaps(of(["red", "ring"]), heads="all"), edits=edit) as run:
            sample(pipe, ["a red ring"], steps=3)
        assert run.notes == []
        found.append(run[TextMaps].map("ring", layers=of([0, 2]), steps=of([0, 2]), heads=of([1])))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    with probe(pipe, TextMaps(np.array([1, 2]))) as run:
        sample(pipe, ["a red ring"])
    assert run[TextMaps].maps(0).shape[-1] == 2


def test_wrong_token_tables_are_refused(pipe: Any) -> None:
    tables = MMDiT(pipe, max_sequence_length=4).token_tables("a cat")
    with pytest.raises(UserError, match=r"\[16\] positions for 2 rows of 22"), probe(pipe.transformer, tokens=tables):
        pipe.transformer(**bare_inputs())


def test_steps_and_layers_are_selected(pipe: Any) -> None:
    with probe(pipe, AttentionMass(), layers="0,2", steps="last-2") as run:
        sample(pipe, steps=4)
    table = run[AttentionMass].table()
    assert set(table["layer"]) == {0, 2} and set(table["step"]) == {2}
    with pytest.raises(UserError, match="layer 3 does not exist"):
        probe(pipe, AttentionMass(), layers=3)
    with pytest.raises(UserError, match="step 7 does not exist"), probe(pipe, AttentionMass(), steps=7):
        sample(pipe)
    refusal = "no denoising call was at steps 3; the steps that ran are 0, 1"
    with pytest.raises(UserError, match=refusal), probe(pipe, AttentionMass(), steps=3):
        sample(pipe, steps=4, callback_on_step_end=stop_after(1))


def stop_after(last: int) -> Callable[..., dict[str, Any]]:
    """A callback that ends the sampling early."""

    def interrupt(pipe: Any, step: int, *others: Any) -> dict[str, Any]:
        pipe._interrupt = step >= last
        return {}

    return interrupt


def test_skipped_layers_are_no_error_and_their_pass_is_named(pipe: Any) -> None:
    with probe(pipe, AttentionMass()) as run:
        sample(
            pipe,
            skip_guidance_layers=[1],
            skip_layer_guidance_start=-1.0,
            skip_layer_guidance_stop=2.0,
        )
    table = run[AttentionMass].table()
    assert set(table["branch"]) == {"cond", "uncond", "perturbed"}
    assert set(table.query("branch == 'perturbed'")["layer"]) == {0, 2}


class PlainProcessor:
    """Attention without torch's function, as some kernels do it."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        return attn.to_out[0](hidden_states), attn.to_add_out(encoder_hidden_states)


def test_a_layer_that_is_never_seen_raises_and_is_named(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[1].attn.processor = PlainProcessor()
    sample(pipe)
    before = state(pipe)
    with (
        pytest.raises(RunError, match=r"layer 1 \(transformer_blocks.1.attn, PlainProcessor, backend 'native'\)"),
        probe(pipe, AttentionMass()),
    ):
        sample(pipe)
    assert state(pipe) == before
    with probe(pipe, AttentionMass(), layers=[0, 2]) as run:
        sample(pipe)
    assert set(run[AttentionMass].table()["layer"]) == {0, 2}


def test_nothing_seen_at_all_raises(pipe: Any) -> None:
    with pytest.raises(RunError, match="no denoising call"), probe(pipe, AttentionMass()):
        pass
    other = tiny.transformer()
    with pytest.raises(RunError, match="no denoising call"), probe(pipe, AttentionMass()):
        other(**bare_inputs())


def test_a_call_that_bypasses_the_transformer_raises(pipe: Any) -> None:
    with pytest.raises(RunError, match="outside the transformer's own call"), probe(pipe, AttentionMass()):
        pipe.transformer.forward(**bare_inputs())


def test_a_backend_that_the_processors_do_not_ask_for_changes_nothing(pipe: Any) -> None:
    """SD3's processors call torch's function themselves, whatever diffusers' dispatch is set to."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    stock, process_wide = sample(pipe), _AttentionBackendRegistry._active_backend
    _AttentionBackendRegistry._active_backend = AttentionBackendName.FLEX
    try:
        with probe(pipe, AttentionMass()):
            assert np.array_equal(sample(pipe), stock)
        assert _AttentionBackendRegistry._active_backend == AttentionBackendName.FLEX
    finally:
        _AttentionBackendRegistry._active_backend = process_wide


def test_a_hook_put_on_inside_the_probe_stays_and_can_be_taken_off() -> None:
    from diffusers import LayerSkipConfig
    from diffusers.hooks.layer_skip import apply_layer_skip

    model, inputs = FIXTURES["qwen_image"].build(), FIXTURES["qwen_image"].inputs()

    def output() -> Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    stock = output()
    with pytest.raises(RunError, match="AttentionProcessorSkipHook skips it"), probe(model, AttentionMass()):
        apply_layer_skip(
            model, LayerSkipConfig(indices=[1], skip_attention_scores=True, skip_attention=False, skip_ff=False)
        )
        skipped = output()
    assert not torch.equal(skipped, stock) and torch.equal(output(), skipped)
    with probe(model, AttentionMass()):
        model.transformer_blocks[1].attn._diffusers_hook.remove_hook("layer_skip_hook")
        assert torch.equal(output(), stock)


def test_a_hook_of_before_that_is_taken_off_inside_the_probe_takes_the_probe_with_it() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    model, inputs = FIXTURES["qwen_image"].build(), FIXTURES["qwen_image"].inputs()
    registry = HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1].attn)
    registry.register_hook(ModelHook(), "somebody's")
    with (
        pytest.raises(RunError, match=r"layer 1 .* was given another forward"),
        probe(model, AttentionMass()),
        torch.no_grad(),
    ):
        registry.remove_hook("somebody's")
        model(**inputs)


def test_more_text_positions_than_an_embedded_model_was_trained_with_are_noted() -> None:
    """Stock SD3 pipelines pad T5 to 256. How many positions another model takes is its own affair."""
    pipe, embedded = tiny.pipeline(), tiny.pipeline()
    embedded.register_to_config(_name_or_path=str(assets.path("scenes-sd3")))
    for pipeline, length in ((pipe, 16), (embedded, tiny.T5_LENGTH)):
        with probe(pipeline, AttentionMass()) as run:
            pipeline("a red ring", num_inference_steps=1, max_sequence_length=length, output_type="latent")
        assert run.notes == []
    message = f"t5 has 16 text positions, and this embedded model was trained with {tiny.T5_LENGTH}"
    with pytest.warns(ProbeWarning, match=message), probe(embedded, AttentionMass()) as run:
        embedded("a red ring", num_inference_steps=2, max_sequence_length=16, output_type="latent")
    assert len(run.notes) == 1


def test_layers_left_out_by_a_cache_are_noted_once_and_the_others_reported() -> None:
    from diffusers import FirstBlockCacheConfig

    model, inputs = FIXTURES["flux"].build(), FIXTURES["flux"].inputs()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with (
        pytest.warns(UserWarning, match=r"FirstBlockCache \(.*FBC.*disable_cache\(\)") as caught,
        probe(model, AttentionMass()) as run,
        model.cache_context("cond"),
        torch.no_grad(),
    ):
        for timestep in (1.0, 0.9, 0.8):
            model(**inputs | {"timestep": torch.full((2,), timestep)})
    table = run[AttentionMass].table()
    assert table.groupby("layer")["step"].unique().map(list).tolist() == [[0, 1, 2], [0], [0], [0]]
    assert len(run.notes) == len([note for note in caught if "FirstBlockCache" in str(note.message)]) == 1


def test_context_parallelism_is_refused(pipe: Any) -> None:
    pipe.transformer._parallel_config = object()
    with pytest.raises(UserError, match="context parallelism"), probe(pipe, AttentionMass()):
        sample(pipe)


@pytest.mark.parametrize(("keys", "queries"), [(6, 5), (5, 6)])
def test_a_call_that_lacks_the_last_token_is_refused(keys: int, queries: int) -> None:
    """Tokens 0..5 are looked for; the call has one fewer on a side."""
    tokens = torch.arange(6)[None]
    call = SDPACall(torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, keys, 4), torch.zeros(1, 1, keys, 4))
    layout, places = Layout.from_counts([("image", 4), ("text", 2)]), Places(tokens, tokens)
    recorder = SimpleNamespace(name="layer 0")
    with pytest.raises(RunError, match=f"attends from {queries} to {keys} tokens in 1 samples"):
        _LayerRecorder._check(recorder, SimpleNamespace(call=call), 1, layout, places)  # type: ignore[arg-type]


def test_tokens_that_are_there_for_one_sample_are_so_for_all() -> None:
    there, places = torch.tensor([[True, False, True]]), torch.tensor([[0, -1, 1]])
    layout = replace(Layout.from_counts([("image", 2), ("text", 1)]), keys=there, queries=~there)
    layout, found = _spread(layout, Places(places, places + 1), 2)
    assert layout.keys is not None and layout.queries is not None and found is not None
    assert layout.keys.tolist() == there.tolist() * 2 and layout.queries.tolist() == (~there).tolist() * 2
    assert found.keys.tolist() == places.tolist() * 2 and found.queries.tolist() == (places + 1).tolist() * 2


def test_things_that_are_no_model_are_refused() -> None:
    with pytest.raises(UserError, match="cannot probe str"):
        probe("scenes-sd3")
    with pytest.raises(UserError, match="not a known MM-DiT"):
        probe(torch.nn.Linear(2, 2))


def test_an_observer_is_found_by_its_class(pipe: Any) -> None:
    run = probe(pipe, AttentionMass(), TextMaps(), TextMaps(queries="text"))
    assert isinstance(run[AttentionMass], AttentionMass)
    with pytest.raises(UserError, match="2 observers of class TextMaps"):
        run[TextMaps]


class ScaleTextValues:
    """An edit: image queries see the text values times two (by two calls on disjoint query rows)."""

    layers = 1
    stage = "output"

    def handler(self, layer: Any, run: Any) -> Any:
        def edit(call: SDPACall, module_call: Any, proceed: Callable[[SDPACall], Tensor]) -> Tensor:
            assert run.current is not None
            image = module_call.argument("hidden_states", 0).shape[1]
            louder = torch.cat([call.value[:, :, :image], 2 * call.value[:, :, image:]], 2)
            return torch.cat(
                [
                    proceed(SDPACall(call.query[:, :, :image], call.key, louder)),
                    proceed(SDPACall(call.query[:, :, image:], call.key, call.value)),
                ],
                2,
            )

        return edit


@pytest.mark.parametrize("nested", [False, True])
def test_masses_are_those_of_the_full_call_even_with_edits(pipe: Any, nested: bool) -> None:
    with probe(pipe, AttentionMass()) as plain:
        sample(pipe, steps=1)
    if nested:
        with probe(pipe, edits=ScaleTextValues()), probe(pipe, AttentionMass()) as edited:
            sample(pipe, steps=1)
    else:
        with probe(pipe, AttentionMass(), edits=[ScaleTextValues()]) as edited:
            sample(pipe, steps=1)
    one, two = (run[AttentionMass].table() for run in (plain, edited))
    upstream = one["layer"] <= 1  # the edit changes what comes after layer 1
    assert np.array_equal(one[upstream]["mass"], two[upstream]["mass"])
    assert not np.allclose(one[~upstream]["mass"], two[~upstream]["mass"], atol=1e-6)


def masses_of_a_step(pipe: Any) -> np.ndarray:
    """All masses of a pipeline's sampling with one step."""
    with probe(pipe, AttentionMass()) as run:
        sample(pipe, steps=1)
    return run[AttentionMass].table()["mass"].to_numpy()


def test_a_lora_added_before_or_after_attaching_is_seen(pipe: Any) -> None:
    from peft import LoraConfig

    masses = functools.partial(masses_of_a_step, pipe)
    plain = masses()
    with probe(pipe, AttentionMass()) as run:
        pipe.transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["attn.to_q", "attn.add_k_proj"])
        )
        stock = sample(pipe, steps=1)
    after_attaching = run[AttentionMass].table()["mass"].to_numpy()
    assert not np.allclose(plain, after_attaching, atol=1e-4)
    assert np.array_equal(masses(), after_attaching)
    assert np.array_equal(sample(pipe, steps=1), stock)


def test_gradients_pass_through_and_checkpointing_is_not_counted_twice() -> None:
    transformer = tiny.transformer().train()
    inputs = bare_inputs()

    def gradient() -> Tensor:
        transformer.zero_grad()
        transformer(**inputs, return_dict=False)[0].square().sum().backward()
        return transformer.transformer_blocks[0].attn.to_q.weight.grad.clone()

    stock = gradient()
    transformer.enable_gradient_checkpointing()
    with probe(transformer, AttentionMass()) as run:
        assert torch.allclose(gradient(), stock, rtol=1e-4, atol=1e-6)
    table = run[AttentionMass].table()
    per_layer = table.groupby(["layer"]).size()
    assert per_layer.nunique() == 1 and len(table) == 2 * 3 * tiny.HEADS * 2 * 3  # rows, layers, heads, queries, keys


def test_state_does_not_grow_with_prompts_or_steps(pipe: Any) -> None:
    """Finished rows go to the sink; what the probe holds after 2 and after 12 denoising calls is the same."""

    def held(prompts: int, steps: int) -> tuple[int, int]:
        written = 0

        def sink(columns: dict[str, np.ndarray]) -> None:
            nonlocal written
            written += len(columns["mass"])

        with probe(pipe, AttentionMass(sink=sink)) as run:
            for _ in range(prompts):
                sample(pipe, prompts="a red ring", steps=steps)
            gc.collect()
            # Of these types exactly: compiling leaves fake tensors of no size behind.
            tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter, np.ndarray)]
            sizes = sum(thing.nbytes for thing in tensors)
            assert run[AttentionMass]._pending == {}
        return written, sizes

    held(1, 1)  # whatever the first use allocates for good
    few, few_bytes = held(1, 2)
    many, many_bytes = held(3, 4)
    assert many == 6 * few
    assert many_bytes <= few_bytes + 1024


def test_denoise_labels_its_own_call(tiny_directory: Path) -> None:
    model = load(tiny_directory, device="cpu")
    text = model.encode_prompt(["a red ring", "a cat"])
    with probe(model, AttentionMass(), layers=1, steps=5) as run:
        model.denoise(torch.randn(2, 4, 8, 8), [0.25, 0.5], text, seeds=[7, 9])
        model.denoise(torch.randn(2, 4, 8, 8), 0.75, text, branch="uncond", step=3)
    table = run[AttentionMass].table()
    found = table[["prompt", "seed", "step", "sigma", "branch"]].drop_duplicates().values.tolist()
    assert found == [
        ["a red ring", 7, 0, 0.25, "cond"],
        ["a cat", 9, 0, 0.5, "cond"],
        ["a red ring", -1, 3, 0.75, "uncond"],
        ["a cat", -1, 3, 0.75, "uncond"],
    ]
    assert {"word"} <= set(table["span"])
    assert model.batch is None


def test_model_offload_between_pipeline_calls_keeps_the_probe(pipe: Any) -> None:
    """Offloading re-wraps the transformer's forward after every pipeline call."""
    transformer = pipe.transformer
    with probe(pipe, AttentionMass()) as run:
        sample(pipe, steps=1)
        first = transformer.forward
        transformer.forward = lambda *args, **kwargs: first(*args, **kwargs)
        sample(pipe, steps=1)
    del transformer.forward
    assert len(run[AttentionMass].table()) % 2 == 0
    assert run._calls == 2


def test_lora_weights_loaded_fused_and_unloaded_through_the_pipeline(pipe: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    donor = tiny.pipeline("sd3")
    torch.manual_seed(0)
    donor.transformer.add_adapter(
        LoraConfig(r=2, init_lora_weights=False, target_modules=["attn.to_q", "attn.add_k_proj"])
    )
    type(donor).save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor.transformer))

    masses = functools.partial(masses_of_a_step, pipe)
    plain = masses()
    with probe(pipe, AttentionMass()) as run:
        pipe.load_lora_weights(tmp_path)
        stock = sample(pipe, steps=1)
    loaded_inside = run[AttentionMass].table()["mass"].to_numpy()
    assert np.abs(loaded_inside - plain).max() > 1e-3
    assert np.array_equal(masses(), loaded_inside) and np.array_equal(sample(pipe, steps=1), stock)
    pipe.fuse_lora()
    assert np.allclose(masses(), loaded_inside, atol=1e-5)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert np.allclose(masses(), plain, atol=1e-5)


def test_a_transformer_inside_a_peft_model_is_probed() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(tiny.transformer(), LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    stock = model(**bare_inputs(), return_dict=False)[0]
    with probe(model, AttentionMass()) as run:
        assert torch.equal(model(**bare_inputs(), return_dict=False)[0], stock)
    assert set(run[AttentionMass].table()["layer"]) == {0, 1, 2}


OFFLOADS = ["model", "sequential", "disk", "group", "layerwise casting"]


def offload(pipe: Any, kind: str, folder: Path, device: str) -> None:
    """What moves or casts weights around every forward; `device` computes."""
    if kind == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif kind == "sequential":  # what `enable_sequential_cpu_offload` does to each of a pipeline's models
        from accelerate import cpu_offload

        cpu_offload(pipe.transformer, execution_device=torch.device(device))
    elif kind == "disk":
        from accelerate import disk_offload

        disk_offload(pipe.transformer, str(folder), execution_device=torch.device(device))
    elif kind == "group":
        pipe.transformer.enable_group_offload(
            onload_device=torch.device(device), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
    else:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", ["offload", "probe"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_weights_that_come_and_go(pipe: Any, kind: str, first: str, tmp_path: Path, device: str) -> None:
    """Hooks that were there before the probe, or came while it was attached, work on, and so does the probe."""
    pipe, other = pipe.to(device), tiny.pipeline("sd3").to(device)
    with probe(other, AttentionMass()) as plain:
        sample(other)
    offload(other, kind, tmp_path / "other", device)
    stock = sample(other)
    if first == "offload":
        offload(pipe, kind, tmp_path / "own", device)
    with probe(pipe, AttentionMass()) as run:
        if first == "probe":
            offload(pipe, kind, tmp_path / "own", device)
        assert np.array_equal(sample(pipe), stock)
    assert np.array_equal(sample(pipe), stock)
    one, two = (found[AttentionMass].table() for found in (run, plain))
    labels = [column for column in one if column != "mass"]
    assert one[labels].equals(two[labels])
    # Weights that were cast to float16 in between are others.
    assert np.allclose(one["mass"], two["mass"], rtol=0, atol=2e-2 if kind == "layerwise casting" else 0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to offload from")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_without_an_accelerator_is_refused_by_diffusers_and_leaves_the_probe_well(
    pipe: Any, method: str
) -> None:
    stock, before = sample(pipe), state(pipe)[:-1]
    with probe(pipe, AttentionMass()):
        with pytest.raises(RuntimeError, match="requires accelerator"):
            getattr(pipe, method)()
        assert np.array_equal(sample(pipe), stock)
    assert state(pipe)[:-1] == before  # the pipeline itself keeps diffusers' empty list of hooks


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nested_probes_come_off_in_any_order(order: tuple[int, ...]) -> None:
    transformer, inputs = tiny.transformer(), bare_inputs()
    pipe = SimpleState(transformer)

    def output() -> Tensor:
        with torch.no_grad():
            result: Tensor = transformer(**inputs, return_dict=False)[0]
        return result

    stock, before = output(), state(pipe)
    with probe(transformer, edits=ScaleTextValues()):
        edited = output()
    assert not torch.equal(stock, edited)
    runs = [probe(transformer, AttentionMass()), probe(transformer, edits=ScaleTextValues()),
            probe(transformer, AttentionMass(), layers=1)]  # fmt: skip
    for run in runs:
        run.__enter__()
    active, calls = {0, 1, 2}, [0, 0, 0]
    for index in (*order, None):
        assert torch.equal(output(), edited if 1 in active else stock)
        calls = [count + (number in active) for number, count in enumerate(calls)]
        assert [run._calls for run in runs] == calls
        if index is not None:
            runs[index].__exit__(None, None, None)
            active.discard(index)
    assert state(pipe) == before
    for number, layers in ((0, {0, 1, 2}), (2, {1})):
        table = runs[number][AttentionMass].table()
        assert set(table["layer"]) == layers
        assert len(table) == calls[number] * len(layers) * 2 * tiny.HEADS * 2 * 3  # rows, heads, queries, keys


class SimpleState:
    """Something with a transformer, for `state`."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


def test_a_probe_opened_and_closed_by_a_callback_sees_the_steps_between(pipe: Any) -> None:
    """It came too late for the prompt, so words are unknown; step, noise level, branch and masses are not."""
    stock, before = sample(pipe, steps=4), state(pipe)
    with probe(pipe, AttentionMass(), steps="1-2") as whole:
        sample(pipe, steps=4)
    opened = probe(pipe, AttentionMass())

    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            opened.__enter__()
        if step == 2:
            opened.__exit__(None, None, None)
        return {}

    assert np.array_equal(sample(pipe, steps=4, callback_on_step_end=callback), stock)
    assert state(pipe) == before
    late, full = opened[AttentionMass].table(), whole[AttentionMass].table()
    assert set(late["prompt"]) == {""} and set(late.query("key == 'text'")["span"]) == {"unknown"}
    # Spans and prompts are told apart in one of them only.
    keys = ["step", "sigma", "branch", "layer", "head", "query", "key"]
    sums = [table.groupby(keys)["mass"].sum() for table in (late, full)]
    assert sums[0].index.equals(sums[1].index)
    assert np.allclose(sums[0], sums[1], atol=1e-5)


def call(model: MMDiT) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.denoise(latents, 0.5, model.encode_prompt(PROMPTS))


@pytest.fixture
def began(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the blocks whose forward began."""
    found: list[int] = []
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        forward = block.forward
        monkeypatch.setattr(
            block, "forward", lambda *args, index=index, of=forward, **named: found.append(index) or of(*args, **named)
        )
    return found


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_forward_that_ends_early_gives_the_rows_of_a_whole_one(pipe: Any, began: list[int], last: int) -> None:
    model = MMDiT(pipe)
    with probe(model, AttentionMass(), layers=f"0-{last}") as whole:
        call(model)
    before = state(pipe)  # the first call leaves the pipeline's own settings
    began.clear()
    with probe(model, AttentionMass(), layers=f"0-{last}", to_end=False) as run:
        for _ in range(2):
            with pytest.raises(ForwardEnded):
                call(model)
    assert began == 2 * list(range(last + 1)) and state(pipe) == before
    assert np.array_equal(run[AttentionMass].table()["mass"], np.tile(whole[AttentionMass].table()["mass"], 2))
    assert np.array_equal(call(model), call(MMDiT(tiny.pipeline())))


def test_a_forward_that_others_listen_to_runs_to_its_end(pipe: Any, began: list[int]) -> None:
    model, every = MMDiT(pipe), list(range(tiny.LAYERS))
    with probe(model, AttentionMass()) as outer, probe(model, AttentionMass(), layers=[0], to_end=False):
        call(model)
    assert set(outer[AttentionMass].table()["layer"]) == set(every) and began == every
    handle = pipe.transformer.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *_: None)
    with probe(model, AttentionMass(), layers=[1], to_end=False):
        call(model)
    handle.remove()
    assert began == 2 * every


def test_a_forward_that_ends_early_still_stops_at_what_is_not_finite(pipe: Any) -> None:
    model = MMDiT(pipe)
    pipe.transformer.transformer_blocks[1].attn.to_k.weight.data.fill_(float("nan"))
    rows: list[Any] = []
    with (
        pytest.raises(RunError, match=r"^layer 1: attention is not finite"),
        probe(model, AttentionMass(rows.append), layers=[0, 1], to_end=False),
    ):
        call(model)
    assert not rows


def test_a_probe_is_attached_once_at_a_time(pipe: Any) -> None:
    """Attached twice it came off once, and no probe could read the model after it."""
    run = probe(pipe, AttentionMass(), layers=1)
    with run:
        with pytest.raises(UserError, match="attached already"), run:
            pass
        sample(pipe)
    rows = len(run[AttentionMass].table())
    with run:
        sample(pipe)
    assert len(run[AttentionMass].table()) == 2 * rows > 0


def test_calls_of_two_threads_at_once_are_refused_and_one_after_the_other_are_not(pipe: Any) -> None:
    """Each took the other's rows for its own: most were lost in silence."""
    model, errors = MMDiT(pipe), list[str]()

    def elsewhere() -> None:
        try:
            call(model)
        except RunError as error:
            errors.append(str(error))

    def from_inside(*_: Any) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    with probe(model, AttentionMass()) as run:
        handle = pipe.transformer.transformer_blocks[1].register_forward_hook(from_inside)
        call(model)
        handle.remove()
        from_inside()
    assert len(errors) == 1 and "one call at a time" in errors[0]
    first, second = run[AttentionMass].table()["mass"].to_numpy().reshape(2, -1)
    assert np.array_equal(first, second)


def test_a_run_says_what_it_holds(pipe: Any) -> None:
    with probe(pipe, AttentionMass(), layers=[1]) as run:
        assert repr(run) == "Run of SD3Transformer2DModel: AttentionMass; layers 1; 0 denoising calls"
        sample(pipe)
    assert repr(run).endswith("AttentionMass; layers 1; 2 denoising calls")


def test_a_class_in_place_of_an_observer_is_refused(pipe: Any) -> None:
    for given, how in (([AttentionMass], {}), ([], {"edits": [Blur]})):
        with pytest.raises(UserError, match=r"(AttentionMass|Blur) is a class; expected an observer or an edit"):
            probe(pipe, *given, **how)


def test_what_is_no_observer_or_edit_is_refused_when_the_probe_is_made(pipe: Any) -> None:
    """It failed in the middle of the model's call, with torch's warnings about hooks."""
    blur = Blur("image", "text", layers=[0], sigma=1, kernel=3)
    for wrong in (None, "AttentionMass", [AttentionMass(), AttentionMass()]):
        with pytest.raises(UserError, match="is no observer; expected such as AttentionMass"):
            probe(pipe, wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="edits are given as edits="):
        probe(pipe, blur)  # type: ignore[arg-type]
    for other in (None, AttentionMass(), [None]):
        with pytest.raises(UserError, match="is no edit; expected such as Blur"):
            probe(pipe, edits=other)  # type: ignore[arg-type]
    for kind in ("AttentionMass", 0, None):
        with pytest.raises(UserError, match="expected the class of an observer"):
            _ = probe(pipe, AttentionMass())[kind]  # type: ignore[index]


def test_an_observer_counts_nothing_twice(pipe: Any) -> None:
    """Given twice, or to two probes at once, every row was there twice in silence; one after the other it goes on."""
    one = AttentionMass()
    with pytest.raises(UserError, match="no rows were kept yet"):
        one.table()
    sample(pipe, steps=1)  # a pipeline keeps things of its calls
    before = state(pipe)
    with pytest.raises(UserError, match="would count everything twice"), probe(pipe, one, one):
        pass
    with probe(pipe, one):
        with pytest.raises(UserError, match="would count everything twice"), probe(pipe, one):
            pass
        sample(pipe, steps=1)
    assert state(pipe) == before
    rows = len(one.table())
    with probe(pipe, one):
        sample(pipe, steps=1)
    assert len(one.table()) == 2 * rows


def test_a_probe_says_that_its_observers_are_what_is_pickled(tiny_model: MMDiT) -> None:
    with probe(tiny_model, AttentionMass()) as run:
        call(tiny_model)
    with pytest.raises(UserError, match=r"neither pickled nor copied: pickle its observers, such as run\[Attention"):
        pickle.dumps(run)
    kept = pickle.loads(pickle.dumps(run[AttentionMass]))
    pd.testing.assert_frame_equal(kept.table(), run[AttentionMass].table())
