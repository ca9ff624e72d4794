"""The figure scripts of the analyses draw run folders that are there, without a model."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmdit_probe.experiments import AttentionBudget, Experiment, FeaturePCA, Generate, Perturb, ValueNorms
from mmdit_probe.experiments.attention_budget import summarise
from mmdit_probe.experiments.experiment import plain
from mmdit_probe.experiments.store import FolderStore
from tests.tables import budget_table, by_item

FIGURES = Path(__file__).parents[2] / "figures"
SAMPLED = {"mode": "sample", "steps": [0, 1], "num_steps": 2, "guidance": 7.5, "heads": [0, 1], "items": ["a"]}


def folder_with(
    tmp_path: Path, ask: Experiment, tables: Mapping[str, pd.DataFrame], request: Mapping[str, Any] = SAMPLED,
    model: str = "tiny", arrays: Mapping[str, np.ndarray] | None = None,
) -> Path:  # fmt: skip
    facts = {"model": {"id": model, "heads": 2}, "options": plain(asdict(ask))}
    store = FolderStore.open(ask.name, {"model": model, **request}, facts, out=tmp_path / "run", resume=False)
    with store, store.writing(tuple(tables)), store.task(0, lambda _: None) as record:
        for name, table in tables.items():
            record.write(name, table)
        if arrays is not None:
            record.arrays("shown", **arrays)
    return tmp_path / "run"


def draw(script: str, run: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr(sys, "argv", [script, "--run", str(run), "--out", str(out)])
    monkeypatch.syspath_prepend(str(FIGURES))
    runpy.run_path(str(FIGURES / f"{script}.py"), run_name="__main__")
    return {path.name for path in out.glob("*/*")}


@pytest.mark.parametrize("model", ["tiny", "somewhere/stable-diffusion-3-medium-diffusers"])
def test_fig02(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    items = by_item(AttentionBudget(), budget_table())
    tables = {"attention_budget": budget_table().assign(control="none"), "attention_budget_by_item": items}
    run = folder_with(tmp_path, AttentionBudget(), tables, model=model)
    names = draw("fig02_attention_budget", run, tmp_path / "out", monkeypatch)
    assert names == {f"fig02_attention_budget.{kind}" for kind in ("png", "pdf", "csv")}
    drawn = pd.read_csv(tmp_path / "out" / Path(model).name / "fig02_attention_budget.csv")
    expected = summarise(items[items["branch"] == "cond"])
    pd.testing.assert_frame_equal(drawn[["I2T", "T2I"]], expected[["I2T", "T2I"]], atol=1e-5)


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
    tables = {"value_norms": norm_table(), "value_norms_by_item": by_item(ValueNorms(), norm_table())}
    run = folder_with(tmp_path, ValueNorms(), tables, model=model)
    names = draw("fig04_value_norms", run, tmp_path / "out", monkeypatch)
    assert names == {f"{n}.{k}" for n in ("fig04_value_norms", "fig28_value_norm_heads") for k in ("png", "pdf", "csv")}
    drawn = pd.read_csv(next((tmp_path / "out").glob("*/fig04*.csv")))
    assert drawn["gap"].tolist() == [1.0, 1.0, 1.0]
    assert ("paper_prompt" in drawn) == ("medium" in model)


def test_fig03(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [(item, layer, kind) for item in range(3) for layer in range(2) for kind in ("key", "value")]
    table = pd.DataFrame(
        [
            {"control": "none", "item": item, "layer": layer, "kind": kind, "class": 0.5 + 0.1 * item,
             "class_shuffled": 0.2, "position": 0.3, "coordinates": 0.1}
            for item, layer, kind in cells
        ]
    )  # fmt: skip
    maps = {f"{layer}:{kind}": np.random.default_rng(layer).normal(size=(1, 4, 4, 3)) for _, layer, kind in cells}
    maps["pictures"] = np.zeros((1, 8, 8, 3), np.uint8)
    request = {"kinds": ["key", "value"], "items": [[f"picture {item}", "", item] for item in range(3)]}
    run = folder_with(tmp_path, FeaturePCA(), {"pca": table}, request, arrays=maps)
    names = draw("fig03_pca", run, tmp_path / "out", monkeypatch)
    maps_and_scores = {f"{name}.{kind}" for name in ("fig29_pca_maps", "fig03_pca_scores") for kind in ("png", "pdf")}
    assert names == maps_and_scores | {"fig03_pca_scores.csv"}


def test_one_component_is_grey_and_two_are_two_colours() -> None:
    from mmdit_probe.plots.pca import to_rgb

    maps = np.arange(100.0).reshape(1, 10, 10, 1)
    grey, two = to_rgb(maps), to_rgb(np.concatenate([maps, maps], -1))
    assert (grey == grey[..., :1]).all() and grey[0, 0, 0, 0] == 0 and grey[0, -1, -1, 0] == 1
    assert (two[..., :2] == grey[..., :2]).all() and not two[..., 2].any()


def test_fig05(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.experiments.test_perturb import long_table

    stock = {"condition": "stock", "layer": -1, "head": -1, "span": "all"}
    items = [[f"p{item}", item] for item in range(8)]
    request = {**SAMPLED, "conditions": [["stock", stock, 0.0, None]], "items": items}
    run = folder_with(tmp_path, Perturb(), {"perturb": long_table(0.3, 0.0)}, request)
    names = draw("fig05_blur", run, tmp_path / "out", monkeypatch)
    assert names == {f"fig18_blur_scores.{kind}" for kind in ("png", "pdf", "csv")}


def test_fig06(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (("", 0.0), ("1", 1.0), ("1", 2.0))
    rows = [
        {"item": item, "prompt": "p", "seed": item, "layers": layers, "scale": scale, "control": "none",
         "change": 0.1 * scale, "facts": 0.5 + 0.1 * scale}
        for item in range(4) for layers, scale in settings
    ]  # fmt: skip
    conditions = [
        [f"{layers}-{scale}", {"layers": layers, "scale": scale, "control": "none"}, scale, None]
        for layers, scale in settings
    ]
    request = {**SAMPLED, "conditions": conditions, "items": [[f"p{item}", item] for item in range(4)]}
    run = folder_with(tmp_path, Generate(), {"images": pd.DataFrame(rows)}, request)
    names = draw("fig06_guidance", run, tmp_path / "out", monkeypatch)
    drawn = {f"{name}.{kind}" for name in ("fig06_guidance", "fig06_guidance_scores") for kind in ("png", "pdf")}
    assert names == drawn | {"fig06_guidance_scores.csv"}
    drawn = pd.read_csv(tmp_path / "out" / "tiny" / "fig06_guidance_scores.csv")
    facts = drawn[(drawn["outcome"] == "facts") & (drawn["scale"] == 2)].iloc[0]
    # Four equal rises, and one of their size each way: mean .4 / 3, error .2 / 3, t with 5 degrees of freedom.
    np.testing.assert_allclose(
        [facts["difference"], facts["difference_low"]], [0.2, 0.4 / 3 - 2.570582 * 0.2 / 3], 1e-5
    )
