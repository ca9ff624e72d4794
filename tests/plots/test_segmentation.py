"""Figures of segmentation: palettes keep indices, figures show every configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmdit_probe.plots import save
from mmdit_probe.plots.league import head_figure, layer_figure, league_figure, sigma_figure
from mmdit_probe.plots.segmentation import blend, overlay_sheet, palette, write_labels


def table(**columns: list[str]) -> pd.DataFrame:
    """A league with one run per given setting, a ceiling and a random row."""
    count = len(next(iter(columns.values())))
    base = {"protocol": "present", "method": "seg4diff", "refine": "none", "layers": "1", "heads": "mean",
            "sigma": "0.5", "n": 9, "miou_low": 0.2, "miou_high": 0.6, "role": "method", "over": 0.05}  # fmt: skip
    runs = pd.DataFrame({**{name: [value] * count for name, value in base.items()}, **columns})
    runs["miou"] = np.linspace(0.3, 0.5, count)
    beside = {**base, "layers": "", "heads": "", "sigma": "", "over": np.nan, "role": "control"}
    values = {"token-grid ceiling": 0.9, "random": 0.1, "seg4diff, words shifted": 0.2}
    marks = pd.DataFrame([{**beside, "method": name, "miou": value} for name, value in values.items()])
    return pd.concat([runs, marks], ignore_index=True)


def test_labels_keep_their_indices(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 7], [65535, 2, 2]], np.uint16)
    image = Image.open(write_labels(labels, tmp_path / "a.png"))
    assert np.array(image).tolist() == [[0, 1, 7], [255, 2, 2]] and image.mode == "P"
    many = np.array([[0, 300]], np.uint16)
    assert np.array(Image.open(write_labels(many, tmp_path / "b.png"))).tolist() == [[0, 300]]


def test_palette_has_no_twins_among_the_first() -> None:
    colours = palette(24).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(24, dtype=int)
    assert apart.min() > 20 and palette(200).shape == (200, 3)


def test_unlabelled_pixels_are_not_tinted() -> None:
    image = np.full((4, 4, 3), 100, np.uint8)
    labels = np.zeros((4, 4), np.uint16)
    labels[:, 2:] = 65535
    tinted = blend(image, labels)
    assert (tinted[:, 2:] == 100).all() and (tinted[:, :2] != 100).any()


def test_sheet(tmp_path: Path) -> None:
    labels = np.zeros((20, 30), np.uint16)
    labels[:, 15:] = 1
    shares = np.stack([labels == 0, labels == 1]).astype(float)
    figure = overlay_sheet(np.zeros((20, 30, 3), np.uint8), labels, ["cat", "sky"], shares)
    assert {axes.get_title() for axes in figure.axes} >= {"picture", "labels", "cat (max 1.00)", "sky (max 1.00)"}
    assert save(figure, tmp_path / "sheet")[0].stat().st_size > 1000


@pytest.mark.parametrize(
    ("figure", "columns", "marks"),
    [
        (layer_figure, {"layers": ["0", "1", "2"]}, 3),
        (sigma_figure, {"sigma": ["0.1", "0.5"]}, 2),
    ],
)
def test_sweeps_draw_every_point(figure, columns: dict[str, list[str]], marks: int) -> None:
    drawn = figure(table(**columns), "title")
    lines = {line.get_label(): line for line in drawn.axes[0].lines}
    (run,) = drawn.axes[0].containers
    assert run.get_label() == "no refinement"
    assert drawn.get_suptitle().endswith("seg4diff, names of the classes present")
    assert len(run.lines[0].get_xdata()) == marks
    assert "token-grid ceiling" in lines and "random" in lines


def test_heads_and_league() -> None:
    heads = head_figure(table(layers=["0", "0", "1", "1"], heads=["0", "1", "0", "1"]))
    assert heads.axes[0].collections[0].get_array().shape == (2, 2)
    league = league_figure(table(method=["seg4diff", "iseg"], refine=["none", "pamr"]))
    names = [text.get_text() for text in league.axes[0].get_yticklabels()]
    assert names == ["seg4diff", "iseg", "random"]  # shifted words have no row of their own, but are drawn as ticks
    ticks = np.concatenate([line.get_xdata() for line in league.axes[0].lines if line.get_color() == "#888888"])
    assert sorted(ticks[np.isfinite(ticks)]) == pytest.approx([0.25, 0.45])  # the strongest controls of 0.3 and 0.5
    (legend,) = league.legends
    assert {"no refinement", "PAMR"} <= {text.get_text() for text in legend.get_texts()}
