"""The generic data set: a folder of pictures, a folder of label PNGs, a list of classes.

    mine/
        classes.txt        one class per line in the order of the ids, synonyms by semicolon
        images/a.jpg       any picture format
        labels/a.png       class ids in one channel, 255 is not scored

    mmdit-probe evaluate --dataset folder:mine

A line "background" in classes.txt marks the class that is found by a background rule and not named in prompts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mmdit_probe.data.images import SUFFIXES
from mmdit_probe.errors import UserError
from mmdit_probe.evaluate.datasets.base import Sample, SegDataset, mapped, reader
from mmdit_probe.evaluate.scores import IGNORE
from mmdit_probe.segment.picture import read_picture
from mmdit_probe.segment.vocabulary import parse_classes


@reader("folder")
def folder(root: Path) -> SegDataset:
    """See the module.

    Raises:
        UserError: a part of the layout is missing, or classes.txt names more than 255 classes.
    """
    for part in ("classes.txt", "images", "labels"):
        if not (root / part).exists():
            raise UserError(f"{str(root)!r} has no {part}; a generic data set is classes.txt, images/ and labels/")
    classes = parse_classes(root / "classes.txt")
    if len(classes) > IGNORE:
        raise UserError(f"{str(root / 'classes.txt')!r} names {len(classes)} classes; label PNGs hold at most {IGNORE}")
    names = [one.name for one in classes]
    samples, lost = [], 0
    for path in sorted(p for p in (root / "images").iterdir() if p.suffix.lower() in SUFFIXES):
        label = root / "labels" / f"{path.stem}.png"
        if not label.is_file():
            lost += 1
            continue
        samples.append(Sample(path.stem, partial(read_picture, path), mapped(label, lambda raw: raw, len(classes))))
    note = f"{lost} pictures without a label were left out" if lost else ""
    background = names.index("background") if "background" in names else None
    return SegDataset(f"folder:{root.name}", classes, samples, background, note)
