"""The score report: resumed without repeating, intervals that cover, one row per image."""

import numpy as np
import pytest

from mmdit_probe import load
from mmdit_probe.experiments import scenes_report as report
from mmdit_probe.results import read_table

REQUEST = {"n": 3, "split": "val", "guidance": 4.0, "num_steps": 2, "sigmas": [0.5], "seed": 0}


def test_report_has_a_row_per_image_and_resumes(tmp_path, monkeypatch):
    model = load("scenes-sd3", device="cpu")
    out = tmp_path / "run"
    found = report.score_model(model, REQUEST, categories=("texture", "real"), out=out)
    images, maps = read_table(out / "alignment.parquet"), read_table(out / "maps.parquet")
    assert list(images.groupby("category").size()) == [3, 3]
    assert images.loc[images["category"] == "real", "facts"].mean() > 0.8
    assert len(maps) == 8 * 3 * 5 * 2 and maps["miou"].between(0, maps["ceiling"].iloc[0]).all()
    assert found.document["alignment"]["texture"]["n"] == 3

    def again(*_args, **_kwargs):
        raise AssertionError("a finished run was measured again")

    monkeypatch.setattr(report, "alignment_of", again)
    shown = report.score_model(model, REQUEST, categories=("texture", "real"), out=out, resume=True)
    assert shown.document == found.document


def test_interval_covers_the_mean():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        mean, low, high = report.interval(rng.random(80), draws=400)
        assert low < mean < high
        hits += low <= 0.5 <= high
    assert hits >= 85
    assert report.interval([1.0, 1.0]) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
