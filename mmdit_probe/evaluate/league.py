"""The league table of an evaluation: one row per configuration, from the counts on disk.

    table = league(read_table(folder / "counts.parquet"), classes, match="image")

Segments are matched here, so that every variant of matching reads the same counts. Two trivial rows need no run: one
present class everywhere (the most frequent by the data set's pixels), and one segment everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.evaluate.plan import CEILING, KEYS, ONE_CLASS, ONE_SEGMENT, RANDOM, UNSUPERVISED
from mmdit_probe.evaluate.scores import SCORES, ImageCounts, assign

if TYPE_CHECKING:
    import pandas as pd

BASELINES = (CEILING, RANDOM, ONE_CLASS, ONE_SEGMENT)


def league(
    counts: pd.DataFrame, classes: int, *, match: str = "image", background: int | None = None, agnostic: bool = False
) -> pd.DataFrame:
    """Scores of every configuration.

    Args:
        counts: rows of `evaluate.plan.COLUMNS`. classes: C.
        match: one of `evaluate.scores.MATCHES`, background: its background class for segments.
        agnostic: classes are masks of one image each (`Dataset.agnostic`).

    Returns: columns `KEYS` without kind, n (images), the `SCORES` in 0..1 with `miou_low`, `miou_high` (95 % over
    images), `gain`, `gain_low`, `gain_high` (mIoU over the same configuration without refinement, images paired),
    `segments` (mean number per image; NaN for named classes). Best mIoU first within a protocol.
    """
    import pandas as pd

    groups = _groups(counts)
    found: dict[tuple[str, ...], ImageCounts] = {}
    segments: dict[tuple[str, ...], float] = {}
    for key, part in groups.items():
        if key[-1] == "segments":
            segments[key] = float(part[part["pixels"] > 0].groupby("image")["found"].nunique().mean())
            part = matched(part, classes, match, background)
        found[key] = ImageCounts.from_table(part, classes, agnostic)
    for protocol in dict.fromkeys(key[0] for key in groups):
        whole = groups.get((protocol, CEILING, "none", "", "", "", "classes"))
        if whole is not None and not (protocol == UNSUPERVISED and match == "row"):  # the plan counted it by rows
            name = ONE_SEGMENT if protocol == UNSUPERVISED else ONE_CLASS
            key = (protocol, name, "none", "", "", "", "classes")
            trivial = _trivial(whole, classes, protocol, match, background)
            found[key] = ImageCounts.from_table(trivial, classes, agnostic)
    rows = []
    for key, scores in found.items():
        low, high = scores.interval("miou")
        row: dict[str, Any] = dict(zip(KEYS[:-1], key[:-1], strict=True)) | {"n": len(scores)}
        row |= {name: scores.score(name) for name in SCORES} | {"miou_low": low, "miou_high": high}
        plain = found.get((*key[:2], "none", *key[3:]))
        if key[2] != "none" and plain is not None:
            row |= dict(zip(("gain", "gain_low", "gain_high"), scores.gain(plain), strict=True))
        row["segments"] = segments.get(key, float("nan"))
        rows.append(row)
    columns = [*KEYS[:-1], "n", *SCORES, "miou_low", "miou_high", "gain", "gain_low", "gain_high", "segments"]
    table = pd.DataFrame(rows, columns=columns)
    order = {name: place for place, name in enumerate(dict.fromkeys(table["protocol"]))}
    table = table.assign(_order=table["protocol"].map(order))
    return table.sort_values(["_order", "miou"], ascending=[True, False], kind="stable").drop(columns="_order")


def per_class(
    counts: pd.DataFrame, names: list[str], *, match: str = "image", background: int | None = None
) -> pd.DataFrame:
    """IoU of every class of every configuration: columns `KEYS` without kind, class, iou (NaN: never seen)."""
    import pandas as pd

    rows = []
    for key, part in _groups(counts).items():
        if key[-1] == "segments":
            part = matched(part, len(names), match, background)
        ious = ImageCounts.from_table(part, len(names)).ious()
        rows += [
            dict(zip(KEYS[:-1], key[:-1], strict=True)) | {"class": name, "iou": value}
            for name, value in zip(names, ious, strict=True)
        ]
    return pd.DataFrame(rows)


def matched(part: pd.DataFrame, classes: int, match: str, background: int | None = None) -> pd.DataFrame:
    """Counts of segments as counts of classes: `found` becomes the class of the segment, C for none."""
    import pandas as pd

    whole: NDArray[np.int64] | None = None
    if match == "dataset":
        whole = assign(_dense(part, classes), match, background)
    frames = []
    for _, image in part.groupby("image", sort=False):
        ids = whole if whole is not None else assign(_dense(image, classes), match, background)
        frames.append(image.assign(found=ids[image["found"].to_numpy()]))
    return pd.concat(frames)


def _groups(counts: pd.DataFrame) -> dict[tuple[str, ...], pd.DataFrame]:
    """Rows by configuration, in order of appearance."""
    return {tuple(map(str, key)): part for key, part in counts.groupby(list(KEYS), observed=True, sort=False)}


def _dense(part: pd.DataFrame, classes: int) -> NDArray[np.int64]:
    counts = np.zeros((classes, max(classes, int(part["found"].max()) + 1)), np.int64)
    np.add.at(counts, (part["truth"].to_numpy(), part["found"].to_numpy()), part["pixels"].to_numpy())
    return counts


def _trivial(ceiling: pd.DataFrame, classes: int, protocol: str, match: str, background: int | None) -> pd.DataFrame:
    """Counts of the one-class or one-segment prediction, from the truth's own counts."""
    if protocol == UNSUPERVISED:
        return matched(ceiling.assign(found=0), classes, match, background)
    prior = np.bincount(ceiling["truth"], ceiling["pixels"], classes)
    if protocol == "full":
        return ceiling.assign(found=int(prior.argmax()))
    weight = prior[ceiling["truth"].to_numpy()]
    best = ceiling.assign(_weight=weight).sort_values("_weight").groupby("image")["truth"].last()
    return ceiling.assign(found=ceiling["image"].map(best))
