"""`make figures` makes what has changed and leaves the rest; the paper is compared only with its own model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

NAMED = ("text: T5 off, length 77; sigma: 0.515; layers: 9; heads: mean; draws: 1; fit: squash; size: own;"
         " reference: none; options: none; refine: none; background: none; matching: none; compared: own size;"
         " pictures: 1449; adapter: none")  # fmt: skip
UNNAMED = (NAMED.replace("options: none", "options: axis=token, kinds=all, streams=clip, tau=0.1")
           .replace("matching: none; compared: own size", "matching: image; compared: short:640"))  # fmt: skip
SAMPLED = "text: T5 off, length 77; mode: sample; guidance: 7.5; step: 20 of 28; heads: all; prompts: 50 of drawbench"
"""How arXiv:2509.18096 measured: section 3.3 and appendix A, and the released code."""
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
    of_ablation = make.sources(FIGURES / "fig_alignment_ablation.py")  # it reads recipes as the training does
    assert FIGURES.parent / "training" / "align.py" in of_ablation


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
    monkeypatch.setattr(make, "model_name", str)

    def made(*more: str) -> bool:
        monkeypatch.setattr(sys, "argv", ["make", "--model", "m", "--out", str(tmp_path / "out"), *more])
        make.main()
        return "up to date" not in capsys.readouterr().out

    assert made()
    assert not made()
    assert made("--clip", "other")
    (tmp_path / "clip").mkdir()
    for content in ("one", "another"):  # under the same path
        (tmp_path / "clip" / "model.safetensors").write_text(content)
        assert made("--clip", str(tmp_path / "clip")) and not made("--clip", str(tmp_path / "clip"))
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
    layers = layers.assign(measured_as=[SAMPLED, SAMPLED.replace("50 of drawbench", "20 of default")])
    layers.assign(T2I=0.3, T2I_low=0.2, T2I_high=0.4).to_csv(tmp_path / "fig02_attention_budget.csv", index=False)
    league = pd.DataFrame(
        {"protocol": ["present", "unsupervised", "present", "unsupervised"], "refine": "none",
         "method": ["seg4diff", "seg4diff-unsup"] * 2, "dataset": ["voc20:VOC", "pc60:VOC", "pc59:VOC", "pc59:VOC"],
         "miou": [0.7, 0.5, 0.4, 0.4], "miou_gt": [0.8, 0.6, 0.4, 0.4], "miou_low": 0.1, "miou_high": 0.9,
         "world": "measured"}
    )  # fmt: skip
    on_pc = UNNAMED.replace("1449", "5104")
    league["measured_as"] = [NAMED, on_pc, NAMED.replace("T5 off, length 77", "T5 on, length own"), on_pc]
    league.to_csv(tmp_path / "table12_league.csv", index=False)
    return tmp_path


def test_the_paper_is_subtracted_only_for_its_own_model(compared, written):
    ours, paper = compared.ours(written, True), compared.paper()
    same = compared.joined(ours, paper, True)
    row = same[(same["source"] == "Fig. 2b, 2c") & (same["place"] == "layer 0") & (same["quantity"] == "I2T")].iloc[0]
    np.testing.assert_allclose([row["measured"], row["paper"]], [0.5, 0.562])
    np.testing.assert_allclose(row["difference"], -0.062)
    row = same[(same["source"] == "Fig. 2b, 2c") & (same["place"] == "layer 1") & (same["quantity"] == "I2T")].iloc[0]
    assert pd.isna(row["difference"])
    assert row["why_not"] == "measured with prompts 20 of default (the paper: 50 of drawbench)"
    seg4diff = same[same["place"] == "Seg4Diff (SD3, none)"].set_index(["source", "quantity"])
    # Table 1 has the rule of the paper's evaluators; Table 2's Pascal Context is the one with background.
    np.testing.assert_allclose(seg4diff.loc[("Table 1", "VOC20"), "difference"], 80 - 89.2)
    np.testing.assert_allclose(seg4diff.loc[("Table 2", "PC59"), "difference"], 50 - 52.6)
    assert seg4diff.loc[("Table 2", "pc59:VOC"), ["paper", "difference"]].isna().all()
    other = seg4diff.loc[("Table 1", "PC59")]
    np.testing.assert_allclose([other["measured"], other["paper"]], [40, 49.0])
    assert pd.isna(other["difference"])
    assert other["why_not"] == ("measured with text T5 on, length own (the paper: T5 off, length 77); "
                                "pictures 1449 (the paper: 5104)")  # fmt: skip
    assert "no difference: measured with text T5 on" in compared.markdown(same, "stable-diffusion-3-medium")
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


def test_a_difference_is_taken_only_between_like_protocols(compared, written):
    """Every setting by itself: a subset, another fit, size, heads, options, ... is not the paper's protocol."""
    league = pd.read_csv(written / "table12_league.csv").iloc[:1]

    def cell(how: str | None) -> pd.Series:
        league.assign(measured_as=how).to_csv(written / "table12_league.csv", index=False)
        table = compared.joined(compared.ours(written, True), compared.paper(), True)
        return table[(table["place"] == "Seg4Diff (SD3, none)") & (table["quantity"] == "VOC20")].iloc[0]

    assert cell(NAMED)["difference"] == pytest.approx(80 - 89.2)
    others = {"sigma": "0.3", "layers": "8", "heads": "0,1", "draws": "2", "fit": "crop", "size": "512x512",
              "reference": "read", "options": "reduce=sum", "background": "power:2", "compared": "128x128",
              "pictures": "20", "adapter": "me/lora on COCO"}  # fmt: skip
    for name, value in others.items():
        paper = compared.settings(NAMED)[name]
        found = cell(compared.as_measured(**compared.settings(NAMED) | {name: value}))
        assert pd.isna(found["difference"]) and pd.notna(found["measured"])
        assert found["why_not"] == f"measured with {name} {value} (the paper: {paper})"
    unknown = cell(None)
    assert pd.isna(unknown["difference"]) and unknown["why_not"] == "measured with unknown settings"


def test_rows_of_an_adapter_stand_beside_the_papers_magnet_and_leave_the_base_alone(compared, tmp_path):
    papers = "chyun/seg4diff-coco-lora on COCO"
    league = pd.DataFrame(
        {"method": ["seg4diff", "seg4diff, LoRA", "seg4diff-unsup, LoRA", "seg4diff, LoRA", "seg4diff, LoRA"],
         "protocol": ["present", "present", "unsupervised", "present", "present"], "refine": "none",
         "dataset": ["voc20:VOC", "voc20:VOC", "pc60:VOC", "ade20k:ADE", "pc59:VOC"], "world": "measured",
         "miou": [0.7, 0.8, 0.5, 0.3, 0.2], "miou_gt": [0.7, 0.8, 0.6, 0.3, 0.2],
         "measured_as": [NAMED, NAMED.replace("adapter: none", f"adapter: {papers}"),
                         UNNAMED.replace("adapter: none", f"adapter: {papers}").replace("1449", "5104"),
                         NAMED.replace("adapter: none", "adapter: runs/mine/lora on SA-1B").replace("1449", "2000"),
                         NAMED.replace("adapter: none", "adapter: runs/mine/lora on other data")]}
    )  # fmt: skip
    league.to_csv(tmp_path / "table12_league.csv", index=False)
    readings = pd.DataFrame(
        {"world": "measured", "at": "reading", "variant": ["base", "LoRA"], "dataset": "voc20:VOC", "softmax": True,
         "min_max": False, "miou_gt": [0.9, 0.95], "miou": [0.8, 0.85], "low": 0.7, "high": 0.95,
         "measured_as": NAMED.replace("options: none", "options: softmax=joint")}
    )  # fmt: skip
    readings.to_csv(tmp_path / "table5_normalisation.csv", index=False)
    table = compared.joined(compared.ours(tmp_path, True), compared.paper(), True)
    cells = table.set_index(["source", "place", "quantity"])
    assert cells.index.is_unique
    values = {
        ("Table 1", "Seg4Diff (SD3, none)", "VOC20"): (70, 89.2, 70 - 89.2),
        ("Table 1", "Seg4Diff+MAGNET (SD3, COCO)", "VOC20"): (80, 89.8, 80 - 89.8),
        ("Table 2", "Seg4Diff+MAGNET (SD3, COCO)", "PC59"): (50, 53.5, 50 - 53.5),
        ("Table 1", "Seg4Diff+MAGNET (SD3, SA-1B)", "ADE20K-150"): (30, 34.7, np.nan),
        ("Table 1", "seg4diff, LoRA [present]", "PC59"): (20, np.nan, np.nan),
        ("Table 5", "softmax yes, min-max no", "VOC20"): (90, 89.0, 1.0),
        ("Table 5", "softmax yes, min-max no, LoRA, reading", "VOC20"): (95, np.nan, np.nan),
    }
    for place, want in values.items():
        np.testing.assert_allclose(cells.loc[place, ["measured", "paper", "difference"]].astype(float), want, atol=1e-9)
    mine = cells.loc[("Table 1", "Seg4Diff+MAGNET (SD3, SA-1B)", "ADE20K-150"), "why_not"]
    assert mine == "measured with adapter runs/mine/lora on SA-1B (the paper: chyun/seg4diff-sa1b-lora on SA-1B)"


def test_an_adapter_is_named_with_the_data_it_was_trained_on(make, tmp_path):
    from safetensors.numpy import save_file

    runs = importlib.import_module("runs")
    (tmp_path / "coco").mkdir()  # what the record says counts, not the folder's name
    header = {"mmdit_probe": json.dumps({"data": {"data": "sa1b:root"}})}
    save_file({"a": np.zeros(1)}, tmp_path / "coco" / "pytorch_lora_weights.safetensors", header)
    assert runs.adapter_of(str(tmp_path / "coco")) == f"{tmp_path / 'coco'} on SA-1B"
    assert runs.adapter_of("chyun/seg4diff-coco-lora") == "chyun/seg4diff-coco-lora on COCO"
    assert runs.adapter_of("me/lora") == "me/lora on other data" and runs.adapter_of(None) == "none"


def test_committed_tables_name_options_that_methods_have(compared):
    from mmdit_probe.segment.methods import METHODS

    named = 0
    for name in ("fig08_miou_by_layer", "fig15_miou_by_sigma", "fig17_miou_by_head", "table12_league"):
        table = compared.read(FIGURES / "out" / "scenes-sd3", name)
        for row in table[table["method"].isin(METHODS)].to_dict("records"):
            told = compared.settings(row["measured_as"])["options"].split(", ")
            options = {one.partition("=")[0] for one in told if one != "none"}
            assert options <= set(METHODS[row["method"]].defaults), (name, row["method"], options)
            named += len(options)
    assert named > 100
