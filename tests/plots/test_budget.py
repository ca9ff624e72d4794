"""The figure shows the numbers of the table, and equal tables give equal files."""

from __future__ import annotations

import numpy as np
import pytest

from mmdit_probe.data import paper_table
from mmdit_probe.experiments import AttentionBudget
from mmdit_probe.experiments.attention_budget import summarise
from mmdit_probe.plots import attention_budget, save
from tests.tables import budget_table, by_item, of_video


@pytest.fixture(scope="module")
def summary():
    items = by_item(AttentionBudget(), budget_table(layers=8))
    return summarise(items[items["branch"] == "cond"])


def bars(axes, label):
    container = next(c for c in axes.containers if c.get_label() == label)
    return np.array([(bar.get_x(), bar.get_width()) for bar in container])


def test_bars_are_the_masses_and_fill_the_row(summary):
    image, text, split = attention_budget(summary).axes
    np.testing.assert_allclose(bars(image, "text keys")[:, 1], summary.I2T)
    np.testing.assert_allclose(bars(image, "text keys").sum(axis=1), 1)
    np.testing.assert_allclose(bars(text, "image keys")[:, 1], summary.T2I)
    np.testing.assert_allclose(bars(split, "words")[:, 1], summary.I2T_word)
    np.testing.assert_allclose(bars(split, "padding").sum(axis=1), summary.I2T)


def test_a_videos_frames_share_the_image_bar(summary):
    items = by_item(AttentionBudget(), of_video(budget_table(layers=8)))
    image, text, _ = attention_budget(summarise(items[items["branch"] == "cond"])).axes
    same, other = (bars(image, f"image keys, {of}") for of in ("same frame", "other frames"))
    np.testing.assert_allclose(same[:, 1], summary.I2I / 3)
    np.testing.assert_allclose(other[:, 1], summary.I2I * 2 / 3)
    np.testing.assert_allclose(other.sum(axis=1), bars(image, "text keys")[:, 0])
    np.testing.assert_allclose(bars(text, "image keys")[:, 1], summary.T2I)


def test_dotted_line_is_uniform_attention(summary):
    image, text, split = attention_budget(summary).axes
    for axes, expected in ((image, 48 / 64), (text, 48 / 64), (split, 16 / 64)):
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in dotted] == [pytest.approx(expected)]


def test_layer_zero_is_on_top_and_gaps_are_closed(summary):
    axes = attention_budget(summary.iloc[[0, 5]]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "5"]
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_paper_values_stand_at_their_layers(summary):
    axes = attention_budget(summary.iloc[[0, 5]], paper=paper_table("budget_by_layer")).axes[1]
    points = next(line for line in axes.lines if line.get_label() == "paper")
    np.testing.assert_allclose(points.get_xdata(), [0.345, 0.605])


def test_equal_figures_are_equal_files(summary, tmp_path):
    first = save(attention_budget(summary, title="tiny"), tmp_path / "a")
    second = save(attention_budget(summary, title="tiny"), tmp_path / "b")
    assert [path.suffix for path in first] == [".png", ".pdf"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png", "b.pdf", "b.png"]
