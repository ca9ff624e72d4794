"""COCO's annotation files: pictures with class masks and captions, to train on and to score.

    data = coco(Path("coco"), "stuff", "train2017")                  # Dataset; what the paper trains on
    mmdit-probe train-magnet --dataset coco-stuff:coco

Pictures in `train2017/` or `images/train2017/`, JSON in `annotations/`: `instances_*`, `stuff_*`, `panoptic_*` (with
its PNG folder beside the JSON or the pictures), and `captions_*`, of which the first of a picture is taken. Masks of
one class are united. COCO-Stuff's classes are called by their name up to the first "-", as in the paper. Polygons hold
the pixels whose centres lie in them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.labels import Ids, read_label_map
from mmdit_probe.data.masks import Masks, Regions, check_size, decode_rle, fitted, paint, stack
from mmdit_probe.data.picture import open_picture, picture_size
from mmdit_probe.data.sample import Dataset, Sample
from mmdit_probe.data.text import once, read_json
from mmdit_probe.errors import MISSHAPEN, UserError, check_known, counted

KINDS = ("instances", "stuff", "panoptic")
FIRST_STUFF = 92
"""Category ids from here on are COCO-Stuff's; things have 1..90."""


def coco(root: Path, kind: str, split: str | None = None) -> Dataset:
    """The annotated pictures of one annotation file. See the module.

    Args:
        kind: one of `KINDS`. split: e.g. "train2017"; None: "val2017" where it is annotated, else "train2017".

    Raises:
        UserError: unknown kind, no annotations or pictures of the split, or a file that is no COCO annotation.
    """
    check_known("COCO annotations", kind, KINDS)
    if split is None:
        split = "val2017" if (root / "annotations" / f"{kind}_val2017.json").exists() else "train2017"
    path = root / "annotations" / f"{kind}_{split}.json"
    content = read_json(path, f"COCO's {kind} annotations of {split}")
    places = (root / split, root / "images" / split)
    pictures = next((place for place in places if place.is_dir()), None)
    if pictures is None:
        raise UserError(f"{str(root)!r} has no pictures of {split}; expected {split}/ or images/{split}/")
    painted = (root / "annotations" / f"panoptic_{split}", root / f"panoptic_{split}")
    try:
        file = _Annotations(kind, next((p for p in painted if p.is_dir()), root), *_parsed(content, kind))
    except MISSHAPEN as error:
        raise UserError(f"{path.name} is no COCO annotation file ({error!r})") from error
    captions = _captions(root / "annotations" / f"captions_{split}.json")
    found = sorted(name for name in file.of_picture if (pictures / name).is_file())
    lost = sorted({*file.of_picture} - {*found})
    if not found:
        raise UserError(f"none of the {len(file.of_picture)} annotated pictures of {path.name} is in {str(pictures)!r}")
    samples = [
        Sample(
            name, partial(open_picture, pictures / name, reduce=False), captions.get(name, ""),
            partial(file.regions, pictures / name, name), file.classes,
            label=partial(file.label, pictures / name, name), content=(pictures / name, path),
        )
        for name in found
    ]  # fmt: skip
    classes = [SegClass((name,)) for name in file.classes]
    known, notes = len(file.of_picture), []
    if lost:
        notes.append(f"not there: {len(lost)} of {counted(known, 'annotated picture')} (first: {lost[0]})")
    if bare := len(content["images"]) - known:
        notes.append(f"left out: {bare} of {counted(known + bare, 'picture')}, without annotation")
    return Dataset(f"coco-{kind}", classes, samples, note="; ".join(notes), facts={"kind": kind, "split": split})


@dataclass(frozen=True)
class _Annotations:
    """One annotation file.

    Attributes:
        kind: of `KINDS`. painted: folder of the panoptic PNGs.
        of_picture: file name -> its annotations. sizes: file name -> (height, width), where the file says it.
        names: category id -> name of its class; None for COCO-Stuff's "other", which is no class.
    """

    kind: str
    painted: Path
    of_picture: dict[str, Any]
    sizes: dict[str, tuple[int, int]]
    names: dict[int, str | None]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their first category id."""
        return tuple(dict.fromkeys(name for _, name in sorted(self.names.items()) if name is not None))

    def regions(self, picture: Path, name: str) -> Regions:
        """Masks of the classes of a picture at the size of its file, each united over its annotations."""
        size = picture_size(picture)
        united: dict[str, Masks] = {}
        for category, mask in self._pieces(name, size):
            if category not in self.names:
                raise UserError(f"a COCO mask of {name!r} has category {category}, which the file does not name")
            called = self.names[category]
            if called is not None:
                united[called] = united[called] | mask if called in united else mask
        there = [called for called in self.classes if called in united]
        masks = stack([united[called] for called in there], self.sizes.get(name, size))
        return Regions(fitted(masks, size, f"COCO's annotation of {name!r}"), tuple(there))

    def label(self, picture: Path, name: str) -> Ids:
        """Ids of `classes`; where masks overlap, that of the smaller one."""
        found = self.regions(picture, name)
        return paint(found.masks, [self.classes.index(called) for called in found.names])

    def _pieces(self, name: str, stored: tuple[int, int]) -> Iterator[tuple[int, Masks]]:
        """(category, mask) of every annotation, at the size that the JSON says the picture has."""
        size, found = self.sizes.get(name, stored), self.of_picture[name]
        try:
            if self.kind != "panoptic":
                for one in found:
                    yield int(one["category_id"]), _filled(one["segmentation"], size)
                return
            ids = read_label_map(self.painted / found["file_name"], colours=True)
            if ids.shape != size:
                raise ValueError(f"it has {ids.shape[0]} x {ids.shape[1]} pixels, its picture {size[0]} x {size[1]}")
            for one in found["segments_info"]:
                yield int(one["category_id"]), ids == int(one["id"])
        except MISSHAPEN as error:
            raise UserError(f"a COCO mask of {name!r} is damaged: {error}") from error


def _parsed(content: Any, kind: str) -> tuple[dict[str, Any], dict[str, tuple[int, int]], dict[int, str | None]]:
    """Annotations by file name, sizes by file name, class names by category."""
    file_of = _files(content["images"])
    sizes = {
        str(one["file_name"]): check_size((one["height"], one["width"]))
        for one in content["images"] if "height" in one and "width" in one
    }  # fmt: skip
    names = once("categories", [(int(one["id"]), _called(one, kind)) for one in content["categories"]])
    if kind == "panoptic":
        return (
            once("annotated pictures", [(file_of[int(one["image_id"])], one) for one in content["annotations"]]),
            sizes,
            names,
        )
    grouped = defaultdict(list)
    for one in content["annotations"]:
        grouped[file_of[int(one["image_id"])]].append(one)
    return dict(grouped), sizes, names


def _files(images: Any) -> dict[int, str]:
    """File names by the id of their picture.

    Raises:
        ValueError: an id, or a file, that stands twice: annotations of one would be taken for the other's.
    """
    found = once("pictures", [(int(one["id"]), str(one["file_name"])) for one in images])
    once("pictures", [(name, number) for number, name in found.items()])
    return found


def _called(category: Any, kind: str) -> str | None:
    name = category["name"]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"category {category['id']} has the name {name!r}")
    if kind == "instances" or int(category["id"]) < FIRST_STUFF or category.get("isthing") == 1:
        return name
    name = name.split("-")[0]
    return None if name == "other" else name


def _filled(segmentation: Any, size: tuple[int, int]) -> Masks:
    """A mask [height, width] from polygons [[x, y, x, y, ...], ...] or a run-length mask.

    Raises:
        ValueError: of another size, or it leaves the picture: that was stored smaller than it was annotated.
    """
    if isinstance(segmentation, dict):
        mask = decode_rle(segmentation)
        if mask.shape != size:
            raise ValueError(f"it has {mask.shape[0]} x {mask.shape[1]} pixels, its picture {size[0]} x {size[1]}")
        return mask
    mask = np.zeros(size, bool)
    for polygon in segmentation:
        points = np.asarray(polygon, float).reshape(-1, 2)
        beyond = np.maximum(points - [size[1], size[0]], -points)
        if not np.isfinite(points).all() or (beyond > np.maximum(2, 0.01 * np.array([size[1], size[0]]))).any():
            raise ValueError(f"a polygon leaves its picture of {size[0]} x {size[1]} pixels")
        mask |= _inside(points, size)
    return mask


def _inside(points: NDArray[np.float64], size: tuple[int, int]) -> Masks:
    """The pixels [height, width] whose centres lie in a polygon of points [n, 2] (x, y): those with an odd number of
    edges to their left."""
    height, width = size
    (x, y), (to_x, to_y) = points.T, np.roll(points, -1, 0).T
    first, last = np.ceil(np.clip(np.sort([y, to_y], 0), 0, height) - 0.5).astype(int)
    edge = np.repeat(np.arange(len(points)), last - first)  # (n,) one for each row that an edge crosses
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - last, last - first)
    slope = (to_x - x) / np.where(to_y == y, 1.0, to_y - y)
    across = np.clip(x[edge] + (rows + 0.5 - y[edge]) * slope[edge], 0, width)
    places = rows * (width + 1) + np.ceil(across - 0.5).astype(int)
    crossed = np.bincount(places, minlength=height * (width + 1)).reshape(height, width + 1)
    return crossed.cumsum(1)[:, :width] % 2 == 1


def _captions(path: Path) -> dict[str, str]:
    """The first caption of each picture by file name; {} without a caption file."""
    if not path.exists():
        return {}
    content = read_json(path, "COCO's captions")
    found: dict[str, str] = {}
    try:
        file_of = _files(content["images"])
        for one in sorted(content["annotations"], key=lambda a: int(a["id"])):
            found.setdefault(file_of[int(one["image_id"])], " ".join(one["caption"].split()))
    except MISSHAPEN as error:
        raise UserError(f"{path.name} is no COCO caption file ({error!r})") from error
    return found
