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
from mmdit_probe.segment.clip import CLIP, TEMPLATES, ClipInput, patch_features
from mmdit_probe.segment.methods import find
from mmdit_probe.segment.methods.dense_clip import _region_tokens
from mmdit_probe.segment.record import Capture, Pass
from mmdit_probe.segment.refine import Refinement
from mmdit_probe.segment.run import finish
from mmdit_probe.segment.settings import Background
from mmdit_probe.segment.tail import label
from mmdit_probe.segment.vocabulary import Query
from tests import tiny
from tests.segment import worlds


def checkpoint(path: Path, depth: int) -> str:
    """A tiny random CLIP in transformers' layout, whose vision tower has so many blocks."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = tiny.clip_tokenizer("<|endoftext|>")
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": tiny.CLIP_LENGTH,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}  # fmt: skip
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": depth, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8, "initializer_factor": 8.0}  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("clip"), 3)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("deep"), 7)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)


def test_blocks_and_head_are_those_of_the_model(folder: str, image: np.ndarray) -> None:
    clip = CLIP.open(folder)
    states, grid = clip.hidden(clip.pixels([image], (32, 32)))
    assert grid == (4, 4) and len(states) == 4
    for layer, before, after in zip(clip.layers, states[:-1], states[1:], strict=True):
        assert torch.allclose(clip.block(layer, before), after, atol=1e-5)
    value = clip.values(states[-2], grid, grid)
    attention = clip.layers[-1].self_attn
    want = attention.out_proj(attention.v_proj(clip.layers[-1].layer_norm1(states[-2])))[1:]
    assert torch.allclose(clip.head(value), clip.model.vision_model.post_layernorm(want), atol=1e-5)


def test_one_region_gives_the_class_token_itself(folder: str, image: np.ndarray) -> None:
    clip = CLIP.open(folder)
    states, grid = clip.hidden(clip.pixels([image], (32, 32)))
    token = _region_tokens(clip, states[0], torch.zeros(grid, dtype=torch.long))
    own = clip.model.vision_model.post_layernorm(states[-1][0])
    assert torch.allclose(token[0], own, atol=1e-5)
    halves = torch.zeros(grid, dtype=torch.long)
    halves[:, 2:] = 1
    two = _region_tokens(clip, states[0], halves)
    assert not torch.allclose(two[0], two[1], atol=1e-3)


def test_text_is_the_mean_over_templates(folder: str) -> None:
    clip = CLIP.open(folder)
    assert torch.allclose(clip.text(["cat", "ring"])[1], clip.text(["ring"])[0], atol=1e-5)
    assert torch.allclose(clip.text(["cat"]).norm(dim=-1), torch.ones(1))
    sentences = clip.sentences([template.format("cat") for template in TEMPLATES])
    mean = torch.nn.functional.normalize(sentences.mean(0), dim=0)
    assert len(TEMPLATES) > 1 and torch.allclose(clip.text(["cat"])[0], mean, atol=1e-5)
    assert not torch.allclose(clip.text(["cat"])[0], sentences[0], atol=1e-3)


def test_vote_is_one_label_per_region_of_labels_with_the_background() -> None:
    scores = torch.tensor([[[0.9, 0.1, 0.8, 0.2, 0.3]], [[0.1, 0.9, 0.2, 0.8, 0.1]]])
    vote, rule = Refinement.parse("vote"), Background.parse("probability:0.85")

    def of(regions: list[int], background: Background | None = None) -> list[int]:
        capture = Capture.of((1, 5), regions=[regions])
        return vote.labels(vote(scores, capture), capture, background)[0].tolist()

    assert of([1, 1, 1, 2, 2]) == [0, 0, 0, 0, 0]  # two for the first class; one each, of which the first wins
    assert of([1, 0, 1, 0, 1]) == [0, 1, 0, 1, 0]  # pixels of no region keep their labels
    # Below the threshold are the last three: in the first region a class has more pixels, in the second all are
    # background; a region of both has as many of each, and the background, the first class there, wins.
    assert of([1, 2, 2, 2, 3], rule) == [0, 2, 2, 2, 2]
    assert of([1, 2, 1, 3, 3], rule) == [2, 1, 2, 2, 2]


def test_scores_are_averaged_within_each_region() -> None:
    """Tokens of no region keep theirs; ids need not be consecutive."""
    regions = np.array([[7, 0, 2], [7, 2, 0], [2, 7, 7]])
    scores = torch.rand(2, 3, 3)
    expected = scores.numpy().copy()
    for region in (2, 7):
        expected[:, regions == region] = scores.numpy()[:, regions == region].mean(1, keepdims=True)
    found = Refinement.parse("regions").on_grid(scores, Capture.of((3, 3), regions=regions))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_pixels_that_were_not_shown_decide_nothing() -> None:
    """A crop leaves columns 0, 1, 4 and 5 out: they had scores of 0, and so voted for the first class, set the least
    score of a threshold, and made a segment of a proposal that wins nowhere."""
    whole = Capture.of((2, 2), regions=[[1, 1], [1, 1]], spans={"cat": [0], "sky": [1]})
    capture = replace(whole, fit=Fit.of((2, 6), (2, 2), 1, "crop"), regions=np.ones((2, 6), int))
    sky = torch.tensor([[[0.1, 0.1], [0.1, 0.9]], [[0.8, 0.8], [0.8, 0.2]]])  # it has three pixels of four

    def shown(scores: torch.Tensor, refine: str, rule: str = "none") -> list[list[int]]:
        found = finish(capture, scores, ["cat", "sky"][: len(scores)], Refinement.parse(refine), Background.parse(rule))
        assert (found.labels[:, [0, 1, 4, 5]] == found.UNLABELLED).all()
        return found.labels[:, 2:4].tolist()

    assert shown(sky, "none") == [[1, 1], [1, 0]] and shown(sky, "vote") == [[1, 1], [1, 1]]
    cat = torch.tensor([[[1.0, 0.6], [0.9, 0.7]]])  # scaled to 0..1 over what is shown: 1, 0, .75, .25
    assert shown(cat, "none", "threshold:0.5") == [[0, 1], [0, 1]]
    nowhere = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    assert finish(capture, nowhere, None, Refinement(), Background()).names == ["segment 1"]


def test_the_vote_ends_a_refinement() -> None:
    with pytest.raises(UserError, match="it is the last step"):
        Refinement.parse("vote+pamr")


def test_features_of_a_vision_transformer(tmp_path: Path, image: np.ndarray) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
                       patch_size=8)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    features, grid = patch_features(str(tmp_path / "vit"), image)
    assert grid == (4, 4) and tuple(features.shape) == (16, 16)
    features, grid = patch_features(str(tmp_path / "vit"), image, (16, 24))  # its positions are interpolated
    assert grid == (2, 3) and tuple(features.shape) == (6, 16)
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


class Numpy:
    """The vision tower of a CLIP in float64, from its weights alone."""

    def __init__(self, folder: str) -> None:
        from safetensors.numpy import load_file

        self.weights = {name: value.astype(float) for name, value in load_file(f"{folder}/model.safetensors").items()}
        self.depth = len({name.split(".")[3] for name in self.weights if name.startswith("vision_model.encoder")})

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return centred * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def block(self, index: int, x: np.ndarray, allowed: np.ndarray | None = None, heads: int = 2) -> np.ndarray:
        base = f"vision_model.encoder.layers.{index}"
        normed = self.norm(f"{base}.layer_norm1", x)
        query, key, value = (self.linear(f"{base}.self_attn.{part}_proj", normed) for part in "qkv")
        width, out = x.shape[1] // heads, []
        for part in (slice(head * width, (head + 1) * width) for head in range(heads)):
            logits = query[:, part] @ key[:, part].T / width**0.5
            shares = np.exp(logits) * (1.0 if allowed is None else allowed)
            out.append(shares / shares.sum(1, keepdims=True) @ value[:, part])
        x = x + self.linear(f"{base}.self_attn.out_proj", np.concatenate(out, 1))
        inner = self.linear(f"{base}.mlp.fc1", self.norm(f"{base}.layer_norm2", x))
        return x + self.linear(f"{base}.mlp.fc2", inner / (1 + np.exp(-1.702 * inner)))

    def states(self, start: np.ndarray, allowed: np.ndarray | None = None) -> list[np.ndarray]:
        found = [start]
        for index in range(self.depth):
            found.append(self.block(index, found[-1], allowed))
        return found

    def branch(self, matrix: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Last values of a state mixed by a matrix, projected and normed; the grids are one."""
        base = f"vision_model.encoder.layers.{self.depth - 1}"
        value = self.linear(f"{base}.self_attn.v_proj", self.norm(f"{base}.layer_norm1", state))[1:]
        mixed = self.linear(f"{base}.self_attn.out_proj", matrix @ value)
        return self.norm("vision_model.post_layernorm", mixed)

    def named(self, features: np.ndarray, text: np.ndarray, temperature: float = 40) -> np.ndarray:
        vectors = self.linear("visual_projection", features)
        logits = np.exp(temperature * (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)) @ text.T)
        return (logits / logits.sum(1, keepdims=True)).T


def own(folder: str, grid: tuple[int, int], seed: int) -> dict[str, object]:
    """One's own tensors: features on the grid, CLIP's input, unit text vectors; grid and patches are one."""
    rng = np.random.default_rng(seed)
    text = rng.normal(0, 1, (3, 12))
    return {
        "features": rng.normal(0, 1, (5, 6))[rng.integers(0, 5, grid[0] * grid[1])]
        + 0.4 * rng.normal(0, 1, (grid[0] * grid[1], 6)),
        "pixels": torch.from_numpy(rng.normal(0, 1, (3, 8 * grid[0], 8 * grid[1]))).float(),
        "text": torch.from_numpy(text / np.linalg.norm(text, axis=1, keepdims=True)).float(),
    }


def captured(grid: tuple[int, int], features: object, **how: object) -> Capture:
    return Capture.of(grid, features=features, spans={"cat": [], "wet grass": [], "sky": []}, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(("grid", "seed"), [((2, 5), 0), ((3, 4), 1), ((6, 3), 2)])
def test_proxyclip_is_its_formula(deep: str, grid: tuple[int, int], seed: int) -> None:
    given, clip, tower = own(deep, grid, seed), CLIP.open(deep), Numpy(deep)
    start = clip.hidden(given["pixels"])[0][0].double().numpy()  # type: ignore[arg-type]
    unit = given["features"] / np.linalg.norm(given["features"], axis=1, keepdims=True)  # type: ignore[operator]
    similarity = unit @ unit.T
    similarity = 3.0 * (similarity - 1.2 * similarity.mean())
    weights = np.where(similarity < 0, 0.0, np.exp(similarity))  # the diagonal is like any other entry
    matrix = weights / weights.sum(1, keepdims=True)
    want = tower.named(tower.branch(matrix, tower.states(start)[-2]), given["text"].numpy())  # type: ignore[attr-defined]
    method = find("proxyclip").configure({"clip": ClipInput(clip, given["text"], given["pixels"])})
    found = method(captured(grid, given["features"])).flatten(1).numpy()
    assert found.shape == (3, grid[0] * grid[1]) and np.abs(found - want).max() < 1e-4
    source = torch.from_numpy(unit).float().reshape(*grid, -1)  # another network's features
    other = method.configure({"source": source})(captured(grid, np.eye(len(unit)))).flatten(1).numpy()
    assert np.abs(other - want).max() < 1e-4


def test_proxyclip_rows_that_resemble_none_keep_themselves() -> None:
    """Two equal tokens: centred by 1.2 times their mean every similarity is negative."""
    from mmdit_probe.segment.methods.dense_clip import View, _matrix

    one = captured((1, 2), [[1.0, 0.0], [1.0, 0.0]])
    part = View(one, None, torch.zeros(3, 8, 16), (8, 16))  # type: ignore[arg-type]
    found, grid = _matrix(part, "features", 1.2, 3.0, (1, 2))
    assert found.tolist() == [[1.0, 0.0], [0.0, 1.0]] and grid == (1, 2)


def corrclip_of(tower: Numpy, start: np.ndarray, unit: np.ndarray, ids: np.ndarray, earlier: slice) -> np.ndarray:
    """CorrCLIP written out in float64: features [M, E] before the projection.

    Args:
        unit: unit features [M, E]. ids: regions [M], 0 for none. earlier: states of the spatial branch.
    """
    count, cosine = len(unit), unit @ unit.T
    known = [i for i in np.unique(ids) if i > 0]
    means = np.stack([unit[ids == i].mean(0) for i in known])
    means = means / np.linalg.norm(means, axis=1, keepdims=True)
    near = (means @ means.T).max() - means @ means.T <= 0.2
    for _ in known:  # regions that are linked are one
        near = near @ near
    merged = np.zeros(count, int)
    for place, i in enumerate(known):
        merged[ids == i] = 1 + int(near[place].argmax())
    none = merged == 0
    allowed = (merged[:, None] == merged) & ~none
    allowed |= (none[:, None] | none) & (cosine > cosine.mean())
    weights = np.exp(4 * cosine) * allowed
    matrix = weights / weights.sum(1, keepdims=True)
    states = tower.states(start)
    mixed = tower.branch(matrix, states[-2]) + tower.branch(matrix, np.mean(states[earlier], axis=0))
    for region in np.unique(merged):  # one class token per merged region
        sees = np.concatenate([[False, True], merged == region])
        mask = np.ones((count + 2, count + 2), bool)
        mask[:, 0], mask[0] = False, sees
        token = tower.states(np.concatenate([start[:1], start]), mask)[-1][0]
        mixed[merged == region] += 0.5 * tower.norm("vision_model.post_layernorm", token)
    return mixed


@pytest.mark.parametrize(("grid", "seed"), [((2, 5), 0), ((4, 3), 1)])
@pytest.mark.parametrize("regions", ["all", "some"])
def test_corrclip_is_its_formula(deep: str, grid: tuple[int, int], seed: int, regions: str) -> None:
    """Seven blocks: the spatial branch is the mean of the last 3 before the last but one. Region 0 is no region."""
    given, clip, tower = own(deep, grid, seed), CLIP.open(deep), Numpy(deep)
    count = grid[0] * grid[1]
    rng = np.random.default_rng(seed + 5)
    ids = rng.permutation(np.arange(count) % 5 if regions == "some" else 1 + np.arange(count) % 4)
    kinds = rng.normal(0, 1, (4, 6))[np.array([0, 1, 2, 3, 3])[ids]]  # regions 3 and 4 are alike
    given["features"] = kinds + 0.3 * rng.normal(0, 1, (count, 6))
    start = clip.hidden(given["pixels"])[0][0].double().numpy()  # type: ignore[arg-type]
    unit = given["features"] / np.linalg.norm(given["features"], axis=1, keepdims=True)  # type: ignore[operator]
    want = tower.named(corrclip_of(tower, start, unit, ids, slice(3, 6)), given["text"].numpy())  # type: ignore[attr-defined]
    method = find("corrclip").configure({"clip": ClipInput(clip, given["text"], given["pixels"])})
    found = method(captured(grid, given["features"], regions=ids.reshape(grid))).flatten(1).numpy()
    assert np.abs(found - want).max() < 1e-4


@pytest.mark.parametrize(
    ("depth", "earlier"),
    [(12, (6, 11)), (24, (11, 23)), (32, (3, 31)), (4, (2, 3)), (5, (3, 4)), (16, (3, 15))],
)
def test_corrclip_adds_as_many_blocks_as_published(tmp_path: Path, depth: int, earlier: tuple[int, int]) -> None:
    """Outputs of blocks L - 2 - n to L - 3, n = 5, 12, 28 of 12, 24, 32 blocks; of others all but 4, at least one."""
    path = checkpoint(tmp_path / "clip", depth)
    given, clip, tower = own(path, (1, 3), depth), CLIP.open(path), Numpy(path)
    start = clip.hidden(given["pixels"])[0][0].double().numpy()  # type: ignore[arg-type]
    unit = given["features"] / np.linalg.norm(given["features"], axis=1, keepdims=True)  # type: ignore[operator]
    ids, text = np.array([1, 2, 2]), given["text"].numpy()  # type: ignore[attr-defined]
    method = find("corrclip").configure(
        {"clip": ClipInput(clip, given["text"], given["pixels"]), "temperature": 1.0}  # type: ignore[arg-type]
    )
    found = method(captured((1, 3), given["features"], regions=ids[None])).flatten(1).numpy()

    def off(first: int, last: int) -> float:
        want = tower.named(corrclip_of(tower, start, unit, ids, slice(first, last)), text, 1.0)
        return float(np.abs(found - want).max())

    first, last = earlier
    assert off(first, last) < 1e-5
    for others in ((first + 1, last), (first - 1, last), (first, last + 1)):
        assert others[0] >= others[1] or off(*others) > 1e-4


def test_patch_vectors_take_the_place_of_a_clip() -> None:
    """Of any CLIP, on any grid, with texts of any width; what only a CLIP has is asked for by name."""
    rng = np.random.default_rng(0)
    vectors, text = rng.normal(0, 1, (2, 3, 7)), rng.normal(0, 1, (3, 7))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    given = ClipInput(text=torch.from_numpy(text).float(), features=torch.from_numpy(vectors))
    one = captured((4, 6), np.eye(24), regions=np.ones((4, 6), int))
    plain = find("proxyclip").configure({"clip": given, "source": "identity", "temperature": 1.0})
    unit = vectors.reshape(6, 7) / np.linalg.norm(vectors.reshape(6, 7), axis=1, keepdims=True)
    shares = np.exp(unit @ text.T)
    shares = (shares / shares.sum(1, keepdims=True)).T.reshape(1, 3, 2, 3)
    want = torch.nn.functional.interpolate(torch.from_numpy(shares), (4, 6), mode="bilinear")[0]
    assert (plain(one).double() - want).abs().max() < 1e-5
    corrclip = find("corrclip").configure({"clip": given})
    assert corrclip.configure({"weights": (0, 0)})(one).shape == (3, 4, 6)
    for method, told in (
        (corrclip, "set corrclip.weights to 0,0"),
        (plain.configure({"side": (16, 16, 8)}), "windows slide over pixels"),
        (plain.configure({"clip": ClipInput(text=torch.ones(2, 7), features=given.features)}), r"expected \[3, 7\]"),
    ):
        with pytest.raises(UserError, match=told):
            method(one)
    for wrong, told in (
        ({"features": given.features}, "give text vectors beside them"),
        ({"head": torch.nn.Identity()}, "a head is of CLIP features"),
        ({"features": torch.ones(6, 7), "text": given.text}, r"of shape \(6, 7\): expected finite \[h, w, E\]"),
        ({"features": given.features, "text": given.text, "pixels": torch.ones(3, 8, 8)}, "and no pixels"),
    ):
        with pytest.raises(UserError, match=told):
            ClipInput(**wrong)  # type: ignore[arg-type]


def test_values_and_a_head_are_gathered_before_the_last_norm(deep: str) -> None:
    """Values of a CLIP of one's own, and what follows them, give what the CLIP gives; its normed vectors do not."""
    grid = (3, 4)
    given, clip, tower = own(deep, grid, 1), CLIP.open(deep), Numpy(deep)
    start = clip.hidden(given["pixels"])[0][0].double().numpy()  # type: ignore[arg-type]
    text, last = given["text"].numpy(), f"vision_model.encoder.layers.{tower.depth - 1}"  # type: ignore[attr-defined]
    unit = given["features"] / np.linalg.norm(given["features"], axis=1, keepdims=True)  # type: ignore[operator]
    similarity = 3.0 * (unit @ unit.T - 1.2 * (unit @ unit.T).mean())
    matrix = np.where(similarity < 0, 0.0, np.exp(similarity))
    matrix /= matrix.sum(1, keepdims=True)
    state = tower.states(start)[-2]
    want = tower.named(tower.branch(matrix, state), text, 1.0)
    values = tower.linear(f"{last}.self_attn.v_proj", tower.norm(f"{last}.layer_norm1", state))[1:]

    def head(values: np.ndarray) -> np.ndarray:
        mixed = tower.linear(f"{last}.self_attn.out_proj", values)
        return tower.linear("visual_projection", tower.norm("vision_model.post_layernorm", mixed))

    def scores(features: np.ndarray, **how: object) -> np.ndarray:
        clip = ClipInput(text=given["text"], features=torch.from_numpy(features).reshape(*grid, -1), **how)  # type: ignore[arg-type]
        method = find("proxyclip").configure({"clip": clip, "temperature": 1.0})
        return method(captured(grid, given["features"])).flatten(1).numpy()

    found = scores(values, head=lambda mixed: torch.from_numpy(head(mixed.double().numpy())).float())
    assert np.abs(found - want).max() < 1e-5
    assert np.abs(scores(head(values)) - want).max() > 1e-3


def test_regions_reach_the_grid_as_the_picture_does() -> None:
    """A letterboxed picture's regions lie in the middle of the input, with none above and below."""
    from mmdit_probe.segment.methods.dense_clip import region_map

    one = replace(captured((4, 4), np.eye(16)), fit=Fit.of((2, 4), (4, 4), 1, "letterbox"))
    one = replace(one, regions=np.array([[1, 1, 2, 2], [3, 3, 3, 3]]))
    found = region_map(one, (4, 4))
    assert found is not None
    assert found.tolist() == [[0, 0, 0, 0], [1, 1, 2, 2], [3, 3, 3, 3], [0, 0, 0, 0]]


def test_windows_are_averaged_where_they_overlap(deep: str) -> None:
    """16 x 24 pixels in windows of 16, stride 8: two of them, which share the middle 8 columns."""
    given, clip, tower = own(deep, (2, 3), 3), CLIP.open(deep), Numpy(deep)
    pixels, text = given["pixels"], given["text"].double()  # type: ignore[attr-defined]
    assert isinstance(pixels, torch.Tensor)
    logits, seen = torch.zeros(3, 16, 24, dtype=torch.float64), torch.zeros(24)
    for left in (0, 8):
        start = clip.hidden(pixels[:, :, left : left + 16])[0][0].double().numpy()
        vectors = torch.from_numpy(tower.linear("visual_projection", tower.branch(np.eye(4), tower.states(start)[-2])))
        maps = (torch.nn.functional.normalize(vectors, dim=-1) @ text.T).T.reshape(1, 3, 2, 2)
        logits[:, :, left : left + 16] += torch.nn.functional.interpolate(maps, (16, 16), mode="bilinear")[0]
        seen[left : left + 16] += 1
    assert seen.tolist() == [1.0] * 8 + [2.0] * 8 + [1.0] * 8
    # a pixel of the 2 x 3 picture is read between the fourth and fifth pixels of its 8 x 8: the mean of the four
    centres = (logits / seen).unfold(1, 8, 8).unfold(2, 8, 8)[..., 3:5, 3:5].mean((-2, -1))
    want = (40 * centres).softmax(0)
    given_to = ClipInput(clip, given["text"], pixels)  # type: ignore[arg-type]
    method = find("proxyclip").configure({"clip": given_to, "source": "identity", "side": (16, 16, 8)})
    found = method(captured((2, 3), np.eye(6)))
    assert found.shape == (3, 2, 3) and (found.double() - want).abs().max() < 1e-4
    for side, told in (((16, 16, 24), "stride <= window"), ((16, 12, 8), "whole patches"), ((16, 16), "or three")):
        with pytest.raises(UserError, match=told):
            find("proxyclip").configure({"clip": given_to, "side": side})(captured((2, 3), np.eye(6)))


def test_a_window_reads_the_tokens_and_the_regions_that_lie_in_it() -> None:
    from mmdit_probe.segment.methods.dense_clip import View

    ids = np.array([[1, 2, 3], [4, 5, 6]])
    one = captured((2, 3), np.arange(6)[:, None] == np.arange(6), regions=ids)
    part = View(one, None, torch.zeros(3, 16, 16), (16, 24), (0, 8))  # type: ignore[arg-type]
    places, grid = part.tokens((2, 3))
    assert places.tolist() == [1, 2, 4, 5] and grid == (2, 2)
    features, out = part.features("features")
    assert features.argmax(1).tolist() == [1, 2, 4, 5] and out == (2, 2)
    assert part.regions((2, 2), 0.5).tolist() == [2, 3, 5, 6]
    assert part.tokens((1, 1))[0].tolist() == [0]  # no centre lies in it: the nearest token
    own = torch.arange(24.0).reshape(4, 6, 1).cos()
    assert part.features(torch.cat([own, own.sin()], -1))[1] == (4, 4)


@pytest.mark.parametrize("name", ["proxyclip", "corrclip"])
def test_one_window_of_the_whole_picture_is_the_picture(deep: str, name: str) -> None:
    one = worlds.capture(worlds.masks(), noise=0.05)
    whole = find(name).configure({"clip": deep, "side": 64})
    found, window = whole(one), whole.configure({"side": (64, 64, 64)})(one)
    assert window.shape == (3, 64, 64)
    assert (label(one.fit.back(found)) == label(one.fit.back(window))).mean() > 0.98  # logits, not shares, are enlarged
