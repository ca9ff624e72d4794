"""Models of videos from their folders: clips, frames, noise levels and guidance are those of the stock pipelines."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit_probe import MMDiT, load, probe
from mmdit_probe.errors import UserError
from mmdit_probe.models.families.registry import FAMILIES
from mmdit_probe.observe.mass import AttentionMass
from mmdit_probe.results.clip import Clip
from tests.pipelines import build, transformer
from tests.video_pipelines import VIDEO_PIPELINES

LOADED = [name for name in VIDEO_PIPELINES if FAMILIES[name].pipelines]
LENGTHS = {"hunyuan_video": 500}
RATIO = {"mochi": 6}
"""Frames of the video per frame of the model, 4 elsewhere."""
SIDE = {"hunyuan_video15": 8}
"""Pixels a token, 16 elsewhere."""


@functools.cache
def model_of(name: str) -> MMDiT:
    """A model of three frames of 32 x 48 pixels."""
    model = MMDiT(build(name), max_sequence_length=LENGTHS.get(name))
    model.num_frames, model.size = 2 * RATIO.get(name, 4) + 1, (32, 48)
    return model


@pytest.mark.parametrize("name", LOADED)
def test_a_clip_is_the_pipelines_own(name: str) -> None:
    model = model_of(name)
    pipe = model.pipeline
    with probe(model, AttentionMass(heads=0), layers=0) as run:
        (clip,) = model.generate("a red ring", steps=2, guidance=3.0, seed=5)
    assert isinstance(clip, Clip) and len(clip) == model.num_frames and clip.size == (48, 32)
    options: dict[str, Any] = {"guidance_scale": 3.0}
    if getattr(pipe, "guider", None) is not None:
        options, pipe.guider.guidance_scale = {}, 3.0
    options |= {FAMILIES[name].length_argument: model.max_sequence_length} if FAMILIES[name].length_argument else {}
    options.pop("max_sequence_length" if name == "easyanimate" else "", None)
    (stock,) = pipe(
        prompt=["a red ring"], num_inference_steps=2, height=32, width=48, num_frames=model.num_frames,
        generator=[torch.Generator().manual_seed(5)], output_type="pil", negative_prompt=[""], **options,
    ).frames  # fmt: skip
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(clip, stock, strict=True))
    # What the model sees: three frames, whose tokens are told apart.
    side = SIDE.get(name, 16)
    grid = (32 // side, 48 // side)
    assert model.token_grid(32, 48) == (3, *grid)
    table = run[AttentionMass].table()
    own = table[(table["query"] == "image") & (table["span"] == "same frame")]
    assert set(own["n_key"]) == {math.prod(grid)} and set(own["n_query"]) == {3 * math.prod(grid)}
    assert set(table["seed"]) == {5} and set(table["prompt"]) == {"a red ring"} and "unknown" not in set(table["span"])
    assert set(table["branch"]) == ({"cond"} if FAMILIES[name].distilled else {"cond", "uncond"})
    levels = table.drop_duplicates("step").set_index("step")["sigma"]
    np.testing.assert_allclose(levels.sort_index(), FAMILIES[name].levels(model.scheduler), atol=1e-6)
    if name != "cogvideox":  # which is no rectified flow: its first timestep may be any
        assert levels[0] == 1.0 > levels[1]


@pytest.mark.parametrize("name", LOADED)
def test_a_folder_is_loaded_with_its_own_size(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path, safe_serialization=True)
    model = load(tmp_path, device="cpu")
    expected = {
        "cogvideox": (5, 32, 32), "hunyuan_video": (129, 720, 1280), "hunyuan_video15": (121, 48, 80),
        "mochi": (19, 480, 848), "easyanimate": (49, 512, 512), "motif_video": (121, 736, 1280),
    }[name]  # fmt: skip
    assert (model.num_frames, *model.default_size) == expected and model.makes_videos
    assert f"{expected[0]} frames of {expected[1]} x {expected[2]} pixels" in repr(model)
    with pytest.raises(UserError, match="makes videos and reads no pictures here"):
        model.encode_image(Image.new("RGB", (32, 32)))


def test_a_pipeline_that_wants_a_picture_is_given_to_the_probe(tmp_path: Path) -> None:
    build("hunyuan_video_framepack").save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(UserError, match=r"give the pipeline to `probe`; .* no pipeline of the hunyuan_video_framepack"):
        load(tmp_path, device="cpu")


def test_frames_that_are_patched_together_are_one_frame_of_the_model() -> None:
    """CogVideoX 1.5: two latent frames a token, the first one doubled where their number is odd."""
    pipe = build("cogvideox")
    pipe.register_modules(
        transformer=transformer("cogvideox", patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True)
    )
    model = MMDiT(pipe)
    model.num_frames, model.size = 9, (32, 32)
    assert model.token_grid(32, 32) == (2, 2, 2)
    with probe(model, AttentionMass(heads=0), layers=0) as run:
        (clip,) = model.generate("ring", steps=1, guidance=1.0)
    assert len(clip) == 9 and clip.times(2) == [0] + [1] * 8
    table = run[AttentionMass].table()
    assert set(table[table["span"] == "other frames"]["n_key"]) == {4}


@pytest.mark.parametrize(
    ("name", "count", "least"),
    [("motif_video", 3, 1e-3), ("hunyuan_video15", 3, 1e-3), ("mochi", 2, 1e-3), ("cogvideox", 2, 0.2)],
)
@torch.no_grad()
def test_frames_come_from_the_latent_frame_that_the_autoencoder_says(name: str, count: int, least: float) -> None:
    """A causal autoencoder: what a latent frame changes begins where the frames made of it begin. CogVideoX's, whose
    normalisation is over time, changes all of them a little."""
    vae = model_of(name).pipeline.vae
    channels = getattr(vae.config, "latent_channels", None) or vae.config.z_dim
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, channels, count, 2, 2, generator=generator)
    before, begins = vae.decode(latents, return_dict=False)[0], []
    for frame in range(count):
        other = latents.clone()
        other[:, :, frame] += 2 * torch.randn(1, channels, 2, 2, generator=generator)
        change = (vae.decode(other, return_dict=False)[0] - before).abs().mean((0, 1, 3, 4))
        begins.append(int((change > least * change.max()).nonzero()[0]))
    times = Clip.of([Image.new("RGB", (4, 4))] * before.shape[2]).times(count)
    assert [times.index(frame) for frame in range(count)] == begins


def test_mochi_counts_from_noise() -> None:
    """genmo/mochi-1-preview: timestep 0 is noise, and the transformer predicts the way to the image."""
    model = model_of("mochi")
    scheduler = model.scheduler
    scheduler.set_timesteps(sigmas=np.array([1.0, 0.75, 0.25]))
    assert scheduler.timesteps.tolist() == [0.0, 250.0, 750.0]
    family = model.family
    assert family.levels(scheduler) == pytest.approx([1.0, 0.75, 0.25])
    assert [family.sigma(t) for t in scheduler.timesteps.tolist()] == pytest.approx([1.0, 0.75, 0.25])
    assert family.timestep(0.75) == pytest.approx(250.0)
    # One Euler step from noise to image by the way between them ends at the image.
    noise, image = torch.randn(2, 1, 4, 3, 2, 2).unbind(0)
    scheduler.set_timesteps(sigmas=np.array([1.0]))
    ended = scheduler.step(image - noise, scheduler.timesteps[0], noise, return_dict=False)[0]
    torch.testing.assert_close(ended, image)
    assert family.towards_image


def test_two_prompts_and_two_videos_each() -> None:
    model = model_of("cogvideox")
    with probe(model, AttentionMass(heads=0), layers=0) as run:
        clips = model.generate(["a red ring", "ring"], steps=1, guidance=1.0, seed=3, num_images_per_prompt=2)
    rows = run[AttentionMass].table().query("query == 'image' and span == 'same frame'")
    assert len(clips) == 4
    assert rows[["prompt", "seed"]].values.tolist() == [["a red ring", 3], ["a red ring", 4], ["ring", 5], ["ring", 6]]
    alone = model.generate("ring", steps=1, guidance=1.0, seed=6)[0]
    np.testing.assert_allclose(np.asarray(alone[4], int), np.asarray(clips[3][4], int), atol=1)
