"""Pages hold everything inside, within their size, and nothing of a prompt becomes markup."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdit_probe.pages import Page, Section, explorer, report
from mmdit_probe.pages.explorer import LIMIT, atlas, coarser, plan
from mmdit_probe.plots.overlay import png
from tests.pages.arrays import WORDS, exploration


class Links(HTMLParser):
    """Every address and tag of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "action", "data")]


def test_a_page_asks_for_nothing_and_escapes_everything() -> None:
    page = explorer(exploration(2, 2, (4, 6), WORDS, 16)[0])
    links = Links(page.html)
    assert all(link.startswith("data:") for link in links.found)
    assert links.tags.count("img") == 1 and links.tags.count("script") == 2
    assert "<b>" not in page.html and "tiny &amp; &lt;b&gt;" in page.html
    assert "default-src 'none'" in page.html
    assert not re.search(r"https?://", page.html)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.html, re.DOTALL)[1])  # type: ignore[index]
    assert data["words"] == [*WORDS[:-1], "BOS 0"] and data["prompt"] == " ".join(WORDS)


def test_a_notebook_shows_it_in_a_frame_and_it_can_be_saved(tmp_path: Path) -> None:
    page = Page.of("a 'title'", "<p>body</p>")
    assert page.save(tmp_path / "page.html").read_text("utf-8") == page.html
    assert 'sandbox="allow-scripts"' in page._repr_html_() and "<p>body" not in page._repr_html_()
    assert repr(page).startswith("Page(\"a 'title'\", 0.0 MB)")


@pytest.mark.parametrize(
    ("layers", "heads", "grid", "words", "pixels", "most"),
    [
        (8, 4, (16, 16), 14, 64, 3e6),  # the embedded model
        (24, 24, (64, 64), 14, 1024, 15e6),  # SD3-medium, ten words
        (24, 24, (64, 64), 60, 1024, 15e6),
        (57, 24, (64, 64), 14, 1024, 15e6),  # Flux.1
        (60, 24, (128, 128), 30, 1024, 15e6),
        (60, 24, (33, 45, 80), 8, 64, 15e6),  # HunyuanVideo, without its pictures
    ],
)
def test_pages_stay_within_their_size_even_where_nothing_compresses(
    layers: int, heads: int, grid: tuple[int, ...], words: int, pixels: int, most: float
) -> None:
    found, fits = exploration(layers, heads, grid, [f"w{k}" for k in range(words)], pixels)
    assert len(explorer(found).html) < most
    assert fits.layers >= 1 and fits.steps >= 1


def test_what_fits_is_kept_whole() -> None:
    assert plan(14, 8, 4, (16, 16), 28, 8) == (6, 8, 1)
    assert plan(14, 8, 4, (16, 16), 2, 3) == (2, 3, 1)
    steps, layers, coarse = plan(14, 24, 24, (64, 64), 28, 24)
    assert coarse == 1
    assert 64 * 64 * 14 * (24 * (2 + steps) + 2 * 24 * layers) <= LIMIT


def test_an_atlas_gives_back_every_map_to_half_a_255th() -> None:
    maps = np.random.default_rng(1).random((3, 2, 4, 5)).astype(np.float32) * np.array([1e-6, 1.0, 20.0])[
        :, None, None, None
    ].astype(np.float32)
    maps[0, 1] = 0.0
    found = atlas(maps)
    picture = Image.open(BytesIO(base64.b64decode(found["src"].split(",")[1])))
    tiles = np.asarray(picture).reshape(3, 4, 2, 5).transpose(0, 2, 1, 3) / 255.0
    back = tiles * np.array(found["max"])[..., None, None]
    top = maps.max((2, 3), keepdims=True)
    assert (np.abs(back - maps) <= top * (0.5 / 255 + 1e-3)).all()


def test_frames_lie_below_each_other_under_one_maximum() -> None:
    maps = np.random.default_rng(2).random((2, 3, 4, 5, 6)).astype(np.float32)
    found = atlas(maps)
    picture = np.asarray(Image.open(BytesIO(base64.b64decode(found["src"].split(",")[1]))))
    assert picture.shape == (2 * 4 * 5, 3 * 6)
    tiles = picture.reshape(2, 4, 5, 3, 6).transpose(0, 3, 1, 2, 4) / 255.0
    top = maps.max((2, 3, 4))
    np.testing.assert_allclose(found["max"], top, rtol=1e-3)
    np.testing.assert_allclose(tiles * top[..., None, None, None], maps, atol=0.5 / 255 + 1e-6)


def test_coarser_maps_are_means_also_at_the_edge() -> None:
    maps = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    found = coarser(maps, 2)
    assert found.shape == (2, 2, 3)
    for y in range(2):
        for x in range(3):
            part = maps[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((1, 2))
            np.testing.assert_allclose(found[:, y, x], part, rtol=1e-6)
    assert coarser(maps, 1) is maps


def test_a_report_leads_to_its_sections() -> None:
    figure = png(Image.new("RGB", (200, 100), "red"))
    sections = [
        Section("A < B", ["line & more"], ["<table></table>"], {"a 'figure'": figure}, "layer 4"),
        Section("C", ["last"]),
    ]
    html = report("Which <layers>?", ["n = 4"], sections, {"more": "explore.html"}).html
    for link in re.findall(r'href="#(.*?)"', html):
        assert f'id="{link}"' in html
    assert "<layers>" not in html and "A &lt; B</a>: layer 4" in html and "line &amp; more" in html
    assert html.count("data:image/png") == 1 and 'href="explore.html"' in html
