"""Overlays light the place that the map names, at any size and shape."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from mmdit_probe.errors import UserError
from mmdit_probe.plots.overlay import PictureMaps, WordMap, colours, maps_sheet, overlay

GREY = Image.new("RGB", (96, 64), (128, 128, 128))


def one_hot(rows: int, columns: int, y: int, x: int) -> np.ndarray:
    heat = np.zeros((rows, columns), np.float32)
    heat[y, x] = 0.2
    return heat


def brightest(picture: Image.Image) -> tuple[int, int]:
    """(row, column) of the yellow that stands for the maximum: red and green high, blue low."""
    pixels = np.asarray(picture).astype(int)
    score = pixels[..., 0] + pixels[..., 1] - pixels[..., 2]
    rows, columns = (score == score.max()).nonzero()
    return int(rows.mean()), int(columns.mean())


@pytest.mark.parametrize(("rows", "columns", "y", "x"), [(4, 6, 1, 4), (4, 6, 3, 0), (8, 8, 2, 5), (64, 96, 10, 70)])
def test_a_single_token_lights_its_own_place(rows: int, columns: int, y: int, x: int) -> None:
    found = overlay(GREY, one_hot(rows, columns, y, x))
    assert found.size == GREY.size
    row, column = brightest(found)
    assert abs(row - (y + 0.5) * 64 / rows) <= 64 / rows / 2
    assert abs(column - (x + 0.5) * 96 / columns) <= 96 / columns / 2


def test_between_tokens_it_is_bilinear() -> None:
    heat = np.array([[0.0, 1.0]], np.float32)
    line = np.asarray(overlay(Image.new("RGB", (8, 1)), heat, 1.0))[0]
    expected = [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
    table = np.array(colours())
    levels = [int(np.abs(table - colour).sum(1).argmin()) / 255 for colour in line]
    np.testing.assert_allclose(levels, expected, atol=0.01)


def test_colours_end_at_the_maps_own_minimum_and_maximum() -> None:
    heat = np.array([[0.1, 0.3], [0.2, 0.2]], np.float32)
    found = np.asarray(overlay(Image.new("RGB", (2, 2)), heat, 1.0))
    assert found[0, 0].tolist() == colours()[0]
    assert found[0, 1].tolist() == colours()[255]
    even = np.asarray(overlay(Image.new("RGB", (2, 2)), np.full((2, 2), 0.3), 1.0))
    assert (even == colours()[0]).all()


def test_strength_runs_from_the_grey_picture_to_the_map() -> None:
    red = Image.new("RGB", (4, 4), (200, 10, 10))
    assert (np.asarray(overlay(red, one_hot(2, 2, 0, 0), 0.0)) == np.asarray(red.convert("L"))[..., None]).all()
    with pytest.raises(UserError, match="strength 2"):
        overlay(red, one_hot(2, 2, 0, 0), 2)
    with pytest.raises(UserError, match=r"\(h, w\); found \(3, 2, 2\)"):
        overlay(red, np.zeros((3, 2, 2)))


def test_rows_that_go_on_with_a_prompt_are_not_told_as_an_empty_one() -> None:
    """Of two prompts, the second row of one with more than five words was "(empty)"."""
    several = PictureMaps(GREY, "a b c d e f", {word: one_hot(4, 6, 1, 4) for word in "abcdef"})
    drawn = maps_sheet([several, PictureMaps(GREY, "", {})])
    told = [axes.get_ylabel() for axes in drawn.axes[::6]]
    assert told == ["a b c d e f", "", "(empty)"]


def test_the_maps_of_a_picture_are_a_mapping() -> None:
    maps = PictureMaps(GREY, "a <ring>", {"ring": one_hot(4, 6, 1, 4), "<b>": one_hot(4, 6, 0, 0)})
    assert list(maps) == ["ring", "<b>"] and len(maps) == 2 and "ring" in maps
    assert maps.get("rings") is None and maps.get("rings", 3) == 3 and isinstance(maps.get("ring"), WordMap)
    assert maps["ring"].overlay() == overlay(GREY, one_hot(4, 6, 1, 4))
    assert len(maps.sheet().axes) == 3
    html = maps._repr_html_()
    assert html.count("<img") == 3 and "&lt;b&gt;" in html and "<b>" not in html and "a &lt;ring&gt;" in html
    with pytest.raises(UserError, match=r"unknown word 'rings'.*ring"):
        maps["rings"]
    with pytest.raises(UserError, match="without their model"):
        maps.explore()


def test_maps_are_kept_without_the_model_that_their_page_needs() -> None:
    """What makes the page is a function that holds the model, and no pickle holds a function."""
    maps = PictureMaps(GREY, "a ring", {"ring": one_hot(4, 6, 1, 4)}, 3, "about", lambda: "page")
    kept = pickle.loads(pickle.dumps(maps))
    assert maps.explore() == "page" and (kept.prompt, kept.seed, kept.about) == ("a ring", 3, "about")
    assert kept["ring"].overlay() == maps["ring"].overlay()
    with pytest.raises(UserError, match="without their model"):
        kept.explore()
