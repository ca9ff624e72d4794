"""Folders of one's own pictures, in two layouts.

    mine/                                        pictures/
        classes.txt    one class per line,           a.jpg              any picture format
                       in the order of the ids       a.txt              its caption, optional
        images/a.jpg   any picture format            masks/a.png        one integer per pixel, 0: unlabelled, optional
        labels/a.png   class ids, 255: not scored    masks/classes.json {"1": "cat", ...}, optional

    mmdit-probe evaluate --dataset folder:mine
    mmdit-probe train-magnet --dataset pictures

A line "background", in any case, in classes.txt marks the class that is found by a background rule and not named in
prompts. Masks without classes.json have no names and are for head-level alignment.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np

from mmdit_probe.data.class_names import SegClass, read_classes
from mmdit_probe.data.labels import IGNORE, mapped, read_label_map
from mmdit_probe.data.masks import Regions, stack
from mmdit_probe.data.picture import SUFFIXES, by_name, listed, open_picture, picture_size
from mmdit_probe.data.sample import Dataset, Sample
from mmdit_probe.data.text import caption_beside, once, read_json, stem
from mmdit_probe.errors import MISSHAPEN, UserError, counted


def labelled(root: Path) -> Dataset:
    """The layout with classes.txt.

    Raises:
        UserError: a part of the layout is missing, or classes.txt names more than 255 classes.
    """
    for part in ("classes.txt", "images", "labels"):
        if not (root / part).exists() or (part != "classes.txt" and not (root / part).is_dir()):
            raise UserError(f"{str(root)!r} has no {part}; a generic data set is classes.txt, images/ and labels/")
    classes = read_classes(root / "classes.txt")
    if len(classes) > IGNORE:
        raise UserError(f"{str(root / 'classes.txt')!r} names {len(classes)} classes; label PNGs hold at most {IGNORE}")
    names = [one.name for one in classes]
    labels = _by_stem(root / "labels")
    pictures = listed(root / "images")
    samples = [
        Sample(
            path.stem, partial(open_picture, path, reduce=False), partial(caption_beside, path), names=names,
            label=mapped(labels[stem(path)], lambda ids: ids, len(classes)),
            content=(path, labels[stem(path)], root / "classes.txt"),
        )
        for path in pictures if stem(path) in labels
    ]  # fmt: skip
    lost = len(pictures) - len(samples)
    notes = [f"left out: {counted(lost, 'picture')} without a label"] if lost else []
    if bare := sorted(labels.keys() - {stem(path) for path in pictures}):
        told = counted(len(bare), "label is", "labels are")
        notes.append(f"{told} of no picture (first: {labels[bare[0]].name})")
    background = next((number for number, name in enumerate(names) if name.lower() == "background"), None)
    return Dataset(f"folder:{root.name}", classes, samples, background, "; ".join(notes))


def pictures(root: Path) -> Dataset:
    """The layout of bare pictures, with captions and masks where they are there.

    Raises:
        UserError: no picture, two of one name, a classes.json that cannot be read, or a mask that is no PNG or is of no
            picture: it would be left out, and its picture be one without a mask.
    """
    names = _names(root / "masks" / "classes.json")
    found = listed(root)
    masks = _masks(root / "masks", {stem(path) for path in found}) if (root / "masks").is_dir() else {}
    known = dict.fromkeys(names.values())
    samples = [picture(path, masks.get(stem(path)), names) for path in found]
    return Dataset(str(root), [SegClass((name,)) for name in known], samples, agnostic=not names)


def picture(path: Path, mask: Path | None = None, names: dict[int, str] | None = None) -> Sample:
    """One picture file with the caption beside it, and its mask file if there is one."""
    caption, regions = partial(caption_beside, path), None
    if mask is not None:
        regions = partial(_regions, path, mask, names or {})
    content = [path, *([mask] if mask is not None else [])]
    return Sample(path.name, partial(open_picture, path, reduce=mask is None), caption, regions, content=content)


def _masks(folder: Path, pictures: Collection[str]) -> dict[str, Path]:
    """The masks of a folder, each of one of these pictures; errors as in `pictures`."""
    found = _by_stem(folder)
    lost = [path.name for name, path in found.items() if name not in pictures]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"{str(folder)!r} holds {lost[0]!r}{more}, which no picture is called like; a mask has its picture's name:"
            " rename or remove it"
        )
    return found


def _regions(file: Path, mask: Path, names: dict[int, str]) -> Regions:
    ids, (height, width) = read_label_map(mask), picture_size(file)
    if ids.shape != (height, width):
        raise UserError(
            f"{str(file)!r} is {width} x {height} pixels, its mask {ids.shape[1]} x {ids.shape[0]}; they must be equal"
        )
    present = [int(i) for i in np.unique(ids) if i != 0]
    missing = [i for i in present if names and i not in names]
    if missing:
        raise UserError(
            f"mask of {file.name!r} has ids {missing[:8]} that classes.json does not name; it names "
            f"{sorted(names)[:12]}"
        )
    groups: dict[object, list[int]] = {}
    for i in present:
        groups.setdefault(names.get(i, i), []).append(i)
    masks = stack([np.isin(ids, group) for group in groups.values()], ids.shape)
    return Regions(masks, tuple(str(name) for name in groups) if names else ())


def _names(file: Path) -> dict[int, str]:
    """Name of each mask id; {} where the masks have none."""
    if not file.exists():
        return {}
    expected = '{"1": "cat", ...}'
    try:
        names = once("ids", [(int(key), value) for key, value in read_json(file, expected).items()])
        if not all(isinstance(name, str) and name.strip() for name in names.values()):
            raise ValueError("a name is no text")
        return dict(sorted(names.items()))
    except MISSHAPEN as error:
        raise UserError(f"{str(file)!r} cannot be read: {error}; expected {expected}") from error


def _by_stem(folder: Path) -> dict[str, Path]:
    """The PNGs of a folder by the name before the suffix, whose case does not matter.

    Raises:
        UserError: as in `by_name`, or another kind of picture is among them: its ids would be left out.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
    if other := [path.name for path in files if path.suffix.lower() != ".png"]:
        raise UserError(
            f"{str(folder)!r} holds {other[0]!r}; {folder.name} are PNGs, whose pixels are the ids that were saved"
        )
    return by_name(files, folder, stem)
