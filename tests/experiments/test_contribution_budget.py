"""contribution-budget: the table's rows reduced by hand, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmdit_probe.cli.app import main
from mmdit_probe.experiments import ContributionBudget, read
from mmdit_probe.models.mmdit import MMDiT
from tests import tiny


def test_summary_is_the_mean_over_steps_then_prompts() -> None:
    run = ContributionBudget(prompts=["a red ring", "a cat"], num_steps=2, guidance=3.0, control="uniform")
    result = run.run(MMDiT(tiny.pipeline()), progress=False)
    table = result.table.query("control == 'none' and branch == 'cond' and head == -1 and stream == ''")
    words = table.query("layer == 1 and span == 'word' and word == ''").set_index(["item", "step"])
    whole = table.query("layer == 1 and key == 'all'").set_index(["item", "step"])["norm"]
    row = result.summary.set_index(["layer", "group"]).loc[(1, "word")]
    assert row["n"] == 2
    relative = (words["norm"] / whole).groupby("item").mean().mean()
    assert row["relative"] == pytest.approx(relative, rel=1e-5)
    assert row["norm"] == pytest.approx(words["norm"].groupby("item").mean().mean(), rel=1e-5)
    assert 0 < row["mass"] < 1 and -1 <= row["cosine"] <= 1
    assert result.summary.set_index(["layer", "group"]).loc[(1, "all"), "relative"] == pytest.approx(1)
    assert set(result.claims["control"]) == {"uniform"} and len(result.claims) == 2 * tiny.LAYERS


def test_command(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["contribution-budget", "--model", str(tiny_directory), "--prompts", "a red ring", "--num-steps", "1"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--layers", "0,2", "--out", "run", "--json"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 0, err
    assert {row["layer"] for row in json.loads(out)["layers"]} == {0, 2}
    names = {path.name for path in Path("run").iterdir()}
    assert {"contribution_budget.png", "contribution_budget_by_word.csv", "contribution_budget_by_head.csv"} <= names
    assert "words" in read("run").texts()[0].columns  # type: ignore[union-attr]
