"""Evidence joined, ranked and compared, on tables whose answers are known, and from run folders of a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmdit_probe import load
from mmdit_probe.cli.app import main
from mmdit_probe.errors import UserError
from mmdit_probe.experiments import Perturb, SelectLayers, evidence
from mmdit_probe.experiments.evidence import EVIDENCE, evidence_names
from mmdit_probe.experiments.options import shared, sources_of
from mmdit_probe.experiments.target import named
from mmdit_probe.experiments.text import TextTable
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results.selection import load_selection
from tests import tiny

LAYERS = 6


def long_table(noise: float = 0.01) -> pd.DataFrame:
    """Two evidences that agree (best at layer 3), one that is their opposite; 10 items."""
    rng = np.random.default_rng(0)
    truth = np.array([0.0, 1, 2, 5, 4, 3])
    rows = []
    for name, values in (("word_mass", truth), ("segmentation", 0.2 + truth / 10), ("value_gap", -truth)):
        for item in range(10):
            for layer in range(LAYERS):
                value = values[layer] + noise * rng.normal()
                rows.append({"evidence": name, "split": "val", "item": item, "layer": layer, "value": value})
    return pd.DataFrame(rows)


def test_values_intervals_and_ranks() -> None:
    table = evidence.by_layer(long_table())
    part = table[table["evidence"] == "word_mass"].set_index("layer")
    assert part["rank"].tolist() == [6, 5, 4, 1, 2, 3]
    assert (part["low"] <= part["value"]).all() and (part["value"] <= part["high"]).all()
    assert part.loc[3, "value"] == pytest.approx(5, abs=0.02)
    assert set(table["n"]) == {10}


def test_agreement_is_the_rank_correlation() -> None:
    pairs = evidence.agreement(long_table(), draws=50).set_index(["first", "second"])
    assert pairs.loc[("word_mass", "segmentation"), "rho"] == pytest.approx(1)
    assert pairs.loc[("word_mass", "value_gap"), "rho"] == pytest.approx(-1)
    noisy = evidence.agreement(long_table(noise=20.0), draws=50)
    assert (noisy["high"] - noisy["low"]).min() > 0.3
    assert set(pairs["layers"]) == {LAYERS}
    # Of 720 orders two agree so well, or so badly; three comparisons are told.
    assert pairs["p_holm"].tolist() == pytest.approx([3 * 2 / 720] * 3)


def test_layers_that_tie_win_equally_often_and_one_without_values_never() -> None:
    """Three layers of equal values: each wins a third of 300 draws, within four binomial standard errors."""
    rows = [{"evidence": "segmentation", "split": "val", "item": item, "layer": layer,
             "value": np.nan if layer == 1 else 0.5} for item in range(9) for layer in range(4)]  # fmt: skip
    shares = evidence.stability(pd.DataFrame(rows), draws=300).set_index("layer")["share"]
    assert set(shares.index) == {0, 2, 3} and shares.sum() == pytest.approx(1)
    assert (shares - 1 / 3).abs().max() < 4 * np.sqrt(2 / 9 / 300)
    table = evidence.by_layer(pd.DataFrame(rows))
    assert table["layer"].tolist() == [0, 2, 3]
    for rule in ("ranks", "median-ranks", "segmentation"):
        assert evidence.choose(table, 1, rule) == (0,) and evidence.level(table, (0,), rule) == (2, 3)
        assert evidence.level(table, (0, 2, 3), rule) == ()
    with pytest.raises(UserError, match="undefined for every item"):
        evidence.by_layer(pd.DataFrame(rows).assign(value=np.nan))


def test_undefined_items_are_left_out_of_every_number() -> None:
    """As many items without the one that has no value in one layer: the same order, the same layers win."""
    long = long_table()
    long.loc[(long["item"] == 4) & (long["layer"] == 3), "value"] = np.nan
    table = evidence.by_layer(long)
    assert set(table.loc[table["layer"] == 3, "n"]) == {9}
    shares = evidence.stability(long, rule="word_mass", draws=50).set_index("layer")["share"]
    assert shares.to_dict() == {layer: float(layer == 3) for layer in range(LAYERS)}
    assert evidence.agreement(long, draws=50)["rho"].abs().tolist() == pytest.approx([1, 1, 1])


def test_the_perturbation_of_a_control_is_beyond_its_own_change_of_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights: .5 - .2; random ones: .4 - .4. Without a change of equal size of its own the control would show
    .4, more than what is measured."""
    moved = {"tiny": (0.5, 0.2), "tiny-random": (0.4, 0.4)}

    def sampled(ask: Perturb, model: MMDiT, **_: object) -> SimpleNamespace:
        assert ask.control == "budget"
        edited, equal = moved[model.name]
        model.generate("a cat", steps=1, guidance=1.0, seed=0, output_type="latent")
        places = [("edit", "none", edited), ("control", "budget", equal), ("control", "noise", 0.0)]
        cells = [(kind, name, value + item / 100, item) for item in range(2) for kind, name, value in places]
        table = pd.DataFrame(cells, columns=["condition", "control", "relabelled", "item"])
        return SimpleNamespace(table=table.assign(layer=0, head=-1, span="all"))

    monkeypatch.setattr(Perturb, "run", sampled)
    amount = evidence.Amount(prompts=2)
    found = evidence.measure("perturbation", MMDiT(tiny.pipeline(), "tiny"), "val", amount, ("random", "shuffled"))
    values = found.groupby("control", sort=False)["value"].agg(list).to_dict()
    assert values == {"none": pytest.approx([0.3, 0.3]), "random": pytest.approx([0.0, 0.0])}


def test_shares_stay_within_their_bounds() -> None:
    """mIoU near 1, skewed: the interval of a mean without bounds would reach beyond."""
    values = [1.0] * 7 + [0.2]
    rows = [{"evidence": "segmentation", "split": "val", "item": item, "layer": 0, "value": value}
            for item, value in enumerate(values)]  # fmt: skip
    (row,) = evidence.by_layer(pd.DataFrame(rows)).to_dict("records")
    assert 0 <= row["low"] < row["value"] == pytest.approx(0.9) and row["high"] == 1


def test_choice_by_ranks_and_by_one_evidence() -> None:
    table = evidence.by_layer(long_table())
    agreed = table[table["evidence"] != "value_gap"]
    assert evidence.choose(agreed, 2) == (3, 4)
    assert evidence.choose(table, 1, "value_gap") == (0,)
    assert evidence.choose(table, 1, "median-ranks") == (3,)  # two against one
    ranks = table.groupby("layer")["rank"].mean()
    assert evidence.choose(table, 1) == (ranks.idxmin(),)
    with pytest.raises(UserError, match="segmentation"):
        evidence.choose(table, 1, "segmentatoin")
    with pytest.raises(UserError, match="1 to 6"):
        evidence.choose(table, 7)


def test_the_rules_of_ranks_differ_by_one_dissenter() -> None:
    """Ranks (1, 1, 4), (2, 2, 1), (3, 4, 3) and (4, 3, 2): means 6/3, 5/3, 10/3, 9/3, medians 1, 2, 3 and 3."""
    ranks = {"word_mass": (1, 2, 3, 4), "value_gap": (1, 2, 4, 3), "segmentation": (4, 1, 3, 2)}
    table = pd.DataFrame(
        {"evidence": name, "layer": layer, "value": -float(rank)}
        for name, of in ranks.items() for layer, rank in enumerate(of)
    )  # fmt: skip
    assert evidence.choose(table, 4, "ranks") == (1, 0, 3, 2)
    assert evidence.choose(table, 4, "median-ranks") == (0, 1, 3, 2)


def test_of_many_layers_that_tie_the_lower_number_comes_first() -> None:
    table = pd.DataFrame({"evidence": "word_mass", "layer": range(60), "value": np.arange(60) % 2})
    assert evidence.choose(table, 60, "word_mass") == (*range(1, 60, 2), *range(0, 60, 2))


def test_layers_are_ranked_among_those_that_all_evidence_has() -> None:
    """Mass is largest in layers 3, 4, 5; maps were measured in 0 to 2 and 5 alone, where 2 is their second and 5 their
    first: of these four, 5 is first in both. Layer 3 has the best mean of its ranks, of one evidence."""
    long = long_table()
    long = long[
        (long["evidence"] == "word_mass") | ((long["evidence"] == "segmentation") & ~long["layer"].isin([3, 4]))
    ]
    table = evidence.by_layer(long)
    assert table.groupby("layer")["rank"].mean().idxmin() == 3
    for rule in ("ranks", "median-ranks"):
        assert evidence.choose(table, 4, rule) == (5, 2, 1, 0)
        shares = evidence.stability(long, 1, rule, draws=50).set_index("layer")["share"]
        assert shares.to_dict() == {layer: float(layer == 5) for layer in range(LAYERS)}
    assert evidence.choose(table, 1, "word_mass") == (3,)
    assert evidence.weights_of(table, (5, 2), "ranks") == pytest.approx((4 / 7, 3 / 7))
    assert evidence.weights_of(table, (3, 4), "ranks", "word_mass") == pytest.approx((6 / 11, 5 / 11))
    apart = table[(table["evidence"] == "segmentation") ^ (table["layer"] > 2)]
    with pytest.raises(UserError, match="no layer has a value of each of word_mass, segmentation"):
        evidence.choose(apart)


def test_weights_follow_ranks_and_controls_are_not_ranked() -> None:
    long = long_table().assign(control="none")
    table = evidence.by_layer(long)
    assert evidence.weights_of(table, (3, 4)) == (0.5, 0.5)
    first, second = evidence.weights_of(table[table["evidence"] == "word_mass"], (3, 4), "ranks")
    assert (first, second) == (pytest.approx(6 / 11), pytest.approx(5 / 11))
    with pytest.raises(UserError, match="equal"):
        evidence.weights_of(table, (3,), "even")
    louder = pd.concat([long, long.assign(control="random", value=long["value"] + 100)])
    pd.testing.assert_frame_equal(evidence.by_layer(louder), table)
    pd.testing.assert_frame_equal(evidence.agreement(louder, draws=20), evidence.agreement(long, draws=20))


def test_what_cannot_be_selected_is_refused_before_it_is_measured() -> None:
    """Heads beyond the model's were cut to those there are; a rule without its evidence failed after the measuring."""
    model = MMDiT(tiny.pipeline("sd3"))
    with pytest.raises(UserError, match="--top-heads 3: expected at most 2 heads"):
        SelectLayers(evidence="word_mass", top_heads=3).prepare(model, None)
    for asked in ({"top": 9}, {"top_heads": 5}):  # of a name, from its configuration: the model was loaded for it
        with pytest.raises(UserError, match=r"--top 9: expected 1 to 8 layers|--top-heads 5: expected at most 4 heads"):
            named("scenes-sd3", SelectLayers(evidence="word_mass", **asked))
    with pytest.raises(UserError, match=r"unknown rule 'segmentation'.* Known: ranks, median-ranks, word_mass"):
        SelectLayers(evidence="word_mass", rule="segmentation").prepare(model, None)
    with pytest.raises(UserError, match="--top-heads are selected by their maps on scenes"):
        SelectLayers(runs=["runs/budget"], top_heads=1).gather(False)
    with pytest.raises(UserError, match=r"'runs/gone' is no run folder of"):  # before the model is loaded
        SelectLayers(runs=["runs/gone"]).gather(False)


def test_correlations_of_two_evidences_and_of_two_splits_are_told() -> None:
    both = pd.concat([long_table(), long_table().assign(split="test")], ignore_index=True)
    both = both[both["evidence"].isin(["word_mass", "value_gap"])]
    ask = SelectLayers(evidence="word_mass,value_gap")
    data: Any = SimpleNamespace(summary=evidence.by_layer(both), table=both, path=None)
    data.data = {"model": {"id": "tiny", "weight_hash": "0" * 16}}
    data.frames = ask.frames(data)
    (table,) = (one for one in ask.tell(data) if isinstance(one, TextTable) and one.title.startswith("rank correl"))
    assert table.title == f"rank correlation over {LAYERS} layers, 95 % interval over items"
    assert [(*row[:2], row[2][:5]) for row in table.rows] == [
        ("word_mass", "itself on test", "+1.00"), ("value_gap", "itself on test", "+1.00"),
        ("word_mass", "value_gap", "-1.00"),
    ]  # fmt: skip


def test_names() -> None:
    assert evidence_names(None, False) == evidence_names("all", True) == list(EVIDENCE)
    assert evidence_names(None, True) == []
    assert evidence_names("segmentation, word_mass", False) == ["segmentation", "word_mass"]
    assert evidence_names("word_mass,word_mass", False) == ["word_mass"]
    with pytest.raises(UserError, match="value_gap"):
        evidence_names("value_gaps", False)


def test_a_prompt_that_a_run_was_given_twice_is_one_item(tiny_model: MMDiT, tmp_path: Path) -> None:
    prompts = ["a red ring", "a cat", "a red ring"]
    ask = Perturb(prompts=prompts, edit="zero", layers=0, num_steps=1, guidance=1.0, shown=0, control="none")
    table = ask.run(tiny_model, out=tmp_path / "twice", progress=False).table
    ring, cat, again = table[table["condition"] == "edit"].sort_values("item")["change"]
    assert ring != again
    found = evidence.from_run(tmp_path / "twice", tiny_model, {})
    assert dict(zip(found["item"], found["value"], strict=True)) == {0: pytest.approx((ring + again) / 2), 1: cat}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_from_run_folders_to_a_selection(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """Any model: run the analyses, join their folders."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_directory), "-q"]
    pictures = ["--images", "scenes:val", "--limit", "3", "--prompts", "a red ring"]
    assert run("value-norms", *model, *pictures, "--out", "norms") == 0
    assert run("attention-budget", *model, *pictures, "--out", "budget") == 0
    prompts = ["--prompts", "a red ring", "--num-steps", "1", "--guidance", "1", "--edit", "zero"]
    assert run("perturb", *model, *prompts, "--out", "perturb") == 0
    capfd.readouterr()
    folders = ["--from", "norms", "--from", "budget", "--from", "perturb"]
    assert run("select-layers", *model[:2], *folders, "--top", "2", "--out", "chosen", "--json") == 0
    document = json.loads(capfd.readouterr().out)
    selection = load_selection("chosen")
    assert list(selection.layers) == document["layers"] and len(selection.layers) == 2
    assert {row["evidence"] for row in selection.evidence} == {"word_mass", "value_gap", "perturbation"}
    assert Path("chosen/select_layers.png").exists()
    masses = evidence.word_mass(pd.read_parquet("budget/attention_budget_by_item.parquet"))
    assert set(masses["layer"]) == {0, 1, 2} and (masses["value"] > 0).all()

    with pytest.raises(UserError, match=r"'norms' was measured on scenes:val, which is reported on"):
        evidence.from_run("norms", load(tiny_directory), {}, kept="scenes:val")
    assert run("select-layers", "--model", str(tiny_directory), "--from", "chosen") == 2
    assert "no run folder" in capfd.readouterr().err
    assert run("select-layers", "--model", str(tiny_directory), "--from", "norms", "--no-t5") == 2
    assert "text encoded in another way (the model's own way; here: no_t5=True)" in capfd.readouterr().err
    assert run("select-layers", "--model", str(tiny_directory), "--from", "norms", "--from", "norms") == 2
    assert "evidence 'value_gap' is given twice" in capfd.readouterr().err
    assert run("select-layers", "--model", str(tiny_directory), "--split", "test") == 2
    assert "another" in capfd.readouterr().err
    assert run("select-layers", "--model", str(tiny_directory), "--rule", "rank") == 2
    assert "ranks" in capfd.readouterr().err


def test_what_is_measured_where_nothing_is_named_counts_as_measured() -> None:
    """Runs of the default scenes were evidence for layers that were reported on the same ones."""
    assert sources_of({"images": None, "prompts": None, "num_steps": 28}, True) == ["scenes:val"]
    assert sources_of({"images": None, "prompts": None, "num_steps": 28}, False) == []
    assert sources_of({"images": None, "prompts": "a cat"}, True) == ["a cat", "scenes:val"]  # the pictures' text
    assert sources_of({"images": None, "prompts": ["a cat", "a dog"], "num_steps": 28}, True) == ["a cat", "a dog"]
    assert sources_of({"images": "scenes", "prompts": None}, True) == ["scenes:val"]
    assert sources_of({"dataset": "scenes:test"}, True) == ["scenes:test"]
    assert sources_of({"split": "train"}, True) == ["scenes:train"]
    assert shared(["scenes:test", "scenes:val"], ["scenes:val:3"]) == "scenes:val"
    assert shared(["scenes:val:3"], ["scenes:val"]) == "scenes:val:3"
    assert shared(["scenes:val:3", "a cat"], ["scenes:val:33", "a"]) == ""


def test_runs_of_the_default_scenes_are_not_reported_on_these(tiny_model: MMDiT, tmp_path: Path) -> None:
    """A model of the scenes world reads scenes:val where no prompt is named."""
    known = MMDiT(tiny_model.pipeline, "scenes-sd3")
    asked = Perturb(limit=1, edit="zero", layers=0, num_steps=1, guidance=1.0, shown=0, control="none", clip="none")
    asked.run(known, out=tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="measured on scenes:val, which is reported on"):
        evidence.from_run(tmp_path / "run", known, {}, kept="scenes:val")
    assert len(evidence.from_run(tmp_path / "run", known, {}, kept="scenes:test"))

    chosen = SelectLayers(runs=[tmp_path / "run"]).run(known, out=tmp_path / "chosen", progress=False)
    assert chosen.experiment.selected(chosen).how["selected_on"] == ["scenes:val"]
    again = replace(asked, layers="all", selection=tmp_path / "chosen")
    told = "the layers were selected on scenes:val, too: report on others, such as scenes:test"
    assert told in again.run(known, progress=False).data["remarks"]
    other = replace(again, prompts="scenes:test").run(known, progress=False)
    assert told not in other.data["remarks"]
