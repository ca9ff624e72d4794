"""Head triage: verdicts, ways to read maps by hand, and that selection and report share no scene."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe import UserError, load
from mmdit_probe.experiments import HeadTriage
from mmdit_probe.experiments.head_triage import (
    RAW,
    WAYS,
    Calibration,
    Reader,
    looking_away,
    several,
    summarise,
    triage_table,
    verdicts,
    ways,
)
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.scenes.world import CLASSES
from tests import tiny
from tests.tables import unexplained


def test_heads_by_their_auc_on_training_scenes() -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        {"train_item": item, "layer": 0, "stream": "all", "head": head, "word": "ring", "mean": 0.1,
         "auc": level + rng.normal(0, 0.02)}
        for item in range(12) for head, level in enumerate((0.9, 0.2, 0.5))
    )  # fmt: skip
    found = verdicts(rows)
    assert found["verdict"].tolist()[:2] == ["localises", "looks away"] and found["n"].tolist() == [12] * 3
    assert looking_away(found, 3) == {0: [1]}
    assert looking_away(found.assign(verdict="looks away"), 3) == {0: [1, 2]}  # the best head stays


def test_ways_to_read_maps() -> None:
    maps = torch.rand(3, 2, 4, 4, dtype=torch.float64)
    scales = {(0, 1, 2): np.array([2.0, 4.0])[:, None, None], (0, 2): np.array([5.0, 10.0])[:, None, None]}
    found = ways(maps, [1], scales, seed=0)
    assert tuple(found) == WAYS
    whole, kept = maps.mean(0), (maps[0] + maps[2]) / 2
    expected = [whole, whole / whole.mean((1, 2), keepdim=True), torch.stack([whole[0] / 2, whole[1] / 4]), kept]
    expected.append(torch.stack([kept[0] / 5, kept[1] / 10]))
    for one, two in zip(found.values(), expected, strict=False):
        torch.testing.assert_close(one, two)
    pairs = [maps[[a, b]].mean(0) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert any(torch.allclose(found["random heads"], pair) for pair in pairs)


def test_words_are_scaled_by_their_means_on_training_scenes_and_chosen_heads() -> None:
    rng, calibration = np.random.default_rng(0), Calibration(None, [])  # type: ignore[arg-type]
    cells = [(item, layer, stream, head, word) for item in range(2) for layer in (1, 2) for stream in ("all", "t5")
             for head in range(3) for word in ("cat", "ring")]  # fmt: skip
    of = dict(zip(cells, rng.random(len(cells)).tolist(), strict=True))
    columns = ["train_item", "layer", "stream", "head", "word"]
    calibration.rows = pd.DataFrame(cells, columns=columns).assign(mean=of.values())
    cat, ring = (np.mean([of[item, 2, "t5", head, word] for item in (0, 1) for head in (0, 2)])
                 for word in ("cat", "ring"))  # fmt: skip
    found = calibration.scale(2, "t5", ["ring", "dog", "cat"], [0, 2])
    assert found.shape == (3, 1, 1) and found.ravel() == pytest.approx([ring, (cat + ring) / 2, cat])


def test_ways_are_told_as_paired_differences_from_raw_maps() -> None:
    """Scene k is .01 k easier; a way adds .1 times its place, so that only raw has an interval of its own width."""
    table = pd.DataFrame(
        {"layer": layer, "stream": "all", "item": item, "way": way, "miou": 0.2 + 0.01 * item + 0.1 * place}
        for layer in (4, 2) for item in range(12) for place, way in enumerate(WAYS)
    )  # fmt: skip
    first, second = triage_table(summarise(table)).rows
    assert (first[:2], second[:2]) == (["4", "all"], ["2", "all"]) and first[2].startswith("0.255 [0.2")
    assert first[3:] == [f"+0.{place}0 [+0.{place}0, +0.{place}0]" for place in (1, 2, 3, 4, 5)]


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return load("scenes-sd3")


def test_rows_of_training_scenes_are_computed_from_the_maps(model: MMDiT) -> None:
    from sklearn.metrics import roc_auc_score

    reader, items = Reader(model, (4,), ["all", "t5"], 0.515, 0), several("train", 3)
    rows = Calibration(reader, items).rows
    maps = reader.maps(items[1], 1)[4, "t5"]
    word = items[1].class_names[0]
    cells = (items[1].classes == CLASSES.index(word)).reshape(maps.shape[2], -1, maps.shape[3], 64 // maps.shape[3])
    share = cells.mean((1, 3))
    row = rows.query(f"train_item == 1 and stream == 't5' and head == 2 and word == '{word}'").iloc[0]
    assert row["mean"] == pytest.approx(float(maps[2, 0].mean()), rel=1e-5)
    inside = share > 0.5
    away = share == 0
    sure = inside | away  # the class of a mixed token is the most frequent one
    auc = roc_auc_score(inside[sure], maps[2, 0].numpy()[sure])
    assert row["auc"] == pytest.approx(auc, abs=0.1)


def test_run(model: MMDiT) -> None:
    result = HeadTriage(limit=3, train_limit=3, layers="3,4").run(model, progress=False)
    assert unexplained(result) == set()
    assert set(result.table["way"]) == set(WAYS) and set(result.table["stream"]) == {"all", "clip", "t5"}
    assert result.table["miou"].between(0, 1).all()
    raw = result.summary.query(f"way == '{RAW}'")
    assert (raw["difference"] == 0).all() and set(raw["layer"]) == {3, 4}
    assert set(result.claims["control"]) == {"raw", "random heads"} and result.figure().axes
    assert "training" in str(result.texts()[2])
    train, report = several("train", 3), several("test", 3)
    assert not any(np.array_equal(a.image, b.image) for a in train for b in report)
    with pytest.raises(UserError, match="does not know"):
        HeadTriage().run(MMDiT(tiny.pipeline()), progress=False)
