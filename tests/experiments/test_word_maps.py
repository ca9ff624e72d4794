"""Word maps against the explicit softmax in float64; batches, words that a prompt lacks, photos, folders, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit_probe import AttentionMass, MMDiT, TextMaps, probe, word_maps
from mmdit_probe.errors import UserError
from mmdit_probe.experiments import Explore, Result, WordMaps
from mmdit_probe.experiments.known import KnownLayers
from mmdit_probe.experiments.pictured_words import grounding, words_of
from mmdit_probe.plots.overlay import PictureMaps
from tests import pipelines, tiny
from tests.observe.oracle import attentions
from tests.tables import unexplained

IMAGE = 16
QUICK: dict[str, Any] = {"num_steps": 2, "guidance": 1.0}
PROMPT = "a red ring"


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return MMDiT(tiny.pipeline("sd3"), "tiny", tiny.T5_LENGTH)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def dense(model: MMDiT, photo: Image.Image, prompt: str, seed: int = 0) -> list[torch.Tensor]:
    """[1, H, N, N] float64 of every layer at the photo's noise level."""
    latents = model.noise(model.encode_image(photo), 0.5, seed)
    text = model.encode_prompt([prompt])
    return attentions(lambda: model.denoise(latents, 0.5, text), IMAGE + tiny.CLIP_LENGTH + tiny.T5_LENGTH)


@pytest.mark.parametrize(
    ("options", "layers", "heads"),
    [({}, [1], [0, 1]), ({"layers": "0,2"}, [0, 2], [0, 1]), ({"layers": "all", "heads": "1"}, [0, 1, 2], [1])],
)
def test_a_photos_map_is_the_mean_of_the_words_columns(
    model: MMDiT, photo: Image.Image, options: dict[str, Any], layers: list[int], heads: list[int]
) -> None:
    maps = word_maps(model, PROMPT, images=photo, sigma=0.5, **options)
    assert isinstance(maps, PictureMaps) and list(maps) == ["a", "red", "ring"]
    found = dense(model, photo, PROMPT)
    table = model.token_tables(PROMPT)[0]
    for word in maps:
        keys = [IMAGE + p for p in table.positions(word=word)]
        mean = torch.stack([found[layer][0, heads, :IMAGE][..., keys].sum(-1).mean(0) for layer in layers]).mean(0)
        assert np.abs(maps[word].array - mean.view(4, 4).numpy()).max() < 2e-6
    assert maps.image.size == (64, 64) and maps["ring"].overlay().size == (64, 64)


def test_heads_may_be_named_by_layer(model: MMDiT, photo: Image.Image) -> None:
    """Two layers of a model with two heads: as many entries as there are heads are not all heads."""
    found = dense(model, photo, PROMPT)
    keys = [IMAGE + p for p in model.token_tables(PROMPT)[0].positions(word="ring")]
    maps = word_maps(model, PROMPT, images=photo, sigma=0.5, layers="0,2", heads={0: [1], 2: [0]})
    columns = [found[layer][0, head, :IMAGE][:, keys].sum(-1) for layer, head in ((0, 1), (2, 0))]
    assert np.abs(maps["ring"].array - torch.stack(columns).mean(0).view(4, 4).numpy()).max() < 2e-6  # type: ignore[index]
    assert "all heads" not in maps.about  # type: ignore[union-attr]
    with pytest.raises(UserError, match="heads are named of layer 1; read are layers 0, 2"):
        word_maps(model, PROMPT, images=photo, layers="0,2", heads={1: [0]})
    with pytest.raises(UserError, match="heads are named of layer '0'"):
        word_maps(model, PROMPT, images=photo, layers="0,2", heads={"0": [1]})


def test_one_stream_is_part_of_the_whole(model: MMDiT, photo: Image.Image) -> None:
    both, named, clip, t5 = (
        word_maps(model, PROMPT, images=photo, streams=streams)["ring"].array  # type: ignore[index]
        for streams in (None, "t5, clip", "clip", "t5")
    )
    np.testing.assert_array_equal(named, both)
    np.testing.assert_allclose(clip + t5, both, atol=1e-6)
    with pytest.raises(UserError, match="unknown encoder stream 'qwen'"):
        word_maps(model, PROMPT, images=photo, streams="qwen")
    with pytest.raises(UserError, match="unknown option of word_maps 'image': did you mean 'images'"):
        word_maps(model, PROMPT, image=photo)


def test_ones_own_pipeline_gives_its_stock_picture() -> None:
    pipe = tiny.pipeline("sd3")
    maps = word_maps(pipe, PROMPT, seed=3, **QUICK)
    assert isinstance(maps, PictureMaps)
    again = MMDiT(pipe).generate(PROMPT, steps=2, guidance=1.0, seed=3)[0]
    assert (np.asarray(maps.image) == np.asarray(again)).all()
    with probe(pipe, TextMaps(["ring"]), layers=1) as run:
        pipe(PROMPT, num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(3),
             max_sequence_length=tiny.T5_LENGTH)  # fmt: skip
    np.testing.assert_allclose(run[TextMaps].map("ring"), maps["ring"].array, atol=1e-7)
    assert run[TextMaps].overlay("ring", maps.image) == run[TextMaps].overlay("ring") == maps["ring"].overlay()


def test_overlays_are_over_the_pictures_of_the_last_call() -> None:
    pipe = tiny.pipeline("sd3")
    how: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "max_sequence_length": tiny.T5_LENGTH}
    before = dict(vars(pipe.image_processor))
    with probe(pipe, TextMaps(), layers=1) as run:
        pipe([PROMPT], **how)
        images = pipe(["a house", PROMPT], **how).images
    assert vars(pipe.image_processor) == before
    seen = run[TextMaps]
    assert seen.overlay("house", sample=1) == seen.overlay("house", images[0], sample=1)
    assert seen.overlay("ring", sample=2) == seen.overlay("ring", images[1], sample=2)
    with pytest.raises(UserError, match="no picture of sample 0"):
        seen.overlay("ring", sample=0)
    with probe(pipe, TextMaps(["ring"]), layers=1) as run:
        pipe(PROMPT, output_type="np", **how)
    with pytest.raises(UserError, match="no picture of sample 0"):
        run[TextMaps].overlay("ring")


def test_img2img_starts_from_a_reference(photo: Image.Image) -> None:
    """Its first steps are left out: neither seen nor told as if they were."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    parts = tiny.pipeline("sd3").components
    pipe = StableDiffusion3Img2ImgPipeline(**{name: part for name, part in parts.items() if part is not None})
    maps = word_maps(pipe, PROMPT, references=photo, num_steps=5, guidance=1.0, layers=1)
    with probe(pipe, TextMaps(["ring"]), layers=1) as run:
        pipe(PROMPT, image=photo, num_inference_steps=5, guidance_scale=1.0, height=64, width=64,
             generator=torch.Generator().manual_seed(0), max_sequence_length=tiny.T5_LENGTH)  # fmt: skip
    assert run[TextMaps].steps == [2, 3, 4] and "3 of 5 steps" in maps.about
    np.testing.assert_array_equal(run[TextMaps].map("ring"), maps["ring"].array)
    assert run[TextMaps].overlay("ring") == maps["ring"].overlay()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(pipelines.PIPELINES))
def test_every_stock_pipeline_of_pictures_has_word_maps(name: str) -> None:
    """A prompt of one word: the mean of its map is the mass of words among the keys that image tokens attend to."""
    pipe, side = pipelines.build(name), 128 if name == "prx" else pipelines.SIDE
    prompt = '"ring"' if name == "glm_image" else "ring"  # it reads quotations only
    how = {"guidance": 2.0, "height": side, "width": side}
    maps = word_maps(pipe, prompt, words="ring", layers="all", num_steps=2, **how)
    assert isinstance(maps, PictureMaps) and maps.image.size == (side, side)
    with probe(pipe, AttentionMass()) as run:
        image = MMDiT(pipe).generate(prompt, steps=2, seed=0, **how)[0]
    assert (np.asarray(image) == np.asarray(maps.image)).all()
    rows = run[AttentionMass].table().query("query == 'image' and span == 'word' and branch == 'cond'")
    masses = rows.groupby(["layer", "step", "head"])["mass"].sum()
    assert masses.index.nunique() == len(MMDiT(pipe).layers) * 2 * MMDiT(pipe).heads
    assert maps["ring"].array.mean() == pytest.approx(masses.mean(), rel=1e-5) and masses.min() > 0


@pytest.mark.parametrize(
    ("name", "prompt", "words", "message"),
    [
        ("glm_image", "a red ring", None, "or no word at all: byt5 reads only what stands in quotation marks"),
        ("glm_image", 'a red "ring"', "red", "'red' has no text token: no text encoder reads it"),
    ],
)
def test_a_word_that_no_encoder_is_given_is_refused(name: str, prompt: str, words: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        word_maps(pipelines.build(name), prompt, words=words, **QUICK)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cogview3plus", "CogVideoXDDIMScheduler is no rectified flow: sample with the pipeline"),
        ("cogview4", "timesteps that do not follow from the noise level: sample with the pipeline"),
        ("ideogram4", "puts image and text into one input of its transformer: sample with the pipeline"),
        ("ernie_image", "normalised in a way that is not known here"),
    ],
)
def test_a_photo_is_read_or_refused_by_name(photo: Image.Image, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        word_maps(pipelines.build(name), '"ring"', words="ring", images=photo, height=32, width=32)


def test_several_prompts_and_pictures_give_a_list(model: MMDiT) -> None:
    found = word_maps(model, [PROMPT, "a cat"], words=["ring", "cat", "a"], images_per_prompt=2, **QUICK)
    assert isinstance(found, list)
    assert [(one.prompt, one.seed, list(one)) for one in found] == [
        (PROMPT, 0, ["ring", "a"]), (PROMPT, 1, ["ring", "a"]), ("a cat", 2, ["cat", "a"]), ("a cat", 3, ["cat", "a"]),
    ]  # fmt: skip
    alone = word_maps(model, "a cat", words="cat", seed=3, **QUICK)
    assert isinstance(alone, PictureMaps)
    np.testing.assert_array_equal(alone["cat"].array, found[3]["cat"].array)
    assert isinstance(word_maps(model, [PROMPT], **QUICK), list)
    with pytest.raises(UserError, match="unknown word 'dog'"):
        word_maps(model, [PROMPT, "a cat"], words="cat, dog", **QUICK)


def test_a_sample_without_the_word_gets_nothing_in_a_run(model: MMDiT) -> None:
    with probe(model, TextMaps(["ring", "a"], heads="all"), layers="0-1") as run:
        model.generate([PROMPT, "a cat"], steps=2, guidance=2.0, seed=0, output_type="latent")
    maps = run[TextMaps]
    assert (maps.maps(0)[1, ..., 0] == 0).all() and (maps.maps(0)[0, ..., 0] > 0).all()
    with pytest.raises(UserError, match="sample 1, 'a cat', has no word 'ring'"):
        maps.map("ring", sample=1)
    expected = torch.stack([maps.maps(layer, step)[0, 1, ..., 0] for layer in (0, 1) for step in (0, 1)]).mean(0)
    np.testing.assert_allclose(maps.map("ring", heads=1), expected, atol=1e-7)
    np.testing.assert_allclose(
        maps.map("a", layers=1, steps=0, sample=1), maps.maps(1, 0)[1, ..., 1].mean(0), atol=1e-7
    )
    with pytest.raises(UserError, match="unknown word 'red'"):
        maps.map("red")
    with pytest.raises(UserError, match="sample 2 does not exist"):
        maps.map("a", sample=2)
    with pytest.raises(UserError, match="layer 2 does not exist"):
        maps.map("a", layers=2)


def test_a_prompt_without_the_word_has_its_picture_and_no_maps(model: MMDiT, tmp_path: Path) -> None:
    """It was an error for all prompts."""
    prompts = ["a cat", "a red ring", "a cat"]
    maps = word_maps(model, prompts, words="ring", seed=5, **QUICK)
    assert [list(one) for one in maps] == [[], ["ring"], []]
    alone = word_maps(model, "a red ring", words="ring", seed=6, **QUICK)
    assert np.array_equal(maps[1]["ring"].array, alone["ring"].array)
    for seed in (5, 7):
        stock = model.generate("a cat", steps=2, guidance=1.0, seed=seed)[0]
        assert np.array_equal(np.asarray(maps[seed - 5].image), np.asarray(stock))
    assert len(maps[0].sheet().axes) == 1 and "a cat" in maps[0]._repr_html_()
    experiment = WordMaps(prompt=prompts, words="ring", seed=5, **QUICK)
    for resume in (False, True):
        result = experiment.run(model, out=tmp_path, resume=resume)
        assert result.table["item"].tolist() == [1] and len(list((tmp_path / "images").glob("*.png"))) == 3
    assert result.data["remarks"] == ["prompt 'a cat' has none of the words asked for: it has no maps"]
    result.figure()
    assert result.texts()
    explored = Explore(prompt=prompts, words="ring", seed=5, **QUICK).run(model, out=tmp_path / "page", progress=False)
    assert [path.name for path in (tmp_path / "page").glob("*.html")] == ["explore-001.html"]
    of_one = Explore(prompt="a red ring", words="ring", seed=6, **QUICK).run(model, progress=False)
    (page,), (one,) = (result.experiment.explorations(result) for result in (explored, of_one))
    assert np.array_equal(page.i2t, one.i2t) and np.array_equal(page.image, one.image)
    assert explored.figure() and explored.texts()


def test_without_words_any_word_of_the_prompt_can_be_asked(model: MMDiT) -> None:
    with probe(model, TextMaps(), TextMaps(queries="text"), layers=1) as run:
        model.generate(PROMPT, steps=1, guidance=1.0, seed=0, output_type="latent")
    i2t, t2i = run.observers
    assert isinstance(i2t, TextMaps) and isinstance(t2i, TextMaps)
    places = model.token_tables(PROMPT)[0].positions(word="red ring")
    np.testing.assert_allclose(i2t.map("red ring"), i2t.maps(1)[0, ..., places].sum(-1), atol=1e-7)
    np.testing.assert_allclose(t2i.map("red ring"), t2i.maps(1)[0, ..., places].mean(-1), atol=1e-7)
    with pytest.raises(UserError, match=r'TextMaps\(heads="all"\)'):
        i2t.map("ring", heads=0)


def test_what_becomes_of_a_file_is_said(model: MMDiT, photo: Image.Image, tmp_path: Path) -> None:
    """Of several frames the first was taken, and one pixel drawn over the whole input, without a word."""
    photo.save(tmp_path / "film.gif", save_all=True, append_images=[Image.eval(photo, lambda value: 255 - value)])
    photo.resize((1, 1)).save(tmp_path / "dot.png")
    photo.crop((0, 0, 64, 32)).save(tmp_path / "wide.png")
    photo.save(tmp_path / "whole.png")
    ask = WordMaps(prompt=PROMPT, images=str(tmp_path), layers=0)
    height, width = model.default_size
    assert ask.prepare(model, ask.gather(False)).notes == [
        f"dot.png: 1 x 1 pixels are enlarged to {height} x {width}",
        "film.gif: the first of 2 frames is used",
        "wide.png: what lies beside the centre is cut off",
    ]


@pytest.mark.parametrize("prompt", ["caf\u00e9 cafe\u0301 CAFE\u0301", "cat's cat\u2019s"])
def test_a_word_that_is_written_in_two_ways_is_one(model: MMDiT, photo: Image.Image, prompt: str) -> None:
    assert list(word_maps(model, prompt, images=photo)) == [prompt.split()[0]]
    page = Explore(prompt=prompt, images=photo).run(model, progress=False)
    shown = page.experiment.explorations(page)[0].tokens  # type: ignore[attr-defined]
    assert [token for token in shown if token[1] <= 0] == [(word, 0) for word in prompt.split()]


def test_the_name_of_a_reference_may_hold_a_comma(photo: Image.Image, tmp_path: Path) -> None:
    for name in ("one.png", "a, b.png"):
        photo.save(tmp_path / name)
    for asked, count in ((f"{tmp_path}/a, b.png", 1), (f"{tmp_path}/one.png, {tmp_path}/one.png", 2)):
        assert len(WordMaps(prompt=PROMPT, references=asked).pictures_given()) == count


def test_half_a_character_is_refused(model: MMDiT, photo: Image.Image) -> None:
    """Half of an emoji's escape in JSON; tokenizers raise a TypeError."""
    with pytest.raises(UserError, match="character 2 is half of one"):
        word_maps(model, json.loads('"a \\ud83d cat"'), images=photo)
    with pytest.raises(UserError, match="character 2 is half of one"):
        model.token_tables("a \ud83d cat")


def test_words_are_taken_once_without_signs(model: MMDiT) -> None:
    table = model.token_tables("A cat, a red-cat!")[0]
    assert words_of(table, None)[:2] == ("A", "cat")
    assert "," not in words_of(table, None) and "a" not in words_of(table, None)
    assert words_of(table, ["dog", "cat"]) == ("cat",)
    assert words_of(table, [",", "CAT", "cat"]) == (",", "CAT")  # a sign that is asked for; what is listed counts once


def test_known_layers_are_the_default_if_the_model_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MMDiT(tiny.pipeline("sd3"), "stabilityai/stable-diffusion-3-medium-diffusers", tiny.T5_LENGTH)
    assert grounding(model).layers == (1,) and "middle third" in grounding(model).source
    monkeypatch.setattr(MMDiT, "layers", model.layers * 8)
    assert grounding(model).layers == (9,) and "2509.18096" in grounding(model).source


def test_weighted_layers_are_averaged_with_their_weights(model: MMDiT, photo: Image.Image) -> None:
    known = KnownLayers((2, 0), "told", (0.75, 0.25))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmdit_probe.experiments.known.known_layers", lambda *_: known)
        both = word_maps(model, PROMPT, images=photo)
    each = [word_maps(model, PROMPT, images=photo, layers=layer)["ring"].array for layer in (2, 0)]  # type: ignore[index]
    assert isinstance(both, PictureMaps) and "layers 0, 2 (told; weighted)" in both.about
    np.testing.assert_allclose(both["ring"].array, 0.75 * each[0] + 0.25 * each[1], atol=1e-7)


def test_the_folder_holds_overlays_arrays_and_a_sheet(model: MMDiT, tmp_path: Path) -> None:
    experiment = WordMaps(prompt=PROMPT, words="ring, red ring", layers="0-1", heads="1", steps="1", **QUICK)
    result = experiment.run(model, tmp_path / "run", progress=False)
    assert unexplained(result) == set()
    assert [path.name for path in sorted((tmp_path / "run" / "overlays").iterdir())] == [
        "000-00-ring.png", "000-01-red-ring.png",
    ]  # fmt: skip
    kept = np.load(tmp_path / "run" / "arrays" / "maps-000.npz")
    assert kept["words"].tolist() == ["ring", "red ring"] and kept["maps"].shape == (2, 4, 4)
    assert (tmp_path / "run" / "maps.png").exists() and (tmp_path / "run" / "images" / "000.png").exists()
    row = result.table.iloc[0]
    assert row["mass"] == pytest.approx(kept["maps"][0].mean()) and row["max"] == pytest.approx(kept["maps"][0].max())
    assert np.unravel_index(kept["maps"][0].argmax(), (4, 4)) == (row["peak_row"], row["peak_column"])
    again = Result.read(tmp_path / "run")
    assert isinstance(again.experiment, WordMaps)
    np.testing.assert_array_equal(again.experiment.maps(again)[0]["ring"].array, kept["maps"][0])
    assert "layers 0, 1, heads [1], 1 of 2 steps" in again.texts()[-1]
    assert again.save(tmp_path / "copy") and (tmp_path / "copy" / "arrays" / "maps-000.npz").exists()


def test_what_is_missing_is_asked_for(model: MMDiT, photo: Image.Image) -> None:
    with pytest.raises(UserError, match="no prompt is given"):
        word_maps(model)
    with pytest.raises(UserError, match="has no caption"):
        word_maps(model, images=photo)
    with pytest.raises(UserError, match="layer 7 does not exist"):
        word_maps(model, PROMPT, layers=7, **QUICK)
    with pytest.raises(UserError, match="input size 33 x 64: both sides must be multiples of 16"):
        word_maps(model, PROMPT, height=33, **QUICK)
    with pytest.raises(UserError, match="positions for"):
        word_maps(model, PROMPT, width=1 << 14, **QUICK)
    with pytest.raises(UserError, match="height is 16385; expected a whole number from 1"):
        word_maps(model, PROMPT, height=(1 << 14) + 1, **QUICK)


def test_every_option_that_decides_the_maps_is_in_the_request(model: MMDiT, photo: Image.Image) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"guidance": 2.0}, {"num_steps": 3}, {"seed": 1}, {"words": "ring"}, {"images_per_prompt": 2},
        {"layers": 0}, {"heads": "1"}, {"steps": "0"}, {"streams": "clip"}, {"height": 32}, {"width": 32},
        {"prompt": "a blue ring"},
    ]  # fmt: skip
    asked = [WordMaps(**{"prompt": PROMPT, **QUICK, **change}) for change in changes]
    found = [one.prepare(model, one.gather(False)).request for one in asked]
    assert all(first != second for k, first in enumerate(found) for second in found[:k])
    pictured = [WordMaps(prompt=PROMPT, images=photo, sigma=sigma) for sigma in (0.2, 0.3)]
    assert len({one.prepare(model, one.gather(False)).request["sigma"] for one in pictured}) == 2


def test_seeds_may_be_large(model: MMDiT) -> None:
    seed = 2**62
    result = WordMaps(prompt=PROMPT, words="ring", images_per_prompt=2, seed=seed, **QUICK).run(model, progress=False)
    assert result.table["seed"].tolist() == [seed, seed + 1]


def test_unknown_words_of_the_embedded_model_are_told_once(model: MMDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MMDiT, "vocabulary", ("ring", "red", "a"))
    study = WordMaps(prompt=[PROMPT, "a cat"], **QUICK).prepare(model, ([PROMPT, "a cat"], []))
    assert [note for note in study.notes if "knows 3 words; not: cat" in note] == study.notes


def test_the_page_holds_what_was_measured(model: MMDiT, photo: Image.Image) -> None:
    maps = word_maps(model, PROMPT, images=photo, sigma=0.5, layers=2)
    assert isinstance(maps, PictureMaps)
    found = json.loads(re.search(r'id="data">(.*?)</script>', maps.explore().html, re.DOTALL)[1])  # type: ignore[index]
    assert found["words"] == ["a", "red", "ring", "BOS (clip)", "EOS (clip)", "EOS (t5)", "PAD (clip)", "PAD (t5)"]
    assert found["chosen"] == [2] and found["layers"] == [0, 1, 2] and found["steps"] == ["the one"]
    attention = [one.numpy() for one in dense(model, photo, PROMPT)]
    table = model.token_tables(PROMPT)[0]
    bos = [IMAGE + p for p in table.positions(kind="bos", stream="clip")]
    ring = [IMAGE + p for p in table.positions(word="ring")]
    for layer in range(3):
        mean = attention[layer][0].mean(0)
        assert found["i2t"][str(layer)]["max"][0][3] == pytest.approx(mean[:IMAGE, bos].sum(-1).max(), rel=1e-3)
        assert found["t2i"][str(layer)]["max"][0][2] == pytest.approx(mean[ring, :IMAGE].mean(0).max(), rel=1e-3)
        head = attention[layer][0, 1]
        assert found["i2tHeads"][str(layer)]["max"][1][2] == pytest.approx(head[:IMAGE, ring].sum(-1).max(), rel=1e-3)
        words = [IMAGE + p for p in table.positions(kind="word")]
        assert found["budget"][layer][2][0][0][0] == pytest.approx(head[:IMAGE, words].sum(-1).mean(), abs=1e-4)
        assert np.allclose(np.sum(found["budget"][layer], -1), 1, atol=1e-3)


def test_the_page_of_a_sampled_picture_has_its_steps(model: MMDiT, tmp_path: Path) -> None:
    experiment = Explore(prompt=PROMPT, words="ring", num_steps=3, guidance=2.0)
    result = experiment.run(model, tmp_path, progress=False)
    kept = result.store.load_arrays("explore-000")
    assert kept is not None and kept["i2t"].shape == (3, 4, 6, 4, 4)
    np.testing.assert_allclose(kept["i2t"][:, 0], kept["i2t"][:, 1:].mean(1), atol=1e-7)
    np.testing.assert_allclose(kept["i2t_heads"].mean(1), kept["i2t"][:, 0], atol=1e-6)
    np.testing.assert_allclose(kept["budget"][:, :, 0], kept["budget"][:, :, 1:].mean(2), atol=1e-6)
    assert (tmp_path / "explore.html").stat().st_size < 1e6
    maps = word_maps(model, PROMPT, words="ring", layers="all", num_steps=3, guidance=2.0)
    assert isinstance(maps, PictureMaps)
    np.testing.assert_allclose(maps["ring"].array, kept["i2t"][:, 0, 0].mean(0), atol=1e-6)


def test_models_whose_text_is_no_query_have_a_page_without_t2i() -> None:
    maps = word_maps(pipelines.build("prx"), PROMPT, words="ring", num_steps=1, guidance=1.0, height=128, width=128)
    assert isinstance(maps, PictureMaps) and maps["ring"].array.shape == (8, 8)
    found = json.loads(re.search(r'id="data">(.*?)</script>', maps.explore().html, re.DOTALL)[1])  # type: ignore[index]
    assert np.max([layer["max"] for layer in found["t2i"].values()]) == 0
    assert np.min([np.array(layer["max"])[..., 0] for layer in found["i2t"].values()]) > 0
