"""Score: CLIPScore against its formula, pairing, intervals, the export layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from mmdit_probe import UserError, load
from mmdit_probe.cli.app import main
from mmdit_probe.evaluate.blip import BlipAsker, phrases
from mmdit_probe.evaluate.clipscore import ClipScorer
from mmdit_probe.experiments import Result, Score
from mmdit_probe.experiments.compare_runs import compare_runs
from mmdit_probe.experiments.experiment import Study
from mmdit_probe.experiments.score import (
    Job,
    Scorers,
    compare_variants,
    export,
    prompts_by_category,
    scene_prompts,
    scored,
    verdict_lines,
)
from mmdit_probe.experiments.store import MemoryStore
from mmdit_probe.scenes import captions, describe, load_parser, scene
from tests import blip


def test_the_path_of_an_adapter_may_hold_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was cut at the last one: "1e-4/lora" looks like a hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "rate=1e-4" / "lora").mkdir(parents=True)
    path = "runs/rate=1e-4/lora"
    assert Score(lora=[path]).variants() == {"base": None, "rate=1e-4": path}
    assert Score(lora=[f"mine={path}"]).variants() == {"base": None, "mine": path}


def test_clipscore_is_the_clamped_cosine_of_the_model() -> None:
    scorer = ClipScorer.load("scenes-clip")
    assert scorer.metric == "clipscore[scenes-clip]"
    picture, text = Image.fromarray(scene("val", 0).image), describe(scene("val", 0))
    clip = scorer.clip
    pixels = clip.processor(images=[picture], return_tensors="pt")["pixel_values"]
    length = clip.model.config.text_config.max_position_embeddings
    words = clip.tokenizer([text], padding="max_length", max_length=length, return_tensors="pt")
    with torch.no_grad():
        image = clip.model.visual_projection(clip.model.vision_model(pixels).pooler_output)[0]
        said = clip.model.text_projection(clip.model.text_model(**words).pooler_output)[0]
    expected = 100 * max(0.0, float(torch.nn.functional.cosine_similarity(image, said, dim=0)))
    assert scorer([picture], [text])[0] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(UserError, match="1 image for 2 prompts"):
        scorer([picture], [text, text])


def test_clipscore_prefers_the_right_caption() -> None:
    scorer = ClipScorer.load("scenes-clip")
    items = [scene("val", index) for index in range(24)]
    pictures = [Image.fromarray(item.image) for item in items]
    right = [describe(item) for item in items]
    wrong = right[12:] + right[:12]
    assert scorer(pictures, right).mean() > scorer(pictures, wrong).mean() + 5
    assert len(scorer([], [])) == 0


def test_a_model_that_is_no_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="is a 'bert' model"):
        ClipScorer.load(str(tmp_path))
    with pytest.raises(UserError, match="cannot load the CLIP 'nowhere'"):
        ClipScorer.load("nowhere")


def frame(shift: float = 0.1, noise: float = 0.0) -> pd.DataFrame:
    """Two variants on 40 prompts x 2 seeds whose pictures differ a lot and whose difference is `shift` each time."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(40):
        for j in range(2):
            value = float(rng.random())
            key = {"category": "colour" if k < 20 else "count", "prompt": f"p{k}", "index": k, "seed": 2 * k + j}
            rows.append({"variant": "base", **key, "facts": value})
            rows.append({"variant": "tuned", **key, "facts": value + shift + noise * float(rng.standard_normal())})
    return pd.DataFrame(rows)


def test_pairing_sees_a_difference_that_means_alone_do_not() -> None:
    table = compare_variants(frame(shift=0.03, noise=0.02), "base").set_index(["variant", "category"])
    row = table.loc[("tuned", "all")]
    assert (row.prompts, row.images) == (40, 80)
    assert 0 < row.difference_low < 0.03 < row.difference_high < 0.05
    assert row.low < table.loc[("base", "all"), "mean"]  # unpaired, the intervals overlap
    assert row.verdict != "worse"
    lower = compare_variants(frame(shift=-0.1, noise=0.02), "base").set_index(["variant", "category"])
    assert lower.loc[("tuned", "count"), "verdict"] == "worse"
    assert table.loc[("base", "all"), "difference"] == 0


def test_a_caption_that_comes_up_again_is_one_prompt() -> None:
    """Eight captions five times over are eight means, whose interval is the t interval up to the draws; forty prompts
    would have one of less than half its width."""
    rng = np.random.default_rng(0)
    level, noise = rng.normal(0, 1, 8), rng.normal(0, 0.1, 40)
    rows = [
        {"variant": variant, "category": "texture", "prompt": f"p{k % 8}", "index": k, "seed": k,
         "clip": 30 + (variant == "tuned") * (level[k % 8] + noise[k])}
        for variant in ("base", "tuned") for k in range(40)
    ]  # fmt: skip
    row = compare_variants(pd.DataFrame(rows), "base").set_index(["variant", "category"]).loc["tuned", "texture"]
    means = level + noise.reshape(5, 8).mean(0)
    assert (row["prompts"], row["images"]) == (8, 40) and row["difference"] == pytest.approx(means.mean())
    half = stats.t.ppf(0.975, 7) * means.std(ddof=1) / np.sqrt(8)
    assert (row["difference_high"] - row["difference_low"]) / (2 * half) == pytest.approx(1, abs=0.2)


def test_a_caption_of_two_categories_is_one_prompt_of_all() -> None:
    """Twelve captions, four of them in both categories: of all prompts those four count once, by their means."""
    first, second = np.arange(12.0), 100 + np.arange(4.0)
    pictures = [("colour", f"p{k}", value) for k, value in enumerate(first)]
    pictures += [("numeracy", f"p{k}", value) for k, value in enumerate(second)]
    rows = [
        {"variant": variant, "category": category, "prompt": prompt, "index": k, "seed": k, "clip": value * scale}
        for variant, scale in (("base", 1), ("tuned", 3)) for k, (category, prompt, value) in enumerate(pictures)
    ]  # fmt: skip
    table = compare_variants(pd.DataFrame(rows), "base").set_index(["variant", "category"])
    expected = np.concatenate([(first[:4] + second) / 2, first[4:]]).mean()
    assert table.loc[("tuned", "all"), ["prompts", "images"]].tolist() == [12, 16]
    assert table.loc[("base", "all"), "mean"] == pytest.approx(expected)
    assert table.loc[("tuned", "all"), "difference"] == pytest.approx(2 * expected)
    assert table.loc[("tuned", "numeracy"), "prompts"] == 4


def yes_and_no(name: str, tuned: int, n: int = 60) -> pd.DataFrame:
    """A metric that 30 of n pictures of the base model show, and `tuned` of the other variant."""
    rows = [
        {"variant": variant, "category": "colour", "prompt": f"p{k}", "index": k, "seed": k, name: float(k < count)}
        for variant, count in (("base", 30), ("tuned", tuned)) for k in range(n)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_verdicts_and_intervals_of_yes_and_no() -> None:
    """A fall of the opposite is no loss; shares stay within 0..1; a few items that are alike exclude no loss."""

    def row(name: str, tuned: int, n: int = 60) -> pd.Series:
        return (
            compare_variants(yes_and_no(name, tuned, n), "base").set_index(["variant", "category"]).loc["tuned", "all"]
        )

    assert [row("colours", count)["verdict"] for count in (10, 50)] == ["worse", "no worse"]
    assert [row("swapped_colours", count)["verdict"] for count in (10, 50)] == ["no worse", "worse"]
    fall = row("swapped_colours", 10)
    assert fall["difference"] == pytest.approx(-1 / 3)
    assert fall["difference_low"] < fall["difference"] < fall["difference_high"] < 0
    assert row("facts", 30, 30)["verdict"] == "undecided" and row("facts", 30, 200)["verdict"] == "no worse"
    whole = row("facts", 30, 30)
    assert whole["mean"] == whole["high"] == 1 and whole["low"] == pytest.approx(1 / (1 + 1.959964**2 / 30))  # Wilson
    itself = compare_variants(yes_and_no("facts", 30), "base").set_index("variant").loc["base"]
    assert itself["verdict"].eq("").all() and itself.filter(like="difference").eq(0).all(axis=None)


def test_verdicts_are_told_with_their_margin() -> None:
    parts = [yes_and_no("facts", 10), yes_and_no("facts", 30).assign(category="count")]
    found = compare_variants(pd.concat(parts), "base")
    assert verdict_lines(found, "facts", "base") == [
        "facts of tuned against base: worse in all, colour; no worse in count"
        " (margin 0.05, corrected for 3 comparisons (Holm))."
    ]


def test_the_margin_of_a_cosine_is_that_of_the_clipscore() -> None:
    rng = np.random.default_rng(0)
    cosines = np.stack([rng.normal(0.3, 0.02, 80)] * 2) - [[0.0], [0.03]] + rng.normal(0, 0.001, (2, 80))
    rows = [
        {"variant": variant, "category": "colour", "prompt": f"p{k}", "index": k, "seed": k,
         "clipscore[m]": 100 * value, "clip_similarity[m]": value}
        for variant, values in zip(("base", "tuned"), cosines, strict=True) for k, value in enumerate(values)
    ]  # fmt: skip
    found = compare_variants(pd.DataFrame(rows), "base")
    assert set(found[found["variant"] == "tuned"]["verdict"]) == {"worse"}


def test_variants_of_other_seeds_are_not_compared() -> None:
    other = frame()
    other.loc[other.variant == "tuned", "seed"] += 1
    with pytest.raises(UserError, match="other prompts or seeds"):
        compare_variants(other, "base")
    with pytest.raises(UserError, match="did you mean 'base'"):
        compare_variants(frame(), "bas")


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> BlipAsker:
    return BlipAsker.load(str(blip.save(tmp_path_factory.mktemp("models") / "tiny-blip")))


def painted(k: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(k).integers(0, 255, (50, 40, 3), np.uint8))


def test_blip_is_decoded_as_the_original(asker: BlipAsker) -> None:
    """[ENC] first, the first answer token, yes against no: by the parts of the model, and one by one as in a batch."""
    model = asker.model
    images, questions = [painted(0), painted(1)], ["a cat?", "a red ring on grass?"]
    found = asker.yes(images, questions)
    for image, question, p in zip(images, questions, found.tolist(), strict=True):
        size = {"height": 480, "width": 480}
        pixels = asker.processor(images=[image], size=size, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 480, 480)
        answers = {}
        for first in ("[ENC]", "[CLS]"):
            ids = [first, *asker.tokenizer.tokenize(question), "[SEP]"]
            with torch.no_grad():
                seen = model.vision_model(pixels, interpolate_pos_encoding=True)[0]
                asked = model.text_encoder(
                    input_ids=torch.tensor([asker.tokenizer.convert_tokens_to_ids(ids)]), encoder_hidden_states=seen
                )[0]
                start = torch.tensor([[blip.WORDS.index("[DEC]")]])
                logits = model.text_decoder(input_ids=start, encoder_hidden_states=asked).logits[0, 0]
            yes, no = (float(logits[blip.WORDS.index(word)].exp()) for word in ("yes", "no"))
            answers[first] = yes / (yes + no)
        assert p == pytest.approx(answers["[ENC]"], abs=1e-5)
        assert abs(p - answers["[CLS]"]) > 1e-4  # control: the class's own decoding is another one


def test_a_prompt_is_the_product_of_its_phrases(asker: BlipAsker) -> None:
    assert asker.metric == "blip_yes[tiny-blip]"
    image = painted(2)
    cat, ring = asker.yes([image] * 2, ["a cat?", "a red ring?"]).tolist()
    assert asker([image, image], ["a cat and a red ring", ""]).tolist() == pytest.approx([cat * ring, 1.0])
    # 96 positions: [ENC], 94 words, [SEP]; what is longer is cut
    cut, long = asker.yes([image] * 2, [" ".join(["cat"] * count) for count in (94, 200)]).tolist()
    assert cut == long != cat
    with pytest.raises(UserError, match="1 image for 2 prompts"):
        asker([image], ["a cat", "a ring"])


def test_phrases_are_cut_at_function_words() -> None:
    assert phrases("a red ring left of a blue house") == ["a red ring", "a blue house"]
    assert phrases("A green bench, and two cats on the top of the car.") == ["a green bench", "two cats", "the car"]
    assert phrases("the dog is next to a wooden chair") == ["the dog", "a wooden chair"]
    assert len(phrases(" and ".join(f"a thing{k}" for k in range(12)))) == 8


def test_a_model_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a BlipForConditionalGeneration"):
        BlipAsker.load(str(blip.save(tmp_path / "captions", "caption")))
    with pytest.raises(UserError, match="no BLIP model 'nowhere'"):
        BlipAsker.load("nowhere")


def test_clip_similarity_is_the_plain_cosine() -> None:
    scorer = ClipScorer.load("scenes-clip")
    items = [scene("val", index) for index in range(6)]
    pictures, texts = [Image.fromarray(item.image) for item in items], [describe(item) for item in reversed(items)]
    cosines = scorer.cosines(pictures, texts)
    np.testing.assert_allclose(scorer(pictures, texts), 100 * cosines.clip(min=0))
    assert scorer.cosine_metric == "clip_similarity[scenes-clip]"


def test_a_clipscore_is_a_hundred_cosines_and_never_below_0() -> None:
    clip = SimpleNamespace(metric="clipscore", cosine_metric="cosine", cosines=lambda *_: np.array([0.25, -0.5]))
    table = scored(pd.DataFrame({"prompt": ["a", "b"]}), [None, None], Scorers(clip=clip))
    assert table["clipscore"].tolist() == [25, 0] and table["cosine"].tolist() == [0.25, -0.5]


def test_scene_prompts_are_held_out_captions_by_category() -> None:
    prompts = scene_prompts(3, ("numeracy", "texture"))
    assert [category for category, _ in prompts] == ["numeracy"] * 3 + ["texture"] * 3
    assert [text for _, text in prompts[:3]] == captions("val", 3, "numeracy", distinct=False)
    with pytest.raises(UserError, match="did you mean 'numeracy'"):
        scene_prompts(3, ("numracy",))


class Painter:
    """Stands for a model: paints real scenes, so that the parser has something to read."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def generate(self, texts: list[str], *, seed: list[int], **options: Any) -> list[Image.Image]:
        self.seeds += seed
        return [Image.fromarray(scene("val", s).image) for s in seed]


def test_scores_and_export(tmp_path: Path) -> None:
    prompts = [("colour", k, describe(scene("val", s))) for k, s in enumerate((0, 0, 2)) for _ in range(2)]
    painter: Any = Painter()
    ask, store = Score(images_per_prompt=2, export=tmp_path, batch=4, clip="none"), MemoryStore("score", {}, {})
    study = Study(painter, {}, [], state=(prompts, Scorers(load_parser())))
    for number, numbers in enumerate((range(4), range(4, 6))):
        with store.task(number, lambda _: None) as record:
            ask.measure(study, Job("pictures", numbers=numbers), record)
    rows = store.table("scores")
    assert painter.seeds == rows.seed.tolist() == list(range(6))
    assert rows["index"].tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.facts[0] == 1.0  # the scene's own caption
    names = sorted(path.name for path in (tmp_path / "base" / "colour" / "samples").iterdir())
    assert names == sorted(f"{prompts[k][2]}_{k:06d}.png" for k in range(6))
    with pytest.raises(UserError, match="nothing to score with"):
        Score(prompts="a cat", clip="none")
    for levels in ("a,b", "1.5"):
        with pytest.raises(UserError, match=re.escape("expected noise levels in 0..1")):
            Score(map_sigma=levels)
    with pytest.raises(UserError, match="it has _"):
        export(None, tmp_path, "a_b", 0)
    for text, says in (("a_b", "it has _"), ("a red ring, " * 21, "longer than 244 bytes")):
        with pytest.raises(UserError, match=says):  # before the model is loaded, and pictures are sampled
            Score(prompts=text, export=tmp_path).gather(False)


def test_two_runs_are_compared_by_prompt() -> None:
    """Of other models, say: pictures of a prompt averaged, scenes left out, less of an opposite is better."""
    rng, runs, values = np.random.default_rng(0), [], []
    for level in range(2):
        drawn = rng.normal(2 * level, 1, (10, 2))
        rows = [
            {"variant": "base", "category": category, "prompt": f"p{k}", "index": k, "seed": 2 * k + j,
             "facts": drawn[k, j], "swapped_colours": drawn[k, j]}
            for category, count in (("colour", 10), ("real", 3)) for k in range(count) for j in range(2)
        ]  # fmt: skip
        store = MemoryStore("score", {}, {"model": {"id": "model"}})
        with store.task(0, lambda _: None) as record:
            record.write("scores", pd.DataFrame(rows))
        runs.append(Result(Score(), store))
        values.append(drawn.mean(1))
    gain = values[1] - values[0]
    for margin, verdicts in ((None, ["higher", "higher"]), (0.5, ["no worse", "worse"])):
        table = compare_runs(*runs, margin=margin).table.set_index("outcome")
        assert table["n"].tolist() == [10, 10]
        assert np.allclose(table["difference"], gain.mean()) and np.allclose(table["first"], values[0].mean())
        assert table["verdict"].tolist() == verdicts


def test_maps_are_those_of_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after pictures of an adapter."""
    loaded: list[str | None] = []
    monkeypatch.setattr("mmdit_probe.models.adapters.load_adapter", lambda _, path, name: loaded.append(path))
    monkeypatch.setattr(Score, "_maps", lambda *_: pd.DataFrame({"adapter": [str(loaded[-1])]}))
    painter: Any = Painter()
    painter.pipeline = SimpleNamespace(unload_lora_weights=lambda: loaded.append(None))
    prompts = [("colour", 0, describe(scene("val", 0)))]
    scorers = Scorers(load_parser(), variants={"base": None, "tuned": "adapter"})
    ask, store = Score(limit=1, map_sigma="0.5", clip="none"), MemoryStore("score", {}, {})
    for number, task in enumerate((Job("pictures", "tuned", range(1)), Job("real"))):
        with store.task(number, lambda _: None) as record:
            ask.measure(Study(painter, {}, [], state=(prompts, scorers)), task, record)
    assert loaded == ["adapter", None] and store.table("maps")["adapter"].tolist() == ["None"]


def test_a_run_that_is_cut_short_leaves_no_adapter_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run of the model at hand would draw the base with it."""
    loaded: list[str | None] = []
    monkeypatch.setattr("mmdit_probe.models.adapters.load_adapter", lambda _, path, name: loaded.append(path))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    painter: Any = SimpleNamespace(generate=interrupted)
    painter.pipeline = SimpleNamespace(unload_lora_weights=lambda: loaded.append(None))
    scorers = Scorers(variants={"base": None, "tuned": "adapter"})
    study = Study(painter, {}, [], state=([("colour", 0, "a ring")], scorers))
    store = MemoryStore("score", {}, {})
    with pytest.raises(KeyboardInterrupt), store.task(0, lambda _: None) as record:
        Score(clip="none").measure(study, Job("pictures", "tuned", range(1)), record)
    assert loaded == ["adapter", None] and scorers.loaded == "base"


def test_an_adapter_of_the_model_at_hand_is_not_taken_off(pipe: Any, tmp_path: Path) -> None:
    """Beside it one more was loaded, and then both were unloaded: later rows were those of another model."""
    from mmdit_probe.magnet.lora import save_lora
    from mmdit_probe.models.adapters import load_adapter, merge
    from mmdit_probe.models.mmdit import MMDiT
    from tests.magnet.test_lora import trained

    save_lora(trained(pipe).transformer, tmp_path / "lora", {})
    pipe.unload_lora_weights()
    load_adapter(pipe, str(tmp_path / "lora"))
    ask = Score(lora=[f"more={tmp_path / 'lora'}"], prompts="a red ring", num_steps=1, guidance=1.0)
    with pytest.raises(UserError, match="the model has an adapter"):
        ask.prepare(MMDiT(pipe), [("prompts", "a red ring")])
    merge(pipe)
    study = ask.prepare(MMDiT(pipe), [("prompts", "a red ring"), ("prompts", "ring " * 50)])
    assert study.tasks and "longer than the text encoders: 'ring ring" in study.notes[-1]


def test_command_compares_an_adapter_with_the_base(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mmdit_probe.magnet.lora import save_lora
    from tests.magnet.test_lora import trained

    monkeypatch.chdir(tmp_path)
    save_lora(trained(load(tiny_directory).pipeline).transformer, tmp_path / "strong" / "lora", {})
    arguments = ["score", "--model", str(tiny_directory), "--prompts", "a red ring", "--num-steps", "2",
                 "--images-per-prompt", "2", "--lora", str(tmp_path / "strong" / "lora"), "--out", "run"]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code in (0, None), capfd.readouterr().err
    rows = pd.read_parquet("run/scores.parquet")
    assert rows.variant.tolist() == ["base"] * 2 + ["strong"] * 2
    assert rows.seed.tolist() == [0, 1] * 2
    table = pd.read_csv("run/comparison.csv")
    assert (table.set_index(["variant", "category"]).difference.loc["strong"].abs() > 0).all()
    assert table.low.isna().all()  # one prompt has no interval
    with pytest.raises(SystemExit) as stopped:
        main([*arguments[:-2], "--lora", "nowhere/at/all"])
    assert stopped.value.code == 2
    assert "no LoRA" in capfd.readouterr().err
    (tmp_path / "strong" / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"trained again")
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--resume"])
    assert stopped.value.code == 2
    assert "holds something else" in capfd.readouterr().err


def test_a_prompt_may_be_longer_than_the_name_of_a_file() -> None:
    """It was looked for as a folder, which the system refused."""
    text = "a red ring and a blue house on grass, " * 10
    assert prompts_by_category(text, 5) == [("prompts", text)]


@pytest.mark.parametrize("names", [("color", "color_val"), ("all",), ("real",)])
def test_a_category_is_one_file_and_none_of_the_tables_own_names(names: tuple[str, ...], tmp_path: Path) -> None:
    """Two files were one category, "all" hid that of every prompt, and "real" was left out as the parser's limit."""
    for name in names:
        (tmp_path / f"{name}.txt").write_text("a red ring", encoding="utf-8")
    with pytest.raises(UserError, match="expected one file per category"):
        prompts_by_category(str(tmp_path), 5)


def test_command_scores_a_folder_of_prompts_by_category(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One file per category as in T2I-CompBench; BLIP's answers; pictures in the layout of the official evaluator."""
    monkeypatch.chdir(tmp_path)
    Path("prompts").mkdir()
    Path("prompts/color_val.txt").write_text("a red ring\na cat on grass\na house\n", encoding="utf-8")
    Path("prompts/shape.txt").write_text("two rings\n", encoding="utf-8")
    blip.save(tmp_path / "tiny-blip")
    arguments = ["score", "--model", str(tiny_directory), "--prompts", "prompts", "-n", "2", "--num-steps", "1",
                 "--clip", "none"]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--vqa", "tiny-blip", "--export", "pictures", "--out", "run", "--json"])
    assert stopped.value.code in (0, None), capfd.readouterr().err
    rows = pd.read_parquet("run/scores.parquet")
    assert rows.category.tolist() == ["color", "color", "shape"]
    assert rows["blip_yes[tiny-blip]"].between(0, 1, inclusive="neither").all()
    names = sorted(str(path.relative_to("pictures/base")) for path in Path("pictures").rglob("*.png"))
    assert names == [
        "color/samples/a cat on grass_000001.png", "color/samples/a red ring_000000.png",
        "shape/samples/two rings_000002.png",
    ]  # fmt: skip
    assert "blip_yes[tiny-blip]" in capfd.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", "nothing"])
    assert stopped.value.code == 2
    assert "nothing to score with" in capfd.readouterr().err
    assert not Path("nothing").exists()


def test_maps_are_scored_with_pictures_and_alone(tmp_path: Path) -> None:
    how = {"limit": 2, "num_steps": 1, "clip": "none", "map_sigma": "0.3,0.6"}
    both = Score(categories="colour", **how).run("scenes-sd3", out=tmp_path / "both", progress=False)
    alone = Score(categories="none", **how).run("scenes-sd3", out=tmp_path / "alone", progress=False)
    assert set(both.table["category"]) == {"colour", "real"}
    pd.testing.assert_frame_equal(both.store.table("maps"), alone.store.table("maps"))
    assert set(alone.store.table("maps")["sigma"]) == {0.3, 0.6} and set(alone.table["category"]) == {"real"}
    with pytest.raises(UserError, match="leaves nothing to score"):
        Score(categories="none")
