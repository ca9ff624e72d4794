"""Generation scores: CLIPScore against its formula, pairing, intervals, the export layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mmdit_probe import UserError, load
from mmdit_probe.cli.app import main
from mmdit_probe.evaluate.clipscore import ClipScorer
from mmdit_probe.evaluate.generation import bootstrap, compare, scene_prompts, score
from mmdit_probe.scenes import captions, load_parser, scene


def test_clipscore_is_the_clamped_cosine_of_the_model() -> None:
    scorer = ClipScorer.load("scenes-clip")
    assert scorer.metric == "clipscore[scenes-clip]"
    picture, text = Image.fromarray(scene("val", 0).image), scene("val", 0).caption
    pixels = scorer.processor(images=[picture], return_tensors="pt")["pixel_values"]
    length = scorer.model.config.text_config.max_position_embeddings
    words = scorer.tokenizer([text], padding="max_length", max_length=length, return_tensors="pt")
    with torch.no_grad():
        image = scorer.model.visual_projection(scorer.model.vision_model(pixels).pooler_output)[0]
        said = scorer.model.text_projection(scorer.model.text_model(**words).pooler_output)[0]
    expected = 100 * max(0.0, float(torch.nn.functional.cosine_similarity(image, said, dim=0)))
    assert scorer([picture], [text])[0] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(UserError, match="1 images for 2 prompts"):
        scorer([picture], [text, text])


def test_clipscore_prefers_the_right_caption() -> None:
    scorer = ClipScorer.load("scenes-clip")
    items = [scene("val", index) for index in range(24)]
    pictures = [Image.fromarray(item.image) for item in items]
    right = [item.caption for item in items]
    wrong = right[12:] + right[:12]
    assert scorer(pictures, right).mean() > scorer(pictures, wrong).mean() + 5
    assert len(scorer([], [])) == 0


def test_a_model_that_is_no_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="is a 'bert' model"):
        ClipScorer.load(str(tmp_path))
    with pytest.raises(UserError, match="no CLIP model 'nowhere'"):
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
    table = compare(frame(shift=0.03, noise=0.02), "base").set_index(["variant", "category"])
    row = table.loc[("tuned", "all")]
    assert (row.prompts, row.images) == (40, 80)
    assert 0 < row.difference_low < 0.03 < row.difference_high < 0.05
    assert row.low < table.loc[("base", "all"), "mean"]  # unpaired, the intervals overlap
    assert not row.worse
    assert compare(frame(shift=-0.1), "base").set_index(["variant", "category"]).loc[("tuned", "count"), "worse"]
    assert table.loc[("base", "all"), "difference"] == 0


def test_variants_of_other_seeds_are_not_compared() -> None:
    other = frame()
    other.loc[other.variant == "tuned", "seed"] += 1
    with pytest.raises(UserError, match="other prompts or seeds"):
        compare(other, "base")
    with pytest.raises(UserError, match="did you mean 'base'"):
        compare(frame(), "bas")


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).standard_normal(400) + 3
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)


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
    prompts = [("colour", scene("val", k).caption) for k in (0, 0, 2)]
    painter: Any = Painter()
    rows = score(painter, prompts, variant="base", images=2, seed=0, parser=load_parser(), export=tmp_path, batch=4)
    assert painter.seeds == rows.seed.tolist() == list(range(6))
    assert rows["index"].tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.facts[0] == 1.0  # the scene's own caption
    names = sorted(path.name for path in (tmp_path / "colour" / "samples").iterdir())
    assert names == sorted(f"{prompts[k // 2][1]}_{k:06d}.png" for k in range(6))
    with pytest.raises(UserError, match="nothing to score with"):
        score(painter, prompts, variant="base")
    with pytest.raises(UserError, match="underscore"):
        score(painter, [("colour", "a_b")], variant="base", export=tmp_path)


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
