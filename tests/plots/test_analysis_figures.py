"""The figure scripts of the analyses draw run folders that are there, without a model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmdit_probe.results import RunFolder, TableWriter

FIGURES = Path(__file__).parents[2] / "figures"


def folder_with(tmp_path: Path, command: str, tables: dict[str, pd.DataFrame], model: str = "tiny") -> Path:
    folder = RunFolder.open(command, {"model": model}, out=tmp_path / "run")
    for name, table in tables.items():
        with TableWriter(folder.path, name) as writer, writer.item(0) as item:
            item.write(table)
    return folder.path


def draw(script: str, run: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr(sys, "argv", [script, "--run", str(run), "--out", str(out)])
    monkeypatch.syspath_prepend(str(FIGURES))
    runpy.run_path(str(FIGURES / f"{script}.py"), run_name="__main__")
    return {path.name for path in out.glob("*/*")}


def norm_table(layers: int = 3) -> pd.DataFrame:
    rows = []
    for item in range(3):
        for layer in range(layers):
            for head in (-1, 0, 1):
                for token, span, norm in (("image", "all", 1.0), ("text", "word", 2.0), ("text", "pad", 3.0)):
                    rows.append(
                        {"item": item, "prompt": "p", "seed": item, "step": 0, "branch": "cond", "layer": layer,
                         "head": head, "token": token, "span": span, "stream": "", "norm": norm + layer + item,
                         "n_token": 4}
                    )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("model", ["tiny", "somewhere/stable-diffusion-3-medium"])
def test_fig04(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    run = folder_with(tmp_path, "value-norms", {"value_norms": norm_table()}, model)
    names = draw("fig04_value_norms", run, tmp_path / "out", monkeypatch)
    assert names == {f"{n}.{k}" for n in ("fig04_value_norms", "fig28_value_norm_heads") for k in ("png", "pdf", "csv")}
    drawn = pd.read_csv(next((tmp_path / "out").glob("*/fig04*.csv")))
    assert drawn["gap"].tolist() == [1.0, 1.0, 1.0]
    assert ("paper_prompt" in drawn) == ("medium" in model)


def test_fig03(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame(
        [
            {"item": item, "layer": layer, "kind": kind, "class": 0.5 + 0.1 * item, "class_shuffled": 0.2,
             "position": 0.3, "coordinates": 0.1}
            for item in range(3) for layer in range(2) for kind in ("key", "value")
        ]
    )  # fmt: skip
    run = folder_with(tmp_path, "pca", {"pca": table})
    Image.new("RGB", (4, 4)).save(run / "pca_maps.png")
    names = draw("fig03_pca", run, tmp_path / "out", monkeypatch)
    assert names == {"fig29_pca_maps.png", "fig03_pca_scores.png", "fig03_pca_scores.pdf", "fig03_pca_scores.csv"}


def test_fig05(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.experiments.test_perturb import long_table

    run = folder_with(tmp_path, "perturb", {"perturb": long_table(0.3, 0.0)})
    names = draw("fig05_blur", run, tmp_path / "out", monkeypatch)
    assert names == {f"fig18_blur_scores.{kind}" for kind in ("png", "pdf", "csv")}


def test_fig06(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"item": item, "prompt": "p", "seed": item, "layers": layers, "scale": scale, "control": "none",
         "change": 0.1 * scale, "facts": 0.5 + 0.1 * scale}
        for item in range(4) for layers, scale in (("", 0.0), ("1", 1.0), ("1", 2.0))
    ]  # fmt: skip
    run = folder_with(tmp_path, "generate", {"images": pd.DataFrame(rows)})
    names = draw("fig06_guidance", run, tmp_path / "out", monkeypatch)
    assert names == {f"fig06_guidance_scores.{kind}" for kind in ("png", "pdf", "csv")}
    drawn = pd.read_csv(tmp_path / "out" / "tiny" / "fig06_guidance_scores.csv")
    facts = drawn[(drawn["outcome"] == "facts") & (drawn["scale"] == 2)].iloc[0]
    np.testing.assert_allclose([facts["difference"], facts["difference_low"]], [0.2, 0.2], atol=1e-6)
