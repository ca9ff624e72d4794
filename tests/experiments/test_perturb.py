"""The perturbation experiment on a tiny model: pairing, no-op, control, and the summary against closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmdit_probe.cli.app import main
from mmdit_probe.errors import UserError
from mmdit_probe.experiments import BlockOperations, Diagnose, FeaturePCA, Generate, Perturb
from mmdit_probe.experiments.outcomes import Change
from mmdit_probe.experiments.perturb import CONTROL, DRAWN, EDIT, NO_OP, STOCK, effect_table, power, summarise
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.plots.perturb import effects_by_layer
from mmdit_probe.results import read_table
from mmdit_probe.results.statistics import interval

PROMPTS = ["a red ring", "a cat", "a blue house"]


def test_no_op_is_exactly_zero_and_images_do_not_depend_on_the_batch(tiny_model: MMDiT) -> None:
    ask = Perturb(prompts=PROMPTS, edit="zero", layers="0-1", num_steps=2, guidance=4.0, seed=7, batch=3)
    tables = [replace(ask, batch=batch).run(tiny_model, progress=False).table for batch in (3, 2)]
    table = tables[0]
    assert len(table) == 3 * (2 + 2 * 2)
    assert (table[table["condition"].isin([STOCK, NO_OP])]["change"] == 0).all()
    assert (table[table["condition"].isin([EDIT, CONTROL])]["change"] > 0).all()
    by = ["item", "condition", "layer"]
    one, two = (t.astype({"condition": str}).sort_values(by).reset_index(drop=True) for t in tables)
    assert one[["item", "seed", "condition", "layer"]].equals(two[["item", "seed", "condition", "layer"]])
    np.testing.assert_allclose(one["change"], two["change"], atol=2e-3)  # 8-bit images round


def test_places(tiny_model: MMDiT) -> None:
    heads = Perturb(layers="1", sweep="head", control="none").conditions(tiny_model, PROMPTS)
    assert [(c.labels["condition"], c.labels["layer"], c.labels["head"]) for c in heads[2:]] == [
        (EDIT, 1, 0), (EDIT, 1, 1),
    ]  # fmt: skip
    spans = Perturb(layers="1", sweep="span", control="none").conditions(tiny_model, PROMPTS)
    assert [c.labels["span"] for c in spans[2:]] == ["word", "bos", "eos", "pad"]
    assert spans[2].edit.spans == ("word",)
    with pytest.raises(UserError, match="layer, head, span"):
        Perturb(sweep="token")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="layer 9"):
        Perturb(layers=9).conditions(tiny_model, PROMPTS)


def long_table(effect: float, random: float, n: int = 8) -> pd.DataFrame:
    """Alignment 0.8 +- noise; the edit of layer 0 takes `effect` off, its control `random`."""
    noise = np.random.default_rng(0).normal(size=(n, 3)) * 0.01
    rows = []
    for item in range(n):
        base = 0.8 + noise[item, 0]
        for kind, layer, facts in (
            (STOCK, -1, base),
            (NO_OP, -1, base),
            (EDIT, 0, base - effect + noise[item, 1]),
            (CONTROL, 0, base - random + noise[item, 2]),
        ):
            rows.append(
                {"item": item, "prompt": "", "seed": item, "control": "budget" if kind == CONTROL else "none",
                 "condition": kind, "layer": layer, "head": -1, "span": "all",
                 "change": 0.0 if layer < 0 else 0.1, "facts": facts, "clip_i": 1.0 if layer < 0 else 0.9}
            )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("effect", "random", "verdict"),
    [
        (0.3, 0.0, "beyond control"),
        (0.3, 0.3, "not beyond control"),
        (0.0, 0.0, "no effect shown"),
        (0.1, 0.3, "not beyond control"),
        (0.1, -0.3, "beyond control"),
    ],
)
def test_summary_compares_with_the_same_prompt_and_seed(effect: float, random: float, verdict: str) -> None:
    summary = summarise(long_table(effect, random)).set_index(["outcome", "layer"])
    row = summary.loc["facts", 0]
    assert row["effect"] == pytest.approx(-effect, abs=0.02)
    assert row["low"] <= row["effect"] <= row["high"]
    assert row["control"] == pytest.approx(-random, abs=0.02)
    assert row["verdict"] == verdict
    assert summary.loc["facts", -1]["effect"] == 0.0  # no-op
    assert summary.loc["change", 0]["effect"] == pytest.approx(0.1)
    assert summary.loc["clip_i", 0]["effect"] == pytest.approx(-0.1)


def test_the_verdict_is_against_the_stronger_control() -> None:
    """Noise that does as much as the edit takes from it what the coherent control does not, and the other way round."""
    weak, strong = long_table(0.3, 0.0), long_table(0.3, 0.3)
    for name, other in (("budget", "noise"), ("noise", "budget")):
        second = strong[strong["condition"] == CONTROL].assign(control=other)
        table = pd.concat([weak.replace({"control": {"budget": name}}), second], ignore_index=True)
        row = summarise(table).set_index(["outcome", "layer"]).loc["facts", 0]
        assert (row["equal"], row["verdict"]) == (other, "not beyond control")
        assert row["control"] == pytest.approx(-0.3, abs=0.02) and row["p_holm"] > 0.05


def test_meaning_comes_first_and_power_is_told() -> None:
    """Effects that spread by .1 tell a drop of .05 (dz = .5) from 34 pairs on (G*Power: two-sided 5 %, power .8);
    where the control spreads as much the other way, the difference has twice the spread: dz = .25 takes 128."""
    table = long_table(0.3, 0.0, n=12)
    assert list(dict.fromkeys(summarise(table)["outcome"])) == ["facts", "clip_i", "change"]
    stock = table[table["condition"] == STOCK].set_index("item")["facts"]
    edited = table["condition"] == EDIT
    spread = 0.1 * np.tile([1.0, -1.0], 6) / np.sqrt(12 / 11)
    table.loc[edited, "facts"] = stock.to_numpy() + spread
    alone = table[table["condition"] != CONTROL]
    assert power(alone) == ["Power: n = 34 would show a drop of 0.05 at every place (80 %, facts)."]
    table.loc[table["condition"] == CONTROL, "facts"] = stock.to_numpy() - spread
    assert power(table) == ["Power: n = 128 would show a drop of 0.05 beyond the control at every place (80 %, facts)."]
    assert power(table.drop(columns="facts")) == []
    even = alone[alone["condition"] == "edit"].assign(layer=1, facts=stock.to_numpy())
    told = power(pd.concat([alone, even], ignore_index=True))
    assert told == ["Power: n = 41 would show a drop of 0.05 at 1 of 2 places, others untold (80 %, facts)."]


def test_a_prompt_that_is_given_twice_is_one_prompt(tiny_model: MMDiT) -> None:
    """Its two images, of two seeds, are averaged; n and the intervals are those of the two prompts."""
    ask = Perturb(prompts=["a cat", "a red ring", "a cat"], edit="zero", layers=0, num_steps=1, guidance=1.0, shown=0)
    result = ask.run(tiny_model, progress=False)
    edited = result.table[result.table["condition"] == EDIT].set_index("item")["change"]
    assert len(edited) == 3 and edited[0] != edited[2]
    row = result.summary.set_index(["outcome", "layer"]).loc["change", 0]
    assert row["n"] == 2 and row["effect"] == pytest.approx(((edited[0] + edited[2]) / 2 + edited[1]) / 2)
    two = np.array([(edited[0] + edited[2]) / 2, edited[1]])
    assert (row["low"], row["high"]) == pytest.approx(interval(two)[1:])


def test_few_prompts_decide_nothing() -> None:
    summary = summarise(long_table(0.3, 0.0, n=3)).set_index(["outcome", "layer"])
    assert summary.loc["facts", 0]["verdict"] == "too few items"


@pytest.mark.parametrize("make", [Perturb, Generate, BlockOperations])
def test_words_that_no_encoder_reads_are_told(make: Any, tiny_model: MMDiT) -> None:
    """The beginning was sampled in silence, and its pictures judged by all of the prompt."""
    notes = make(prompts=["a ring"]).prepare(tiny_model, ["a ring", "ring " * 20 + "house"]).notes
    told = [note for note in notes if "fell off" in note]
    assert len(told) == 1 and "is longer than the text encoders: 'ring ring" in told[0] and "house" in told[0]
    with pytest.raises(UserError, match="is no text: character 2"):
        make(prompts=["a ring"]).prepare(tiny_model, ["a \ud83d ring"])


@pytest.mark.parametrize("make", [Diagnose, FeaturePCA])
def test_captions_that_no_encoder_reads_to_the_end_are_told(make: Any, tiny_model: MMDiT, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("ring " * 20 + "house")
    ask = make(images=str(tmp_path))
    assert "is longer than the text encoders" in " ".join(ask.prepare(tiny_model, ask.gather(False)).notes)


def test_what_no_prompt_states_is_neither_drawn_nor_told() -> None:
    """A caption without one fact of the scenes world, such as any of `everyday`."""
    summary = summarise(long_table(0.3, 0.0, n=3).assign(facts=np.nan, things_right=np.nan))
    (panel,) = [axes for axes in effects_by_layer(summary, DRAWN[:2] + DRAWN[-1:]).axes if axes.axison]
    assert panel.get_title("left") == "change of pixels (RMS)"
    assert effect_table(summary).columns == ["place", "change of pixels (RMS)", "control", "verdict"]


def test_change_is_a_root_mean_square() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert Change()([""], [white], [black])["change"].tolist() == [1.0]  # type: ignore[list-item]
    assert Change()([""], [black], [black])["change"].tolist() == [0.0]  # type: ignore[list-item]


def test_command(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    arguments = ["perturb", "--model", str(tiny_directory), "--prompts", "prompts.txt", "--layers", "0,2"]
    arguments += ["--num-steps", "2", "--guidance", "3", "--edit", "zero", "--batch", "2", "--shown", "1", "--json"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", "run"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 0, err
    document = json.loads(out)
    assert document["no_op_change"] == 0.0
    assert {row["layer"] for row in document["places"]} == {-1, 0, 2}
    table = read_table("run/perturb.parquet")
    assert len(table) == 3 * (2 + 2 * 2)
    names = {path.name for path in Path("run").iterdir()}
    assert {"perturb.png", "perturb_sheet.png", "perturb_sheet_control.png", "perturb_by_place.csv"} <= names
    assert len(list(Path("run/images").iterdir())) == 6
    record = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    assert [edit["edit"] for *_, edit in record["request"]["conditions"][1:3]] == ["Scale", "Scale"]
    with pytest.raises(SystemExit) as stopped:
        main(["perturb", "--model", str(tiny_directory), "--prompts", "a cat", "--kernel", "4"])
    assert stopped.value.code == 2
    assert "odd" in capfd.readouterr().err
