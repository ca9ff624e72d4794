"""COCO and SA-1B as training data, and captions by a model: masks by hand, cache, refusals, a whole training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from mmdit_probe import UserError
from mmdit_probe.cli.app import main
from mmdit_probe.data import Fit, PictureData, Sample, dataset, training_data
from mmdit_probe.data.captions import Captioner, cached
from mmdit_probe.data.coco import _filled
from mmdit_probe.data.sample import Dataset
from mmdit_probe.data.training import first_sentences
from tests import blip

SIZE = (64, 64)
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 93, "name": "wall-brick"}, {"id": 94, "name": "wall-wood"},
              {"id": 183, "name": "other"}]  # fmt: skip


def runs(mask: np.ndarray) -> dict[str, Any]:
    """A mask as COCO's uncompressed runs."""
    flat = mask.T.reshape(-1).astype(int)
    edges = np.flatnonzero(np.diff(np.r_[0, flat, 1 - flat[-1]]))
    return {"size": list(mask.shape), "counts": np.diff(np.r_[0, edges]).tolist()}


def parts() -> dict[str, np.ndarray]:
    """A picture of 64 x 128: a cat on the left quarter of the centre, brick and wood walls to its right."""
    columns = np.arange(128)[None].repeat(64, 0)
    return {"cat": (columns >= 32) & (columns < 48), "brick": (columns >= 48) & (columns < 64), "wood": columns >= 64}


def coco(root: Path) -> Path:
    """The three kinds of annotations of the same two pictures; captions of the first alone."""
    (root / "train2017").mkdir(parents=True)
    (root / "annotations" / "panoptic_train2017").mkdir(parents=True)
    of = parts()
    images = [{"id": k, "file_name": f"00{k}.jpg"} for k in (3, 4, 9)]  # the last one's file is not there
    for k in (3, 4):
        Image.fromarray(np.full((64, 128, 3), 20 * k, np.uint8)).save(root / "train2017" / f"00{k}.jpg")
    box = [32, 0, 48, 0, 48, 64, 32, 64]
    pieces = {
        "instances": [{"category_id": 1, "segmentation": [box]}],
        "stuff": [{"category_id": 93, "segmentation": runs(of["brick"])},
                  {"category_id": 94, "segmentation": runs(of["wood"])},
                  {"category_id": 183, "segmentation": runs(of["cat"])}],
    }  # fmt: skip
    for kind, given in pieces.items():
        listed = [{"image_id": k, **one} for k in (3, 4, 9) for one in given]
        content = {"images": images, "categories": CATEGORIES, "annotations": listed}
        (root / "annotations" / f"{kind}_train2017.json").write_text(json.dumps(content))
    ids = of["cat"] * 7 + of["brick"] * 300 + of["wood"] * 70000
    painted = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1).astype(np.uint8)
    Image.fromarray(painted).save(root / "annotations" / "panoptic_train2017" / "003.png")
    segments = [{"id": 7, "category_id": 1}, {"id": 300, "category_id": 93}, {"id": 70000, "category_id": 94}]
    entry = {"image_id": 3, "file_name": "003.png", "segments_info": segments}
    content = {"images": images, "categories": CATEGORIES, "annotations": [entry]}
    (root / "annotations" / "panoptic_train2017.json").write_text(json.dumps(content))
    told = [
        {"id": 8, "image_id": 3, "caption": "Second."},
        {"id": 2, "image_id": 3, "caption": "A cat at\n a wall. It sits."},
    ]
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps({"images": images, "annotations": told}))
    return root


def coco_data(root: Path, size: tuple[int, int], *, kind: str = "stuff", split: str = "train2017", **how: Any) -> Any:
    return training_data(f"coco-{kind}:{root}", size=size, split=split, **{"prompt": "caption", **how})


def widths(data: Any, index: int = 0) -> dict[str, int]:
    """Columns that each mask covers."""
    return {name: int(mask.any(0).sum()) for name, mask in zip(data[index].names, data[index].masks, strict=True)}


@pytest.mark.parametrize(
    ("kind", "expected", "count"),
    [("instances", {"cat": 16}, 2), ("stuff", {"wall": 48}, 2), ("panoptic", {"cat": 16, "wall": 48}, 1)],
)
def test_coco_masks_are_united_by_name(tmp_path: Path, kind: Any, expected: dict[str, int], count: int) -> None:
    """The centre of 64 columns is kept; the walls are one class, "other" is none."""
    data = coco_data(coco(tmp_path), SIZE, prompt="list", kind=kind)
    assert (len(data), widths(data), data[0].image.shape) == (count, expected, (64, 64, 3))
    assert data[0].prompt == " ".join(expected)
    assert data.describe()["kind"] == kind


def test_a_polygon_holds_the_pixels_whose_centres_lie_in_it() -> None:
    """PIL's polygons, with their whole rim, were larger by a pixel across: small objects by a third."""
    assert _filled([[1, 1, 3, 1, 3, 4, 1, 4], [5, 0, 6, 0, 6, 1, 5, 1]], (5, 7)).sum() == 2 * 3 + 1
    assert not _filled([[1, 1], [1, 1, 6, 4], []], (5, 7)).any()
    points = np.random.default_rng(0).uniform(0, (50, 40), (7, 2))  # crosses itself
    rows, columns = np.mgrid[:40, :50] + 0.5
    inside = np.zeros((40, 50), bool)
    for (x, y), (to_x, to_y) in zip(points, np.roll(points, -1, 0), strict=True):
        between = (y > rows) != (to_y > rows)
        inside ^= between & (columns > x + (rows - y) * (to_x - x) / (to_y - y))
    assert np.array_equal(_filled([points.ravel().tolist()], (40, 50)), inside)


def test_two_pictures_of_one_name_or_id_are_refused(tmp_path: Path) -> None:
    """One had the other's masks, in silence; a caption that is no text was "None"."""
    root = coco(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for change in ({"file_name": "003.jpg"}, {"id": 3}):
        images = [content["images"][0], content["images"][1] | change, content["images"][2]]
        file.write_text(json.dumps(content | {"images": images}))
        with pytest.raises(UserError, match=r"two pictures are called (3|'003\.jpg')"):
            dataset(f"coco-instances:{root}")
    file.write_text(json.dumps(content | {"images": [*content["images"], {"id": 77, "file_name": "empty.jpg"}]}))
    assert "left out: 1 of 4 pictures, without annotation" in dataset(f"coco-instances:{root}").note
    told = {"images": images[:1], "annotations": [{"id": 1, "image_id": 3, "caption": None}]}
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="no COCO caption file"):
        dataset(f"coco-instances:{root}")


@pytest.mark.parametrize(
    ("kind", "part", "said"),
    [("instances", "categories", "categories are called 1"),
     ("panoptic", "annotations", "annotated pictures are called")],
)  # fmt: skip
def test_what_an_annotation_file_says_twice_is_refused(tmp_path: Path, kind: str, part: str, said: str) -> None:
    """The last one counted: a category had another's name, a picture another's segments."""
    file = coco(tmp_path) / "annotations" / f"{kind}_train2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {part: [*content[part], content[part][0]]}))
    with pytest.raises(UserError, match=f"two {said}"):
        dataset(f"coco-{kind}:{tmp_path}")


def test_coco_captions_name_what_is_aligned(tmp_path: Path) -> None:
    data = coco_data(coco(tmp_path), SIZE, kind="panoptic")
    assert data[0].prompt == "A cat at a wall. It sits."
    assert data[0].names == ("cat", "wall")
    assert replace(data, sentences=1)[0].prompt == "A cat at a wall."
    assert coco_data(tmp_path, SIZE, kind="stuff")[1].names == ()  # no caption says "wall"


def test_coco_refusals(tmp_path: Path) -> None:
    root = coco(tmp_path / "a")
    with pytest.raises(UserError, match=r"stuff_val2017.json'; expected COCO's stuff annotations"):
        coco_data(root, SIZE, split="val2017")
    with pytest.raises(UserError, match="did you mean 'coco-stuff'"):
        coco_data(root, SIZE, kind="stuf")  # type: ignore[arg-type]
    file = root / "annotations" / "stuff_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"]["counts"][0] += 5
    damaged = coco(tmp_path / "b")
    (damaged / "annotations" / "stuff_train2017.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"COCO mask of '003.jpg' is damaged"):
        coco_data(damaged, SIZE)[0]
    for picture in (damaged / "train2017").iterdir():
        picture.unlink()
    with pytest.raises(UserError, match="none of the 3 annotated pictures"):
        coco_data(damaged, SIZE, kind="instances")


def test_coco_tells_what_is_not_there_and_classes_that_no_label_holds(tmp_path: Path) -> None:
    """Id 255 means unknown in a label map: the 256th class of a long list was not scored."""
    source = f"coco-instances:{coco(tmp_path)}"
    assert dataset(source).note == "not there: 1 of 3 annotated pictures (first: 009.jpg)"
    Image.new("RGB", (128, 64)).save(tmp_path / "train2017" / "009.jpg")
    assert dataset(source).note == ""
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["categories"] += [{"id": 200 + k, "name": f"thing {k}"} for k in range(255 - len(content["categories"]))]
    file.write_text(json.dumps(content))
    assert len(dataset(source).classes) == 255
    content["categories"].append({"id": 900, "name": "one more"})
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has 256 classes; labels hold at most 255"):
        dataset(source)
    assert training_data(source, size=SIZE)[0].names == ("cat",)


def sa1b(root: Path) -> Path:
    """One picture with three masks, one of them too small to count."""
    root.mkdir(parents=True)
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(root / "sa_5.jpg")
    of = parts()
    dot = np.zeros((64, 128), bool)
    dot[:2, :2] = True
    content = {"annotations": [{"segmentation": runs(mask)} for mask in (dot, of["cat"], of["wood"])]}
    (root / "sa_5.json").write_text(json.dumps(content))
    (root / "sa_5.txt").write_text("A wall. A cat before it. More of it.")
    return root


def test_sa1b_masks_have_no_names_largest_first(tmp_path: Path) -> None:
    sample = training_data(f"sa1b:{sa1b(tmp_path / 'sa')}", size=SIZE, sentences=2)[0]
    assert sample.names == ()
    assert [int(mask.any(0).sum()) for mask in sample.masks] == [32, 16]
    assert sample.prompt == "A wall. A cat before it."


def test_masks_are_brought_to_size_with_their_picture() -> None:
    """Black and white stripes wider than a pixel of the result: picture and mask agree wherever they are sure."""
    stripes = (np.arange(210) // 30 % 2 == 1)[None].repeat(90, 0)
    picture = Image.fromarray(np.repeat(stripes[..., None] * 255, 3, -1).astype(np.uint8))
    for fit in ("crop", "squash"):
        of = Fit.of((90, 210), (48, 64), how=fit)
        shown = np.asarray(of.apply(picture, smooth=True))[..., 0]
        mask = of.masks(stripes[None])[0]
        sure = (shown < 5) | (shown > 250)
        assert sure.mean() > 0.5
        assert (mask[sure] == (shown[sure] > 128)).all()


def test_a_long_caption_is_cut_at_sentences() -> None:
    assert first_sentences("One. Two! Three? Four", 2) == "One. Two!"
    assert first_sentences("no full stop", 2) == "no full stop"
    assert first_sentences("a b. c", None) == "a b. c"


def test_masks_of_a_caption_are_those_whose_names_it_says() -> None:
    """In any spelling, as the words of prompts are found; a name within a longer one is not said."""
    names = ("bear", "teddy bear", "café", "猫", "cat")
    masks = np.zeros((5, 2, 2), bool)
    masks[:, 0, 0] = True

    def kept(caption: str) -> tuple[str, ...]:
        sample = Sample("a", np.zeros((2, 2, 3), np.uint8), caption, masks, names)
        return PictureData(Dataset("own", [], [sample]), prompt="caption")[0].names

    assert kept("A teddy bear, a cafe\u0301.") == ("teddy bear", "café")
    assert kept("the bear of a Teddy-bear, catfish") == ("bear",)
    assert kept("一只猫, teddy bear and bears") == ("teddy bear", "猫")


def pictures(count: int = 3) -> dict[str, Any]:
    def draw(k: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(k).integers(0, 255, (40, 30, 3), np.uint8))

    return {f"{k}.png": lambda k=k: draw(k) for k in range(count)}


def test_captions_are_written_once_and_kept(tmp_path: Path) -> None:
    captioner = Captioner.load(str(blip.save(tmp_path / "blip", "caption")))
    file, steps = tmp_path / "deep" / "captions.json", []
    found = cached(pictures(2), file, captioner, batch=1, advance=lambda: steps.append(1))
    assert len(steps) == 2
    assert found == {key: captioner([show()])[0] for key, show in pictures(2).items()}
    assert set("".join(found.values())) <= set("".join(blip.WORDS) + " ")
    assert any(found.values())
    calls: list[str] = []

    def once_more() -> Captioner:
        calls.append("loaded")
        return captioner

    assert cached(pictures(2), file, once_more) == found
    assert calls == []  # all there: the model is not even loaded
    assert cached(pictures(3), file, once_more).keys() == pictures(3).keys()
    assert calls == ["loaded"]
    told = json.loads(file.read_text())
    assert told["model"] == str(tmp_path / "blip")


def test_captions_of_another_model_are_not_mixed_in(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"model": "other", "instruction": "", "captions": {"0.png": "a cat"}}))
    assert cached(pictures(1), file, None) == {"0.png": "a cat"}
    with pytest.raises(UserError, match=r"no caption of '1.png' \(2 missing\); name a captioning model"):
        cached(pictures(3), file, None)
    with pytest.raises(UserError, match="holds captions of 'other'"):
        cached(pictures(3), file, Captioner.load(str(blip.save(tmp_path / "blip", "caption"))))
    file.write_text("[]")
    with pytest.raises(UserError, match="is no caption file"):
        cached(pictures(1), file, None)
    with pytest.raises(UserError, match="no captioning model 'nowhere'"):
        Captioner.load("nowhere")


def test_questions_of_different_lengths_are_asked_together() -> None:
    """Wider pictures have more tokens; a decoder repeats what it was told before it answers."""

    class Chatty:
        chat_template = "of the model"

        def apply_chat_template(self, talks: Any, *, padding: bool = False, **_: Any) -> BatchFeature:
            ids = [[7] * talk[0]["content"][0]["image"].width for talk in talks]
            assert talks[0][0]["content"][1]["text"] == "What is it?"
            longest = max(map(len, ids))
            ids = [[0] * (longest - len(row)) + row for row in ids] if padding else ids
            return BatchFeature({"input_ids": torch.tensor(ids)})

        def batch_decode(self, written: torch.Tensor, **_: Any) -> list[str]:
            return [" ".join(map(str, row)) for row in written.tolist()]

    class Echo:
        device, dtype = torch.device("cpu"), torch.float32

        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.cat([input_ids, (input_ids != 0).sum(1, keepdim=True)], 1)

    images = [Image.new("RGB", (width, 4)) for width in (2, 5)]
    assert Captioner("chat", Echo(), Chatty(), "What is it?")(images) == ["2", "5"]


def train(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["train-magnet", *arguments, "--train-steps", "1", "--batch", "1", "--rank", "2", "--layers", "1", "-q"])
    return int(stopped.value.code or 0)


def test_coco_and_sa1b_train_from_the_command_line(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root, pieces, model = coco(tmp_path / "coco"), sa1b(tmp_path / "sa"), str(tiny_directory)
    assert train("--dataset", f"coco-panoptic:{root}", "--model", model, "--out", "a") == 0, capfd.readouterr().err
    request = json.loads(Path("a/run.json").read_text(encoding="utf-8"))["request"]
    assert (request["data"]["kind"], request["data"]["prompt"], request["alignment"]) == ("panoptic", "list", "token")
    blip.save(tmp_path / "blip", "caption")
    captioned = ["--dataset", f"sa1b:{pieces}", "--masks", "part", "--captions", "c.json", "--caption-model", "blip"]
    assert train(*captioned, "--model", model, "--out", "b") == 0, capfd.readouterr().err
    assert json.loads(Path("b/run.json").read_text(encoding="utf-8"))["request"]["data"]["captions"]
    assert list(json.loads(Path("c.json").read_text(encoding="utf-8"))["captions"]) == ["sa_5"]
    capfd.readouterr()
    for arguments, words in (
        (["--dataset", f"sa1b:{pieces}"], "token-level alignment needs named masks"),
        (["--dataset", f"coc-stuff:{root}"], "did you mean 'coco-stuff'"),
        ([*captioned[:4], "--caption-model", "blip"], "Give --captions FILE.json"),
    ):
        assert train(*arguments, "--model", model, "--out", "c") == 2
        assert words in capfd.readouterr().err
    assert not Path("c").exists()


def test_a_folder_takes_captions_of_a_model(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    data = training_data(str(tmp_path), size=SIZE)
    assert data[0].prompt == ""
    assert replace(data, captions={"x.png": "a red ring"})[0].prompt == "a red ring"
    assert data.describe()["captions"] is None
