"""Every figure script measures and draws from nothing but a model that no one has seen before: tiny, random weights."""

from __future__ import annotations

import importlib
import io
import runpy
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmdit_probe.experiments import AttentionBudget, Evaluate, Result

FIGURES = Path(__file__).parents[2] / "figures"
FEW = ["limit=2", "num_steps=2", "prompts=prompts.txt"]


@pytest.fixture
def draw(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a script on the tiny model: the files it wrote, by name. Words with `=` are options of the experiment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FIGURES))
    (tmp_path / "prompts.txt").write_text("a red ring\na cat on grass\n")

    def run(script: str, *arguments: str) -> dict[str, Path]:
        given = [part for text in arguments for part in (("--set", text) if "=" in text else (text,))]
        line = [script, "--model", str(tiny_directory), "--out", str(tmp_path / "out"), *given]
        monkeypatch.setattr(sys, "argv", line)
        said = io.StringIO()
        with redirect_stdout(said):
            runpy.run_path(str(FIGURES / f"{script}.py"), run_name="__main__")
        files = [Path(line) for line in said.getvalue().splitlines() if line.startswith(str(tmp_path / "out"))]
        assert all(path.stat().st_size > 0 for path in files)
        assert {path.with_suffix(".pdf") for path in files if path.suffix == ".png"} <= set(files)
        return {path.name: path for path in files}

    return run


def test_an_option_keeps_the_words_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A written none is the word where there is one, and nothing where the option may be nothing."""
    monkeypatch.syspath_prepend(str(FIGURES))
    given = importlib.import_module("runs").given
    told = SimpleNamespace(set=["sweep=none", "limit=none", "preset=none", "noise_seeds=2", "background=none"])
    expected = {"sweep": "none", "limit": None, "preset": None, "noise_seeds": 2, "background": "none"}
    assert given(told, Evaluate) == expected and Evaluate(**expected).sweep == "none"


def test_what_ships_is_drawn_from_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A clone has no `runs/`: every figure whose drawing code had changed was measured anew, for hours."""
    monkeypatch.syspath_prepend(str(FIGURES))
    runs = importlib.import_module("runs")
    monkeypatch.setattr(runs, "MEASURED", tmp_path)
    asked = AttentionBudget(limit=1, rows="summary", layers="0")
    places: list[Any] = []
    found: list[list[str]] = []

    def measure(self: AttentionBudget, target: Any, out: Any, resume: bool) -> None:
        places.append((str(out), self.limit, resume))
        if out != "auto":
            found.append(sorted(path.name for path in Path(out).glob("*")))
            for name in ("run.json", "0.parquet", "drawn.png"):
                Path(out).mkdir(parents=True, exist_ok=True)
                (Path(out) / name).write_text(name)

    monkeypatch.setattr(AttentionBudget, "run", measure)

    def run(*line: str, experiment: AttentionBudget = asked) -> tuple[str, int, bool]:
        options = runs.options_of("").parse_args([*line])
        runs.run(experiment, runs.model_of(options), options)
        return places[-1]

    kept = run()
    assert Path(kept[0]).parent == tmp_path / "scenes-sd3" and kept[1:] == (1, True)
    shutil.rmtree(kept[0])  # as in a clone, which has the archive alone
    assert run("--device", "cpu", "--out", "elsewhere") == kept
    assert found == [[], ["0.parquet", "run.json"]]
    assert run(experiment=replace(asked, limit=2))[0] not in (kept[0], "auto")
    for given in (["--set", "limit=1"], ["--lora", "somebody/adapter"]):
        assert run(*given)[0] == "auto"
    assert run("--fresh") == kept and found[-1] == []


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("fig02_attention_budget", FEW, {"fig02_attention_budget.png"}),
        ("fig03_pca", ["--images", "scenes:val", "limit=6"], {"fig29_pca_maps.png", "fig03_pca_scores.png"}),
        ("fig04_value_norms", FEW, {"fig04_value_norms.png", "fig28_value_norm_heads.png"}),
        ("fig05_blur", [*FEW, "layers=1"],
         {"fig05_blur.png", "fig05_blur_control.png", "fig18_blur_scores.png"}),
        ("fig06_guidance", [*FEW, "perturb_layers=0,2"],
         {"fig06_guidance.png", "fig06_guidance_scores.png"}),
    ],
)  # fmt: skip
def test_scripts_of_commands(draw, script, arguments, expected):
    files = draw(script, *arguments)
    assert {name for name in files if name.endswith(".png")} == expected
    assert list(Path("runs").glob("*/*/run.json"))


def test_blur_scores_keep_the_no_op_and_the_control(draw):
    scores = pd.read_csv(draw("fig05_blur", *FEW, "layers=1")["fig18_blur_scores.csv"])
    assert set(scores["outcome"]) == {"change"}  # nobody can read this model's images, and no CLIP was given
    assert scores.loc[scores["layer"] == -1, "effect"].item() == 0
    edited = scores[scores["layer"] == 1].iloc[0]
    assert edited["effect"] > 0
    assert edited["control"] > 0


def test_token_maps(draw):
    prompts = ["--marked-prompts", "a [red] [ring]", "--marked-prompts", "a [cat] on [grass]"]
    files = draw("fig09_token_maps", *prompts, "--layers", "1,2", "num_steps=3")
    assert {name for name in files if name.endswith(".png")} == {
        "fig09a_token_maps.png", "fig09b_pad_maps.png", "fig16_i2t_t2i.png", "fig25_all_tokens.png", "fig26_heads.png",
        "fig27_heads.png", "fig30_empty_prompt.png",
    }  # fmt: skip
    masses = pd.read_csv(files["fig26_heads.csv"])
    assert set(masses["word"]) == {"red", "ring"}
    assert len(masses) == 2 * 3 * 2  # words, layers, heads
    assert ((masses["mean"] > 0) & (masses["mean"] <= masses["maximum"]) & (masses["maximum"] < 1)).all()


def test_masks(draw):
    files = draw("fig07_masks", "--limit", "1")
    assert {"fig07_masks_open.png", "fig37_masks_unsupervised.png"} <= set(files)
    scores = pd.read_csv(files["fig07_masks_open.csv"])
    assert scores["right"].between(0, 1).all()
    assert scores["method"].tolist()[:2] == ["seg4diff", "seg4diff + centre+pamr"]


def test_segmentation_league_lists_the_paper_as_another_world(draw):
    files = draw("fig08_segmentation", "--only", "layer", "--limit", "2")
    table = pd.read_csv(files["fig08_miou_by_layer.csv"])
    assert sorted(set(table["layers"].dropna())) == [0, 1, 2]
    assert set(table["world"]) == {"measured"}


def test_a_finished_run_is_drawn_again_and_fresh_measures_anew(draw):
    for more, runs in (((), 1), ((), 1), (("--fresh",), 2)):
        draw("fig02_attention_budget", *FEW, *more)
        assert len(list(Path("runs").glob("*/*/run.json"))) == runs


def test_the_papers_model_is_measured_as_the_paper_did(monkeypatch):
    monkeypatch.syspath_prepend(str(FIGURES))
    runs, fig07, fig08 = (importlib.import_module(name) for name in ("runs", "fig07_masks", "fig08_segmentation"))
    options = runs.options_of("").parse_args(["--model", "stabilityai/stable-diffusion-3-medium-diffusers"])
    model = runs.model_of(options)
    assert (model.options["t5"], model.max_sequence_length) == (False, 77)
    assert runs.paper_step(options) == {"steps": "last-8"}
    read = {name: fig08.settings(options.model, how)["layers"] for name, (_, how) in fig08.RUNS.items()}
    assert read == {"layer": "all", "sigma": "9", "head": "all", "league": "9", "normalisation": "9"}
    assert fig07.settings(options.model) == {"layers": (9,)}
    other = runs.options_of("").parse_args(["--model", "scenes-sd3"])
    assert runs.model_of(other).max_sequence_length is None and runs.paper_step(other) == {}


def test_normalisation_is_measured_before_and_after_the_softmax(draw):
    table = pd.read_csv(
        draw("fig08_segmentation", "--only", "normalisation", "--limit", "1")["table5_normalisation.csv"]
    )
    ours = table[table["world"] == "measured"]
    assert sorted(zip(ours["softmax"], ours["min_max"], strict=True)) == [
        (s, m) for s in (False, True) for m in (False, True)
    ]
    assert ours["miou"].between(0, 1).all() and set(table["world"]) == {"measured", "paper"}


@pytest.fixture
def adapter(tiny_directory, tmp_path):
    from mmdit_probe import load
    from mmdit_probe.magnet.lora import save_lora
    from tests.magnet.test_lora import trained

    save_lora(trained(load(tiny_directory).pipeline).transformer, tmp_path / "lora", {"data": {"data": "sa1b:SA"}})
    return str(tmp_path / "lora")


def test_magnet_of_any_model_with_an_adapter(draw, adapter):
    how = ("--lora", adapter, "--limit", "1")
    files = draw("fig10_magnet", *how, "--marked-prompts", "a [red] [ring]", "--layers", "1,2", "num_steps=2")
    drawn = {"fig10_pipeline", "fig11_masks_open", "fig11_masks_unsupervised", "fig12_maps", "fig13_pictures"}
    assert {Path(name).stem for name in files} == drawn
    files = draw("fig08_segmentation", "--only", "league", *how, "method=seg4diff,seg4diff-unsup", "refine=none")
    table = pd.read_csv(files["table12_league.csv"])
    ours = set(table.loc[table["world"] == "measured", "method"])
    assert {"seg4diff", "seg4diff, LoRA", "seg4diff-unsup, LoRA"} <= ours


def test_the_papers_model_differs_from_the_paper_in_what_was_asked_for_alone(
    draw, adapter, tiny_directory, tmp_path, monkeypatch
):
    """Tiny weights under the name of the paper's model, one picture, layer 1, its own adapter: all else is the
    paper's."""
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / "VOC" / folder).mkdir(parents=True)
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(tmp_path / "VOC/JPEGImages/a.jpg")
    Image.fromarray(np.repeat(np.array([0, 8, 12, 255], np.uint8), 12)[None].repeat(40, 0)).save(
        tmp_path / "VOC/SegmentationClass/a.png"
    )
    (tmp_path / "stable-diffusion-3-medium").symlink_to(tiny_directory)
    own = ("--model", str(tmp_path / "stable-diffusion-3-medium"), "--out", str(tmp_path / "out"))
    for name, method, only in (
        ("voc20", "seg4diff", "league"),
        ("voc21", "seg4diff-unsup", "league"),
        ("voc20", "seg4diff", "normalisation"),
    ):
        league = ("protocol=present", "refine=none") if only == "league" else ()
        how = ("--lora", adapter, "--limit", "1", "layers=1", f"method={method}", *league)
        draw("fig08_segmentation", *own, *how, "--dataset", f"{name}:VOC", "--only", only)
    table = pd.read_csv(draw("paper_vs_measured", *own)["paper_vs_measured.csv"])
    found = table[table["measured"].notna() & table["paper"].notna()]
    assert found["difference"].isna().all() and not found.duplicated(["source", "place", "quantity"]).any()
    other = "measured with layers 1 (the paper: 9); pictures 1 (the paper: 1449)"
    adapted = (f"measured with layers 1 (the paper: 9); adapter {adapter} on SA-1B (the paper: chyun/seg4diff-sa1b-lora"
               " on SA-1B); pictures 1 (the paper: 1449)")  # fmt: skip
    assert {(row.source, row.place): row.why_not for row in found.itertuples()} == {
        ("Table 1", "Seg4Diff (SD3, none)"): other,
        ("Table 1", "Seg4Diff+MAGNET (SD3, SA-1B)"): adapted,
        ("Table 2", "Seg4Diff (SD3, none)"): other,
        ("Table 2", "Seg4Diff+MAGNET (SD3, SA-1B)"): adapted,
        **{("Table 5", f"softmax {s}, min-max {m}"): other for s in ("yes", "no") for m in ("yes", "no")},
    }


@pytest.mark.parametrize(
    ("known", "name"),
    [
        ("scenes-sd3", "scenes-sd3"),
        ("owner/model", "model"),
        ("scenes-sd3+runs/magnet-40/lora", "scenes-sd3+magnet-40"),
        ("owner/model+someone/adapter+int8", "model+adapter+int8"),
    ],
)
def test_figures_of_an_adapted_model_are_named_after_both(known, name):
    assert Result(AttentionBudget(), SimpleNamespace(data={"model": {"id": known}})).model_name == name


@pytest.mark.parametrize(
    ("miou", "prompt", "blurred", "verdicts"),
    [
        ({1: 0.60, 2: 0.30}, 9.0, {1: -0.2}, ["agrees, by disjoint intervals", "agrees", "agrees"]),
        ({1: 0.31, 2: 0.30}, 5.0, {}, ["not decided", "not decided", "not decided"]),
        ({1: 0.60, 2: 0.30}, 2.0, {2: -0.2}, ["agrees, by disjoint intervals", "differs", "differs"]),
        ({1: 0.60, 2: 0.30}, 2.0, {1: -0.3, 2: -0.2}, ["agrees, by disjoint intervals", "differs", "agrees"]),
        ({1: 0.60, 2: 0.30}, 2.0, {1: -0.2, 2: -0.3}, ["agrees, by disjoint intervals", "differs", "differs"]),
        ({1: 0.60, 2: 0.30}, 2.0, {1: -0.2, 2: -0.2}, ["agrees, by disjoint intervals", "differs", "not decided"]),
    ],
)
def test_findings_of_the_paper_are_decided_by_intervals(tmp_path, monkeypatch, miou, prompt, blurred, verdicts):
    """Image values have norm 5; intervals are 0.02 wide for mIoU, 1 for norms. Layer 1 segments best."""
    monkeypatch.syspath_prepend(str(FIGURES))
    layers = pd.DataFrame({"layers": list(miou), "role": "method", "refine": "none", "miou": list(miou.values())})
    layers.assign(miou_low=layers["miou"] - 0.01, miou_high=layers["miou"] + 0.01, n=200).to_csv(
        tmp_path / "fig08_miou_by_layer.csv", index=False
    )
    norms = {"layer": [1, 2], "prompts": 20, "prompt": prompt, "prompt_low": prompt - 0.5, "prompt_high": prompt + 0.5}
    pd.DataFrame(norms | {"image": 5.0, "image_low": 4.5, "image_high": 5.5}).to_csv(
        tmp_path / "fig04_value_norms.csv", index=False
    )
    rows = [
        {"layer": layer, "outcome": "facts", "n": 99, "effect": effect, "low": effect, "high": effect,
         "verdict": "beyond control" if effect else "no effect"}
        for layer, effect in ({1: 0.0, 2: 0.0} | blurred).items()
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "fig18_blur_scores.csv", index=False)
    text = importlib.import_module("paper_findings").markdown(tmp_path, "tiny")
    assert [line.split(" | ")[-1].rstrip(" |") for line in text.splitlines() if line.startswith("| ")][1:] == verdicts


def test_layers_beside_the_paper_are_those_of_the_method_and_not_of_its_controls(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FIGURES))
    row = {"layers": 1, "refine": "none", "dataset": "scenes:val", "miou_low": 0.0, "miou_high": 1.0, "measured_as": ""}
    rows = [row | {"method": "seg4diff", "role": "method", "miou": 0.3},
            row | {"method": "seg4diff, words shifted", "role": "control", "miou": 0.1}]  # fmt: skip
    script = importlib.import_module("paper_vs_measured")
    pd.DataFrame(rows).to_csv(tmp_path / "fig08_miou_by_layer.csv", index=False)
    assert script.ours(tmp_path, False)["measured"].tolist() == [30.0]
    pd.DataFrame([rows[0], rows[0]]).to_csv(tmp_path / "fig08_miou_by_layer.csv", index=False)
    with pytest.raises(ValueError, match="several rows are called"):
        script.ours(tmp_path, False)


def test_the_ablation_s_figure_frames_what_was_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two transformers by three layers: a dot each in every panel, frames around one layer and around all three."""
    monkeypatch.syspath_prepend(str(FIGURES))
    script = importlib.import_module("fig_alignment_ablation")
    rows = [
        {"recipe": recipe, "seed": 0, "layer": layer, "min_max": kind, "miou": 0.1 * (layer + 1), "rank": 3 - layer}
        for recipe in ("layer:1", "all:labels") for layer in range(3) for kind in (False, True)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    assert script.taught("none", [0, 1, 2]) == script.taught(script.RANDOM, [0, 1, 2]) == []
    panels = script.ablation_figure(table, table).axes[:3]
    for axes in panels:
        dots = [tuple(line.get_xydata()[0]) for line in axes.lines]
        assert dots == [(2.5, 0.12), (2.5, 1.12)]  # the last layer is best: greatest mIoU, least rank
        assert sorted(frame.get_xy() for frame in axes.patches) == [(0, 1), (1, 0), (1, 1), (2, 1)]
    told = script.headline(table.assign(n=200), table.assign(n=[8, *[48] * 11]))
    assert told.endswith("; n = 200 scenes (ranks: 8 to 48), 1 seed")
    more = pd.concat([table, table.query("recipe == 'layer:1'").assign(seed=1)]).assign(n=200)
    assert script.headline(more, more).endswith(", 1 seed (labels, layer 1: 2)")


def test_the_committed_sizes_of_the_analyses_are_options_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FIGURES))
    for one in importlib.import_module("fig_analyses").ANALYSES.values():
        asked = one.experiment(**one.how)
        assert {name: getattr(asked, name) for name in one.how} == one.how
