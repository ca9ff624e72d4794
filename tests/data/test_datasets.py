"""Every reader on a small folder of its exact layout, label quirks included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdit_probe.cli.app import main
from mmdit_probe.data import dataset
from mmdit_probe.data.check import check
from mmdit_probe.data.masks import decode_rle
from mmdit_probe.data.public import COARSE, SETS, THINGS
from mmdit_probe.data.sa1b import sa1b_masks, sa1b_pairs
from mmdit_probe.data.sources import DATASETS
from mmdit_probe.errors import UserError

BY_NAME = {one.name: one for one in SETS}


def picture(path: Path, size: tuple[int, int] = (4, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)


def labels(path: Path, values: list[int], size: tuple[int, int] = (4, 6)) -> None:
    """A label PNG whose first row starts with these values; the rest repeats the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full(size, values[-1], np.uint8)
    array.flat[: len(values)] = values
    image = Image.fromarray(array, mode="P")
    image.putpalette([i for _ in range(256) for i in (10, 20, 30)])
    image.save(path)


def listing(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n", encoding="utf-8")


CASES = [
    # name, image, label, list, stored values, ids read
    ("voc20", "JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/val.txt",
     [0, 1, 20, 255], [255, 0, 19, 255]),
    ("voc20", "JPEGImages/a.jpg", "annotations_detectron2/val/a.png", None,
     [0, 19, 255], [0, 19, 255]),
    ("voc21", "JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/val.txt",
     [0, 1, 20, 255], [0, 1, 20, 255]),
    ("voc21", "JPEGImages/a.jpg", "annotations_detectron2_bg/val/a.png", None,
     [20, 0, 19, 255], [0, 1, 20, 255]),
    ("pc59", "JPEGImages/a.jpg", "SegmentationClassContext/a.png", "ImageSets/SegmentationContext/val.txt",
     [0, 1, 59, 255, 2], [255, 0, 58, 255, 1]),
    ("pc59", "JPEGImages/a.jpg", "annotations_detectron2/pc59_val/a.png", None,
     [0, 58, 255], [0, 58, 255]),
    ("pc60", "JPEGImages/a.jpg", "SegmentationClassContext/a.png", "ImageSets/SegmentationContext/val.txt",
     [0, 1, 59], [0, 1, 59]),
    ("pc60", "JPEGImages/a.jpg", "annotations_detectron2_bg/pc59_val/a.png", None,
     [59, 0, 58], [0, 1, 59]),
    ("coco-object", "images/val2017/a.jpg", "annotations/val2017/a_instanceTrainIds.png", None,
     [0, 1, 80], [0, 1, 80]),
    ("coco-object", "val2017/a.jpg", "annotations_object/val2017/a.png", None,
     [0, 80], [0, 80]),
    ("coco-object", "images/val2017/a.jpg", "stuffthingmaps/val2017/a.png", None,
     [0, 12, 89, 95, 255], [1, 12, 80, 0, 0]),
    ("coco-object-words", "images/val2017/a.jpg", "stuffthingmaps/val2017/a.png", None,
     [0, 12, 89, 95, 255], [1, 12, 80, 0, 0]),
    ("coco-stuff-27", "val2017/a.jpg", "annotations_27_detectron2/val2017/a.png", None,
     [0, 26, 255], [0, 26, 255]),
    ("coco-stuff-27", "images/val2017/a.jpg", "stuffthingmaps/val2017/a.png", None,
     [0, 71, 105, 178, 255], [9, 0, 23, 26, 255]),
    ("ade20k", "images/validation/a.jpg", "annotations/validation/a.png", None,
     [0, 1, 150], [255, 0, 149]),
    ("ade20k", "images/validation/a.jpg", "annotations_detectron2/validation/a.png", None,
     [255, 0, 149], [255, 0, 149]),
    ("cityscapes", "leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelTrainIds.png", None,
     [0, 18, 255], [0, 18, 255]),
    ("cityscapes", "leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png", None,
     [*range(24)], [*[255] * 7, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10]),
    ("cityscapes", "leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png", None,
     [*range(24, 34)], [11, 12, 13, 14, 15, 255, 255, 16, 17, 18]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "image", "label", "listed", "stored", "want"), CASES)
def test_layout(
    tmp_path: Path, name: str, image: str, label: str, listed: str | None, stored: list[int], want: list[int]
) -> None:
    picture(tmp_path / image)
    labels(tmp_path / label, stored)
    if listed:
        listing(tmp_path / listed, ["a", "gone"])
    data = dataset(f"{name}:{tmp_path}")
    assert len(data.samples) == 1 and f"usual split has {BY_NAME[name].expected}" in data.note
    assert ("gone" in data.note) == bool(listed)
    read = np.asarray(data.samples[0].label())
    assert read.flat[: len(want)].tolist() == want
    assert data.samples[0].image.shape == (4, 6, 3)
    # what no class claims is background, or, with its name in the prompt, scored nowhere
    assert data.background == (0 if name in ("voc21", "pc60", "coco-object") else None)
    assert data.ignore == ((0,) if name == "coco-object-words" else ())
    assert (data.classes[0].name == "background") == BY_NAME[name].background


@pytest.mark.parametrize(
    ("case", "value"), [(CASES[0], 21), (CASES[1], 20), (CASES[4], 60), (CASES[10], 182), (CASES[13], 182),
                        (CASES[14], 151), (CASES[17], 34)],
)  # fmt: skip
def test_an_id_that_no_label_of_the_set_has_is_refused(tmp_path: Path, case: tuple, value: int) -> None:
    """Labels of the 459 classes of Pascal Context passed for those of its 59: what was beyond was not scored."""
    picture(tmp_path / case[1])
    labels(tmp_path / case[2], [0, value])
    with pytest.raises(UserError, match=rf"holds ids \[{value}\]; expected 0\.\."):
        dataset(f"{case[0]}:{tmp_path}").samples[0].label()


def test_files_of_one_name_are_refused_and_a_name_is_listed_once(tmp_path: Path) -> None:
    """Which of a.jpg and a.JPG was scored was the disk's choice."""
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "JPEGImages" / name)
        labels(tmp_path / "SegmentationClass" / f"{name[0]}.png", [1])
    listing(tmp_path / "ImageSets/Segmentation/val.txt", ["b", "a", "b"])
    assert [one.name for one in dataset(f"voc20:{tmp_path}").samples] == ["b", "a"]
    picture(tmp_path / "JPEGImages/a.JPG")
    with pytest.raises(UserError, match=r"'a\.JPG' and 'a\.jpg'"):
        dataset(f"voc20:{tmp_path}")


def test_an_id_beyond_a_byte_is_no_background(tmp_path: Path) -> None:
    picture(tmp_path / "val2017/a.jpg")
    file = tmp_path / "stuffthingmaps/val2017/a.png"
    file.parent.mkdir(parents=True)
    Image.fromarray(np.full((4, 6), 256, np.uint16)).save(file)
    with pytest.raises(UserError, match="256"):
        dataset(f"coco-object:{tmp_path}").samples[0].label()


def test_roots_above_the_data_set(tmp_path: Path) -> None:
    inner = tmp_path / "VOCdevkit" / "VOC2012"
    picture(inner / "JPEGImages/a.jpg")
    labels(inner / "SegmentationClass/a.png", [1])
    assert len(dataset(f"voc20:{tmp_path}").samples) == 1


def test_linked_folders_are_read_and_links_back_end(tmp_path: Path) -> None:
    """A city, or an archive of SA-1B, that lies on another disk and is linked was left out, in silence."""
    root, other = tmp_path / "root", tmp_path / "other"
    for city, place in (("bonn", root / "leftImg8bit/val"), ("ulm", other)):
        picture(place / city / f"{city}_leftImg8bit.png")
        labels(root / f"gtFine/val/{city}/{city}_gtFine_labelTrainIds.png", [1])
    (root / "leftImg8bit/val/ulm").symlink_to(other / "ulm")
    (other / "ulm/back").symlink_to(root / "leftImg8bit/val")
    assert [one.name for one in dataset(f"cityscapes:{root}").samples] == ["bonn/bonn", "ulm/ulm"]
    for archive in (root, other):
        sa1b_picture(archive / "sa", f"sa_{archive.name}", [{"segmentation": RLE}], (40, 60), False)
    (root / "sa_000020").symlink_to(other / "sa")
    assert [one.name for one in dataset(f"sa1b:{root}").samples] == ["sa/sa_root", "sa_000020/sa_other"]


COARSE_LETTERS = "abcdefghijklmnopqrstuvwxyzA"
STEGOS_COARSE = (
    "jlllllllliiiiiihhhhhhhhhhggggggggkkkkkkkkkkffffffffccccccccccddddddddddaaaaaabbbbbbeeeeeeeerrwuuwpzqnmmrrxpprpv"
    "pznnnnnwAoopwvvyuwprqpwyvrzqvrwqvvzvAvyurovApxuvypywzpurrwosssssssAAtty"
)
"""The coarse class of COCO-Stuff's stored values 0..181, a letter each: `fine_to_coarse` of STEGO's data.py."""


def test_class_lists_and_coarse_map() -> None:
    counts = {source.name: len(source.names) for source in SETS}
    assert counts == {"voc20": 20, "voc21": 21, "pc59": 59, "pc60": 60, "coco-object": 81,
                      "coco-object-words": 81, "coco-stuff-27": 27,
                      "ade20k": 150, "cityscapes": 19}  # fmt: skip
    assert "".join(COARSE_LETTERS[COARSE[value]] for value in range(182)) == STEGOS_COARSE
    assert len(COARSE) == 182 and len(THINGS) == 80 and set(THINGS) <= set(range(90))


def test_layout_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no layout of voc20: expected JPEGImages \+ SegmentationClass/\*\.png; or "):
        dataset(f"voc20:{tmp_path}")
    with pytest.raises(UserError, match=r"_labelTrainIds\.png; or leftImg8bit/val .*_labelIds"):  # not twice the same
        dataset(f"cityscapes:{tmp_path}")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "classes.txt").write_text("ring\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match="called alike, and lie where `mmdit-probe datasets list` says"):
        dataset(f"folder:{tmp_path}")
    with pytest.raises(UserError, match="did you mean 'voc20'"):
        dataset(f"vocc20:{tmp_path}")
    with pytest.raises(UserError, match="needs its folder"):
        dataset("voc20")
    with pytest.raises(UserError, match="did you mean 'val'"):
        dataset("scenes:vall")


@pytest.mark.parametrize("name", ["background", "Background"])
def test_the_background_of_ones_own_classes_is_known_in_any_case(tmp_path: Path, name: str) -> None:
    """Written "Background" it was a word of the prompts, and no rule found it."""
    listing(tmp_path / "classes.txt", ["cat", name])
    picture(tmp_path / "images/a.png")
    labels(tmp_path / "labels/a.png", [0, 1])
    assert dataset(str(tmp_path)).background == 1
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "labels/b.tif")  # its picture had no label, in silence
    with pytest.raises(UserError, match=r"holds 'b\.tif'; labels are PNGs"):
        dataset(str(tmp_path))


def test_check_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    listing(root / "classes.txt", ["cat", "dog"])
    for name in "abcd":
        picture(root / f"images/{name}.png")
    labels(root / "labels/a.png", [0, 1])
    labels(root / "labels/b.png", [7])
    labels(root / "labels/c.png", [0], (3, 3))
    labels(root / "labels/d.png", [255])
    (root / "images/e.png").write_text("no picture")
    labels(root / "labels/e.png", [0])
    Image.fromarray(np.full((4, 6, 4), 90, np.uint8)).save(root / "images/a.png")
    for name in "fg":
        labels(root / f"labels/{name}.png", [0])
    picture(root / "images/f.png")
    (root / "images/f.txt").write_bytes(b"caf\xe9")
    report = check(dataset(f"folder:{root}"))
    assert "1 label is of no picture (first: g.png)" in dataset(f"folder:{root}").note
    assert report.notes == [("a", "transparency was laid on white")]
    found = dict(report.problems)
    assert "ids [7]" in found["b"] and "differ in size" in found["c"] and "ignored" in found["d"]
    assert "cannot be read" in found["e"] and "not UTF-8" in found["f"] and "a" not in found
    with pytest.raises(SystemExit) as stop:
        main(["datasets", "check", f"folder:{root}", "--json"])
    assert stop.value.code == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 5


def test_the_list_names_every_data_set_and_its_folders_on_80_columns(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main(["datasets", "list"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and all(f" {name} " in told for name in DATASETS)
    assert all(layout.labels + "/*" + layout.suffix in told for source in SETS for layout in source.layouts)


def test_prepared_labels_read_back_as_their_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "val2017/a.jpg")
    labels(tmp_path / "stuffthingmaps/val2017/a.png", [0, 12, 89, 105, 255])
    for kind, folder in (("coco-object", "annotations_object"), ("coco-stuff-27", "annotations_27_detectron2")):
        before = np.asarray(dataset(f"{kind}:{tmp_path}").samples[0].label())
        with pytest.raises(SystemExit) as stop:
            main(["datasets", "prepare", kind, str(tmp_path), str(tmp_path / folder / "val2017")])
        assert stop.value.code == 0
        after = dataset(f"{kind}:{tmp_path}")
        assert np.array_equal(np.asarray(after.samples[0].label()), before)
    with pytest.raises(SystemExit) as stop:
        main(["datasets", "prepare", "pc60-last", str(tmp_path), str(tmp_path / "out")])
    assert stop.value.code == 2
    labels(tmp_path / "SegmentationClassContext/a.png", [0, 1, 2, 59])
    with pytest.raises(SystemExit) as stop:
        main(["datasets", "prepare", "pc60-last", str(tmp_path), str(tmp_path / "out")])
    assert stop.value.code == 0
    last = np.asarray(Image.open(tmp_path / "out/a.png"))  # the background behind the classes
    assert last.flat[:4].tolist() == [59, 0, 1, 58]
    capsys.readouterr()


RLE = {"size": [40, 60], "counts": "b6d0d000^O^O>b0B^O>b04000000000000000000000000000000VZ1]O]fN"}
"""A disc-like mask as pycocotools 2.0 encodes it: rows 10..29 of columns 5..24, a hole and a far pixel."""


def rle_mask() -> np.ndarray:
    mask = np.zeros((40, 60), bool)
    mask[10:30, 5:25] = True
    mask[12:14, 7:9] = False
    mask[0, 59] = True
    return mask


def sa1b_picture(root: Path, name: str, annotations: list[dict], size: tuple[int, int], split: bool) -> None:
    places = (root / "images/sa_000020", root / "annotations/sa_000020") if split else (root, root)
    picture(places[0] / f"{name}.jpg", size)
    places[1].mkdir(parents=True, exist_ok=True)
    (places[1] / f"{name}.json").write_text(json.dumps({"image": {}, "annotations": annotations}))


def test_run_lengths_read_as_the_reference_writes_them() -> None:
    assert np.array_equal(decode_rle(RLE), rle_mask())
    assert np.array_equal(decode_rle({"size": [2, 3], "counts": [1, 3, 2]}), np.array([[0, 1, 0], [1, 1, 0]], bool))
    for broken in ({"size": [2, 3], "counts": [1, 3]}, {**RLE, "counts": "b6\x7f"}, {**RLE, "counts": "b6n"}):
        with pytest.raises(ValueError):
            decode_rle(broken)


@pytest.mark.parametrize("split", [False, True])
def test_sa1b_paints_parts_on_wholes(tmp_path: Path, split: bool, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {"size": [40, 60], "counts": [0, 40 * 60]}
    tiny = {"size": [40, 60], "counts": [0, 5, 40 * 60 - 5]}
    sa1b_picture(tmp_path, "sa_2", [{"segmentation": one} for one in (RLE, tiny, whole)], (40, 60), split)
    sa1b_picture(tmp_path, "sa_3", [{"segmentation": RLE}], (20, 30), split)  # stored at half size
    sa1b_picture(tmp_path, "sa_4", [{"segmentation": RLE}], (40, 30), split)  # another picture
    data = dataset(f"sa1b:{tmp_path}")
    assert data.agnostic and [Path(one.name).name for one in data.samples] == ["sa_2", "sa_3", "sa_4"]
    assert np.array_equal(data.samples[0].label(), rle_mask().astype(int))  # the tiny mask is left out
    half = data.samples[1].label()
    assert half.shape == (20, 30) and half[10, 5] == 0 and half[0, 0] == 255
    found = check(data)
    assert [name for name, _ in found.problems] == [data.samples[2].name]
    assert "not of one picture" in found.problems[0][1]
    assert found.per_image == 1.5  # the picture of the damaged pair is not counted
    with pytest.raises(SystemExit) as stop:
        main(["datasets", "check", f"sa1b:{tmp_path}"])
    assert stop.value.code == 1 and "masks per image" in capsys.readouterr().out
    pairs, lost = sa1b_pairs(tmp_path)
    assert len(pairs) == 3 and not lost and sa1b_masks(pairs[0][2], limit=1).all()
    sizes = [{"segmentation": {"size": size, "counts": [0, size[0] * size[1]]}} for size in ([40, 60], [20, 30])]
    pairs[1][2].write_text(json.dumps({"annotations": sizes}))
    with pytest.raises(UserError, match="masks of different sizes"):
        sa1b_masks(pairs[1][2])
    pairs[1][2].write_text("{}")
    with pytest.raises(UserError, match="no SA-1B annotation"):
        sa1b_masks(pairs[1][2])


def test_names_print_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["[red]cat", "$x_$ / <b>", "[/]", "café, 🐈"]
    (tmp_path / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    picture(tmp_path / "images/[bold]a.png")
    labels(tmp_path / "labels/[bold]a.png", [0, 1, 2, 3, 9])
    with pytest.raises(SystemExit):
        main(["datasets", "check", f"folder:{tmp_path}"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*names, "[bold]a: label"))
