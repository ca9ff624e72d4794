"""The league table of an evaluation: one row per configuration, from the counts on disk, each beside its controls.

    table = league(read_table(folder / "counts.parquet"), classes, match="image")

Segments are matched here, so that every variant of matching reads the same counts. Two trivial rows need no run: one
present class everywhere (the most frequent by the data set's pixels), and one segment everywhere. A method is compared
with the strongest control of its protocol: these two, and what `evaluate.plan` counts with the method's refinement
(random maps, one true token per class, the method's own maps with the words shifted).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdit_probe.evaluate.plan import CEILING, KEYS, ONE_CLASS, ONE_SEGMENT, ONE_TOKEN, RANDOM, SHIFTED, UNSUPERVISED
from mmdit_probe.evaluate.scores import SCORES, ImageCounts, assign
from mmdit_probe.results.statistics import holm, verdicts

if TYPE_CHECKING:
    import pandas as pd

METHOD, CONTROL, BOUND = "method", "control", "bound"
"""Values of the column `role`: what is measured, what it is compared with, what no map of the grid can exceed."""
_TRIVIAL = (ONE_CLASS, ONE_SEGMENT)
_GAIN = ("gain", "gain_low", "gain_high")
_OVER = ("over", "over_low", "over_high")
Key = tuple[str, ...]


def league(
    counts: pd.DataFrame, classes: int, *, match: str = "image", background: int | None = None, agnostic: bool = False
) -> pd.DataFrame:
    """Scores of every configuration.

    Args:
        counts: rows of `evaluate.plan.COLUMNS`. classes: C.
        match: one of `evaluate.scores.MATCHES`, background: its background class for segments.
        agnostic: classes are masks of one image each (`Dataset.agnostic`).

    Returns: columns `KEYS` without kind, role, n (images with a scored pixel), the `SCORES` in 0..1 with `miou_low`,
    `miou_high` (95 % over images), `gain`, `gain_low`, `gain_high` (mIoU over the same configuration without
    refinement, images paired), `control` (the strongest one), `over`, `over_low`, `over_high` (mIoU over it, paired),
    `p_holm` (corrected for all methods of the table), `verdict`, and `segments` (mean number per image; NaN for named
    classes). Best mIoU first within a protocol.
    """
    import pandas as pd

    found, segments = _scored(counts, classes, match, background, agnostic)
    numbers = ["n", *SCORES, "miou_low", "miou_high", *_GAIN]
    columns = [*KEYS[:-1], "role", *numbers, "control", *_OVER, "p_holm", "verdict", "segments"]
    table = pd.DataFrame([_row(key, found) for key in found], columns=columns)
    table = table.assign(
        p_holm=holm(table["p_holm"]), control=table["control"].fillna(""),
        segments=[segments.get(key, float("nan")) for key in found],
    )  # fmt: skip
    table["verdict"] = np.where(table["control"] == "", "", verdicts(table["p_holm"], table["over_low"] > 0))
    order = {name: place for place, name in enumerate(dict.fromkeys(table["protocol"]))}
    table = table.assign(_order=table["protocol"].map(order))
    return table.sort_values(["_order", "miou"], ascending=[True, False], kind="stable").drop(columns="_order")


def _scored(
    counts: pd.DataFrame, classes: int, match: str, background: int | None, agnostic: bool
) -> tuple[dict[Key, ImageCounts], dict[Key, float]]:
    """Counts of every configuration, the trivial ones too, and the number of segments per image of those without
    names."""
    groups = _groups(counts)
    found: dict[Key, ImageCounts] = {}
    segments: dict[Key, float] = {}
    for key, part in groups.items():
        if key[-1] == "segments":
            segments[key[:-1]] = float(part[part["pixels"] > 0].groupby("image")["found"].nunique().mean())
            part = matched(part, classes, match, background)
        found[key[:-1]] = ImageCounts.from_table(part, classes, agnostic)
    for protocol in dict.fromkeys(key[0] for key in groups):
        whole = groups.get((protocol, CEILING, "none", "", "", "", "classes"))
        if whole is not None and not (protocol == UNSUPERVISED and match == "row"):  # the plan counted it by rows
            name = ONE_SEGMENT if protocol == UNSUPERVISED else ONE_CLASS
            trivial = _trivial(whole, classes, protocol, match, background)
            found[protocol, name, "none", "", "", ""] = ImageCounts.from_table(trivial, classes, agnostic)
    return found, segments


def _row(key: Key, found: Mapping[Key, ImageCounts]) -> dict[str, Any]:
    """A row of the table; `p_holm` is not corrected yet."""
    scores = found[key]
    low, high = scores.interval("miou")
    row: dict[str, Any] = dict(zip(KEYS[:-1], key, strict=True)) | {"role": role(key[1]), "n": len(scores)}
    row |= {name: scores.score(name) for name in SCORES} | {"miou_low": low, "miou_high": high}
    plain = found.get((*key[:2], "none", *key[3:]))
    if key[2] != "none" and plain is not None:
        row |= dict(zip(_GAIN, scores.gain(plain), strict=False))
    control = _strongest(key, found) if row["role"] == METHOD else None
    if control is not None:
        over = scores.gain(found[control])
        row |= dict(zip(_OVER, over, strict=False)) | {"control": control[1]}
        row["p_holm"] = over.p
    return row


def role(name: str) -> str:
    """What a row of this name is: a method, a control or a bound."""
    if name == CEILING:
        return BOUND
    return CONTROL if name in (RANDOM, ONE_TOKEN, *_TRIVIAL) or name.endswith(SHIFTED) else METHOD


def _strongest(key: Key, found: Mapping[Key, ImageCounts]) -> Key | None:
    """The control with the highest mIoU among those of a method's row; None where the table has none."""
    protocol, method, refine, layers, heads, sigma = key
    asked = [(protocol, name, "none", "", "", "") for name in _TRIVIAL]
    places = ("", "", ""), (layers, "", sigma)
    asked += [(protocol, name, refine, *place) for name in (RANDOM, ONE_TOKEN) for place in places]
    asked.append((protocol, method + SHIFTED, refine, layers, heads, sigma))
    return max((one for one in asked if one in found), key=lambda one: found[one].miou(), default=None)


def per_class(
    counts: pd.DataFrame, names: list[str], *, match: str = "image", background: int | None = None
) -> pd.DataFrame:
    """IoU of every class of every configuration but the controls: columns `KEYS` without kind, class, iou (NaN: never
    seen)."""
    import pandas as pd

    rows = []
    for key, part in _groups(counts).items():
        if role(key[1]) == CONTROL:
            continue
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


def _groups(counts: pd.DataFrame) -> dict[Key, pd.DataFrame]:
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
