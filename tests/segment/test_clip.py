"""The CLIP-based methods: exact identities on a tiny random CLIP, and the embedded one on known regions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdit_probe import assets
from mmdit_probe.data import Fit, SegClass
from mmdit_probe.errors import UserError
from mmdit_probe.segment.clip import DenseCLIP, patch_features
from mmdit_probe.segment.methods import find
from mmdit_probe.segment.methods.dense_clip import _region_tokens, _voted
from mmdit_probe.segment.record import Capture, Pass
from mmdit_probe.segment.tail import label
from mmdit_probe.segment.vocabulary import Query
from tests import tiny
from tests.segment import worlds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random CLIP in transformers' layout."""
    from transformers import CLIPConfig, CLIPModel

    path: Path = tmp_path_factory.mktemp("clip")
    tokenizer = tiny.clip_tokenizer("<|endoftext|>")
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": tiny.CLIP_LENGTH,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}  # fmt: skip
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)


def test_blocks_and_head_are_those_of_the_model(folder: str, image: np.ndarray) -> None:
    clip = DenseCLIP.open(folder)
    states, grid = clip.hidden(image)
    assert grid == (4, 4) and len(states) == 4
    for layer, before, after in zip(clip.layers, states[:-1], states[1:], strict=True):
        assert torch.allclose(clip.block(layer, before), after, atol=1e-5)
    value = clip.values(states[-2], grid, grid)
    attention = clip.layers[-1].self_attn
    want = attention.out_proj(attention.v_proj(clip.layers[-1].layer_norm1(states[-2])))[1:]
    assert torch.allclose(clip.head(value), clip.model.vision_model.post_layernorm(want), atol=1e-5)


def test_one_region_gives_the_class_token_itself(folder: str, image: np.ndarray) -> None:
    clip = DenseCLIP.open(folder)
    states, grid = clip.hidden(image)
    token = _region_tokens(clip, states[0], torch.zeros(grid, dtype=torch.long), grid)
    own = clip.model.vision_model.post_layernorm(states[-1][0])
    assert torch.allclose(token[0], own, atol=1e-5)
    halves = torch.zeros(grid, dtype=torch.long)
    halves[:, 2:] = 1
    two = _region_tokens(clip, states[0], halves, grid)
    assert not torch.allclose(two[0], two[1], atol=1e-3)


def test_text_is_the_mean_over_templates(folder: str) -> None:
    clip = DenseCLIP.open(folder)
    assert torch.allclose(clip.text(["cat", "ring"])[1], clip.text(["ring"])[0], atol=1e-5)
    assert torch.allclose(clip.text(["cat"]).norm(dim=-1), torch.ones(1))
    assert not torch.allclose(clip.text(["cat"], ["{}"]), clip.text(["cat"], ["a {} on it"]))


def test_vote_is_one_label_per_region() -> None:
    scores = torch.tensor([[[0.9, 0.1, 0.8, 0.2]], [[0.1, 0.9, 0.2, 0.8]]])
    voted = _voted(scores, torch.tensor([0, 0, 0, 1]))
    assert voted.argmax(0).tolist() == [[0, 0, 0, 1]] and voted[0, 0, 0] == pytest.approx(2 / 3)


def test_features_of_a_vision_transformer(tmp_path: Path, image: np.ndarray) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
                       patch_size=8)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    features, grid = patch_features(str(tmp_path / "vit"), image)
    assert grid == (4, 4) and tuple(features.shape) == (16, 16)
    with pytest.raises(UserError, match="cannot load the features"):
        patch_features(str(tmp_path / "nothing"), image)


@pytest.mark.parametrize("name", ["proxyclip", "corrclip"])
def test_methods_on_another_clip(folder: str, name: str) -> None:
    one = worlds.capture(worlds.masks())
    scores = find(name).configure({"clip": folder})(one)
    assert tuple(scores.shape) == (3, 8, 8) and torch.isfinite(scores).all()


def scene_capture(index: int) -> tuple[np.ndarray, list[int], Capture]:
    """A scene whose forward has perfect features: regions are known, names are CLIP's to find."""
    from mmdit_probe.scenes import CLASSES, scene

    item = scene("val", index)
    ids = [int(i) for i in np.unique(item.classes)]
    shares = torch.stack([torch.from_numpy(item.classes == i).float() for i in ids])
    best = torch.nn.functional.adaptive_avg_pool2d(shares, 16).argmax(0)
    regions = torch.nn.functional.one_hot(best, len(ids)).permute(2, 0, 1).float()
    one = worlds.capture(regions, text=len(ids) + 3, noise=0.05)
    names = [CLASSES[i] for i in ids]
    queries = tuple(Query(name, place, {"clip": [1 + place]}) for place, name in enumerate(names))
    first = one.passes[0]
    return item.classes, ids, Capture(
        item.image, Fit.of((64, 64), (64, 64), 4), (16, 16), [SegClass((name,)) for name in names],
        [Pass(replace(first.prompt, queries=queries), first.records)], (0.5,), (0,), one.layers,
    )  # fmt: skip


@pytest.mark.skipif("scenes-clip" not in assets.names(), reason="the embedded CLIP is not in this checkout")
@pytest.mark.parametrize("name", ["proxyclip", "corrclip"])
def test_embedded_clip_names_regions_of_scenes(name: str) -> None:
    right, guess = [], []
    for index in range(12):
        truth, ids, one = scene_capture(index)
        found = np.array(ids)[label(one.fit.back(find(name)(one)))]
        right.append((found == truth).mean())
        guess.append(1 / len(ids))
    assert np.mean(right) > np.mean(guess) + 0.1
