"""PCA against scikit-learn on the tokens written down, and the scores on maps whose answers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mmdit_probe import probe
from mmdit_probe.cli.app import main
from mmdit_probe.data import IGNORE, Sample, samples
from mmdit_probe.errors import UserError
from mmdit_probe.experiments import Diagnose, FeaturePCA
from mmdit_probe.experiments.feature_pca import classes_of
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.observer import Observer
from mmdit_probe.observe.pca import KINDS, PCA, Projection, own_scores, scores, token_classes
from mmdit_probe.scenes import CLASSES, describe, scene
from tests import tiny

IMAGE, LAYER = 16, 1


class Keep(Observer):
    """The raw features, by another way than the observer's."""

    def __init__(self) -> None:
        self.parts: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}

    def observe(self, seen: Any) -> None:
        named = {"query": seen.call.query, "key": seen.call.key, "value": seen.call.value, "output": seen.output}
        for kind, tensor in named.items():
            rows = torch.stack([torch.cat([*sample[:, :IMAGE]], -1) for sample in tensor])  # heads side by side
            self.parts[kind].append(rows.double())


def run_twice(model: MMDiT, *observers: Observer) -> None:
    text = model.encode_prompt("a red ring")
    with probe(model, *observers, layers=[LAYER]):
        for seed, count in ((0, 2), (5, 3)):
            model.denoise(model.noise(torch.zeros(count, 4, 8, 8), 1.0, seed), 0.8, text)


def test_streaming_fit_is_the_fit_of_all_tokens() -> None:
    from sklearn.decomposition import PCA as Reference

    model, basis, keep = MMDiT(tiny.pipeline()), PCA(components=5), Keep()
    run_twice(model, basis, keep)
    projection = Projection(basis)
    run_twice(model, projection)
    assert basis.fitted == [(LAYER, kind) for kind in KINDS]
    for kind in KINDS:
        tokens = torch.cat(keep.parts[kind]).flatten(0, 1).numpy()
        reference = Reference(n_components=5).fit(tokens)
        mean, vectors, shares = basis.basis(LAYER, kind)
        np.testing.assert_allclose(mean.numpy(), reference.mean_, atol=1e-5)
        np.testing.assert_allclose(shares.numpy(), reference.explained_variance_ratio_, rtol=1e-4)
        overlap = np.abs((vectors.numpy() * reference.components_.T).sum(0))
        np.testing.assert_allclose(overlap, 1, atol=1e-4)
        maps = projection.maps(LAYER, kind)
        assert maps.shape == (5, 4, 4, 5)
        np.testing.assert_allclose(np.abs(maps.numpy().reshape(-1, 5)), np.abs(reference.transform(tokens)), atol=1e-3)


def test_unconditional_rows_are_left_out(pipe: Any) -> None:
    basis, keep = PCA(["value"], 2), Keep()
    with probe(pipe, basis, keep, layers=[LAYER]):
        pipe("a cat", num_inference_steps=1, guidance_scale=3.0, output_type="latent", max_sequence_length=10)
    cond = keep.parts["value"][0][1]
    np.testing.assert_allclose(basis.basis(LAYER, "value")[0].numpy(), cond.mean(0).numpy(), atol=1e-5)


def test_token_classes_are_the_majority() -> None:
    mask = np.array([[[1, 1, 2, 2], [1, 3, 2, 3], [0, 0, 4, 4], [0, 0, 4, 4]]], np.uint8)
    assert token_classes(mask, (2, 2)).tolist() == [[[1, 2], [0, 4]]]


def test_token_classes_of_masks_of_another_size() -> None:
    """By hand: the middle of row 2 of 3 lies in the second token of 2, that of column 3 of 5 in the second of 2."""
    mask = np.array([[[1, 1, 2, 2, 2], [3, 3, 1, 1, 1], [3, 2, 4, 4, 1]]])
    assert token_classes(mask, (2, 2)).tolist() == [[[1, 2], [3, 1]]]
    assert token_classes(mask[:, :1, :2], (2, 4)).tolist() == [[[1, 1, 1, 1], [1, 1, 1, 1]]]
    assert token_classes(np.array([[[5, 7]]]), (2, 4)).tolist() == [[[5, 5, 7, 7]] * 2]


@pytest.mark.parametrize("asked", [Diagnose(limit=4), FeaturePCA(limit=8, kinds="key", components=2)])
def test_labels_lie_where_the_picture_is_shown(asked: Any) -> None:
    """Pictures are cropped to the model's aspect, and whole labels were laid over them: what is cut off counts for
    nothing, and pixels without a class are none."""
    model = MMDiT(tiny.pipeline())

    def sample(index: int, margin: int) -> Sample:
        item, sides = scene("val", index), ((0, 0), (margin, margin))
        label = np.pad(item.classes.astype(np.int64), sides, constant_values=IGNORE)
        return Sample(
            str(index), np.pad(item.image, (*sides, (0, 0))), describe(item), names=CLASSES, label=lambda: label
        )

    tables = []
    for margin in (0, 32):
        pictures = [sample(index, margin) for index in range(asked.limit)]
        result = replace(asked, images=pictures).run(model, progress=False)
        tables.append(result.store.table("map_quality" if isinstance(asked, Diagnose) else "pca"))
    assert tables[0].select_dtypes("float").notna().any().all()
    pd.testing.assert_frame_equal(*tables)


def test_classes_of_a_folder_are_told_by_their_names(tmp_path: Path) -> None:
    """Its masks are numbered in each picture on their own, so that the first was one class in all of them."""
    (tmp_path / "masks").mkdir()
    left, right = np.indices((4, 4))[1] < 2, np.indices((4, 4))[1] > 1
    for name, mask in (("0", 7 * left), ("1", 3 * right), ("2", 7 * right + 3 * left)):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{name}.png")
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    model: Any = SimpleNamespace(default_size=(4, 4), token_grid=lambda *_: (1, 2))
    assert classes_of(samples(str(tmp_path)), model) is None  # ids without names mean nothing in another picture
    (tmp_path / "masks" / "classes.json").write_text('{"3": "cat", "7": "sky"}')
    sky, cat = 0, 1
    assert classes_of(samples(str(tmp_path)), model).tolist() == [[[sky, IGNORE]], [[IGNORE, cat]], [[cat, sky]]]


def test_tokens_without_a_class_are_left_out_of_its_scores() -> None:
    maps, classes = maps_of("class")
    known = np.where(np.indices(classes.shape)[1] == 0, IGNORE, classes)  # the first row of tokens is not labelled
    found, cut = scores(maps, known), scores(maps[:, 1:], classes[:, 1:])
    for name in ("class", "silhouette"):
        np.testing.assert_allclose(found[name], cut[name], atol=1e-9)


def test_classes_that_no_training_image_has_are_not_missed() -> None:
    maps, classes = maps_of("class")
    held_out = len(classes) // 2
    classes[held_out:, :2] = 7  # two rows of tokens, of a class of their own
    classes[-1] = 7
    found = scores(maps, classes)["class"]
    assert found[:-1].min() > 0.95
    assert np.isnan(found[-1])


def maps_of(kind: str, n: int = 12, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Components that are the class's code, or the position's, with a little noise; classes are random blocks."""
    rng = np.random.default_rng(0)
    classes = np.kron(rng.integers(0, 3, (n, 2, 2)), np.ones((side // 2, side // 2), int))
    rows, columns = np.mgrid[0:side, 0:side]
    noise = rng.normal(size=(n, side, side, 3)) * 0.05
    if kind == "class":
        return np.eye(3)[classes] + noise, classes
    stripes = np.stack([np.sin(rows * 2.0), np.cos(columns * 2.0), rows / side], -1)
    return stripes[None] + noise, classes


def test_scores_tell_class_from_position() -> None:
    semantic, classes = maps_of("class")
    found = scores(semantic, classes)
    assert all(len(values) == 6 for values in found.values())
    assert found["class"].min() > 0.95
    assert found["class_shuffled"].mean() < 0.7
    assert np.nanmin(found["silhouette"]) > 0.7 > 0.5 > np.nanmean(found["silhouette_shuffled"])
    assert found["position"].mean() < 0.2
    positional, classes = maps_of("position")
    found = scores(positional, classes)
    assert found["position"].min() > 0.9
    assert found["coordinates"].mean() > 0.4
    assert abs(found["class"].mean() - found["class_shuffled"].mean()) < 0.2
    assert set(scores(positional, None)) == {"position", "coordinates"}
    with pytest.raises(UserError, match="two images"):
        scores(positional[:1], None)


def test_incremental_fit_spans_what_the_exact_one_does() -> None:
    model = MMDiT(tiny.pipeline())
    exact, incremental = PCA(["value"], 3), PCA(["value"], 3, "incremental")
    run_twice(model, exact, incremental)
    for one, two in zip(exact.basis(LAYER, "value"), incremental.basis(LAYER, "value"), strict=True):
        assert one.shape == two.shape
    overlap = exact.basis(LAYER, "value")[1][:, 0] @ incremental.basis(LAYER, "value")[1][:, 0]
    assert abs(float(overlap)) > 0.95
    with pytest.raises(UserError, match="exact"):
        PCA(solver="exakt")


def counted_denoise(model: MMDiT, left: list[int]) -> None:
    """Interrupt the model once as many denoising calls as `left` says are made."""
    stock = model.denoise

    def counted(*args: Any, **options: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return stock(*args, **options)

    model.denoise = counted  # type: ignore[method-assign]


@pytest.mark.parametrize("solver", ["exact", "incremental"])
def test_an_interrupted_run_goes_on_where_it_was(solver: str, tmp_path: Path) -> None:
    model, left = MMDiT(tiny.pipeline()), [100]
    counted_denoise(model, left)
    ask = FeaturePCA(
        images="scenes:val", limit=6, prompts="a cat", kinds="key", components=2, batch=2, solver=solver
    )  # fmt: skip
    whole = ask.run(model, progress=False)
    for _ in range(2):  # in the first pass, then in the second
        left[0] = 2
        with pytest.raises(KeyboardInterrupt):
            ask.run(model, out=tmp_path / "run", resume=True, progress=False)
    left[0] = 2  # six batches in all, four are done
    again = ask.run(model, out=tmp_path / "run", resume=True, progress=False)
    pd.testing.assert_frame_equal(whole.table, again.table)
    pd.testing.assert_frame_equal(whole.store.table("pca_variance"), again.store.table("pca_variance"))
    np.testing.assert_array_equal(*(one.store.load_arrays("shown")["0:key"] for one in (whole, again)))
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"pca.parquet"} and not left[0]
    assert not (tmp_path / "run" / "state").exists()


def test_an_interrupted_run_goes_on_with_other_batches(tmp_path: Path) -> None:
    """Finished batches were counted in batches of the size now, so that pictures were fitted twice and maps mixed."""
    model, left = MMDiT(tiny.pipeline()), [100]
    counted_denoise(model, left)
    ask = FeaturePCA(images="scenes:val", limit=6, prompts="a cat", kinds="key", components=2, batch=6)
    whole = ask.run(model, progress=False)
    # Fitted: 0-1 | 2-4 and 5, then maps of 0-2 | maps of 3-4 and 5.
    for batch, calls in ((2, 1), (3, 3)):
        left[0] = calls
        with pytest.raises(KeyboardInterrupt):
            replace(ask, batch=batch).run(model, out=tmp_path / "run", resume=True, progress=False)
    left[0] = 2
    again = replace(ask, batch=2).run(model, out=tmp_path / "run", resume=True, progress=False)
    assert not left[0]
    pd.testing.assert_frame_equal(whole.table, again.table, rtol=1e-3, atol=1e-4)
    pd.testing.assert_frame_equal(whole.store.table("pca_variance"), again.store.table("pca_variance"), rtol=1e-4)


def test_own_scores_need_their_control() -> None:
    """Inside one picture even another's classes are predicted by neighbours: what counts is the distance."""
    semantic, classes = maps_of("class")
    found = own_scores(semantic, classes)
    assert np.nanmin(found["class"]) > 0.95 and len(found["class"]) == 12
    assert np.nanmean(found["silhouette"]) > 0.7 > 0.5 > np.nanmean(found["silhouette_shuffled"])
    positional, classes = maps_of("position")
    assert own_scores(positional, None)["coordinates"].mean() > 0.4


def test_bad_requests() -> None:
    with pytest.raises(UserError, match="value"):
        PCA(["values"])
    with pytest.raises(UserError, match="nothing"):
        PCA().basis(0, "value")


def test_command(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["pca", "--model", str(tiny_directory), "--images", "scenes:val", "--limit", "4", "--components", "3"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--layers", "0-1", "--kinds", "key,value", "--out", "run", "--json"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 0, err
    document = json.loads(out)
    assert [(row["layer"], row["kind"]) for row in document["layers"]] == [
        (0, "key"), (0, "value"), (1, "key"), (1, "value"),
    ]  # fmt: skip
    names = {path.name for path in Path("run").iterdir()}
    assert {"pca.parquet", "pca_variance.parquet", "pca_maps.png", "pca_scores.png", "pca_by_layer.csv"} <= names
    summary = pd.read_csv("run/pca_by_layer.csv")
    assert {"silhouette", "silhouette_beyond_low", "explained_3_low", "position_high"} <= set(summary.columns)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--basis", "image", "--out", "each"])
    assert stopped.value.code == 0
    each = pd.read_parquet("each/pca.parquet")
    assert each["item"].nunique() == 4 and each["position"].isna().all() and each["silhouette"].notna().any()
    assert each["explained_3"].between(0, 1).all()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--kinds", "values"])
    assert stopped.value.code == 2


def test_own_bases_of_a_call_that_has_unconditional_rows_alone(tiny_model: MMDiT) -> None:
    """Of pipelines that call their transformer once for each branch."""
    projection, keep = Projection(PCA(["value"], 2), each=True), Keep()
    text, latents = tiny_model.encode_prompt("a cat"), torch.randn(2, 4, 8, 8)
    with probe(tiny_model, projection, keep, layers=[LAYER]):
        tiny_model.denoise(latents, 0.5, text)
        tiny_model.denoise(latents, 0.5, text, branch="uncond")
    maps = projection.maps(LAYER, "value").flatten(1, 2).double()
    assert maps.shape == (2, IMAGE, 2)
    for image, features in zip(maps, keep.parts["value"][0], strict=True):
        left, size, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
        torch.testing.assert_close(image.abs(), (left * size)[:, :2].abs(), atol=1e-4, rtol=1e-3)
