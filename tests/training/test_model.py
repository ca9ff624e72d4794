"""The embedded model as shipped: a stock pipeline that follows its prompts, whose words find their regions.

Bounds lie well under what was measured (analyses/results/embedded_model/summary.md), since few images are drawn here.
"""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from mmdit_probe import assets, load
from mmdit_probe.experiments.scenes_quality import grid_ceiling, held_out, word_map_scores
from mmdit_probe.scenes import captions, describe, load_parser
from mmdit_probe.scenes.parser import grounds_right, things_right


@pytest.fixture(scope="module")
def model():
    return load("scenes-sd3", device="cpu")


@pytest.fixture(scope="module")
def twin():
    return load("scenes-sd3-random", device="cpu")


@pytest.fixture(scope="module")
def scenes():
    return held_out(24, "test")


def test_the_folder_is_a_stock_pipeline_that_runs_as_loaded(model):
    from diffusers import StableDiffusion3Pipeline

    stock = StableDiffusion3Pipeline.from_pretrained(assets.path("scenes-sd3"))
    stock.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "guidance_scale": 4.0, "max_sequence_length": 24, "output_type": "np"}
    image = stock("a red ring on grass", generator=torch.Generator().manual_seed(0), **arguments).images
    again = model.pipeline("a red ring on grass", generator=torch.Generator().manual_seed(0), **arguments).images
    assert image.shape == (1, 64, 64, 3) and np.array_equal(image, again)


def test_it_is_a_small_sd3(model):
    config = model.transformer.config
    assert len(model.layers) >= 8 and model.text_length == 48
    assert (model.default_size[0] // model.size_multiple) ** 2 >= 144
    assert model.scheduler.config.shift == 3.0 and config.joint_attention_dim == 128
    pooled = model.transformer.time_text_embed.text_embedder.linear_1.weight
    assert torch.count_nonzero(pooled) == 0  # all text acts through the joint attention


def test_generated_images_show_what_was_asked_for(model):
    prompts = captions("test", 12, "colour")
    readings = load_parser().read(model.generate(prompts, steps=14, guidance=4.0))
    asked, other = (
        np.mean([things_right(text, reading) for text, reading in zip(texts, readings, strict=True)])
        for texts in (prompts, prompts[1:] + prompts[:1])
    )
    assert asked >= 0.4 and asked >= other + 0.3
    assert np.mean([grounds_right(text, reading) for text, reading in zip(prompts, readings, strict=True)]) >= 0.8


def test_i2t_maps_find_the_regions_of_words(model, twin, scenes):
    best, chance = (
        table[(table["head"] == "mean") & ~table["min_max"]]["miou"].max()
        for table in (word_map_scores(m, scenes) for m in (model, twin))
    )
    assert best >= chance + 0.1
    assert best < grid_ceiling(scenes, 16) <= 1


def test_the_maps_interval_is_the_jackknife_s_over_scenes(model, scenes):
    """Against the definition: every scene left out in turn, of clean latents, which depend on no noise."""
    few = scenes[:3]

    def miou(items):
        table = word_map_scores(model, items, sigma=0.0)
        return table[(table["head"] == "mean") & ~table["min_max"]].set_index("layer")

    whole = miou(few)
    without = np.stack([miou(few[:k] + few[k + 1 :])["miou"] for k in range(3)])
    error = np.sqrt(2 / 3 * ((without - without.mean(0)) ** 2).sum(0)) * stats.t.ppf(0.975, 2)
    np.testing.assert_allclose(whole["low"], np.clip(whole["miou"] - error, 0, 1), atol=1e-6)
    np.testing.assert_allclose(whole["high"], np.clip(whole["miou"] + error, 0, 1), atol=1e-6)
    assert (whole["low"] < whole["miou"]).all()


def test_the_twin_differs_in_the_transformer_alone(model, twin):
    assert model.weight_hash != twin.weight_hash
    assert twin.weight_hash == load("scenes-sd3-random", device="cpu").weight_hash
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        ours, theirs = (getattr(m.pipeline, name).state_dict() for m in (model, twin))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_t5_can_be_switched_off():
    model = load("scenes-sd3", device="cpu", t5=False)
    text = model.encode_prompt("a red ring on grass")
    assert model.text_length == 48 and (text.prompt_embeds[:, 24:] == 0).all()
    assert set(text.tokens[0].kinds[24:]) == {"null"}


def test_scenes_clip_matches_captions_to_scenes(scenes):
    from transformers import AutoTokenizer, CLIPModel

    folder = assets.path("scenes-clip")
    clip, tokens = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    images = torch.from_numpy(np.stack([item.image for item in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    ids = tokens([describe(item) for item in scenes], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        scores = clip(input_ids=ids, pixel_values=images).logits_per_image
    assert float((scores.argmax(0) == torch.arange(len(scenes))).float().mean()) >= 0.5
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == settings["image_std"] == [0.5, 0.5, 0.5]


def test_training_curves_ship_with_the_weights():
    for folder, stage in (("scenes-sd3", "transformer"), ("scenes-clip", "clip"), ("scenes-parser", "parser")):
        assert (assets.path(folder) / "training" / f"{stage}.csv").read_text().startswith("step,name,value")
