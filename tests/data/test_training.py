"""Training data: masks that fit their words, folders, own labels, and one-line refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmdit_probe import UserError
from mmdit_probe.data import PictureData, Sample, ScenesData, open_picture, read_label_map, samples, training_data
from mmdit_probe.data.masks import MAX_MASKS, largest
from mmdit_probe.magnet.check import check
from mmdit_probe.magnet.pseudo import SelfLabelled
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.scenes import CLASSES, scene
from tests import tiny

SIZE = (64, 64)


def folder(at: Path, names: bool = True) -> Path:
    """Two pictures, twice as wide as high: a cat on the left of the centre, a red ring on its right."""
    (at / "masks").mkdir(parents=True)
    for index in range(2):
        Image.fromarray(np.full((64, 128, 3), 60 * index, np.uint8)).save(at / f"{index}.png")
        (at / f"{index}.txt").write_text("a cat and a\n red ring")
        mask = np.zeros((64, 128), np.uint8)
        mask[:, 40:64], mask[:, 64:90] = 1, 7
        Image.fromarray(mask).save(at / "masks" / f"{index}.png")
    if names:
        (at / "masks" / "classes.json").write_text(json.dumps({"1": "cat", "7": "red ring"}))
    return at


def folder_data(at: Path, size: tuple[int, int], **how: Any) -> PictureData:
    return training_data(str(at), size=size, **{"prompt": "caption", **how})  # type: ignore[return-value]


def test_class_masks_are_those_of_the_scene_and_named_in_the_prompt() -> None:
    for prompt in ("list", "caption", "mixed"):
        for index in range(6):
            sample, truth = ScenesData("val", 6, "class", prompt)[index], scene("val", index)  # type: ignore[arg-type]
            words = sample.prompt.split()
            assert all(name in words for name in sample.names)
            for name, mask in zip(sample.names, sample.masks, strict=True):
                (of,) = {CLASSES[i] for i in np.unique(truth.classes[mask])}
                assert name.startswith(of)  # "stars" are of class "star"
                assert mask.sum() == (truth.classes == CLASSES.index(of)).sum()
    assert len(ScenesData("val", 1)[0].names) == len(scene("val", 0).class_names)


def test_a_background_is_not_named_in_prompts(tmp_path: Path) -> None:
    """Its name was listed, and its words were aligned with all that is no object."""
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("cat\nBackground\nring\n")
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.repeat([[0, 1, 2, 255]], 8, 0).repeat(4, 1).astype(np.uint8)).save(tmp_path / "labels/a.png")
    sample = training_data(str(tmp_path))[0]
    assert (sample.prompt, sample.names, sample.masks.shape) == ("cat ring", ("cat", "ring"), (2, 8, 16))
    assert not sample.masks[:, :, 4:8].any()


def test_masks_without_names_make_no_list(tmp_path: Path) -> None:
    """Captions were read instead, and the record said "list"."""
    source = str(folder(tmp_path, names=False))
    assert training_data(source)[0].prompt == "a cat and a red ring"
    with pytest.raises(UserError, match="have no names for prompts to list"):
        training_data(source, prompt="list")


def test_scenes_end() -> None:
    """A loop over them went on for ever: the sequence protocol asks for an index beyond the last."""
    data = ScenesData("val", 3, first=2)
    assert [sample.name for sample in data] == ["scenes:val:2", "scenes:val:3", "scenes:val:4"]
    assert data[-1].name == "scenes:val:4"


def test_scenes_of_another_world_are_another_training(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ScenesData("train", 2)
    assert data.describe()["data"] == "scenes:train"
    monkeypatch.setattr("mmdit_probe.scenes.world.WORLD_VERSION", 2)
    assert data.describe()["data"] == "scenes:train of world 2"


def test_part_masks_are_parts_of_single_objects_largest_first() -> None:
    sample, truth = ScenesData("val", 9, "part")[3], scene("val", 3)
    assert sample.names == ()
    sizes = sample.masks.sum((1, 2)).tolist()
    assert sizes == sorted(sizes, reverse=True)
    for mask in sample.masks:
        assert len(np.unique(truth.instances[mask])) == len(np.unique(truth.parts[mask])) == 1
    many = [np.arange(4096).reshape(64, 64) // 40 == k for k in range(60)]
    assert len(largest(many)) == MAX_MASKS
    assert len(largest([many[0] & (np.arange(64) < 10)])) == 0  # below half a percent


def test_folder_crops_masks_with_the_picture(tmp_path: Path) -> None:
    data = folder_data(folder(tmp_path / "d"), SIZE)
    sample = data[0]
    assert (len(data), sample.image.shape, sample.prompt) == (2, (64, 64, 3), "a cat and a red ring")
    assert sample.names == ("cat", "red ring")
    assert [int(mask.any(0).argmax()) for mask in sample.masks] == [40 - 32, 64 - 32]
    squashed = folder_data(tmp_path / "d", SIZE, fit="squash")[0]
    assert [int(mask.any(0).argmax()) for mask in squashed.masks] == [20, 32]
    assert folder_data(tmp_path / "d", SIZE, prompt="list")[0].prompt == "cat red ring"
    assert data.describe()["count"] == 2


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (100, 36)])
@pytest.mark.parametrize("stored", [(64, 128), (37, 91), (200, 45), (48, 96)])
def test_pixels_are_those_of_one_resize(tmp_path: Path, size: tuple[int, int], stored: tuple[int, int]) -> None:
    """A training repeats bit by bit: PIL's own crop and Lanczos filter, nothing between."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*stored, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    turned, method = size[::-1], Image.Resampling.LANCZOS
    for fit, want in (("crop", ImageOps.fit(image, turned, method)), ("squash", image.resize(turned, method))):
        assert np.array_equal(folder_data(tmp_path, size, fit=fit)[0].image, np.asarray(want))
    assert np.array_equal(
        np.asarray(samples(str(tmp_path))[0].open(size)), np.asarray(ImageOps.fit(image, turned, method))
    )


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (16, 16)])
def test_labels_stored_at_another_size_are_brought_to_their_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    """Of a larger label the upper left part was taken, a smaller one ended in an IndexError."""
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("cat\nsky\n")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    label = (np.arange(size[1]) >= size[1] // 2) * np.ones(size, np.uint8)  # the right half is sky
    Image.fromarray(label.astype(np.uint8)).save(tmp_path / "labels" / "a.png")
    sample = folder_data(tmp_path, (8, 8), prompt="list")[0]
    assert sample.names == ("cat", "sky") and sample.masks[1].tolist() == [[False] * 4 + [True] * 4] * 8
    Image.fromarray(label[: size[0] // 2].astype(np.uint8)).save(tmp_path / "labels" / "a.png")
    with pytest.raises(UserError, match="not of one picture"):
        folder_data(tmp_path, (8, 8))[0]


def test_the_shown_part_of_a_label_is_that_of_its_picture(tmp_path: Path) -> None:
    """Of a photo that its EXIF tag turns, a label that was not turned was read across: classes of tokens elsewhere."""
    tag = Image.Exif()
    tag[0x0112] = 6
    pixels = Image.fromarray(np.zeros((8, 16, 3), np.uint8))
    label = (np.arange(16) >= 8) * np.ones((8, 1), np.uint8)
    Image.fromarray(label.astype(np.uint8)).save(tmp_path / "label.png")
    for options, size in (({}, (8, 8)), ({"exif": tag}, None)):
        pixels.save(tmp_path / "a.png", **options)
        read = partial(read_label_map, tmp_path / "label.png")
        sample = Sample("a", partial(open_picture, tmp_path / "a.png"), names=("cat", "sky"), label=read)
        if size is None:
            with pytest.raises(UserError, match="not of one picture"):
                sample.label((4, 4))
        else:
            assert sample.label((4, 4)).tolist() == [[0] * 4 + [1] * 4] * 8


def test_folder_without_names_has_unnamed_masks(tmp_path: Path) -> None:
    sample = folder_data(folder(tmp_path / "d", names=False), SIZE)[1]
    assert (sample.names, len(sample.masks)) == ((), 2)


def test_a_word_that_the_caption_does_not_say_has_no_mask(tmp_path: Path) -> None:
    at = folder(tmp_path / "d")
    (at / "0.txt").write_text("a category of red things")  # neither "cat" nor "red ring"
    assert folder_data(at, SIZE)[0].names == ()
    (at / "0.txt").write_text("The Cat, alone")
    assert folder_data(at, SIZE)[0].names == ("cat",)


def test_masks_that_would_be_left_out_are_refused(tmp_path: Path) -> None:
    """Of another format or name, their pictures were pictures without a mask, in silence."""
    at = folder(tmp_path / "d")
    (at / "masks" / "notes.md").write_text("by hand")
    (at / "masks" / ".DS_Store").write_bytes(b"")
    assert len(folder_data(at, SIZE)[1].masks) == 2
    (at / "masks" / "1.png").rename(at / "masks" / "1_mask.png")
    with pytest.raises(UserError, match=r"holds '1_mask\.png', which no picture is called like"):
        folder_data(at, SIZE)
    Image.fromarray(np.zeros((64, 128), np.uint8)).save(at / "masks" / "1.JPG")
    with pytest.raises(UserError, match=r"holds '1\.JPG'; masks are PNGs"):
        folder_data(at, SIZE)


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    model = MMDiT(tiny.pipeline(), "tiny", tiny.T5_LENGTH)
    at = folder(tmp_path / "d")
    check(folder_data(at, SIZE), model, "token")
    with pytest.raises(UserError, match="expected multiples of 16"):
        check(folder_data(at, (40, 40)), model, "token")
    with pytest.raises(UserError, match="2 masks and 0 names; token-level"):
        check(folder_data(folder(tmp_path / "e", names=False), SIZE), model, "token")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(at / "masks" / "0.png")
    with pytest.raises(UserError, match=r"is 128 x 64 pixels, its mask 64 x 64"):
        check(folder_data(at, SIZE), model, "token")
    Image.fromarray(np.full((64, 128), 3, np.uint8)).save(at / "masks" / "0.png")
    with pytest.raises(UserError, match=r"ids \[3\] that classes.json does not name"):
        check(folder_data(at, SIZE), model, "token")
    (at / "0.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        check(folder_data(at, SIZE), model, "none")
    with pytest.raises(UserError, match="no folder"):
        folder_data(tmp_path / "nowhere", SIZE)
    with pytest.raises(UserError, match="did you mean 'class'"):
        ScenesData("val", 3, "clas")  # type: ignore[arg-type]


def test_words_cut_off_by_the_encoders_are_refused(tmp_path: Path) -> None:
    at = folder(tmp_path / "d")
    (at / "0.txt").write_text("a " * 60 + "cat")
    model = MMDiT(tiny.pipeline(), "tiny", tiny.T5_LENGTH)
    with pytest.raises(UserError, match="'cat' fell off the end"):
        check(folder_data(at, SIZE), model, "token")


@pytest.mark.parametrize(("source", "refine"), [("maps", "centre"), ("segments", "none")])
def test_own_labels_read_no_annotation(tmp_path: Path, source: str, refine: str) -> None:
    """The same pictures and prompts with other masks give the same labels. Random weights refined gave one label."""
    model = MMDiT(tiny.pipeline(), "tiny", tiny.T5_LENGTH)
    first = folder(tmp_path / "d")
    second = folder(tmp_path / "e")
    for index in range(2):
        mask = np.zeros((64, 128), np.uint8)
        mask[:20, 40:90], mask[40:, 40:90] = 7, 1
        Image.fromarray(mask).save(second / "masks" / f"{index}.png")
        picture = Image.fromarray(np.random.default_rng(index).integers(0, 255, (64, 128, 3), np.uint8))
        for at in (first, second):
            picture.save(at / f"{index}.png")
    how: Any = {"source": source, "layers": (1,), "seeds": (0,), "refine": refine}
    made = [SelfLabelled.make(model, folder_data(at, SIZE), **how) for at in (first, second)]
    assert np.array_equal(made[0].labels, made[1].labels) and len(np.unique(made[0].labels)) > 1
    sample = made[0][0]
    assert sample.masks.sum(0).max() == 1  # every pixel has at most one label
    if source == "maps":
        assert sample.masks.any(0).all()
        assert set(sample.names) <= {"cat", "red ring"}
    else:
        assert sample.names == ()
    assert made[0].describe()["source"] == source


def test_own_segments_beyond_255_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segment 256 was taken for segment 0: the empty prompt of a model with T5 has more positions than that."""
    found = (np.arange(64 * 64) * 300 // (64 * 64)).astype(np.uint16).reshape(64, 64)
    monkeypatch.setattr("mmdit_probe.magnet.pseudo.discover", lambda *_, **__: SimpleNamespace(labels=found))
    data = ScenesData("val", 1, "part")
    made = SelfLabelled.make(None, data, source="segments", layers=(1,))  # type: ignore[arg-type]
    assert np.unique(made.labels).tolist() == list(range(300))
