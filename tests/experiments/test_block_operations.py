"""Operations on blocks one layer at a time: conditions, differences by hand, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmdit_probe import UserError
from mmdit_probe.cli.app import main
from mmdit_probe.experiments import BlockOperations
from mmdit_probe.experiments.block_operations import summarise
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results import read_table
from tests import tiny
from tests.tables import unexplained


def test_each_block_is_operated_on_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MMDiT(tiny.pipeline())
    ask = BlockOperations(prompts=["a red ring", "a cat"], num_steps=2, guidance=3.0, steps="1", control="shuffled")
    result = ask.run(model, progress=False)
    assert unexplained(result) == set()
    moved = result.table.query("control == 'none'").groupby(["condition", "layer"], observed=True)["change"].max()
    assert len(moved) == 1 + 3 * tiny.LAYERS and moved["stock", -1] == 0
    last = ("double", tiny.LAYERS - 1)  # normalises its text, and hands it to no later block
    assert (moved.drop([("stock", -1), last]) > 0).all() and moved[last] == 0
    stock = np.asarray(model.generate("a cat", steps=2, guidance=3.0, seed=1), float)
    from mmdit_probe import probe
    from mmdit_probe.edit import RemoveBlock

    with probe(model, edits=RemoveBlock(layers=[1], steps="1")):
        edited = np.asarray(model.generate("a cat", steps=2, guidance=3.0, seed=1), float)
    row = result.table.query("control == 'none' and condition == 'remove' and layer == 1 and item == 1").iloc[0]
    assert row["change"] == pytest.approx(np.sqrt(((edited - stock) ** 2).mean()) / 255, abs=2e-3)
    assert result.figure().axes and len(result.texts()) == 3


def test_summary_tells_drops_from_rises() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, 12)
    shifts = {("stock", -1): 0.0, ("remove", 0): -0.3, ("double", 0): 0.2, ("double", 1): 0.0}
    table = pd.DataFrame(
        {"item": item, "prompt": "", "seed": item, "control": "none", "condition": name, "layer": layer,
         "change": 0.1 * (shift != 0), "facts": 0.6 + 0.01 * item + shift + (noise[item] if layer >= 0 else 0.0)}
        for (name, layer), shift in shifts.items() for item in range(12)
    )  # fmt: skip
    rows = summarise(table).query("outcome == 'facts'").set_index(["condition", "layer"])
    assert rows.loc[("remove", 0), "difference"] == pytest.approx(-0.3 + noise.mean())
    assert rows["verdict"].to_dict() == {
        ("remove", 0): "lower", ("double", 0): "higher", ("double", 1): "no difference shown"
    }  # fmt: skip
    still = summarise(table).query("outcome == 'change' and condition == 'double' and layer == 1").iloc[0]
    assert still[["difference", "low", "high"]].tolist() == [0, 0, 0]  # a distance is not below 0


def test_refused() -> None:
    with pytest.raises(UserError, match="silence"):
        BlockOperations(operations="silense")
    with pytest.raises(UserError, match="equal size"):
        BlockOperations(control="budget")


def test_enhance_doubles_the_text_without_guidance(tiny_directory: Path, tmp_path: Path, capfd: Any) -> None:
    arguments = ["generate", "--model", str(tiny_directory), "--prompts", "a red ring", "--num-steps", "2"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--enhance", "0,2", "--out", str(tmp_path / "run")])
    assert stopped.value.code in (0, None), capfd.readouterr().err
    table = read_table(tmp_path / "run/images.parquet")
    assert table["layers"].tolist() == ["", "0,2"] and table["scale"].tolist() == [0.0, 0.0]
    assert table["change"].tolist()[0] == 0 < table["change"].tolist()[1]
    assert "text x 2" in capfd.readouterr().out
