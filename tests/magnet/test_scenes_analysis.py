"""The analysis of MAGNET: the choice among pilots, what its summary says, and its figures and tables."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmdit_probe.evaluate.scores import ImageCounts
from mmdit_probe.scenes import CATEGORIES, CLASSES

ROOT = Path(__file__).parents[2]
VARIANTS = ("base", "control", "class", "part", "self")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "analyses"))
    return runpy.run_path(str(ROOT / "analyses" / "magnet_tables.py"))


def scores(name: str, shift: float = 0.0, category: str = "colour") -> pd.DataFrame:
    """Pictures of 24 prompts per category whose share of facts is `shift` higher in one category."""
    rows = []
    for of in CATEGORIES:
        for k in range(24):
            value = np.random.default_rng([k, len(of)]).random() + (shift if of == category else 0.0)
            value += 1e-3 * ((k + len(name)) % 4)  # no variant differs from the control by one number everywhere
            rows.append({"variant": name, "category": of, "prompt": f"{of} {k}", "index": k, "seed": k, "facts": value,
                         "all_right": float(value > 0.5), "clipscore[scenes-clip]": 50 + value})  # fmt: skip
    return pd.DataFrame(rows)


def counts(share: float, n: int = 12) -> ImageCounts:
    """Every class is found with about this IoU in every image."""
    truth = np.full((n, len(CLASSES)), 100.0) + np.arange(n)[:, None]
    return ImageCounts(share * truth, truth, share * truth)


def pilot_rows() -> pd.DataFrame:
    forms = [("none", None, None), ("token", "logit", "none"), ("token", "probability", "none")]
    rows = []
    for rate in (0.001, 0.003):
        for k, (alignment, space, normalise) in enumerate(forms):
            rows.append({"name": f"{space}-{rate}", "alignment": alignment, "space": space, "normalise": normalise,
                         "rate": rate, "miou": 0.4 + 0.1 * k + 10 * rate})  # fmt: skip
    return pd.DataFrame(rows)


def test_the_pilot_with_the_best_maps_that_harms_no_picture_is_taken(tables: dict[str, Any]) -> None:
    pilots = pilot_rows()
    frames = {name: scores(name) for name in pilots["name"]}
    frames["probability-0.003"] = scores("probability-0.003", -0.3)
    found = tables["choose"](pilots, frames).set_index("name")
    assert found.index[found["chosen"]].tolist() == ["probability-0.001"]
    assert found.loc["probability-0.003", "facts_verdict"] != "no worse"
    harmful = {name: f if name.startswith("None") else scores(name, -0.3) for name, f in frames.items()}
    harmful["logit-0.001"] = scores("logit-0.001", -0.2)
    found = tables["choose"](pilots, harmful).set_index("name")
    assert found.index[found["chosen"]].tolist() == ["logit-0.001"]  # all harm: the one that harms least


def written(tables: dict[str, Any], out: Path) -> Path:
    """An output folder in which `class` reaches the target, `part` harms colours, and `self` gains too little."""
    share = {"base": 0.5, "control": 0.51, "class": 0.6, "part": 0.6, "self": 0.52}
    protocols = [*tables["PROTOCOLS"].values(), tables["UNSUPERVISED"]]
    of = {(name, seed, protocol): counts(share[name])
          for name in VARIANTS for seed in range(1 if name == "base" else 3) for protocol in protocols}  # fmt: skip
    frames = pd.concat([scores(name, -0.3 if name == "part" else 0.0).assign(training_seed=seed)
                        for name, seed, protocol in of if protocol == protocols[0]])  # fmt: skip
    pilots = tables["choose"](pilot_rows(), {name: scores(name) for name in pilot_rows()["name"]})
    examples: dict[str, Any] = {}
    for name in VARIANTS:
        examples |= {
            f"{name}/named": np.zeros((2, 64, 64), np.uint8),
            f"{name}/unnamed": np.full((2, 64, 64), len(CLASSES), np.uint8),
            f"{name}/pictures": np.zeros((2, 64, 64, 3), np.uint8),
            f"{name}/maps": np.random.default_rng(0).random((2, 2, 16, 16)).astype(np.float16),
            f"{name}/words": json.dumps([["ring"], ["house", "grass"]]),
            f"{name}/prompts": json.dumps(["a ring", "a house on grass"]),
        }
    settings = {"model": "scenes-sd3", "weight_hash": "0123456789", "layer": 4, "layer_miou_val": [0.1, 0.2],
                "steps": 400, "batch": 8, "train": 800, "num_steps": 28, "guidance": 7.5, "precision": "bfloat16",
                "pilot_steps": 100, "seeds": 3, "recipe": "ours", "long_steps": 0}  # fmt: skip
    tables["write"](out, of, frames, pilots, {}, examples, settings)
    return out


def test_the_summary_says_who_reached_the_target(tables: dict[str, Any], tmp_path: Path) -> None:
    lines = (written(tables, tmp_path) / "summary.md").read_text().splitlines()
    verdicts = {name: next(line for line in lines if line.startswith(f"* `{name}`")) for name in VARIANTS[2:]}
    gains = "(3 seeds): +10.0 [+10.0, +10.0] points over the base model, +9.0 [+9.0, +9.0] over the control"
    assert gains in verdicts["class"]
    assert verdicts["class"].endswith("no worse in every category. Target reached.")
    assert "worse in all, colour. Target not reached." in verdicts["part"]
    assert verdicts["self"].endswith("Target not reached.")
    assert any(
        re.match(r"\| control \| 0\.5\d+ \| 0\.\d+ \| ", line) for line in lines
    )  # nothing is told of the control against itself
    assert "| variant | all (n = 144) | colour (n = 24) |" in "\n".join(lines)


def test_figures_and_tables(tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tables, tmp_path / "run")
    monkeypatch.syspath_prepend(str(ROOT / "figures"))
    for model in ("someone/other", "scenes-sd3"):
        monkeypatch.setattr(
            sys, "argv", ["fig10", "--run", str(folder), "--out", str(tmp_path / "out"), "--model", model]
        )
        runpy.run_path(str(ROOT / "figures" / "fig10_magnet.py"), run_name="__main__")
        assert (tmp_path / "out").exists() == (model == "scenes-sd3")
    names = {path.name for path in (tmp_path / "out" / "scenes-sd3").iterdir()}
    drawn = {"fig10_pipeline", "fig11_masks_open", "fig11_masks_unsupervised", "fig12_maps", "fig13_pictures"}
    both = {"table3_clipscore", "table4_alignment"}
    expected = {f"{name}.{kind}" for name in drawn | both for kind in ("png", "pdf")}
    assert names == expected | {f"{name}.csv" for name in (*both, "table5_magnet")}
    world = "measured, weights 01234567"  # they are not those that ship
    table = pd.read_csv(tmp_path / "out" / "scenes-sd3" / "table5_magnet.csv")
    assert set(table["world"]) == {world}
    assert (table["at"] == "reading of layer 4").sum() == 4 * len(VARIANTS)  # softmax and min-max, with and without
    clip = pd.read_csv(tmp_path / "out" / "scenes-sd3" / "table3_clipscore.csv")
    assert clip[clip["world"] == world]["variant"].tolist() == list(VARIANTS)
    assert clip[clip["world"] == "paper"]["mean"].between(25, 29).all()
    compared = importlib.import_module("paper_vs_measured").ours(tmp_path / "out" / "scenes-sd3", False)
    assert compared.empty  # rows of other weights do not stand beside those of the model that ships


def test_the_spread_of_the_seeds_is_in_the_interval(tables: dict[str, Any]) -> None:
    """All images alike: what is left is the seeds' own error, t with 2 degrees of freedom."""
    of = {("class", seed, "present"): counts(share) for seed, share in enumerate((0.5, 0.6, 0.7))}
    of |= {("control", seed, "present"): counts(share) for seed, share in enumerate((0.4, 0.4, 0.4))}
    row = tables["miou_table"](of | {("base", 0, "present"): counts(0.3)}).set_index("variant").loc["class"]
    reach = 4.302652729749464 * 0.1 / np.sqrt(3)
    assert row["seeds"] == 3 and row["miou"] == pytest.approx(0.6)
    assert row["high"] - row["miou"] == pytest.approx(reach)
    assert (row["gain_base"], row["gain_control"]) == pytest.approx((0.3, 0.2))
    assert row["gain_control_low"] == pytest.approx(0.2 - reach)


def test_the_base_model_is_beside_every_seed_of_the_control(tables: dict[str, Any]) -> None:
    of = {("control", seed, "present"): counts(share) for seed, share in enumerate((0.3, 0.4, 0.5))}
    rows = tables["miou_table"](of | {("base", 0, "present"): counts(0.3)}).set_index("variant")
    ends = rows.loc["base", ["gain_control", "gain_control_low", "gain_control_high"]].tolist()
    assert ends == pytest.approx(
        [-rows.loc["control", name] for name in ("gain_base", "gain_base_high", "gain_base_low")]
    )
    assert rows.loc["base", "gain_control"] == pytest.approx(-0.1)


def test_pictures_of_seeds_that_differ_decide_less(tables: dict[str, Any]) -> None:
    def table(shifts: tuple[float, ...]) -> pd.Series:
        frames = [scores("base").assign(training_seed=0)]
        for seed, shift in enumerate(shifts):
            frames.append(scores("control").assign(training_seed=seed))
            frames.append(scores("class", shift).assign(training_seed=seed))
        found = tables["generation_table"](pd.concat(frames), "control")
        return found.set_index(["variant", "category", "metric"]).loc["class", "colour", "facts"]

    def base(shifts: tuple[float, ...]) -> pd.Series:
        frames = [scores("base").assign(training_seed=0)]
        frames += [scores("control", shift).assign(training_seed=seed) for seed, shift in enumerate(shifts)]
        found = tables["generation_table"](pd.concat(frames), "control")
        return found.set_index(["variant", "category", "metric"]).loc["base", "colour", "facts"]

    spread = base((-0.12, -0.02, 0.08))  # the seeds are the control's here
    assert spread["seeds"] == 3
    assert spread["difference_low"] == pytest.approx(0.02 - 4.302652729749464 * 0.1 / np.sqrt(3), abs=1e-3)
    same, apart = table((-0.02, -0.02, -0.02)), table((-0.12, -0.02, 0.08))
    assert same["difference"] == pytest.approx(apart["difference"]) == pytest.approx(-0.02)
    assert same["verdict"] == "no worse" and apart["verdict"] == "undecided"
    assert apart["difference_low"] == pytest.approx(-0.02 - 4.302652729749464 * 0.1 / np.sqrt(3), abs=1e-3)


def test_two_shares_differ_by_no_more_than_one(tables: dict[str, Any]) -> None:
    """Seeds that are far apart: intervals of differences went from -1.5 to 1.5."""
    frames, shifts = [scores("base").assign(training_seed=0)], (-0.6, 0.6, 0.6)
    for seed, shift in enumerate(shifts):
        frames += [scores(name, of).assign(training_seed=seed) for name, of in (("control", 0.0), ("class", shift))]
    found = tables["generation_table"](pd.concat(frames), "control").set_index(["variant", "category", "metric"])
    row = found.loc["class", "colour", "all_right"]
    assert (row["difference_low"], row["difference_high"]) == (-1, 1)
    of = {("class", seed, "present"): counts(share) for seed, share in enumerate((0.1, 0.9, 0.5))}
    of |= {("control", seed, "present"): counts(0.4) for seed in range(3)} | {("base", 0, "present"): counts(0.3)}
    row = tables["miou_table"](of).set_index("variant").loc["class"]
    assert (row["gain_base_low"], row["gain_control_high"]) == (
        pytest.approx(0.2 - 4.302652729749464 * 0.4 / 3**0.5),
        1,
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_show_their_mean_alone(tables: dict[str, Any], tmp_path: Path, seeds: int) -> None:
    """Intervals over two seeds hold the truth in 88 % of samples; over the pictures of one they say nothing of it."""
    of = {("base", 0, "present"): counts(0.3)}
    frames = [scores("base").assign(training_seed=0)]
    for name, seed in ((name, seed) for name in ("control", "class") for seed in range(seeds)):
        of[name, seed, "present"] = counts(0.4 + 0.1 * seed)
        frames.append(scores(name).assign(training_seed=seed))
    miou = tables["miou_table"](of).set_index("variant")
    bounds = [f"{name}{end}" for name in ("", "gain_base_", "gain_control_") for end in ("low", "high")]
    assert miou.loc["class", bounds].isna().all() and miou.loc["class", "gain_base"] > 0.09
    assert miou.loc["base", bounds[:4]].notna().all() and miou.loc["base", bounds[4:]].isna().all()
    for baseline in ("control", "base"):
        found = tables["generation_table"](pd.concat(frames), baseline)
        trained = found[found["variant"] == "class"]
        assert set(trained["verdict"]) == {"too few seeds"} and trained[["low", "difference_high"]].isna().all(None)
    (line,) = tables["verdict"](miou.reset_index(), tables["generation_table"](pd.concat(frames), "control"))
    told = f"`class` ({seeds} seed{'s' if seeds > 1 else ''}): {100 * miou.loc['class', 'gain_base']:+.1f} points over"
    assert told in line and "too few seeds in all, colour" in line and line.endswith("Target not reached.")
