"""Training data of public form: COCO with class masks and captions, SA-1B with masks without names.

    data = CocoData(Path("coco"), (1024, 1024), kind="stuff", prompt="list")       # what the paper trains on
    data = Sa1bData(Path("sa_000020"), (1024, 1024), sentences=2, captions=cached(...))

COCO: pictures in `train2017/` or `images/train2017/`, JSON in `annotations/`: `instances_*` (polygons and run-length
masks of things), `stuff_*` (run-length masks of stuff), `panoptic_*` (both; with its PNG folder of the same name beside
the JSON or the pictures), and `captions_*`, of which the first caption of a picture is taken. Masks of one class are
united; a class is called by its name up to the first "-", as the paper does ("wall-brick": wall).
SA-1B: see `evaluate.datasets.sa1b`; a caption is the text file beside the picture, or made by a model (`captions`).

Polygons are filled by PIL: pixels on an edge may differ from pycocotools' by one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.evaluate.datasets.sa1b import decode_rle, sa1b_masks, sa1b_pairs
from mmdit_probe.magnet.pictures import PictureData, read
from mmdit_probe.magnet.sample import MAX_MASKS, MIN_AREA, stack

KINDS = ("instances", "stuff", "panoptic")


@dataclass(frozen=True)
class CocoData(PictureData):
    """COCO: class masks from one of its annotation files. See the module.

    Attributes:
        kind: "instances", "stuff" or "panoptic". split: e.g. "train2017".
    """

    kind: Literal["instances", "stuff", "panoptic"] = "stuff"
    split: str = "train2017"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("COCO annotations", self.kind, KINDS)
        super().__post_init__()

    @property
    def named(self) -> bool:
        return True

    def keys(self) -> list[str]:
        return _coco(self.root, self.split, self.kind).files[: self.limit]

    def file(self, index: int) -> Path:
        return _coco(self.root, self.split, self.kind).pictures / self.keys()[index]

    def truth(self, index: int, size: tuple[int, int]) -> tuple[NDArray[np.bool_], list[str]]:
        return _coco(self.root, self.split, self.kind).masks(self.keys()[index], size)

    def caption(self, index: int) -> str:
        return _coco_captions(self.root, self.split).get(self.keys()[index], "")

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"kind": self.kind, "split": self.split}


@dataclass(frozen=True)
class Sa1bData(PictureData):
    """SA-1B: at most 32 masks of at least half a percent per picture, without names (head-level alignment)."""

    @property
    def named(self) -> bool:
        return False

    def keys(self) -> list[str]:
        return [name for name, _, _ in _sa1b(self.root)[: self.limit]]

    def file(self, index: int) -> Path:
        return _sa1b(self.root)[index][1]

    def truth(self, index: int, size: tuple[int, int]) -> tuple[NDArray[np.bool_], list[str]]:
        return sa1b_masks(_sa1b(self.root)[index][2], limit=MAX_MASKS, min_area=MIN_AREA, size=size), []

    def caption(self, index: int) -> str:
        beside = self.file(index).with_suffix(".txt")
        return " ".join(beside.read_text(encoding="utf-8").split()) if beside.is_file() else ""


@dataclass(frozen=True)
class _Coco:
    """One annotation file: pictures that have annotations, their annotations by file name, names of categories."""

    kind: str
    pictures: Path
    painted: Path
    files: list[str]
    annotations: dict[str, Any]
    names: dict[int, str]

    def masks(self, file: str, size: tuple[int, int]) -> tuple[NDArray[np.bool_], list[str]]:
        """Masks [K, H, W] of the classes of a picture, each united over its annotations, and their names."""
        united: dict[str, NDArray[np.bool_]] = {}
        for category, mask in self._pieces(file, size):
            name = self.names.get(category, "other").split("-")[0]
            if name != "other" and mask.shape != size:
                raise UserError(f"COCO mask of {file!r} is {mask.shape}, the picture {size}; they must be equal")
            if name != "other":
                united[name] = united[name] | mask if name in united else mask
        return stack(list(united.values()), size), list(united)

    def _pieces(self, file: str, size: tuple[int, int]) -> list[tuple[int, NDArray[np.bool_]]]:
        if self.kind != "panoptic":
            found = self.annotations[file]
            return [(int(one["category_id"]), _filled(one["segmentation"], size, file)) for one in found]
        entry = self.annotations[file]
        colours = np.asarray(read(self.painted / entry["file_name"])).astype(np.int64)
        ids = colours[..., 0] + 256 * colours[..., 1] + 256**2 * colours[..., 2]
        return [(int(one["category_id"]), ids == int(one["id"])) for one in entry["segments_info"]]


def _filled(segmentation: Any, size: tuple[int, int], file: str) -> NDArray[np.bool_]:
    """A mask from polygons [[x, y, x, y, ...], ...] or a run-length mask."""
    from PIL import Image, ImageDraw

    try:
        if isinstance(segmentation, dict):
            return decode_rle(segmentation)
        canvas = Image.new("L", (size[1], size[0]))
        for polygon in segmentation:
            ImageDraw.Draw(canvas).polygon([(x, y) for x, y in zip(*[iter(polygon)] * 2, strict=True)], fill=1)
        return np.asarray(canvas).astype(bool)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"a COCO mask of {file!r} is damaged: {error}") from error


@lru_cache(maxsize=4)
def _coco(root: Path, split: str, kind: str) -> _Coco:
    content = _json(root / "annotations" / f"{kind}_{split}.json", f"COCO's {kind} annotations of {split}")
    places = (root / split, root / "images" / split)
    pictures = next((place for place in places if place.is_dir()), None)
    if pictures is None:
        raise UserError(f"{str(root)!r} has no pictures of {split}; expected {split}/ or images/{split}/")
    painted = next(
        (p for p in (root / "annotations" / f"panoptic_{split}", root / f"panoptic_{split}") if p.is_dir()), root
    )
    try:
        of_id = {int(one["id"]): str(one["file_name"]) for one in content["images"]}
        names = {int(one["id"]): str(one["name"]) for one in content["categories"]}
        annotations: dict[str, Any] = {}
        if kind == "panoptic":
            annotations = {of_id[int(one["image_id"])]: one for one in content["annotations"]}
        else:
            grouped = defaultdict(list)
            for one in content["annotations"]:
                grouped[of_id[int(one["image_id"])]].append(one)
            annotations = dict(grouped)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{kind}_{split}.json is no COCO annotation file ({error!r})") from error
    files = sorted(name for name in annotations if (pictures / name).is_file())
    if not files:
        raise UserError(
            f"none of the {len(annotations)} annotated pictures of {kind}_{split}.json is in {str(pictures)!r}"
        )
    return _Coco(kind, pictures, painted, files, annotations, names)


@lru_cache(maxsize=4)
def _coco_captions(root: Path, split: str) -> dict[str, str]:
    """The first caption of each picture by file name; {} without a caption file."""
    path = root / "annotations" / f"captions_{split}.json"
    if not path.is_file():
        return {}
    content = _json(path, "COCO's captions")
    of_id = {int(one["id"]): str(one["file_name"]) for one in content["images"]}
    found: dict[str, str] = {}
    for one in sorted(content["annotations"], key=lambda a: int(a["id"])):
        found.setdefault(of_id[int(one["image_id"])], " ".join(str(one["caption"]).split()))
    return found


@lru_cache(maxsize=4)
def _sa1b(root: Path) -> list[tuple[str, Path, Path]]:
    if not root.is_dir():
        raise UserError(f"no folder {str(root)!r}; expected SA-1B pictures with their JSON files")
    return sa1b_pairs(root)[0]


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no {str(path)!r}: expected {what}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read as JSON: {error}") from error
