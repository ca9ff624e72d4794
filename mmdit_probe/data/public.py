"""Readers of the public data sets, in the folders that mmseg and detectron2 projects use. Each states its label quirks.

    voc20, voc21       VOCdevkit/VOC2012      pc59, pc60       VOCdevkit/VOC2010
    coco-object        81, background 0       coco-stuff-27    coarse classes of DiffSeg and DiffCut
    ade20k             150                    cityscapes       19 (train ids)
    coco-object-words  81; "background" stands in the prompt and competes, its pixels are not scored: what the official
                       code of Seg4Diff scores in its Table 1

The first layout that is there is taken; `datasets check` says which. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmdit_probe.data.class_names import SegClass, class_list
from mmdit_probe.data.labels import IGNORE, IdMapping, mapped
from mmdit_probe.data.picture import below, by_name, open_picture
from mmdit_probe.data.sample import Dataset, Sample
from mmdit_probe.data.text import read_lines
from mmdit_probe.errors import UserError, check_known, counted
from mmdit_probe.results.atomic import make_folder, replacing

ROOTS = ("", "VOCdevkit", "VOC2012", "VOC2010", "VOCdevkit/VOC2012", "VOCdevkit/VOC2010", "coco", "cityscapes",
         "ADEChallengeData2016")  # fmt: skip
"""Where a data set may lie below the root that is given."""


@dataclass(frozen=True)
class FolderLayout:
    """One way a data set lies on disk.

    Attributes:
        name: of the layout. images, labels: folders below the root.
        suffix: of a label file after the image's stem; image_suffix: of the image after that stem.
        mapping: label value -> class id. listing: file of stems below the root, if the split has one.
        nested: pictures lie in sub-folders (Cityscapes: one per city).
    """

    name: str
    images: str
    labels: str
    mapping: IdMapping
    suffix: str = ".png"
    image_suffix: str = ".jpg"
    listing: str | None = None
    nested: bool = False

    @property
    def files(self) -> str:
        """Where it looks, in words: images + label files."""
        return f"{self.images} + {self.labels}/*{self.suffix}"

    def there(self, root: Path) -> bool:
        """Both folders exist and hold at least one label file of this layout."""
        images, labels = root / self.images, root / self.labels
        return images.is_dir() and labels.is_dir() and any(True for _ in self._paths(labels, self.suffix))

    def pairs(self, root: Path) -> tuple[list[tuple[str, Path, Path]], list[str]]:
        """(name, image, label) of every labelled image, and the names of images or labels without the other.

        Raises:
            UserError: two images, or two labels, of one name.
        """
        labels = self._files(root / self.labels, self.suffix)
        images = self._files(root / self.images, self.image_suffix)
        names = sorted(labels)
        if self.listing is not None and (root / self.listing).is_file():
            names = [*dict.fromkeys(line.strip() for line in read_lines(root / self.listing) if line.strip())]
        found = [(name, images[name], labels[name]) for name in names if name in images and name in labels]
        return found, [name for name in names if name not in images or name not in labels]

    def _files(self, folder: Path, suffix: str) -> dict[str, Path]:
        """The files of a folder by their name without the suffix."""
        files = sorted(self._paths(folder, suffix))
        return by_name(files, folder, lambda path: path.relative_to(folder).as_posix()[: -len(suffix)])

    def _paths(self, folder: Path, suffix: str) -> Iterator[Path]:
        """Files that end in a suffix, whose case does not matter."""
        for path in below(folder) if self.nested else folder.iterdir():
            if path.name.lower().endswith(suffix.lower()) and path.name[0] != ".":
                yield path


@dataclass(frozen=True)
class Public:
    """A public data set: its classes, background class and layouts; `expected` images in the usual split.

    Attributes:
        classes: name of the shipped list. background: a class "background" stands before it, with id 0.
        named: the background is named in prompts as other classes are, and not scored.
    """

    name: str
    classes: str
    layouts: tuple[FolderLayout, ...]
    expected: int
    background: bool = False
    named: bool = False

    @property
    def names(self) -> list[SegClass]:
        classes = class_list(self.classes)
        return [SegClass(("background",)), *classes] if self.background else classes

    def find(self, root: Path) -> tuple[Path, FolderLayout]:
        """The folder and layout that are there.

        Raises:
            UserError: none of the layouts is.
        """
        for layout in self.layouts:
            for place in (root / name for name in ROOTS):
                if layout.there(place):
                    return place, layout
        wanted = "; or ".join(layout.files for layout in self.layouts)
        raise UserError(f"{str(root)!r} has no layout of {self.name}: expected {wanted}")

    def read(self, root: Path) -> Dataset:
        """The data set below a root."""
        place, layout = self.find(root)
        pairs, lost = layout.pairs(place)
        classes = self.names
        names = [one.name for one in classes]
        samples = [
            Sample(
                name, partial(open_picture, image, reduce=False), names=names, content=(image, label),
                label=mapped(label, layout.mapping, len(classes)),
            )
            for name, image, label in pairs
        ]  # fmt: skip
        notes = [f"picture or label is missing of {counted(len(lost), 'image')} (first: {lost[0]})"] if lost else []
        if len(samples) != self.expected:
            notes.append(f"{counted(len(samples), 'image')}, the usual split has {self.expected}")
        rule = 0 if self.background and not self.named else None
        return Dataset(
            self.name, classes, samples, rule, "; ".join(notes), ignore=(0,) if self.named else (),
            facts={"layout": layout.name},
        )  # fmt: skip


def _minus_one(classes: int) -> dict[int, int]:
    """1..n -> 0..n-1; 0 ignored (`reduce_zero_label`)."""
    return {0: IGNORE, **{value: value - 1 for value in range(1, classes + 1)}}


def _same(classes: int) -> dict[int, int]:
    return {value: value for value in range(classes)}


def _last_first(classes: int) -> dict[int, int]:
    """Background stored as the last id instead of 0 (PixelCLIP's and Seg4Diff's VOC21)."""
    return {classes - 1: 0, **{value: value + 1 for value in range(classes - 1)}}


def _range(*pairs: tuple[int, int, int]) -> dict[int, int]:
    return {value: coarse for first, last, coarse in pairs for value in range(first, last + 1)}


COARSE: dict[int, int] = {
    **_range((71, 76, 0), (77, 82, 1), (51, 60, 2), (61, 70, 3), (83, 90, 4), (43, 50, 5), (25, 32, 6), (15, 24, 7),
             (9, 14, 8), (0, 0, 9), (33, 42, 10), (1, 8, 11), (170, 176, 18)),
    **{
        value: coarse
        for coarse, values in {
            12: (101, 102), 13: (100, 113, 114, 115, 116, 117), 14: (120, 121, 152, 169),
            15: (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164), 16: (99, 131, 138, 142),
            17: (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167), 19: (179, 180),
            20: (94, 95, 127, 150, 157, 165),
            21: (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
            22: (93, 96, 118, 123, 128, 133, 141, 162, 168), 23: (105, 156),
            24: (126, 134, 149, 159, 161, 181), 25: (98, 112, 137, 145, 163), 26: (119, 147, 154, 177, 178),
        }.items()
        for value in values
    },
}  # fmt: skip
"""Value of stuffthingmaps (0..181) -> coarse class 0..26, as in google/diffseg and PaulCouairon/DiffCut."""

THINGS: tuple[int, ...] = tuple(value for value in range(90) if value not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82))
"""The 80 values of stuffthingmaps that are COCO objects; the gaps are COCO's unused category ids (minus one)."""


def _objects(raw: NDArray[np.int64]) -> NDArray[np.int64]:
    """Things 1..80 in order, everything else background 0, unlabelled pixels too (as in `cvt_coco_object.py`)."""
    table = np.zeros(256, np.int64)
    table[list(THINGS)] = np.arange(1, 81)
    return np.where((raw < len(COARSE)) | (raw == IGNORE), table[raw.clip(0, 255)], raw)


_CITY = dict.fromkeys(range(34), IGNORE) | dict(
    zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(19), strict=True)
)
_VOC_LIST = "ImageSets/Segmentation/val.txt"
_PC_LIST = "ImageSets/SegmentationContext/val.txt"

_OBJECT = (
    FolderLayout("mmseg", "images/val2017", "annotations/val2017", _same(81), suffix="_instanceTrainIds.png"),
    FolderLayout("detectron2", "val2017", "annotations_object/val2017", _same(81)),
    FolderLayout("stuffthingmaps", "images/val2017", "stuffthingmaps/val2017", _objects),
    FolderLayout("stuffthingmaps", "val2017", "stuffthingmaps/val2017", _objects),
)  # fmt: skip

SETS: tuple[Public, ...] = (
    Public("voc20", "voc20", (
        FolderLayout("mmseg", "JPEGImages", "SegmentationClass", _minus_one(20), listing=_VOC_LIST),
        FolderLayout("detectron2", "JPEGImages", "annotations_detectron2/val", _same(20)),
    ), 1449),
    Public("voc21", "voc20", (
        FolderLayout("mmseg", "JPEGImages", "SegmentationClass", _same(21), listing=_VOC_LIST),
        FolderLayout("detectron2", "JPEGImages", "annotations_detectron2_bg/val", _last_first(21)),
    ), 1449, background=True),
    Public("pc59", "pc59", (
        FolderLayout("mmseg", "JPEGImages", "SegmentationClassContext", _minus_one(59), listing=_PC_LIST),
        FolderLayout("detectron2", "JPEGImages", "annotations_detectron2/pc59_val", _same(59)),
    ), 5104),
    Public("pc60", "pc59", (
        FolderLayout("mmseg", "JPEGImages", "SegmentationClassContext", _same(60), listing=_PC_LIST),
        FolderLayout("detectron2", "JPEGImages", "annotations_detectron2_bg/pc59_val", _last_first(60)),
    ), 5104, background=True),
    Public("coco-object", "coco-object", _OBJECT, 5000, background=True),
    Public("coco-object-words", "coco-object", _OBJECT, 5000, background=True, named=True),
    Public("coco-stuff-27", "coco-stuff-27", (
        FolderLayout("detectron2", "val2017", "annotations_27_detectron2/val2017", _same(27)),
        FolderLayout("stuffthingmaps", "images/val2017", "stuffthingmaps/val2017", COARSE),
        FolderLayout("stuffthingmaps", "val2017", "stuffthingmaps/val2017", COARSE),
    ), 5000),
    Public("ade20k", "ade20k", (
        FolderLayout("mmseg", "images/validation", "annotations/validation", _minus_one(150)),
        FolderLayout("detectron2", "images/validation", "annotations_detectron2/validation", _same(150)),
    ), 2000),
    Public("cityscapes", "cityscapes", (
        FolderLayout("labelTrainIds", "leftImg8bit/val", "gtFine/val", _same(19), suffix="_gtFine_labelTrainIds.png",
               image_suffix="_leftImg8bit.png", nested=True),
        FolderLayout("labelIds", "leftImg8bit/val", "gtFine/val", _CITY, suffix="_gtFine_labelIds.png",
               image_suffix="_leftImg8bit.png", nested=True),
    ), 500),
)  # fmt: skip


def prepare(kind: str, root: Path, out: Path) -> int:
    """Write the label PNGs that some projects expect and no script makes.

    Args:
        kind: "coco-object" (81, background 0) or "coco-stuff-27" (27, unlabelled 255), from stuffthingmaps/val2017;
            "pc60-last" (background as id 59, the file detectron2 projects call annotations_detectron2_bg), from
            SegmentationClassContext.
        root: the data set's root. out: folder to write to.

    Returns: number of files. Raises UserError where the source labels are not there.
    """
    sources: dict[str, tuple[str, IdMapping, int]] = {
        "coco-object": ("stuffthingmaps/val2017", _objects, 81),
        "coco-stuff-27": ("stuffthingmaps/val2017", COARSE, 27),
        "pc60-last": ("SegmentationClassContext", _minus_one(59) | {0: 59}, 60),
    }
    check_known("preparation", kind, sources)
    place, mapping, classes = sources[kind]
    places = (root / place, root / "VOCdevkit/VOC2010" / place, root / "coco" / place)
    folder = next((path for path in places if path.is_dir()), None)
    files = sorted(folder.glob("*.png")) if folder is not None else []
    if not files:
        raise UserError(f"{str(root)!r} has no {place} with label PNGs, which {kind} is made from")
    make_folder(out)
    for path in files:
        ids = mapped(path, mapping, classes)()
        with replacing(out / path.name) as temporary:
            Image.fromarray(ids.astype(np.uint8)).save(temporary, "PNG")
    return len(files)
