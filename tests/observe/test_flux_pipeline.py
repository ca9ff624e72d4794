"""A stock Flux pipeline under a probe: words, seeds, steps, and branches that come one call at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmdit_probe.observe.maps import TextMaps
from mmdit_probe.observe.mass import AttentionMass
from mmdit_probe.observe.probe import probe
from tests import tiny
from tests.families import FIXTURES


@pytest.fixture(scope="module")
def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    parts = tiny.pipeline("sd3")
    tokenizer, tokenizer_2 = tiny.clip_tokenizer("<|endoftext|>"), tiny.t5_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=20, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tiny.CLIP_LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer_2), d_model=24, d_kv=8, d_ff=32, num_layers=1,
                                      num_heads=2))  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=parts.vae, text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer, text_encoder_2=encoder.eval(), tokenizer_2=tokenizer_2,
        transformer=FIXTURES["flux"].build(in_channels=16, num_layers=1, num_single_layers=1),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, **options: Any) -> torch.Tensor:
    options = {"prompt": "a red ring"} | options
    return pipe(
        num_inference_steps=2, height=48, width=64, output_type="latent", max_sequence_length=10,
        generator=torch.Generator().manual_seed(5), **options,
    ).images  # fmt: skip


def test_words_steps_and_seeds_of_a_stock_flux_pipeline(flux: Any) -> None:
    stock = sample(flux)
    with probe(flux, AttentionMass(), TextMaps(words=["ring"])) as run:
        assert torch.equal(sample(flux), stock)
    table = run[AttentionMass].table()
    assert set(table.prompt) == {"a red ring"} and set(table.seed) == {5} and set(table.branch) == {"cond"}
    assert sorted(table.step.unique()) == [0, 1]
    assert table.sigma.unique() == pytest.approx(flux.scheduler.sigmas[:2].tolist())
    assert {"word", "eos", "pad"} <= set(table.span) and set(table[table.key == "text"].stream) == {"t5"}
    assert run[TextMaps].maps(0, step=0).shape[-1] == 1


def test_guidance_branches_that_come_one_by_one(flux: Any) -> None:
    with probe(flux, AttentionMass(), layers=0) as run:
        sample(flux, negative_prompt="a blue house", true_cfg_scale=2.0)
    table = run[AttentionMass].table()
    assert table.groupby("step").branch.agg(set).tolist() == [{"cond", "uncond"}] * 2
    assert set(table.prompt) == {"a red ring"}


def test_a_loop_of_ones_own_that_says_nothing_calls_the_prompt_first(flux: Any) -> None:
    """Two texts alike, encoded one by one; a text that is encoded after a call is the next prompt."""
    inputs = FIXTURES["flux"].inputs(batch=1, lengths=(10,))

    def call(embeddings: tuple[torch.Tensor, ...], moment: float) -> None:
        given = {"encoder_hidden_states": embeddings[0], "pooled_projections": embeddings[1]}
        flux.transformer(
            **inputs | given | {"hidden_states": torch.randn(1, 12, 16), "timestep": torch.tensor([moment])}
        )

    def encoded(text: str) -> tuple[torch.Tensor, ...]:
        return flux.encode_prompt(text, None, max_sequence_length=10)

    with probe(flux, AttentionMass(), layers=0) as run, torch.no_grad():
        both = encoded("a red ring"), encoded("a red ring")
        for moment in (0.9, 0.5):
            for one in both:
                call(one, moment)
        call(encoded("a blue house"), 0.3)
    table = run[AttentionMass].table()
    calls = table.drop_duplicates(["step", "branch"])
    assert calls[["step", "branch"]].to_numpy().tolist() == [
        [0, "cond"], [0, "uncond"], [1, "cond"], [1, "uncond"], [2, "cond"],
    ]  # fmt: skip
    assert calls["prompt"].tolist() == ["a red ring"] * 4 + ["a blue house"]


def test_embeddings_that_are_given_are_the_text_that_they_were_encoded_from(flux: Any) -> None:
    """The second of two texts was the unconditional one, with the first one's prompt."""
    with probe(flux, AttentionMass(), layers=0) as run, torch.no_grad():
        for text in ("a red ring", "a blue house"):
            embeds, pooled, _ = flux.encode_prompt(text, None, max_sequence_length=10)
        sample(flux, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    table = run[AttentionMass].table()
    assert (set(table.prompt), set(table.branch)) == ({"a blue house"}, {"cond"}) and "word" in set(table.span)
