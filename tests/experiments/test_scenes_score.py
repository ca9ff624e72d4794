"""Score on the scenes world: a row per picture with its opposites, maps with their ceiling, resumed."""

import numpy as np
import pandas as pd
import pytest

from mmdit_probe import load
from mmdit_probe.experiments.score import Score, opposite_table, scene_prompts
from mmdit_probe.results import read_table
from mmdit_probe.scenes.captions import CONTRASTS, opposites
from mmdit_probe.scenes.parser import SCORES
from tests.scripts import script


@pytest.fixture(scope="module")
def model():
    return load("scenes-sd3", device="cpu")


def test_scores_have_a_row_per_picture_and_resume(model, tmp_path, monkeypatch):
    ask = Score(limit=3, categories="texture,2d-spatial", num_steps=2, guidance=4.0, map_sigma="0.5")
    out = tmp_path / "run"
    result = ask.run(model, out=out, progress=False)
    images, maps = read_table(out / "scores.parquet"), read_table(out / "maps.parquet")
    assert images.groupby("category").size().to_dict() == {"texture": 3, "2d-spatial": 3, "real": 3}
    assert images.loc[images["category"] == "real", "facts"].mean() > 0.8
    assert len(maps) == 8 * 3 * 5 * 2 and maps["miou"].between(0, maps["ceiling"].iloc[0]).all()
    assert images.loc[images["category"] == "real", "clipscore[scenes-clip]"].between(1, 100).all()
    summary = result.summary.set_index(["category", "metric"])
    assert summary.loc[("texture", "facts"), "prompts"] == 3
    # The opposite stands beside what is stated, where something is stated.
    for row in images.itertuples():
        turned = opposites(row.prompt)
        for stated, opposite in CONTRASTS.items():
            values = [getattr(row, stated), getattr(row, opposite)]
            assert all(value in (0, 1) for value in values) if opposite in turned else pd.isna(values).all()
    told = "\n".join(str(text) for text in result.texts())
    assert "opposite relation" in told and "its own limit: facts" in told and " nan" not in told

    def again(*_args, **_kwargs):
        raise AssertionError("a finished run was measured again")

    monkeypatch.setattr(Score, "_pictures", again)
    shown = ask.run(model, out=out, resume=True, progress=False)
    pd.testing.assert_frame_equal(shown.summary, result.summary)


def test_maps_alone_are_measured_beside_the_limit_of_the_parser(model, tmp_path):
    result = Score(limit=2, categories="none", clip="none", map_sigma="0.3,0.5").run(
        model, out=tmp_path / "run", progress=False
    )
    maps = read_table(tmp_path / "run" / "maps.parquet")
    assert sorted(maps["sigma"].unique()) == [0.3, 0.5] and set(result.summary["category"]) == {"all", "real"}
    own = Score(limit=2, prompts="a red ring", num_steps=1, map_sigma="0.5").run(model, progress=False)
    assert len(own.store.table("maps")) == 8 * 3 * 5 * 2 and "stated beside opposite" not in str(own.texts())


def test_the_table_of_opposites_names_what_is_stated():
    rows = [
        {
            "variant": "base",
            "category": category,
            "metric": metric,
            "mean": mean,
            "low": mean,
            "high": mean,
            "prompts": 9,
        }
        for category, shares in (("2d-spatial", (0.7, 0.2)), ("texture", (float("nan"),) * 2))
        for metric, mean in zip(("relation", "opposite_relation"), shares, strict=True)
    ]
    rest = [{**rows[0], "category": row["category"], "metric": name, "mean": float("nan")} for row in rows[::2]
            for name in SCORES if name not in ("relation", "opposite_relation")]  # fmt: skip
    shown = str(opposite_table(pd.DataFrame(rows + rest)))
    assert "0.700 [0.700, 0.700] (9)" in shown and "0.200" in shown and "texture" not in shown


def test_prompts_of_relations_state_one():
    assert all("opposite_relation" in opposites(text) for _, text in scene_prompts(5, ("2d-spatial",)))


def test_the_embedded_model_s_scores_are_over_captions() -> None:
    """One caption in three pictures and another in one: the mean of 2 / 3 and 1, of two captions."""
    part = pd.DataFrame(
        {"prompt": ["a", "a", "a", "b"], "facts": [1.0, 1.0, 0.0, 1.0], "count": [1.0, 0, np.nan, np.nan]}
    )
    row = script("analyses/embedded_model.py").means(part)
    assert (row["n"], row["captions"], row["count_n"]) == (4, 2, 1)
    assert row["facts"] == pytest.approx(5 / 6) and row["count"] == 0.5
