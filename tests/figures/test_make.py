"""`make figures` makes what has changed and leaves the rest; the paper is compared only with its own model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

PAPERS = "T5 off, length 77"
FIGURES = Path(__file__).parents[2] / "figures"


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FIGURES))
    return importlib.import_module("make")


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FIGURES))
    return importlib.import_module("paper_vs_measured")


def test_a_script_depends_on_the_drawing_code_that_it_reaches_and_on_no_other(make):
    names = {path.name for path in make.sources(FIGURES / "fig05_blur.py")}
    assert {"fig05_blur.py", "runs.py", "style.py", "perturb.py", "sweep.py"} <= names
    assert not {"norms.py", "pca.py", "probe.py", "value_norms.py"} & names


def test_every_script_of_the_folder_is_made(make):
    scripts = {path.stem for path in FIGURES.glob("*.py")} - {"runs", "make"}
    assert {figure.script for figure in make.FIGURES} == scripts


def test_rebuilds_what_changed(make, tmp_path, monkeypatch, capsys):
    """A script of our own: made once, left alone, and made again when drawing, weights, options or files change."""
    monkeypatch.setattr(make, "HERE", tmp_path)
    script = tmp_path / "fig.py"
    source = (
        "import argparse, pathlib, helper\np = argparse.ArgumentParser()\n"
        "for name in ('model', 'device', 'out', 'clip'): p.add_argument('--' + name)\n"
        "path = pathlib.Path(p.parse_args().out) / 'm' / 'fig.png'\npath.parent.mkdir(parents=True, exist_ok=True)\n"
        "path.write_text('drawn')\nprint(path)\n"
    )
    script.write_text(source)
    (tmp_path / "helper.py").write_text("")
    monkeypatch.setattr(make, "FIGURES", (make.Figure("fig", ("clip",)),))
    weights = {"of": "one"}
    monkeypatch.setattr(make, "weights_of", lambda model: weights["of"])

    def made(*more: str) -> bool:
        monkeypatch.setattr(sys, "argv", ["make", "--model", "m", "--out", str(tmp_path / "out"), *more])
        make.main()
        return "up to date" not in capsys.readouterr().out

    assert made()
    assert not made()
    assert made("--clip", "other")
    assert made()
    weights["of"] = "two"
    assert made()
    (tmp_path / "helper.py").write_text("changed = True")
    assert made()
    (tmp_path / "out/m/fig.png").write_text("altered by hand")
    assert made()
    (tmp_path / "out/m/fig.png").unlink()
    assert made()
    assert not made()
    assert list(json.loads((tmp_path / "out/m/manifest.json").read_text())["fig"]["files"]) == ["fig.png"]
    script.write_text(source + "raise SystemExit(3)\n")
    with pytest.raises(SystemExit, match="failed: fig"):
        made()


def test_the_embedded_weights_count_by_content(make):
    assert len(make.weights_of("scenes-sd3")) == 64
    assert make.weights_of("somebody/not-in-the-cache") == ""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    layers = pd.DataFrame({"layer": [0, 1], "I2T": [0.5, 0.6], "I2T_low": [0.4, 0.5], "I2T_high": [0.6, 0.7]})
    layers = layers.assign(measured_as=PAPERS + ", step 20 of 28, guidance 7.5")
    layers.assign(T2I=0.3, T2I_low=0.2, T2I_high=0.4).to_csv(tmp_path / "fig02_attention_budget.csv", index=False)
    league = pd.DataFrame(
        {"protocol": ["present", "unsupervised", "present", "unsupervised"], "refine": "none",
         "method": ["seg4diff", "seg4diff-unsup"] * 2, "dataset": ["voc20:VOC", "pc60:VOC", "pc59:VOC", "pc59:VOC"],
         "miou": [0.7, 0.5, 0.4, 0.4], "miou_gt": [0.8, 0.6, 0.4, 0.4], "miou_low": 0.1, "miou_high": 0.9,
         "world": "measured"}
    )  # fmt: skip
    read = f"{PAPERS}, sigma 0.515, layers 9"
    league["measured_as"] = [read, read, "T5 on, length own, sigma 0.515, layers 9", read]
    league.to_csv(tmp_path / "table12_league.csv", index=False)
    return tmp_path


def test_the_paper_is_subtracted_only_for_its_own_model(compared, written):
    ours, paper = compared.ours(written, True), compared.paper()
    same = compared.joined(ours, paper, True)
    row = same[(same["source"] == "Fig. 2b, 2c") & (same["place"] == "layer 0") & (same["quantity"] == "I2T")].iloc[0]
    np.testing.assert_allclose([row["measured"], row["paper"]], [0.5, 0.562])
    np.testing.assert_allclose(row["difference"], -0.062)
    seg4diff = same[same["place"] == "Seg4Diff (SD3, none)"].set_index(["source", "quantity"])
    # Table 1 has the rule of the paper's evaluators; Table 2's Pascal Context is the one with background.
    np.testing.assert_allclose(seg4diff.loc[("Table 1", "VOC20"), "difference"], 80 - 89.2)
    np.testing.assert_allclose(seg4diff.loc[("Table 2", "PC59"), "difference"], 50 - 52.6)
    assert seg4diff.loc[("Table 2", "pc59:VOC"), ["paper", "difference"]].isna().all()
    other = seg4diff.loc[("Table 1", "PC59")]
    np.testing.assert_allclose([other["measured"], other["paper"]], [40, 49.0])
    assert pd.isna(other["difference"]) and "T5 on, length own" in other["why_not"]
    assert "no difference: measured with T5 on" in compared.markdown(same, "stable-diffusion-3-medium")
    assert not (same["why_not"].notna() & same["difference"].notna()).any()
    ours = compared.ours(written, False)
    assert not set(ours["place"]) & set(paper.loc[paper["source"] == "Table 1", "place"])
    other = compared.joined(ours, paper, False)
    assert other["difference"].isna().all()
    assert len(other) == len(ours) + len(paper)
    assert set(other.loc[other["paper"].notna(), "world"]) == {"paper: another model and data"}


def test_layers_stay_in_order_and_worlds_are_named(compared, written):
    table = compared.joined(compared.ours(written, False), compared.paper(), False)
    text = compared.markdown(table, "scenes-sd3")
    assert "another world" in text
    assert text.index("| layer 2 |") < text.index("| layer 10 |")
    assert "scenes-sd3: not measured" in text  # Fig. 4 was not drawn
