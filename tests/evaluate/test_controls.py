"""Controls of the league and sizes of scoring, on captures whose every score is known by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe.data import Dataset, Fit, Sample, SegClass
from mmdit_probe.errors import UserError
from mmdit_probe.evaluate.league import league, per_class
from mmdit_probe.evaluate.plan import CEILING, COLUMNS, ONE_CLASS, ONE_SEGMENT, Plan, Scoring, _true_tokens
from mmdit_probe.evaluate.scores import ImageCounts
from mmdit_probe.experiments.evaluate import beside_controls
from mmdit_probe.results.statistics import ABOVE, NOT_ABOVE, TOO_FEW
from mmdit_probe.segment.record import Reading
from mmdit_probe.segment.settings import scoring_size
from tests.segment import worlds

STEPS = "affinity:1+minmax"
"""With attention that stays within regions: a single token's mark fills its region, exactly."""


def world(count: int) -> tuple[Dataset, Any]:
    """Pictures of three regions, and captures in which each word looks at its region alone."""
    regions = worlds.masks()
    one = worlds.capture(regions, sharp=1.0)
    truth = worlds.truth(regions)
    classes = [SegClass((f"thing{index}",)) for index in range(3)]
    data = Dataset("made", classes, [Sample(str(index), one.image, label=lambda: truth) for index in range(count)])
    side = 8 * worlds.TOKEN
    facts = {"id": "hand", "layers": 2, "heads": 2, "size": (side, side), "multiple": worlds.TOKEN, "most": None}
    return data, SimpleNamespace(facts=facts, pictures=3, workers=0, get=lambda asked: [one for _ in asked])


def table_of(count: int, methods: list[str], refine: list[str], **how: Any) -> pd.DataFrame:
    data, captures = world(count)
    plan = Plan.of(data, methods, (2, 2), reading=Reading(layers="all"), refine=refine, **how)
    return pd.concat(map(pd.DataFrame, plan.rows(captures, range(count))))


def test_controls_stand_in_the_league_with_the_same_refinement() -> None:
    counts = table_of(8, ["seg4diff"], ["none", STEPS])
    table = league(counts, 3)
    rows = {(row["method"], row["refine"]): row for row in table.to_dict("records")}
    assert rows["seg4diff", "none"]["miou"] == rows["seg4diff", STEPS]["miou"] > 0.99  # but where three regions meet
    # one marked token of each class, spread by the attention, is as good as the method: nothing is gained there
    assert rows["one true token per class", STEPS]["miou"] == rows["seg4diff", STEPS]["miou"]
    refined = rows["seg4diff", STEPS]
    assert (refined["control"], refined["over"], refined["verdict"]) == ("one true token per class", 0.0, NOT_ABOVE)
    # unrefined it is the first class everywhere but for three spots, and still the strongest
    plain, control = rows["seg4diff", "none"], rows["one true token per class", "none"]
    assert plain["control"] == "one true token per class" and plain["over"] == pytest.approx(
        plain["miou"] - control["miou"]
    )
    assert plain["over_low"] > 0 and plain["p_holm"] < 0.05 and plain["verdict"] == ABOVE
    # every class's map given to the next one is wrong everywhere; one class everywhere: IoU 1/2 of one of three
    assert rows["seg4diff, words shifted", "none"]["miou"] < 0.01 > rows["seg4diff, words shifted", STEPS]["miou"]
    assert rows["one class everywhere", "none"]["miou"] == pytest.approx(0.5 / 3)
    assert {row["role"] for row in rows.values()} == {"method", "control", "bound"}
    assert [row["control"] != "" for row in rows.values()] == [row["role"] == "method" for row in rows.values()]
    assert "(one true token per class 2)" in beside_controls(table) and "1 of 2 rows." in beside_controls(table)


def by_hand(*parts: tuple[str, str, str, list[Any]]) -> pd.DataFrame:
    """Rows of (protocol, method, kind, one matrix [classes, found] per image)."""
    rows = [
        (image, protocol, method, "none", "", "", "", kind, truth, found, counts[truth, found])
        for protocol, method, kind, images in parts
        for image, counts in enumerate(map(np.asarray, images))
        for truth, found in zip(*np.nonzero(counts), strict=True)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_one_class_and_one_segment_are_scored_from_the_truth_alone() -> None:
    """Class 1 is the larger part of the second picture only, class 0 of all pictures together."""
    truth = [np.diag([90, 10]), np.diag([4, 6])]
    counts = by_hand(
        ("unsupervised", "swapped", "segments", [one[:, ::-1] for one in truth]),
        ("unsupervised", CEILING, "classes", truth), ("full", CEILING, "classes", truth),
        ("full", "wrong", "classes", [one[:, ::-1] for one in truth]), ("full", "right", "classes", truth),
    )  # fmt: skip
    table = league(counts, 2)
    assert list(table["protocol"]) == ["unsupervised"] * 3 + ["full"] * 4  # as they were asked for
    rows = {(row["protocol"], row["method"]): row["miou"] for row in table.to_dict("records")}
    assert rows["full", ONE_CLASS] == pytest.approx((94 / 110 + 0) / 2)  # class 0 everywhere
    # one segment is class 0 in the first picture, class 1 in the second
    assert rows["unsupervised", ONE_SEGMENT] == pytest.approx((90 / (94 + 100 - 90) + 6 / (16 + 10 - 6)) / 2)
    assert rows["unsupervised", "swapped"] == rows["full", "right"] == 1 and rows["full", "wrong"] == 0
    for _, part in table.groupby("protocol"):
        assert list(part["miou"]) == sorted(part["miou"], reverse=True)
    classes = per_class(counts, ["a", "b"])
    assert classes.groupby("method")["iou"].apply(list).to_dict() == {
        CEILING: [1.0] * 4, "right": [1.0] * 2, "swapped": [1.0] * 2, "wrong": [0.0] * 2,
    }  # fmt: skip


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_picture_without_a_scored_pixel_is_left_out_of_every_row(by_rows: bool) -> None:
    """COCO has pictures without an annotation."""
    data, captures = world(2)
    ignored = Sample("ignored", data[1].image, label=lambda: np.full_like(data[0].label(), 255))
    whole, one = (replace(data, samples=samples) for samples in ([data[0], ignored], [data[0]]))
    tables = []
    for of in (whole, one):
        scoring = Scoring(("present", "full"), by_rows=by_rows)
        plan = Plan.of(of, ["seg4diff", "diffcut"], (2, 2), reading=Reading(layers="all"), scoring=scoring)
        counts = pd.concat(map(pd.DataFrame, plan.rows(captures, range(len(of)))))
        tables.append(league(counts, 3, match="row" if by_rows else "image").set_index(["protocol", "method"]))
    assert set(tables[0]["n"]) == set(tables[1]["n"]) == {1}
    assert tables[0]["miou"].to_dict() == tables[1]["miou"].to_dict() and len(tables[0]) >= 8


def test_shifted_words_give_each_class_the_map_of_the_one_before() -> None:
    counts = table_of(1, ["seg4diff"], ["none"]).query("method == 'seg4diff, words shifted'")
    most = counts.sort_values("pixels").groupby("truth")["found"].last()
    assert most.to_dict() == {0: 1, 1: 2, 2: 0}


def test_segments_have_refined_controls_too() -> None:
    table = league(table_of(8, ["diffcut"], ["none", STEPS]), 3)
    rows = {(row["method"], row["refine"]): row for row in table.to_dict("records")}
    assert rows["one true token per class", STEPS]["miou"] > 0.99
    assert rows["one segment", "none"]["miou"] == pytest.approx(0.5 / 3)  # matched to the largest class
    assert rows["diffcut", STEPS]["control"] == "one true token per class"


def test_few_images_have_no_verdict_and_controls_can_be_left_out() -> None:
    table = league(table_of(7, ["seg4diff"], ["none"]), 3).set_index("method")
    assert table.loc["seg4diff", "verdict"] == TOO_FEW and np.isnan(table.loc["seg4diff", "p_holm"])
    data, captures = world(1)
    bare = replace(Plan.of(data, ["seg4diff"], (2, 2)), controls=False)
    assert set(next(bare.rows(captures, [0]))["method"]) == {"seg4diff", "token-grid ceiling"}


def test_one_true_token_lies_in_its_class_or_where_the_class_is_most() -> None:
    shares = torch.tensor([[[0.6, 1.0, 0.0], [0.0, 0.7, 0.0]], [[0.4, 0.0, 0.0], [0.0, 0.3, 0.0]],
                           [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]])  # fmt: skip
    drawn = [_true_tokens(shares, seed) for seed in range(40)]
    for maps in drawn:
        assert maps.sum((1, 2)).tolist() == [1.0, 1.0, 1.0]
        assert maps[1].argmax() == 0  # nowhere the largest; most of it is in the first token
    assert {int(maps[0].argmax()) for maps in drawn} == {0, 1, 4}
    assert {int(maps[2].argmax()) for maps in drawn} == {2, 3, 5}
    assert torch.equal(_true_tokens(shares, 3), drawn[3])


def test_jackknife_of_accuracies_is_the_t_interval_of_a_mean() -> None:
    """Images of equal size: the accuracy is a mean, whose jackknife error is its standard error."""
    right = np.array([[4.0], [5.0], [6.0], [7.0]])
    counts = ImageCounts(right, np.full((4, 1), 10.0), np.full((4, 1), 10.0))
    reach = 3.182446305284263 * np.std([0.4, 0.5, 0.6, 0.7], ddof=1) / 2  # t at 97.5 % with 3 degrees of freedom
    assert counts.interval("accuracy") == pytest.approx((0.55 - reach, 0.55 + reach), abs=1e-9)
    gain = counts.gain(ImageCounts(right[::-1], counts.truth, counts.found), "accuracy")
    assert gain.value == 0.0 and np.isnan(gain.p)  # four images are too few for a verdict
    counts, other = (ImageCounts(np.tile(one, (3, 1)), *np.full((2, 12, 1), 10.0)) for one in (right, right[::-1]))
    assert counts.gain(other, "accuracy").p == pytest.approx(1)


def test_labels_are_read_at_the_middle_of_the_cells_that_are_scored() -> None:
    """Of 4 x 6 pixels the middle 4 x 4 are shown; two cells a side are read at rows 1, 3 and columns 2, 4."""
    truth, scoring = np.arange(24).reshape(4, 6), Scoring(size="2x2")
    fit = Fit.of((4, 6), (8, 8), 2, "crop")
    assert scoring.label(truth, fit, ()).tolist() == [[8, 10], [20, 22]]
    assert scoring.label(truth, fit, (10,)).tolist() == [[8, 255], [20, 22]]
    whole = Scoring().label(truth, fit, ())
    assert (whole[:, [0, 5]] == 255).all() and (whole[:, 1:5] == truth[:, 1:5]).all()
    with pytest.raises(UserError, match="letterbox leaves bars"):
        scoring.label(truth, Fit.of((4, 6), (8, 8), 2, "letterbox"), ())


def test_sizes_are_those_of_the_papers_loaders() -> None:
    assert scoring_size("128x64", (480, 640)) == (128, 64)
    assert scoring_size("short:640", (480, 640)) == (640, 853)  # 640 / 480 * 640 = 853.3
    assert scoring_size("short:640", (1024, 2048)) == (640, 1280)
    assert scoring_size("short:640", (100, 1000)) == (256, 2560)  # the longer side stops at 2560
    with pytest.raises(UserError, match="short:SIDE"):
        scoring_size("short:wide", (4, 4))


def test_prediction_and_label_are_compared_at_the_scoring_size() -> None:
    """Eight tokens a side scored at 4 x 4: 8 cells of the left half, 4 of each of the others, all right."""
    counts = table_of(1, ["seg4diff", "diffcut"], ["none", "pamr:1"], scoring=Scoring(size="4x4"))
    right = counts[counts["method"] == "seg4diff"].groupby(["refine", "truth", "found"])["pixels"].sum()
    assert right.loc["none"].to_dict() == {(0, 0): 8, (1, 1): 4, (2, 2): 4}
    assert set(counts.groupby(["protocol", "method", "refine"])["pixels"].sum()) == {16}
