"""Figures of segmentation: palettes keep indices, figures show every configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmdit_probe.plots import save
from mmdit_probe.plots.league import head_figure, layer_figure, league_figure, sigma_figure
from mmdit_probe.plots.segmentation import (
    blend,
    class_colours,
    overlay_sheet,
    palette,
    write_labels,
)
from mmdit_probe.scenes import CLASSES
from tests.scripts import script

mask_sheet = script("figures/fig07_masks.py").mask_sheet


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


def test_a_class_of_scenes_has_one_colour_whatever_stands_beside_it() -> None:
    one, other = class_colours(["cat", "sky", "ring", "dog"]), class_colours(["ring", "grass", "sky"])
    assert one[2].tolist() == other[0].tolist() == palette(15)[0].tolist() and (one[1] == other[2]).all()
    assert len({tuple(colour) for colour in class_colours([*"abcdefghijkl", *CLASSES])}) == 27


def test_colours_of_scenes_are_told_apart_by_the_colour_blind() -> None:
    """Machado et al. 2009 (severity 1) of linear RGB, then distances in CIELAB."""
    seen = {
        "normal": "1 0 0 0 1 0 0 0 1",
        "protanopia": "0.152286 1.052583 -0.204868 0.114503 0.786281 0.099216 -0.003882 -0.048116 1.051998",
        "deuteranopia": "0.367322 0.860646 -0.227968 0.280085 0.672501 0.047413 -0.011820 0.042940 0.968881",
        "tritanopia": "1.255528 -0.076749 -0.178779 -0.078411 0.930809 0.147602 0.004733 0.691367 0.303900",
    }
    rgb = class_colours(CLASSES) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for name, numbers in seen.items():
        matrix = np.array(numbers.split(), float).reshape(3, 3)
        xyz = np.clip(linear @ matrix.T, 0, 1) @ to_xyz.T / to_xyz.sum(1)
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1000 * np.eye(len(lab))
        assert apart.min() > (20 if name == "normal" else 10), name


def test_names_stand_in_their_regions_or_nowhere() -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 32:], labels[:3, :3] = 1, 2
    image = np.zeros((64, 64, 3), np.uint8)
    figure = mask_sheet([image], [labels], {"seg4diff": [labels]}, ["sand", "ring", "heart"])
    for axes in figure.axes[1:]:
        texts = {text.get_text(): text.get_position() for text in axes.texts}
        assert texts.keys() == {"sand", "ring"}  # the heart is smaller than its name
        assert texts["sand"][0] < 96 < texts["ring"][0]  # drawn three times as large
    assert not figure.axes[0].texts


@pytest.mark.parametrize(("label", "legend"), [(1, {"sand", "ring"}), (255, {"sand", "ring", "no class"})])
def test_the_legend_of_a_sheet_names_what_is_drawn(label: int, legend: set[str]) -> None:
    labels = np.repeat(np.uint8([[0, 1]]), 32, axis=0).repeat(16, axis=1)
    found = np.where(labels == 1, np.uint8(label), labels)
    figure = mask_sheet([np.zeros((32, 32, 3), np.uint8)], [labels], {"seg4diff": [found]}, ["sand", "ring", "heart"])
    assert {text.get_text() for one in figure.legends for text in one.get_texts()} == legend


def test_unlabelled_pixels_are_not_tinted() -> None:
    image = np.full((4, 4, 3), 100, np.uint8)
    labels = np.zeros((4, 4), np.uint16)
    labels[:, 2:] = 65535
    tinted = blend(image, labels, ["ring"])
    assert (tinted[:, 2:] == 100).all() and (tinted[:, :2] != 100).any()


def test_sheet(tmp_path: Path) -> None:
    labels = np.zeros((20, 30), np.uint16)
    labels[:, 15:] = 1
    shares = np.stack([labels == 0, labels == 1]).astype(float)
    figure = overlay_sheet(np.zeros((20, 30, 3), np.uint8), labels, ["cat", "sky"], shares)
    assert {axes.get_title() for axes in figure.axes} >= {"picture", "labels", "cat (max 1.00)", "sky (max 1.00)"}
    assert save(figure, tmp_path / "sheet")[0].stat().st_size > 1000


def test_names_that_look_like_formulas_are_written_as_they_are(tmp_path: Path) -> None:
    labels, shares = np.zeros((60, 60), np.uint16), np.ones((1, 60, 60))
    figure = overlay_sheet(np.zeros((60, 60, 3), np.uint8), labels, ["$\\frac{a$"], shares)
    assert len(figure.axes[1].texts) == 1
    save(figure, tmp_path / "sheet")


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
