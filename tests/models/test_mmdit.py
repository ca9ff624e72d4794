"""MMDiT: its operations against the stock pipeline's and the scheduler's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdit_probe import AttentionMass, probe
from mmdit_probe.errors import UserError
from mmdit_probe.experiments import AttentionBudget
from mmdit_probe.models.families.registry import FAMILIES, family_of
from mmdit_probe.models.layout import KINDS, Layout, find_layers
from mmdit_probe.models.load import load
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.specs import seed_values
from tests import tiny
from tests.observe.situations import modular


@pytest.fixture
def model(tiny_directory: Path) -> MMDiT:
    return load(tiny_directory, device="cpu")


def test_generate_is_the_stock_pipeline(model: MMDiT) -> None:
    ours = model.generate(["a red ring", "a cat"], steps=2, seed=4, output_type="np")
    stock = model.pipeline(
        ["a red ring", "a cat"],
        num_inference_steps=2,
        guidance_scale=7.5,
        negative_prompt=["", ""],
        generator=[torch.Generator().manual_seed(seed) for seed in (4, 5)],
        max_sequence_length=tiny.T5_LENGTH,
        output_type="np",
    ).images
    assert np.array_equal(ours, stock)
    assert not np.array_equal(ours[0], model.generate("a red ring", steps=2, seed=5, output_type="np")[0])


def test_a_pickled_model_is_the_same_model() -> None:
    model = MMDiT(tiny.pipeline("sd3"), name="tiny")  # transformers' encoders cannot be pickled once they ran
    kept = pickle.loads(pickle.dumps(model))
    assert (repr(kept), kept.weight_hash) == (repr(model), model.weight_hash) and kept.family is model.family
    first, second = (one.generate("a red ring", steps=1, output_type="latent") for one in (model, kept))
    assert torch.equal(first, second)


def test_it_is_quiet_and_leaves_the_pipelines_own_bar(capfd: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.pipeline()
    del pipe._progress_bar_config  # as a stock pipeline comes
    model = MMDiT(pipe)
    model.generate("a red ring", steps=1, guidance=1.0, output_type="latent")
    model.sigmas(1)
    assert capfd.readouterr().err == "" and "_progress_bar_config" not in vars(pipe)
    pipe.set_progress_bar_config(leave=False)
    model.sigmas(1)
    assert pipe._progress_bar_config == {"leave": False}


def test_seeds_belong_to_images(model: MMDiT) -> None:
    both = model.generate("a cat", steps=2, seed=[7, 9], num_images_per_prompt=2, output_type="np")
    alone = model.generate("a cat", steps=2, seed=9, output_type="np")
    assert np.allclose(both[1], alone[0], atol=1e-5)
    with pytest.raises(UserError, match="3 seeds for 1 image"):
        model.generate("a cat", seed=[1, 2, 3])


def test_denoise_is_one_transformer_call(model: MMDiT) -> None:
    text = model.encode_prompt(["a red ring", "a cat"])
    latents = torch.randn(2, 4, 8, 8)
    velocity = model.denoise(latents, [0.25, 0.75], text)
    with torch.no_grad():
        stock = model.transformer(
            hidden_states=latents,
            timestep=torch.tensor([250.0, 750.0]),
            encoder_hidden_states=text.prompt_embeds,
            pooled_projections=text.pooled,
        ).sample
    assert torch.equal(velocity, stock) and not velocity.requires_grad
    assert model.denoise(latents, 0.5, text, grad=True).requires_grad
    one = model.denoise(latents, 0.25, model.encode_prompt("a red ring"))
    assert torch.allclose(one[0], velocity[0], atol=1e-5)


def test_text_is_encoded_as_the_pipeline_encodes_it(model: MMDiT) -> None:
    text = model.encode_prompt(["a red ring", ""])
    # Gradients off here too: with them the text encoders take another attention kernel, and the last bits differ.
    with torch.no_grad():
        stock = model.pipeline.encode_prompt(
            ["a red ring", ""], None, None, do_classifier_free_guidance=False, max_sequence_length=tiny.T5_LENGTH
        )
    assert torch.equal(text.prompt_embeds, stock[0]) and torch.equal(text.pooled, stock[2])
    assert [len(table) for table in text.tokens] == [text.prompt_embeds.shape[1]] * 2


def _halved(module: torch.nn.Module) -> None:
    """As adapters are fused: no counter of changes in place sees it."""
    for parameter in module.parameters():
        parameter.data *= 0.5


def _trained(module: torch.nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).add_(0.1)


def _of_double_precision(module: torch.nn.Module) -> None:
    module.double()


@pytest.mark.parametrize("change", [_halved, _trained, _of_double_precision])
def test_weights_that_change_are_hashed_and_encode_anew(pipe: Any, change: Callable[[torch.nn.Module], None]) -> None:
    """What a model remembers is of the weights it had: caches and kept runs are told apart by its hash."""
    model = MMDiT(pipe, "tiny", tiny.T5_LENGTH)
    before = model.weight_hash, model.encode_prompt(["a cat"]).prompt_embeds
    parts = model.parts
    assert (model.weight_hash, True) == (
        before[0],
        torch.equal(model.encode_prompt(["a cat"]).prompt_embeds, before[1]),
    )
    change(pipe.transformer)
    change(pipe.text_encoder_3)
    fresh = MMDiT(pipe, "tiny", tiny.T5_LENGTH)
    assert model.weight_hash == fresh.weight_hash != before[0]
    assert [name for name, of in model.parts.items() if of != parts[name]] == ["text_encoder_3"]
    assert model.parts == fresh.parts and set(parts) == {"text_encoder", "text_encoder_2", "text_encoder_3", "vae"}
    found = model.encode_prompt(["a cat"]).prompt_embeds
    assert torch.equal(found, fresh.encode_prompt(["a cat"]).prompt_embeds) and not torch.equal(found, before[1])


def test_an_encoder_that_is_taken_away_encodes_no_more(pipe: Any) -> None:
    model = MMDiT(pipe, "tiny", tiny.T5_LENGTH)
    model.encode_prompt(["a cat"])
    pipe.text_encoder_3 = None
    text = model.encode_prompt(["a cat"])
    assert set(text.tokens[0].kinds[-tiny.T5_LENGTH :]) == {"null"}
    assert not text.prompt_embeds[:, -tiny.T5_LENGTH :].any()


def test_images_go_through_the_vae_and_back(model: MMDiT) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    latents = model.encode_image([pixels, Image.fromarray(pixels)])
    assert latents.shape == (2, 4, 8, 4) and torch.equal(latents[0], latents[1])
    config = model.pipeline.vae.config
    with torch.no_grad():
        scaled = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        mean = model.pipeline.vae.encode(scaled).latent_dist.mean
    assert torch.allclose(latents[:1], (mean - config.shift_factor) * config.scaling_factor, atol=1e-6)
    assert model.decode(latents)[0].size == (32, 64)
    with pytest.raises(UserError, match="multiples of 16"):
        model.encode_image(pixels[:50])
    with pytest.raises(UserError, match="one size"):
        model.encode_image([pixels, pixels[:32]])
    with pytest.raises(UserError, match="uint8"):
        model.encode_image(pixels.astype(float))


def test_noise_blends_and_belongs_to_its_seed(model: MMDiT) -> None:
    clean = torch.randn(2, 4, 8, 8)
    assert torch.equal(model.noise(clean, 0.0), clean)
    pure = model.noise(clean, 1.0, seed=[3, 8])
    assert torch.equal(pure[1], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(8)))
    half = model.noise(clean, [0.5, 0.25], seed=[3, 8])
    assert torch.allclose(half[1], 0.75 * clean[1] + 0.25 * pure[1], atol=1e-6)
    with pytest.raises(UserError, match="sigma"):
        model.noise(clean, 1.5)


def test_sigmas_are_the_schedulers(model: MMDiT) -> None:
    sigmas = model.sigmas(28)
    model.scheduler.set_timesteps(28)
    assert sigmas == [float(s) for s in model.scheduler.sigmas[:-1]]
    assert sigmas[-8] == pytest.approx(0.515, abs=1e-3)  # the paper's "t = 8 of 28"


def test_layers_exclude_image_only_attention() -> None:
    transformer = tiny.transformer("sd35")
    layers = find_layers(FAMILIES["sd3"], transformer)
    assert [layer.path for layer in layers] == [f"transformer_blocks.{i}.attn" for i in range(tiny.LAYERS)]
    assert layers[0].module is not transformer.transformer_blocks[0].attn2


def test_layers_beyond_ten_are_in_forward_order() -> None:
    layers = find_layers(FAMILIES["sd3"], tiny.transformer(num_layers=12))
    assert [layer.path.split(".")[1] for layer in layers] == [str(i) for i in range(12)]


def test_a_layout_counts_and_places() -> None:
    layout = Layout.from_counts([("image", 6), ("text", 4)], (2, 3))
    assert layout.counts == {"image": 6, "text": 4, "other": 0, "reference": 0} and layout.total == 10
    assert layout.positions("image") == slice(0, 6) and layout.positions("text") == slice(6, 10)
    split = Layout.from_counts([("other", 1), ("text", 2), ("image", 3), ("text", 1)])
    text = split.positions("text")
    assert isinstance(text, torch.Tensor) and text.tolist() == [1, 2, 6]
    assert split.positions("other") == slice(0, 1) and len(KINDS) == 4


def test_a_model_that_is_no_mmdit_is_refused() -> None:
    with pytest.raises(UserError, match="Linear is not a known MM-DiT"):
        family_of(torch.nn.Linear(1, 1))


def test_a_subclass_is_of_its_base_family() -> None:
    class Mine(type(tiny.transformer())):  # type: ignore[misc]
        pass

    assert family_of(object.__new__(Mine)) is FAMILIES["sd3"]


def test_a_random_pipeline_object_can_be_wrapped(pipe: Any) -> None:
    model = MMDiT(pipe, max_sequence_length=6)
    assert model.text_length == tiny.CLIP_LENGTH + 6
    assert model.encode_prompt("a cat").prompt_embeds.shape[1] == model.text_length


def test_seeds_and_numbers_are_checked_before_anything_runs(model: MMDiT) -> None:
    clean = torch.zeros(1, 4, 8, 8)
    for call in (lambda: model.noise(clean, 0.5, seed=1 << 63), lambda: model.generate("a cat", seed=1 << 63)):
        with pytest.raises(UserError, match="seed 9223372036854775808"):
            call()
    with pytest.raises(UserError, match="guidance nan"):
        model.generate("a cat", guidance=float("nan"))
    with pytest.raises(UserError, match="steps 0: expected a finite number from 1"):
        model.generate("a cat", steps=0)
    with pytest.raises(UserError, match=r"steps 1\.5: expected a whole number"):
        model.generate("a cat", steps=1.5)  # type: ignore[arg-type]
    for prompts in (None, 3, [], b"a cat", ["a cat", None], {"a cat": 1}):
        for ask in (model.generate, model.encode_prompt):
            with pytest.raises(UserError, match="expected a text, or one text or more in a list"):
                ask(prompts)  # type: ignore[operator]
    for side in (0, "64"):
        with pytest.raises(UserError, match=f"height {side!r}: expected a finite number from 1"):
            model.generate("a cat", height=side)  # type: ignore[arg-type]
    for sigma in ("0.5", None, 2, [0.5, 0.5], torch.tensor([0.5, 0.5])):
        with pytest.raises(UserError, match=r"sigma .*: expected (a finite|one) number"):
            model.noise(clean, sigma)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="generate sets 'num_inference_steps' by itself, from its prompts, steps"):
        model.generate("a cat", num_inference_steps=1)
    with pytest.raises(UserError, match="unknown option of the pipeline 'output': did you mean 'output_type'"):
        model.generate("a cat", output="latent")
    with pytest.raises(UserError, match="seed None: expected whole numbers from 0"):
        model.generate("a cat", seed=None)  # type: ignore[arg-type]
    assert seed_values(torch.tensor(3), 2) == seed_values(np.array([3, 4]), 2) == [3, 4]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="sigma nan"):
        model.noise(clean, float("nan"))


def test_only_embedded_models_have_words_that_they_cannot_know(model: MMDiT) -> None:
    assert model.vocabulary == () and model.unknown_words("any word") == [] and model.notes_on_words("kitten") == []


def test_prompts_without_text_are_told(model: MMDiT) -> None:
    """`--prompts "$P"` of a variable that is not set measured the unconditional text without a word."""
    said = "what is measured is the unconditional text"
    assert model.notes_on_words(["", "a cat", " "]) == [f"without text: 2 of 3 prompts; {said}"]
    assert (
        f"without text: 1 of 1 prompt; {said}"
        in AttentionBudget(prompts="", num_steps=1).prepare(model, ([""], [])).notes
    )


def test_an_embedded_model_names_the_words_it_does_not_know() -> None:
    from mmdit_probe import assets
    from mmdit_probe.scenes.captions import WORDS

    pipe = tiny.pipeline()
    pipe.register_to_config(_name_or_path=str(assets.path("scenes-sd3")))
    model = MMDiT(pipe, "scenes-sd3")
    assert model.vocabulary == WORDS and len(WORDS) == 43
    assert model.unknown_words("A wet cat, two Red rings and a cat!") == ["wet", "cat"]
    assert model.unknown_words("a red ring on grass") == [] == model.unknown_words("")
    assert model.notes_on_words(["cat", "Kitten", "a cat"]) == [
        f"scenes-sd3 knows 43 words; not: cat, kitten (it knows {', '.join(WORDS[:15])}, ...)"
    ]


def test_without_an_autoencoder_there_are_latents_and_no_pictures(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.vae = None
    model = MMDiT(pipe, max_sequence_length=tiny.T5_LENGTH)
    latents = model.generate("a cat", steps=1, output_type="latent")
    monkeypatch.setattr(pipe.transformer, "forward", lambda *_, **__: pytest.fail("it was sampled all the same"))
    with pytest.raises(UserError, match=r'vae=None.*ask for output_type="latent"'):
        model.generate("a cat", steps=1)
    with pytest.raises(UserError, match="vae=None"):
        model.decode(latents)
    with pytest.raises(UserError, match="vae=None"):
        model.encode_image(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize("other", ["scenes-sd3", None, tiny.transformer])
def test_what_is_no_pipeline_is_refused(other: Any) -> None:
    with pytest.raises(UserError, match=r"expected a diffusers pipeline with its transformer; load\(\.\.\.\) takes"):
        MMDiT(other)


def test_a_modular_pipeline_is_called_by_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes any keyword, so that steps, size and seed were left out as if it had none of them."""
    pipe = modular("sd3")
    with pytest.raises(UserError, match=r"StableDiffusion3ModularPipeline takes what its blocks ask for .* `probe`"):
        MMDiT(pipe)
    monkeypatch.setattr(pipe, "transformer", None)
    for build, why in ((MMDiT, "with its transformer"), (probe, r"transformer is not loaded \(None\)")):
        with pytest.raises(UserError, match=why):
            build(pipe)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.generate("a ring", steps=1, height=m.size_multiple + 1), "sides that are multiples of"),
        (lambda m: m.generate("a ring", steps=1, negative=None), "negative None: expected a text"),
        (lambda m: m.generate("a ring", steps=1, num_images_per_prompt="x"), "num_images_per_prompt 'x'"),
        (lambda m: m.generate("a ring", steps=1, num_images_per_prompt=0), "num_images_per_prompt 0"),
        (lambda m: m.generate("a ring", steps=1, max_sequence_length=0), "max_sequence_length 0"),
        (lambda m: m.noise("x", 0.5), "latents 'x': expected a tensor"),
        (lambda m: m.noise(torch.zeros(8, 4, 4), 0.5), r"latents of shape \(8, 4, 4\)"),
        (lambda m: m.denoise(torch.zeros(0, 8, 4, 4), 0.5, m.encode_prompt("a ring")), r"shape \(0, 8, 4, 4\)"),
        (lambda m: m.denoise(torch.zeros(1, 3, 4, 4), 0.5, m.encode_prompt("a ring")), r"of 3 channels: expected \d"),
        (lambda m: m.denoise(torch.zeros(1, 3, 4, 4), 0.5, "a ring"), "text 'a ring': expected what `encode_prompt`"),
        (lambda m: m.decode(None), "latents None"),
        (lambda m: m.sigmas(0), "steps 0"),
        (lambda m: m.sigmas(4, (1,)), r"size \(1,\): expected"),
        (lambda m: probe(m, AttentionMass(), steps="q"), "cannot read 'q' as a step"),
        (lambda m: probe(m, AttentionMass(), steps=[]), "step"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_where_it_is_given(model: MMDiT, call: Callable[[MMDiT], Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        call(model)
