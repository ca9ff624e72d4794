"""CLIP and DINO outcomes on tiny local checkpoints, and from the command line with controls and a selection."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit_probe import load
from mmdit_probe.cli.app import main
from mmdit_probe.errors import UserError
from mmdit_probe.experiments import Perturb, Score
from mmdit_probe.experiments.outcomes import ClipScores, Dino, Parser
from mmdit_probe.results import read_table
from mmdit_probe.results.selection import LayerSelection
from tests import tiny

SIDE = 28


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DINOv2 of two layers, as transformers saves it."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    BitImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of one layer each, with its tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = tiny.clip_tokenizer("<|endoftext|>")
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **shared, "vocab_size": len(tokenizer), "max_position_embeddings": tiny.CLIP_LENGTH,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {**shared, "image_size": SIDE, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(2)]


def test_dino_is_the_cosine_of_class_features(dino: Path) -> None:
    from transformers import AutoModel, BitImageProcessor

    images = pictures()
    outcome = Dino(dino)
    assert outcome(["", ""], images, images)["dino"] == pytest.approx([1, 1], abs=1e-6)
    found = outcome(["", ""], images, images[::-1])["dino"]
    model, processor = AutoModel.from_pretrained(dino).eval(), BitImageProcessor.from_pretrained(dino)
    with torch.no_grad():
        features = model(**processor(images=images, return_tensors="pt")).last_hidden_state[:, 0].double()
    expected = float(torch.nn.functional.cosine_similarity(features[:1], features[1:]))
    assert found == pytest.approx([expected, expected], abs=1e-5) and expected < 0.999


def test_clip_scores_text_and_image(clip: Path) -> None:
    images = pictures()
    texts = ["a red ring", "a cat"]
    found = ClipScores(clip)(texts, images, images)
    assert found["clip_i"] == pytest.approx([1, 1], abs=1e-6)
    other = ClipScores(clip)(["a cat", "a red ring"], images, images)
    assert np.abs(found["clip_t"] - other["clip_t"]).min() > 1e-4
    alone = [ClipScores(clip)([text], [image], [image])["clip_t"][0] for text, image in zip(texts, images, strict=True)]
    assert found["clip_t"] == pytest.approx(alone, abs=1e-6)
    with pytest.raises(UserError, match="cannot load the CLIP"):
        ClipScores(clip / "nowhere")


def test_commands_measure_them(
    clip: Path, dino: Path, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """perturb and generate with both checkpoints, all controls, and layers and heads of a selection."""
    monkeypatch.chdir(tmp_path)
    model = load(tiny_directory)
    chosen = LayerSelection(model.name, model.weight_hash, (2, 0), heads={2: (1,)})
    chosen.save("selection.json")
    Path("prompts.txt").write_text("a red ring\na cat\na blue house\na red house\na cat on grass\n", encoding="utf-8")
    shared = ["--model", str(tiny_directory), "--prompts", "prompts.txt", "--num-steps", "1", "--guidance", "2"]
    shared += ["--selection", "selection.json", "--control", "budget,random,shuffled,uniform", "--clip", str(clip)]

    def run(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--json"])
        out, err = capfd.readouterr()
        assert stopped.value.code == 0, err
        return json.loads(out)  # type: ignore[no-any-return]

    document = run("perturb", *shared, "--edit", "zero", "--dino", str(dino), "--out", "perturb")
    assert {row["outcome"] for row in document["places"]} == {"change", "clip_t", "clip_i", "dino"}
    assert {row["layer"] for row in document["places"]} == {-1, 0, 2}
    assert document["no_op_change"] == 0
    verdicts = {(row["control"], row["outcome"]) for row in document["controls"]}
    assert {name for name, _ in verdicts} == {"budget", "random", "shuffled", "uniform"}
    assert ("shuffled", "clip_t") in verdicts and ("shuffled", "change") not in verdicts  # it reads no text
    table = read_table("perturb/perturb.parquet")
    stock = table[(table["condition"] == "stock") & (table["control"] == "none")]
    assert stock["dino"].to_numpy() == pytest.approx(np.ones(5), abs=1e-6)
    record = json.loads(Path("perturb/run.json").read_text(encoding="utf-8"))
    edits = [(labels, edit) for _, labels, _, edit in record["request"]["conditions"]]
    heads = {labels["layer"]: edit["heads"] for labels, edit in edits if labels["condition"] == "edit"}
    assert heads[2] == [1] and record["request"]["checkpoints"]["dino"] == str(dino)
    assert set(record["contents"]) == {str(clip), str(dino)}

    document = run("generate", *shared, "--perturb-scale", "1", "--out", "generate")
    assert {row["layers"] for row in document["settings"]} == {"", "0,2"}
    assert {row["control"] for row in document["controls"]} == {"budget", "random", "shuffled", "uniform"}

    LayerSelection("other", "0" * 64, (1,)).save("selection.json")
    for command in ("perturb", "generate"):
        with pytest.raises(SystemExit) as stopped:
            main([command, *shared])
        assert stopped.value.code == 2
        assert "run select-layers on it" in capfd.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["perturb", *shared, "--layers", "1"])
    assert stopped.value.code == 2
    assert "leave --layers and --heads out" in capfd.readouterr().err


def test_what_is_stated_stands_beside_its_opposite() -> None:
    """True pictures, and pictures of the swapped caption: read by the parser, right and opposite change places."""
    from mmdit_probe.scenes import scene
    from mmdit_probe.scenes.captions import describe, opposites

    items = [item for item in (scene("val", index) for index in range(60)) if len(item.objects) == 2]
    pairs = [(item, describe(item, "complex")) for item in items]
    pairs = [(item, text) for item, text in pairs if "swapped_colours" in opposites(text)][:6]
    images = [Image.fromarray(item.image) for item, _ in pairs]
    parser, texts = Parser(), [text for _, text in pairs]
    stated, turned = (
        parser(texts, images, images),
        parser([opposites(t)["swapped_colours"] for t in texts], images, images),
    )
    assert set(stated) == set(parser.names) >= {"relation", "opposite_relation", "count", "wrong_count"}
    assert stated["colours"].mean() > 0.8 and stated["swapped_colours"].mean() < 0.2
    assert np.array_equal(stated["colours"], turned["swapped_colours"])
    assert np.array_equal(stated["swapped_colours"], turned["colours"])
    plain = parser(["a ring on grass"], images[:1], images[:1])
    assert all(np.isnan(plain[name][0]) for name in ("relation", "wrong_count", "colours"))


@pytest.mark.parametrize("name", ["scenes-sd3", "scenes-sd3+runs/mine/lora", "scenes-sd3+runs/mine/lora-random"])
def test_a_scenes_model_with_an_adapter_is_read_by_the_parser(name: str) -> None:
    """Its images were told by their change alone, so that nothing of them was compared with those of the base model."""
    outcomes, checkpoints = Perturb(layers=0).outcomes(SimpleNamespace(name=name, device="cpu"))  # type: ignore[arg-type]
    assert {"facts", "clip_t"} <= {of for outcome in outcomes for of in outcome.names}
    assert checkpoints["clip"] == "scenes-clip"


@pytest.mark.parametrize(
    ("experiment", "named", "words"),
    [
        (Perturb, {"clip": "scene-clip"}, "did you mean 'scenes-clip'?"),
        (Perturb, {"dino": "dinov2"}, "unknown --dino (no folder or hub id OWNER/NAME) 'dinov2'"),
        (Score, {"clip": "."}, "'.' holds no config.json"),
        (Score, {"vqa": "./blip"}, "unknown --vqa"),
    ],
)
def test_checkpoints_that_cannot_be_there_are_refused_before_a_model_is_loaded(
    experiment: Any, named: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        experiment(**named)
