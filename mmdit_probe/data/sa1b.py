"""SA-1B: pictures with masks that have no names, one JSON of run-length masks per picture.

    masks = sa1b_masks(Path("sa_000020/sa_223750.json"))        # boolean [K, H, W], largest first
    mmdit-probe evaluate --dataset sa1b:ROOT --method diffcut,diffseg

Layouts, below the root or any sub-folders: `sa_1.jpg` and `sa_1.json` side by side (as the archives unpack), or in
`images/` and `annotations/` (as Seg4Diff's code expects). For evaluation masks are painted from the largest to the
smallest, and pixels of no mask are not scored; class k of a picture is its k-th largest mask and means nothing in
another one (`Dataset.agnostic`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.labels import Ids
from mmdit_probe.data.masks import MAX_MASKS, Masks, Regions, decode_rle, fitted, in_order, largest, paint
from mmdit_probe.data.picture import below, by_name, open_picture, picture_size
from mmdit_probe.data.sample import Dataset, Sample
from mmdit_probe.data.text import caption_beside, read_json
from mmdit_probe.errors import MISSHAPEN, UserError, counted

SCORED_MASKS = 64
"""Masks per picture that are scored, the largest ones of at least `MIN_AREA`; head-level training takes `MAX_MASKS`."""
SUFFIXES = (".jpg", ".jpeg", ".png")


def sa1b_pairs(root: Path) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """(name, picture, JSON) of every annotated picture below a root, by name, and the names that lack one of the two.

    Raises:
        UserError: no JSON file is there, or two pictures have one name.
    """
    split = (root / "images").is_dir() and (root / "annotations").is_dir()
    of_pictures, of_masks = (root / "images", root / "annotations") if split else (root, root)
    annotations = _files(of_masks, (".json",))
    if not annotations:
        raise UserError(
            f"{str(root)!r} has no SA-1B annotations; expected sa_*.jpg and sa_*.json side by side, or in images/ and "
            "annotations/"
        )
    pictures = _files(of_pictures, SUFFIXES)
    pairs = [(name, pictures[name], annotations[name]) for name in sorted(pictures.keys() & annotations.keys())]
    return pairs, sorted(pictures.keys() ^ annotations.keys())


def _files(root: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files sa_* below a root by their path without the suffix."""
    there = (path for path in below(root) if path.name.startswith("sa_"))
    files = sorted(path for path in there if path.suffix.lower() in suffixes)
    return by_name(files, root, lambda path: path.relative_to(root).with_suffix("").as_posix())


def sa1b_masks(path: Path, *, limit: int = SCORED_MASKS, size: tuple[int, int] | None = None) -> Masks:
    """Masks of one JSON file, boolean [K, H, W], largest first.

    Args:
        path: the file. limit: at most so many.
        size: (height, width) of the picture if it was stored smaller than its masks; masks are brought to it (nearest).

    Raises:
        UserError: the file cannot be read or a mask in it is damaged; the message names it.
    """
    content = read_json(path, "an SA-1B annotation")
    try:
        masks = in_order([decode_rle(one["segmentation"]) for one in content["annotations"]])
    except MISSHAPEN as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{str(path)!r} is no SA-1B annotation with run-length masks ({reason})") from error
    if len({mask.shape for mask in masks}) > 1:
        raise UserError(f"{str(path)!r} holds masks of different sizes")
    kept = largest(masks, size or (1, 1), limit=limit)
    return kept if size is None else fitted(kept, size, repr(str(path)))


def sa1b(root: Path) -> Dataset:
    """See the module; pictures stored at half size, as advised for training, are read with masks brought to them."""
    pairs, lost = sa1b_pairs(root)
    samples = [
        Sample(
            name, partial(open_picture, picture, reduce=False), partial(caption_beside, picture),
            partial(_regions, picture, annotation), label=partial(_label, picture, annotation),
            content=(picture, annotation),
        )
        for name, picture, annotation in pairs
    ]  # fmt: skip
    note = f"picture or annotation is missing of {counted(len(lost), 'image')} (first: {lost[0]})" if lost else ""
    classes = [SegClass((f"mask {rank}",)) for rank in range(1, SCORED_MASKS + 1)]
    return Dataset("sa1b", classes, samples, note=note, agnostic=True)


def _label(picture: Path, annotation: Path) -> Ids:
    return paint(sa1b_masks(annotation, size=picture_size(picture)))


def _regions(picture: Path, annotation: Path) -> Regions:
    return Regions(sa1b_masks(annotation, limit=MAX_MASKS, size=picture_size(picture)))
