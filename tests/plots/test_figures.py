"""The figure scripts draw a run folder that is there, without a model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
from mmdit_probe.cli.attention_budget import budget_rows
from mmdit_probe.experiments.budget_summary import summarise

from mmdit_probe.data import paper_table
from mmdit_probe.results import RunFolder, TableWriter
from tests.tables import budget_table

SCRIPT = Path(__file__).parents[2] / "figures" / "fig02_attention_budget.py"


@pytest.mark.parametrize("model", ["tiny", "somewhere/stable-diffusion-3-medium-diffusers"])
def test_fig02_from_a_run_folder(tmp_path, monkeypatch, model):
    folder = RunFolder.open("attention-budget", {"model": model}, out=tmp_path / "run")
    table = budget_table()
    with TableWriter(folder.path, "attention_budget") as writer:
        for index, rows in table.groupby("item"):
            with writer.item(index) as item:
                item.write(rows)
    monkeypatch.setattr(sys, "argv", ["fig02", "--run", str(folder.path), "--out", str(tmp_path / "out")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    out = tmp_path / "out" / Path(model).name
    assert {path.name for path in out.iterdir()} == {f"fig02_attention_budget.{kind}" for kind in ("png", "pdf", "csv")}
    drawn = pd.read_csv(out / "fig02_attention_budget.csv")
    pd.testing.assert_frame_equal(drawn[["I2T", "T2I"]], summarise(table)[["I2T", "T2I"]], atol=1e-5)


def test_terminal_table_puts_the_paper_beside_ours():
    table = budget_rows(summarise(budget_table()), paper_table("budget_by_layer"))
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["layer"] == ["0", "1", "2", "3", "4", "5"]
    assert cells["I2T"][0] == ".110 (.250)"
    assert cells["paper I2T"][:2] == [".562", ".856"]
    assert cells["paper T2I"][:2] == [".345", ".869"]
    assert "to words" in cells
    assert "to null slots" not in cells
