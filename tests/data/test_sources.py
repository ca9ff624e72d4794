"""Prompts and pictures from what a user types, the shipped tables, and the room's own examples."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmdit_probe.data import Fit, paper_table, paper_tables, prompts, samples
from mmdit_probe.errors import UserError


@pytest.mark.parametrize("text", ["a cat", "", "a cat: the portrait", "cat and/or dog", "a " * 3000])
def test_plain_text_is_a_prompt(text):
    assert prompts(text) == [text]


def test_sets_and_limits():
    assert len(prompts("everyday")) == len(set(prompts("everyday"))) == 50
    assert prompts("everyday", 3) == prompts("everyday")[:3]
    assert len(prompts("scenes:val")) == 50
    assert len(prompts("scenes:val", 60)) == 60
    assert prompts("scenes:val", 2) == prompts("scenes:val")[:2]


def test_a_folder_is_no_prompts_file(tmp_path):
    with pytest.raises(UserError, match="is a folder; expected a text file"):
        prompts(str(tmp_path))


def test_pictures_are_cropped_at_the_centre_then_resized():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    fitted = np.asarray(Fit.of((10, 30), (20, 20), how="crop").apply(Image.fromarray(wide), smooth=True))
    assert fitted.shape == (20, 20, 3)
    assert fitted.mean() > 240  # squashed, two thirds would be black


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "I;16"):
        path = tmp_path / f"{mode[0]}.png"
        Image.new(mode, (9, 9)).save(path)
        (picture,) = samples(str(path))
        assert picture.open((8, 8)).mode == "RGB"


def test_picture_cut_short_is_refused_when_opened(tmp_path):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    (picture,) = samples(str(path))
    with pytest.raises(UserError, match=r"cut\.jpg' cannot be read as a picture"):
        picture.open((8, 8))


def test_scenes_bring_their_caption_and_name():
    first, second = samples("scenes:val", 2)
    assert (first.name, second.name) == ("scenes:val:0", "scenes:val:1")
    assert first.prompt
    assert first.open((32, 32)).size == (32, 32)


def test_paper_tables_are_complete():
    rows = {name: len(paper_table(name)) for name in paper_tables()}
    assert rows == {
        "budget_by_layer": 24, "clipscore_table": 12, "league_other_protocols": 145, "miou_by_layer": 24,
        "normalisation_ablation": 8, "ovss_table": 45, "t2i_compbench_table": 24, "unsupervised_table": 54,
        "value_norm_by_layer": 24, "vital_layers": 28,
    }  # fmt: skip


def test_paper_budget_adds_up():
    table = paper_table("budget_by_layer")
    np.testing.assert_allclose(table.i2i_sum + table.i2t_sum, 4096)
    np.testing.assert_allclose(table.t2i_sum + table.t2t_sum, 154)
    np.testing.assert_allclose(table.i2t_share, table.i2t_sum / 4096, atol=5e-4)


def test_unknown_paper_table():
    with pytest.raises(UserError, match="unknown paper table 'budget_by_layers': did you mean 'budget_by_layer'"):
        paper_table("budget_by_layers")


@pytest.mark.parametrize("room", ["class_names", "paper", "prompt_sets", "text"])
def test_examples_run(room: str) -> None:
    result = doctest.testmod(importlib.import_module(f"mmdit_probe.data.{room}"))
    assert result.attempted > 0 and result.failed == 0


def test_the_room_is_read_without_torch() -> None:
    code = "import sys; from mmdit_probe.data import *; samples('scenes:val', 1); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
