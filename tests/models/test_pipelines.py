"""Stock pipelines of other families than SD3: guidance branches and words of every row, and the model's own calls."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe.errors import ProbeWarning, RunError, UserError
from mmdit_probe.models.families.registry import FAMILIES
from mmdit_probe.models.latents import pack, unpack
from mmdit_probe.models.load import load
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.pipeline_call import bind
from mmdit_probe.models.tokens import unknown_table
from mmdit_probe.observe.mass import AttentionMass
from mmdit_probe.observe.pipeline_labels import PipelineRows
from mmdit_probe.observe.probe import probe
from tests.editing_pipelines import picture
from tests.families import CHANNELS, TEXT
from tests.pipelines import PIPELINES, SIDE, build, t5, transformer
from tests.video_pipelines import VIDEO_PIPELINES, seeing

NOT_RUN = {"hunyuan_video_framepack", "joyimage_edit"}
"""Pipelines that make nothing of a prompt alone, or nothing that is small: `test_spelling` has their words."""
NAMES = sorted({*PIPELINES, *VIDEO_PIPELINES} - NOT_RUN)
GUIDED = [name for name in NAMES if name not in ("ideogram4", "glm_image", "flux2")]
"""All but those whose unconditional branch is another transformer, or another prompt than the caller's."""
LOADED = [name for name in NAMES if FAMILIES[name].pipelines and FAMILIES[name].video_size is None]
UNCONDITIONAL_FIRST = {
    "aura_flow", "bria", "prx", "bria_fibo", "easyanimate", "ernie_image", "cogview3plus", "cogvideox", "mochi",
    "hidream",
}  # fmt: skip
"""Pipelines that run both branches in one call, the unconditional rows before the others."""
SAMPLED_ONLY = {
    "cogview3plus": "is no rectified flow", "cogview4": "do not follow from the noise level",
    "glm_image": "do not follow from the noise level", "ideogram4": "puts image and text into one input",
}  # fmt: skip
"""Pipelines without calls of the model's own, and why."""
LENGTHS = {"hunyuan_video": 500, "ideogram4": 64}
"""Text lengths, where the family's own holds no prompt of a tokenizer of letters, or is slow."""
OPTIONS = {
    "enable_prompt_rewrite": False, "use_resolution_binning": False, "num_frames": 5, "guidance_schedule": None,
    "use_pe": False,
}  # fmt: skip
"""Arguments of the stock pipelines that take them."""


@functools.cache
def model_of(name: str) -> MMDiT:
    return MMDiT(build(name), max_sequence_length=LENGTHS.get(name))


def sample(model: MMDiT, prompt: Any, *, guidance: float, negative: str = "", **options: Any) -> pd.DataFrame:
    """Masses of two sampling steps of the stock pipeline, called by its own names."""
    family, pipe = model.family, model.pipeline
    texts = [prompt] if isinstance(prompt, str) else prompt
    if getattr(pipe, "guider", None) is not None:
        pipe.guider.guidance_scale = guidance
    scale = "true_cfg_scale" if family.name in ("flux", "qwen_image", "hunyuan_video") else "guidance_scale"
    options |= OPTIONS | {scale: guidance, family.length_argument: model.max_sequence_length}
    known = inspect.signature(type(pipe).__call__).parameters
    if family.name == "ovis_image":
        del options["max_sequence_length"]
    options |= {"negative_prompt": [negative] * len(texts)}
    with torch.no_grad(), probe(pipe, AttentionMass(heads=0), layers=0) as run:
        pipe(
            prompt=texts, num_inference_steps=2, height=SIDE, width=SIDE, output_type="latent",
            generator=torch.Generator().manual_seed(5), **{name: of for name, of in options.items() if name in known},
        )  # fmt: skip
    return run[AttentionMass].table()


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_branches_are_those_of_the_pipeline(name: str) -> None:
    model = model_of(name)
    guided = sample(model, "a red ring", guidance=3.0, negative="ring")
    plain = sample(model, "a red ring", guidance=0.0 if name in ("z_image", "krea2") else 1.0)
    assert set(plain["branch"]) == {"cond"} and set(guided["branch"]) == {"cond", "uncond"}
    # Ernie draws its noise in passing, where nobody is told of the seed.
    assert set(guided["prompt"]) == {"a red ring"} and set(guided["seed"]) == {-1 if name == "ernie_image" else 5}
    assert sorted(set(guided["step"])) == [0, 1]
    # The first step starts from the same noise: the conditional rows are those of sampling without guidance.
    of_guided = guided.query("step == 0 and branch == 'cond'").reset_index(drop=True)
    of_plain = plain.query("step == 0").reset_index(drop=True)
    keys = ["query", "key", "span", "stream", "n_key"]
    assert of_guided[keys].equals(of_plain[keys])
    np.testing.assert_allclose(of_guided["mass"], of_plain["mass"], atol=1e-5)
    words = guided.query("span == 'word' and query == 'image' and step == 0").groupby("branch")["n_key"].first()
    assert words["cond"] > words["uncond"] > 0
    assert "unknown" not in set(guided["span"])


def test_seeds_that_nobody_tells_are_noted() -> None:
    with pytest.warns(ProbeWarning, match="ErnieImagePipeline draws its noise out of a probe's sight: seeds are unkn"):
        sample(model_of("ernie_image"), "a red ring", guidance=1.0)


@pytest.mark.parametrize("name", GUIDED)
def test_branches_with_the_same_text_are_told_apart(name: str) -> None:
    table = sample(model_of(name), "ring", guidance=3.0, negative="ring")
    image = table.query("query == 'image' and key == 'other'")  # one row a call
    order = ["uncond", "cond"] if name in UNCONDITIONAL_FIRST else ["cond", "uncond"]
    assert image["branch"].tolist() == order * 2
    assert image["step"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["flux", "cogview4", "qwen_image", "z_image", "krea2", "nucleus_image"])
def test_prompts_of_different_lengths_and_several_images(name: str) -> None:
    prompts = ["a red ring", "ring"]
    table = sample(model_of(name), list(prompts), guidance=3.0, negative="red", num_images_per_prompt=2)
    rows = table.query("step == 0 and query == 'image' and span == 'word'")
    cond, uncond = (rows[rows["branch"] == branch] for branch in ("cond", "uncond"))
    assert cond["prompt"].tolist() == [p for p in prompts for _ in range(2)] == uncond["prompt"].tolist()
    counts = cond["n_key"].tolist()
    assert counts[0] == counts[1] > counts[2] == counts[3] > 0
    assert len(set(uncond["n_key"])) == 1


@pytest.mark.parametrize("name", LOADED)
def test_a_denoising_call_is_the_pipelines_own(name: str) -> None:
    """At the first step of sampling the model gets pure noise; `denoise` then gives what the scheduler stepped with."""
    model = model_of(name)
    if name in SAMPLED_ONLY:
        with pytest.raises(UserError, match=SAMPLED_ONLY[name]):
            model.encode_prompt("a red ring")
        return
    stepped: list[torch.Tensor] = []
    noise: list[torch.Tensor] = []
    step = model.scheduler.step
    model.scheduler.step = lambda output, t, x, *args, **kwargs: (
        stepped.append(output.clone()), noise.append(x.clone()), step(output, t, x, *args, **kwargs)
    )[-1]  # fmt: skip
    try:
        model.generate(
            "a red ring", steps=1, guidance=1.0 if name != "flux" else 3.5, height=SIDE, width=SIDE,
            output_type="latent",
        )  # fmt: skip
    finally:
        del model.scheduler.step
    text = model.encode_prompt("a red ring")
    size = SIDE // model.latent_side
    latents, wanted = noise[0], stepped[0]
    if latents.ndim == 3:
        latents, wanted = (unpack(t, "packed", model.family.cell, (size, size)) for t in (latents, wanted))
    with probe(model, AttentionMass(heads=0), layers=0) as run:
        found = model.denoise(latents, 1.0, text, seeds=7)
    torch.testing.assert_close(found, wanted.reshape(found.shape).float(), atol=1e-4, rtol=1e-4)
    table = run[AttentionMass].table()
    assert {"word"} <= set(table["span"]) and set(table["sigma"]) == {1.0} and set(table["seed"]) == {7}


def test_a_negative_prompt_that_is_not_read_is_refused() -> None:
    """Flux reads it in a second forward, which the scale that is distilled does not ask for."""
    model, how = model_of("flux"), {"steps": 1, "height": SIDE, "width": SIDE, "output_type": "latent"}
    with pytest.raises(UserError, match="FluxPipeline reads a negative prompt with true_cfg_scale above 1 only"):
        model.generate("a red ring", negative="ring", **how)
    with probe(model, AttentionMass(heads=0), layers=0) as run:
        model.generate("a red ring", negative="ring", true_cfg_scale=2.0, **how)
    assert set(run[AttentionMass].table()["branch"]) == {"cond", "uncond"}


@pytest.mark.parametrize("name", ["hunyuan_image", "longcat_image"])
def test_a_text_length_that_is_not_taken_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="Pipeline takes no max_sequence_length; leave it out"):
        model_of(name).generate("a ring", steps=1, height=SIDE, width=SIDE, max_sequence_length=40)


def test_an_empty_negative_prompt_is_known() -> None:
    table = sample(model_of("ernie_image"), "a red ring", guidance=3.0).query("query == 'image' and key == 'text'")
    kinds = table[table["step"] == 0].groupby("branch")["span"].agg(set).to_dict()
    assert kinds == {"cond": {"word"}, "uncond": {"bos"}}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lumina2", {"system_prompt": "other words"}),
        ("prx", {"skip_text_cleaning": True}),
        ("hunyuan_video", {"prompt_template": {"template": "b{}", "crop_start": 1}}),
    ],
)
def test_words_are_unknown_where_the_caller_writes_the_template(name: str, options: dict[str, Any]) -> None:
    pipe = model_of(name).pipeline
    length = {FAMILIES[name].length_argument: LENGTHS.get(name) or 40}
    for given, known in (({}, True), (options, False)):
        rows = PipelineRows(pipe, FAMILIES[name])
        detach = rows.attach()
        with torch.no_grad():
            pipe.encode_prompt("a cat", device="cpu", **length, **given)
        for undo in detach:
            undo()
        tables = rows._branches["cond"].tables
        assert [table is not None for table in tables] == [known]


def test_words_of_a_pipeline_that_reads_prompts_in_another_way_stay_unknown() -> None:
    """PRXPixel keeps upper case, which is read as other tokens, and has a length of its own."""
    from diffusers import PRXPixelPipeline
    from diffusers.pipelines.prx import pipeline_prx, pipeline_prx_pixel

    parts = dict(model_of("prx").pipeline.components)
    parts.pop("vae")
    pipeline_prx_pixel.ftfy = pipeline_prx.ftfy  # an optional package
    pipe = PRXPixelPipeline(**parts, prompt_max_tokens=8)
    rows = PipelineRows(pipe, FAMILIES["prx"])
    detach = rows.attach()
    with torch.no_grad(), pytest.warns(UserWarning, match="PRXPixelPipeline reads prompts in another way"):
        pipe.encode_prompt("A RED ring", device="cpu")
    for undo in detach:
        undo()
    assert rows._branches["cond"].tables == [None] and rows._branches["cond"].prompts == ["A RED ring"]


@pytest.mark.parametrize("name", ["bria", "cogview3plus"])
def test_a_negative_prompt_that_is_not_encoded_is_null(name: str) -> None:
    """These pipelines put zeros in its place where none is given."""
    model = model_of(name)
    with torch.no_grad(), probe(model.pipeline, AttentionMass(heads=0), layers=0) as run:
        model.pipeline(
            "a red ring", num_inference_steps=1, height=SIDE, width=SIDE, output_type="latent", guidance_scale=3.0,
            max_sequence_length=10,
        )  # fmt: skip
    table = run[AttentionMass].table().query("query == 'image' and key == 'text'")
    kinds = table.groupby("branch")["span"].agg(set).to_dict()
    assert kinds == {"cond": {"word", "eos", "pad"}, "uncond": {"null"}}
    assert set(table.query("branch == 'uncond'")["n_key"]) == {10}


def test_noise_that_is_drawn_before_the_prompt_is_encoded_keeps_its_seed() -> None:
    from diffusers import MotifVideoImage2VideoPipeline

    parts, seen = dict(model_of("motif_video").pipeline.components), seeing()
    parts |= {"text_encoder": t5(parts["tokenizer"]), "feature_extractor": seen["feature_extractor"]}
    parts["text_encoder"].vision_tower = seen["image_encoder"]
    pipe = MotifVideoImage2VideoPipeline(**parts)
    with torch.no_grad(), probe(pipe, AttentionMass(heads=0), layers=0) as run:
        for seed in (5, 6):
            pipe(
                picture(SIDE, SIDE), "a red ring", num_inference_steps=1, height=SIDE, width=SIDE, num_frames=5,
                output_type="latent", generator=torch.Generator().manual_seed(seed), max_sequence_length=10,
            )  # fmt: skip
    assert set(run[AttentionMass].table()["seed"]) == {5, 6}


def test_a_pipeline_of_several_texts_in_one_sequence_is_refused() -> None:
    from diffusers import ZImageOmniPipeline

    pipe = ZImageOmniPipeline(**model_of("z_image").pipeline.components, siglip=None, siglip_processor=None)
    with probe(pipe, AttentionMass()), pytest.raises(UserError, match=r"ZImageOmniPipeline.* are not followed"):
        pipe(prompt="a red ring", num_inference_steps=1, height=SIDE, width=SIDE, output_type="latent")


def test_a_prompt_that_is_encoded_in_another_way_is_told_as_not_followed() -> None:
    """Beside a picture JoyImageEdit does not call its `encode_prompt`: no callback has changed anything."""
    pipe = build("joyimage_edit")
    pipe.vae_image_processor.get_default_height_width = lambda *_: (SIDE, SIDE)
    pipe.encode_prompt_multiple_images = lambda **_: (torch.randn(1, 5, TEXT), torch.ones(1, 5))
    told = pytest.warns(ProbeWarning, match="seeds and branches of JoyImageEditPipeline are not followed")
    with torch.no_grad(), told, probe(pipe, AttentionMass(heads=0), layers=0) as run:
        pipe(picture(SIDE, SIDE), "a ring", num_inference_steps=1, output_type="latent", guidance_scale=1.0)
    table = run[AttentionMass].table()
    assert set(table["branch"]) == {"unknown"} and set(table["prompt"]) == {""} and set(table["seed"]) == {-1}
    assert set(table.query("query == 'image' and span == '0'")["n_key"]) == {4}  # the picture, as reference


def test_a_transformer_that_leaves_a_text_out_is_refused_in_its_own_words() -> None:
    """HunyuanImage's without an embedder of glyphs: there is no IP-Adapter to unload."""
    pipe = build("hunyuan_image")
    pipe.register_modules(transformer=transformer("hunyuan_image", in_channels=CHANNELS, out_channels=CHANNELS))
    with probe(pipe, AttentionMass()), pytest.raises(RunError, match="attends from") as error:
        pipe('a "red" ring', num_inference_steps=1, height=SIDE, width=SIDE, output_type="latent")
    assert "IP-Adapter" not in str(error.value)


def test_a_size_that_the_pipeline_does_not_make_is_told() -> None:
    """HiDream scales any size to its own area."""
    model = MMDiT(build("hidream"))
    with pytest.warns(ProbeWarning, match=f"HiDreamImagePipeline made {SIDE} x {SIDE} pixels .* 64 x 64 were asked"):
        (image,) = model.generate("a red ring", steps=1, guidance=1.0, height=64, width=64)
    assert image.size == (SIDE, SIDE)


def test_an_encoder_without_a_text_of_its_own_reads_the_prompt() -> None:
    """HiDream: another text for T5 is not Llama's, and none is the negative prompt's."""
    pipe = model_of("hidream").pipeline
    rows = PipelineRows(pipe, FAMILIES["hidream"])
    detach = rows.attach()
    with torch.no_grad():
        others = {"prompt_3": "a cat", "negative_prompt": "ring", "negative_prompt_3": "red"}
        pipe.encode_prompt("a red ring", device="cpu", **others)
    for undo in detach:
        undo()
    for branch, texts in (("cond", ("a cat", "a red ring")), ("uncond", ("red", "ring"))):
        table = rows._branches[branch].tables[0]
        assert table is not None
        assert [table.text(stream) for stream in ("t5", "llama", "llama_layer")] == [texts[0], texts[1], texts[1]]


def test_a_tokenizer_that_cannot_be_read_leaves_words_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock pipeline runs with it, so it runs under the probe."""
    model = model_of("flux")

    def unreadable(*_: Any) -> None:
        raise UserError("does not say which characters a token stands for")

    monkeypatch.setattr("mmdit_probe.observe.pipeline_labels.token_tables", unreadable)
    with pytest.warns(UserWarning, match="stay unknown: does not say"):
        table = sample(model, "a cat", guidance=3.0)
    assert set(table[table["key"] == "text"]["span"]) == {"unknown"} and set(table["prompt"]) == {"a cat"}


def test_text_of_another_length_than_the_prompts_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of LongCat's and HunyuanVideo's pipelines that show their encoder a picture."""
    short = [unknown_table(3, "a cat")]
    monkeypatch.setattr("mmdit_probe.observe.pipeline_labels.token_tables", lambda *_: short)
    with pytest.warns(UserWarning, match="FluxPipeline put other text than the prompt alone .* words are unknown"):
        table = sample(model_of("flux"), "a cat", guidance=1.0)
    assert set(table[table["key"] == "text"]["span"]) == {"unknown"} and set(table["prompt"]) == {"a cat"}


def test_the_prompt_of_an_unconditional_row_is_its_image_s_if_it_is_empty() -> None:
    assert set(sample(model_of("aura_flow"), "", guidance=3.0, negative="ring")["prompt"]) == {""}


def test_glm_reads_quotations_only() -> None:
    prompts = ["a \"red\" ring, a 'cat'", "a ring", "the 'ring'"]
    table = sample(
        model_of("glm_image"), prompts, guidance=3.0, prior_token_ids=torch.zeros(3, 4, dtype=torch.long),
    ).query("query == 'image' and key == 'text' and step == 0")  # fmt: skip
    cond = table[table["branch"] == "cond"].pivot_table(index="prompt", columns="span", values="n_key").fillna(0)
    # Two texts have a pad each, which is read like them; shorter prompts are filled up in front.
    assert cond.loc[prompts, ["pad", "word", "eos"]].to_numpy().tolist() == [[2, 6, 2], [9, 0, 1], [5, 4, 1]]
    uncond = table[table["branch"] == "uncond"]
    assert set(uncond["span"]) == {"eos"} and set(uncond["n_key"]) == {1} and list(uncond["prompt"]) == prompts


def test_a_transformer_is_told_from_the_one_that_takes_no_text() -> None:
    table = sample(model_of("ideogram4"), ["a red ring", "ring"], guidance=3.0).query("query == 'image'")
    assert set(table["branch"]) == {"cond"} and set(table["seed"]) == {-1} and "unknown" not in set(table["span"])
    words = table[(table["span"] == "word") & (table["step"] == 0)].set_index("prompt")["n_key"]
    assert words.to_dict() == {"a red ring": 3, "ring": 1}


def test_an_autoencoder_of_unknown_normalisation_is_refused() -> None:
    model = model_of("ernie_image")  # its transformer's latents are the autoencoder's, four cells in one
    with pytest.raises(UserError, match="AutoencoderKLFlux2 are normalised in a way that is not known"):
        model.encode_image(np.zeros((SIDE, SIDE, 3), np.uint8))


@pytest.mark.parametrize("name", [name for name in LOADED if name not in ("ernie_image", "ideogram4")])
def test_images_are_those_of_the_pipelines_own_autoencoder(name: str) -> None:
    model = model_of(name)
    options: Any = {"steps": 1, "guidance": 1.0, "seed": 3, "height": SIDE, "width": SIDE}
    (image,) = model.generate("a red ring", **options)
    latents = model.generate("a red ring", output_type="latent", **options)
    side = SIDE // model.latent_side
    if name == "flux2":  # which gives the autoencoder's own latents
        pipe = model.pipeline
        std = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
        cells = pipe._patchify_latents(latents) - pipe.vae.bn.running_mean[:, None, None]
        latents = (cells / std[:, None, None]).flatten(2).transpose(1, 2)
    if latents.ndim == 3:
        latents = unpack(latents, "packed", model.family.cell, (side, side))
    assert image.size == (SIDE, SIDE) == model.decode(latents)[0].size
    found, wanted = (np.asarray(of, dtype=np.int16) for of in (model.decode(latents)[0], image))
    assert np.abs(found - wanted).max() <= 1 and wanted.std() > 0
    again = model.encode_image(image)
    assert again.shape == latents.shape
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1.0
    if name == "flux2":
        with torch.no_grad():
            own = model.pipeline._encode_vae_image(pixels, torch.Generator())
        torch.testing.assert_close(pack(again, "packed", 2), own.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_an_autoencoder_without_a_distribution() -> None:
    from diffusers import AutoencoderDC

    pipe = build("prx")
    blocks = {f"{part}_{name}": (value,) * 3 for part in ("encoder", "decoder") for name, value in (
        ("block_out_channels", 8), ("layers_per_block", 1), ("qkv_multiscales", ()),
    )}  # fmt: skip
    vae = AutoencoderDC(latent_channels=4, scaling_factor=0.5, **blocks).eval()
    pipe.register_modules(vae=vae)
    model = MMDiT(pipe)
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    latents = model.encode_image(image)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1.0
    torch.testing.assert_close(latents, 0.5 * vae.encode(pixels).latent)
    assert latents.shape == (1, 4, 8, 8) and model.size_multiple == 8 and model.decode(latents)[0].size == (SIDE, SIDE)


@pytest.mark.parametrize(
    ("name", "default", "multiple"),
    [
        ("flux", 1024, 16), ("bria", 1024, 16), ("bria_fibo", 1024, 16), ("krea2", 1024, 16), ("prx", 512, 16),
        ("longcat_image", 1024, 16), ("nucleus_image", 1024, 16), ("ernie_image", 1024, 16), ("ideogram4", 2048, 16),
    ],
)  # fmt: skip
def test_sizes_are_in_pixels_whatever_the_pipeline_counts_in(name: str, default: int, multiple: int) -> None:
    model = model_of(name)
    assert model.default_size == (default, default) and model.size_multiple == multiple


@pytest.mark.parametrize("name", ["aura_flow", "ernie_image", "flux", "glm_image", "ideogram4", "krea2"])
def test_a_size_that_nobody_names_is_the_models_own(name: str) -> None:
    model = model_of(name)
    transformer, found = model.transformer, []

    class Reached(Exception):
        pass

    def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(model.family.arrangement(bind(module, args, kwargs), module.config))
        raise Reached

    handle = transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with pytest.raises(Reached):
            model.generate("ring", steps=1, guidance=1.0)
    finally:
        handle.remove()
    height, width = model.default_size
    side = 16  # pixels a token
    assert found[0].grid == (height // side, width // side)


def test_images_go_through_the_autoencoder_and_back_into_tokens() -> None:
    model = model_of("flux")
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    latents = model.encode_image(image)
    assert latents.shape == (1, 4, 4, 4) and model.size_multiple == 16
    assert model.decode(latents)[0].size == (SIDE, SIDE)
    qwen = model_of("qwen_image")
    assert qwen.encode_image(image).shape == (1, 4, 4, 4) and qwen.decode(latents)[0].size == (SIDE, SIDE)


def test_sigmas_are_those_of_the_pipelines_own_schedule() -> None:
    model = model_of("flux")
    before = torch.random.get_rng_state()
    sigmas = model.sigmas(3, (SIDE, SIDE))
    assert sigmas != pytest.approx(model.sigmas(3, (4 * SIDE, SIDE)))  # its time shift depends on the size
    assert torch.equal(before, torch.random.get_rng_state())
    with probe(model, AttentionMass(heads=0), layers=0) as run:
        model.generate("ring", steps=3, guidance=1.0, height=SIDE, width=SIDE, output_type="latent")
    assert sorted(run[AttentionMass].table()["sigma"].unique(), reverse=True) == pytest.approx(sigmas)


def test_an_only_encoder_whose_length_is_fixed_cannot_be_left_out(tmp_path: Path) -> None:
    pipe = build("ernie_image")
    pipe.register_modules(pe=None, pe_tokenizer=None)
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    assert load(tmp_path, device="cpu").token_tables("a ring")[0].kinds == ["word"] * 2
    with pytest.raises(UserError, match="one text encoder only"):
        load(tmp_path, device="cpu", t5=False)


@pytest.mark.parametrize("name", ["glm_image", "hunyuan_image", "ideogram4"])
def test_a_directory_with_further_models_is_loaded_and_sampled(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path, safe_serialization=True)
    model, how = load(tmp_path, device="cpu"), {"steps": 2, "height": SIDE, "width": SIDE, "seed": 5}
    model.max_sequence_length = LENGTHS.get(name, model.max_sequence_length)
    for guidance, branches in ((3.0, {"cond"} if name == "ideogram4" else {"cond", "uncond"}), (1.0, {"cond"})):
        with probe(model, AttentionMass(heads=0), layers=0) as run:
            (image,) = model.generate('a "ring"', guidance=guidance, **how)
        table = run[AttentionMass].table()
        assert set(table["branch"]) == branches and set(table["seed"]) == {5} and set(table["prompt"]) == {'a "ring"'}
        assert image.size == (SIDE, SIDE)
    spans = model.token_tables('a "ring"')[0].word_spans("ring")
    assert set(spans) == {"glm_image": {"byt5"}, "hunyuan_image": {"byt5", "llm"}, "ideogram4": {"llm"}}[name]


@pytest.mark.parametrize(("name", "layers"), [("aura_flow", 4), ("bria", 4), ("prx", 2)])
def test_a_directory_of_another_family_is_loaded(name: str, layers: int, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path, safe_serialization=True)
    model = load(tmp_path, device="cpu")
    assert model.family.name == name and len(model.layers) == layers and model.text_length == 10
    text = model.encode_prompt("a red ring")
    assert text.prompt_embeds.shape[1] == len(text.tokens[0]) == 10 and text.tokens[0].word_spans("red")["t5"] == [1]
    with pytest.raises(UserError, match="one text encoder only"):
        load(tmp_path, device="cpu", t5=False)
