"""Experiments on a model of videos, against the explicit softmax in float64: budget, word maps, page, files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit_probe import MMDiT, TextMaps, probe, word_maps
from mmdit_probe.attention import reference
from mmdit_probe.errors import UserError
from mmdit_probe.evaluate.clipscore import ClipScorer
from mmdit_probe.experiments import AttentionBudget, Explore, Generate, Result, Score, Segment, ValueNorms, WordMaps
from mmdit_probe.models.layout import find_layers
from mmdit_probe.observe.pca import PCA, Projection
from mmdit_probe.results.clip import Clip
from tests import tiny
from tests.editing_pipelines import picture
from tests.observe.oracle import attentions
from tests.observe.test_families import written_down
from tests.pipelines import build
from tests.video_pipelines import FROM_A_PICTURE

PROMPT = "a red ring"
FRAMES, ROWS, COLUMNS = 3, 2, 3
CELLS = ROWS * COLUMNS
IMAGE = FRAMES * CELLS
QUICK: dict[str, Any] = {"num_steps": 2, "guidance": 1.0}
TEXT = slice(0, tiny.T5_LENGTH)
"""CogVideoX: text comes first."""


@pytest.fixture(scope="module")
def model() -> MMDiT:
    found = MMDiT(build("cogvideox"), "tiny-video")
    found.num_frames, found.size = 9, (32, 48)
    return found


@pytest.fixture(scope="module")
def dense(model: MMDiT) -> np.ndarray:
    """[steps, layers, H, N, N] float64 of two steps."""
    calls = attentions(
        lambda: model.generate(PROMPT, steps=2, guidance=1.0, seed=0, output_type="latent"), tiny.T5_LENGTH + IMAGE
    )
    return torch.stack([call[0] for call in calls]).unflatten(0, (2, -1)).numpy()


@pytest.fixture(scope="module")
def budget(model: MMDiT) -> Result:
    return AttentionBudget(prompts=[PROMPT], **QUICK).run(model, progress=False)


def test_the_budget_tells_the_own_frame_from_the_others(budget: Result, dense: np.ndarray) -> None:
    inside = dense[..., tiny.T5_LENGTH :, :]
    block = inside[..., tiny.T5_LENGTH :].reshape(*dense.shape[:3], FRAMES, CELLS, FRAMES, CELLS).sum(-1)
    same = np.einsum("slhfqf->slhfq", block).mean((0, 2, 3, 4))
    other = block.sum(-1).mean((0, 2, 3, 4)) - same
    text = inside[..., TEXT].sum(-1).mean((0, 2, 3))
    summary = budget.summary
    np.testing.assert_allclose(summary["I2I_same_frame"], same, atol=2e-6)
    np.testing.assert_allclose(summary["I2I_other_frames"], other, atol=2e-6)
    np.testing.assert_allclose(summary["I2T"], text, atol=2e-6)
    np.testing.assert_allclose(summary[["I2I_same_frame", "I2I_other_frames"]].sum(axis=1), summary["I2I"], atol=1e-6)
    np.testing.assert_allclose(same + other + text, 1.0)
    np.testing.assert_allclose(summary["I2I_same_frame_uniform"], CELLS / (IMAGE + tiny.T5_LENGTH))
    assert "same + other frames = I2I" in str(budget.texts()[1])
    assert budget.figure() is not None
    assert budget.request["num_frames"] == 9 and budget.request["size"] == [32, 48]


def test_controls_of_the_budget_are_split_too(model: MMDiT) -> None:
    found = AttentionBudget(prompts=[PROMPT], layers=1, control="random,uniform", **QUICK).run(model, progress=False)
    table = found.store.table("attention_budget_by_item")
    uniform = table[(table["control"] == "uniform") & (table["span"] == "same frame")]
    assert set(table[table["span"] == "other frames"]["control"]) == {"none", "random", "uniform"}
    np.testing.assert_allclose(uniform["mass"], uniform["uniform"], rtol=1e-4)


def test_a_word_has_a_map_per_frame(model: MMDiT, dense: np.ndarray) -> None:
    maps: Any = word_maps(model, PROMPT, layers="0-1", **QUICK)
    table = model.token_tables(PROMPT)[0]
    assert list(maps) == ["a", "red", "ring"] and isinstance(maps.image, Clip)
    for word in maps:
        columns = dense[..., tiny.T5_LENGTH :, table.positions(word=word)].sum(-1).mean((0, 1, 2))
        np.testing.assert_allclose(maps[word].array, columns.reshape(FRAMES, ROWS, COLUMNS), atol=2e-6)
    shown = maps["ring"].overlay()
    assert isinstance(shown, Clip) and len(shown) == 9 and shown.size == (48, 32)
    short: Any = word_maps(model, PROMPT, num_frames=5, **QUICK)  # of which its autoencoder makes eight
    assert short["ring"].array.shape == (2, ROWS, COLUMNS) and len(short.image) == 8 and model.num_frames == 9
    assert repr(maps["ring"]).startswith("WordMap('ring', 3 x 2 x 3 tokens") and "middle frame" in caption(maps.sheet())
    pipe = model.pipeline
    with probe(pipe, TextMaps(["ring"]), layers="0-1") as run:
        frames = pipe(
            PROMPT, num_inference_steps=2, guidance_scale=1.0, num_frames=9, height=32, width=48,
            generator=torch.Generator().manual_seed(0), max_sequence_length=tiny.T5_LENGTH,
        ).frames[0]  # fmt: skip
    np.testing.assert_allclose(run[TextMaps].map("ring"), maps["ring"].array, atol=1e-7)
    assert equal(run[TextMaps].overlay("ring", frames), shown)


def equal(one: Clip, other: Clip) -> bool:
    return all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(one, other, strict=True))


def caption(figure: Any) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title))


def test_maps_are_written_as_frames_and_gifs_and_read_back(model: MMDiT, tmp_path: Path) -> None:
    result = WordMaps(prompt=PROMPT, words="ring", **QUICK).run(model, out=tmp_path / "run", progress=False)
    row = result.table.iloc[0]
    maps = WordMaps(prompt=PROMPT, words="ring", **QUICK).maps(result)[0]
    place = np.unravel_index(maps["ring"].array.argmax(), (FRAMES, ROWS, COLUMNS))
    assert [row["peak_frame"], row["peak_row"], row["peak_column"]] == list(place)
    assert row["max"] == maps["ring"].array.max() and "peak (frame, row, column)" in str(result.texts()[0])
    back = Result.read(tmp_path / "run").store.load_picture("000")
    kept = model.generate(PROMPT, steps=2, guidance=1.0, seed=0)[0]
    assert isinstance(back, Clip) and equal(back, kept)
    for path in (tmp_path / "run" / "images" / "000.gif", tmp_path / "run" / "overlays" / "000-00-ring.gif"):
        with Image.open(path) as gif:
            assert gif.size == (48, 32) and 1 < gif.n_frames <= 9
    assert result.document()["overlays"] == [tmp_path / "run" / "overlays" / "000-00-ring.gif"]


def test_the_page_has_every_frame(model: MMDiT, dense: np.ndarray) -> None:
    result = Explore(prompt=PROMPT, **QUICK).run(model, progress=False)
    found = result.experiment.explorations(result)[0]  # type: ignore[attr-defined]
    ring = found.words.index("ring")
    columns = dense[..., tiny.T5_LENGTH :, model.token_tables(PROMPT)[0].positions(word="ring")].sum(-1)
    wanted = columns.mean(2).reshape(2, -1, FRAMES, ROWS, COLUMNS)  # [steps, layers, ...]
    np.testing.assert_allclose(found.i2t[:, 0, ring], wanted.mean(0), atol=2e-6)
    np.testing.assert_allclose(found.i2t[:, 1:, ring], wanted.swapaxes(0, 1), atol=2e-6)
    np.testing.assert_allclose(
        found.heads[1][0][:, ring], columns.mean(0)[1].reshape(-1, FRAMES, ROWS, COLUMNS), atol=2e-6
    )
    assert isinstance(found.image, Clip) and len(found.image) == FRAMES
    assert {"same frame", "other frames", "image"} <= set(found.kinds)
    np.testing.assert_allclose(found.budget.sum(-1), 1.0, atol=1e-5)
    html = result.experiment.pages(result)[0].html  # type: ignore[attr-defined]
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]
    assert len(data["images"]) == FRAMES and 'id="frame" min="0" max="2"' in html
    assert result.figure() is not None


def test_generate_keeps_videos_and_scores_their_middle_frames(model: MMDiT, tmp_path: Path) -> None:
    ask = Generate(prompts=[PROMPT], enhance="0", **QUICK)
    result = ask.run(model, out=tmp_path / "run", progress=False)
    assert "middle frame" in " ".join(result.data["remarks"])
    stock, edited = (result.store.load_picture(name) for name in ("000-stock", "000-enhanced-layers0-scale0"))
    assert (
        isinstance(stock, Clip)
        and isinstance(edited, Clip)
        and (tmp_path / "run" / "images" / "000-stock.gif").exists()
    )
    change = np.sqrt(np.mean((np.asarray(edited.middle, float) - np.asarray(stock.middle, float)) ** 2)) / 255
    assert result.table["change"].tolist() == [0.0, pytest.approx(change, rel=1e-5)] and change > 0


def test_a_score_is_that_of_the_middle_frame(model: MMDiT, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\n")
    ask = Score(prompts=str(prompts), clip="scenes-clip", map_sigma="none", images_per_prompt=1, **QUICK)
    result = ask.run(model, progress=False)
    assert "middle frame" in " ".join(result.data["remarks"])
    row = result.table[result.table["prompt"] == "a red ring"].iloc[0]
    clip = model.generate("a red ring", steps=2, guidance=1.0, seed=int(row["seed"]))[0]
    expected = ClipScorer.load("scenes-clip")([clip.frames[4]], ["a red ring"])[0]
    values = [value for value in row if isinstance(value, float) and value == pytest.approx(expected, abs=1e-3)]
    assert values


def test_value_norms_are_over_all_frames(model: MMDiT) -> None:
    found = ValueNorms(prompts=[PROMPT], layers=0, **QUICK).run(model, progress=False)
    table = found.store.table("value_norms")
    assert set(table[table["token"] == "image"]["n_token"]) == {IMAGE}


def test_projections_lie_on_the_frames(model: MMDiT) -> None:
    basis = PCA(kinds=("value",), components=2)
    with probe(model, basis, layers=0):
        model.generate(PROMPT, steps=1, guidance=1.0, output_type="latent")
    seen = Projection(basis)
    with probe(model, seen, layers=0):
        model.generate(PROMPT, steps=1, guidance=1.0, output_type="latent")
    assert seen.maps(0, "value").shape == (1, FRAMES, ROWS, COLUMNS, 2)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: Segment(image=Image.new("RGB", (32, 32)), classes="ring, house"),
        lambda: WordMaps(prompt=PROMPT, images=Image.new("RGB", (32, 32))),
        lambda: AttentionBudget(images=[Image.new("RGB", (32, 32))], prompts=PROMPT),
    ],
)
def test_what_reads_pictures_refuses_by_name(model: MMDiT, ask: Any) -> None:
    with pytest.raises(UserError, match="CogVideoXPipeline makes videos and reads no pictures here"):
        ask().run(model, progress=False)


def test_mp4_is_refused_where_it_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdit_probe.results.clip.find_spec", lambda name: None)
    with pytest.raises(UserError, match="MP4 needs imageio-ffmpeg"):
        WordMaps(prompt=PROMPT, video="mp4")


IMAGE_TO_VIDEO = {
    # (frames, h, w), and how many text tokens come before them; what is after them is text, too.
    "cogvideox": ((3, 2, 3), tiny.T5_LENGTH),
    "hunyuan_video15": ((3, 6, 9), 0),
}


@pytest.mark.parametrize("name", FROM_A_PICTURE)
def test_a_video_that_begins_with_a_picture(name: str) -> None:
    """The picture is in channels of the image's own tokens (CogVideoX), or also embedded beside them."""
    model = MMDiT(FROM_A_PICTURE[name](), name)
    model.pipeline.set_progress_bar_config(disable=True)
    model.num_frames, model.size = 9, (32, 48)
    space, before = IMAGE_TO_VIDEO[name]
    frames, cells = space[0], space[1] * space[2]
    how: dict[str, Any] = {"prompts": [PROMPT], "layers": 0, "num_steps": 1, "guidance": 1.0}
    given = picture(32, 48)
    budget = AttentionBudget(references=given, **how).run(model, progress=False)
    with written_down(model.transformer) as calls:
        model.given([given]).generate(PROMPT, steps=1, guidance=1.0, seed=0, output_type="latent")
    call = calls[find_layers(model.family, model.transformer)[0].path][0]
    p = reference.probabilities(call.query, call.key, call.attn_mask, call.is_causal, call.scale)[0]
    inside = p[:, before : before + frames * cells]
    own = inside[..., before : before + frames * cells]
    same = own.reshape(len(p), frames, cells, frames, cells).sum(-1).diagonal(dim1=1, dim2=3).mean()
    row = budget.summary.iloc[0]
    np.testing.assert_allclose(row["I2I"], own.sum(-1).mean(), atol=3e-6)
    np.testing.assert_allclose(row["I2I_same_frame"], same, atol=3e-6)
    np.testing.assert_allclose(row["I2I_same_frame"] + row["I2I_other_frames"], row["I2I"], atol=1e-6)
    np.testing.assert_allclose(row["I2T"] + row["I2O"] + row["I2I"], 1, atol=1e-5)
    assert len(budget.request["references"]) == 1
    with pytest.raises(UserError, match=r"begins with a picture: give it one as reference \(--references FILE"):
        AttentionBudget(**how).run(model, progress=False)
    with pytest.raises(UserError, match="makes a video of one picture; 2 references are given"):
        AttentionBudget(references=[given, given], **how).run(model, progress=False)


def test_pictures_are_asked_for_and_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmdit_probe.models.load.load", lambda *_, **__: pytest.fail("loaded"))
    for pipeline, references, told in (
        ("CogVideoXPipeline", picture(32, 48), "CogVideoXPipeline takes no pictures beside the prompt"),
        ("CogVideoXImageToVideoPipeline", None, "begins with a picture"),
    ):
        index = {"_class_name": pipeline, "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        for ask in (WordMaps(prompt=PROMPT, references=references), Score(references=references)):
            with pytest.raises(UserError, match=told):
                ask.run(tmp_path, progress=False)
