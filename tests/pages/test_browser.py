"""The pages in a real browser: what is clicked is what is shown, nothing is requested, nothing fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmdit_probe.pages import Section, explorer, report
from mmdit_probe.plots.overlay import png
from tests.pages.arrays import WORDS, exploration

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1200",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def shown() -> Any:
    return exploration(3, 2, (4, 6), WORDS, 24)[0]


@pytest.fixture
def page(browser: Any, shown: Any, tmp_path: Path) -> Any:
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(explorer(shown).save(tmp_path / "page.html").as_uri())
    drawn(browser, 1)
    yield browser
    quiet(browser)


def drawn(browser: Any, count: int) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(
        lambda b: int(b.execute_script("return document.body.dataset.drawn || 0")) >= count
    )


def quiet(browser: Any) -> None:
    """Nothing on the console, and no request but for the file itself and what it holds."""
    said = browser.get_log("browser")
    assert [entry for entry in said if entry["source"] != "rendering"] == []  # rendering: that the tests read canvases
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    assert sum(url.startswith("file:") for url in asked) <= 1


def canvas(browser: Any, name: str) -> np.ndarray:
    """Pixels [H, W, 3] of a panel."""
    script = """const c = document.getElementById(arguments[0]);
    return [c.height, c.width, [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]];"""
    height, width, values = browser.execute_script(script, name)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def text(browser: Any, name: str) -> str:
    return browser.find_element("id", name).text


def move(browser: Any, name: str, keys: str) -> None:
    before = int(browser.execute_script("return document.body.dataset.drawn"))
    browser.find_element("id", name).send_keys(keys)
    drawn(browser, before + 1)


def click(browser: Any, label: str) -> None:
    before = int(browser.execute_script("return document.body.dataset.drawn"))
    next(b for b in browser.find_elements("css selector", ".tokens button") if b.text == label).click()
    drawn(browser, before + 1)


def told(values: np.ndarray) -> str:
    """What a panel says of a map."""
    row, column = np.unravel_index(values.argmax(), values.shape)
    return f"at row {row}, column {column}"


def test_it_opens_with_the_best_layer_and_its_strongest_words(page: Any, shown: Any) -> None:
    order = np.argsort(-shown.i2t[1, 0, :3].max((1, 2)))
    assert text(page, "layer-value") == "1 (chosen)"
    assert text(page, "a-i2t-name") == f"A: {shown.words[order[0]]}"
    assert text(page, "b-i2t-name") == f"B: {shown.words[order[1]]}"


def test_a_click_shows_the_words_map(page: Any, shown: Any) -> None:
    for number, word in enumerate(shown.words):
        click(page, word)
        assert text(page, "a-i2t-name") == f"A: {word}"
        assert told(shown.i2t[1, 0, number]) in text(page, "a-i2t-value")
        assert told(shown.t2i[1, number]) in text(page, "a-t2i-value")
    pressed = [b.text for b in page.find_elements("css selector", ".tokens button[aria-pressed=true]")]
    assert shown.words[-1] in pressed and len(pressed) == 2


def test_the_second_word_is_compared_with_the_first(page: Any, shown: Any) -> None:
    click(page, "ring")
    before = canvas(page, "a-i2t")
    page.find_element("css selector", "input[value=b]").click()
    click(page, "a")
    assert text(page, "b-i2t-name") == "B: a" and text(page, "a-i2t-name") == "A: ring"
    assert (canvas(page, "a-i2t") == before).all()
    assert (canvas(page, "b-i2t") != before).any()


def test_a_choice_that_the_browser_kept_counts(page: Any) -> None:
    """Firefox checks the buttons as they were before the page was loaded again, without an event."""
    page.execute_script("document.querySelector('input[value=b]').checked = true")
    click(page, "a")
    assert text(page, "b-i2t-name") == "B: a"


def test_sliders_move_with_the_keyboard(page: Any, shown: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    click(page, "red")
    move(page, "layer", Keys.HOME)
    assert told(shown.i2t[0, 0, 1]) in text(page, "a-i2t-value")
    move(page, "step", Keys.ARROW_RIGHT)
    assert told(shown.i2t[0, 1, 1]) in text(page, "a-i2t-value") and text(page, "step-value") == "0"
    assert "T2I of single steps is not kept here" in text(page, "note")
    move(page, "step", Keys.HOME)
    move(page, "head", Keys.END)
    assert text(page, "head-value") == "1" and text(page, "note") == ""
    assert told(shown.heads[0][0][1, 1]) in text(page, "a-i2t-value")
    assert told(shown.heads[0][1][1, 1]) in text(page, "a-t2i-value")
    assert f"{shown.budget[0, 2, 0, 0, 0]:.3f}" in text(page, "budget")
    assert "head 1, step mean. I2T of red" in text(page, "status")


def test_a_video_has_a_slider_for_its_frames(browser: Any, tmp_path: Path) -> None:
    """One scale of colours for all frames, and the picture of the shown one."""
    from selenium.webdriver.common.keys import Keys

    film = exploration(2, 2, (3, 4, 6), WORDS, 24)[0]
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(explorer(film).save(tmp_path / "film.html").as_uri())
    drawn(browser, 1)
    click(browser, "red")
    values = film.i2t[1, 0, 1]
    frame, row, column = np.unravel_index(values.argmax(), values.shape)
    assert f"at frame {frame}, row {row}, column {column}" in text(browser, "a-i2t-value")
    assert text(browser, "frame-value") == "1 of 0 to 2" and text(browser, "picture-name") == "frame 1 of the model"
    move(browser, "strength", Keys.END)
    seen, shown = [], []
    move(browser, "frame", Keys.HOME)
    for number in range(3):
        assert text(browser, "frame-value") == f"{number} of 0 to 2" and f"frame {number}. I2T" in text(
            browser, "status"
        )
        pixels = canvas(browser, "a-i2t").astype(int)
        tall, wide = pixels.shape[0] / 4, pixels.shape[1] / 6
        seen.append(pixels[int(2.5 * tall), int(3.5 * wide)])
        if number == frame:
            top = pixels[int((row + 0.5) * tall), int((column + 0.5) * wide)]
            assert np.abs(top - [253, 231, 37]).max() < 40
        shown.append(browser.find_element("id", "picture").get_attribute("src"))
        if number < 2:
            move(browser, "frame", Keys.ARROW_RIGHT)
    assert len(set(shown)) == 3
    # Brighter where the map is higher, across frames: viridis' green rises with the value.
    order = np.argsort(values[:, 2, 3])
    assert (np.diff([seen[k][1] for k in order]) > 0).all()
    assert browser.find_element("id", "frame").accessible_name.startswith("Frame")
    quiet(browser)


def test_pixels_are_the_maps_colours(page: Any, shown: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    click(page, "red")
    move(page, "strength", Keys.END)
    pixels = canvas(page, "a-i2t").astype(int)
    row, column = np.unravel_index(shown.i2t[1, 0, 1].argmax(), (4, 6))
    tall, wide = pixels.shape[0] / 4, pixels.shape[1] / 6
    top = pixels[int((row + 0.5) * tall), int((column + 0.5) * wide)]
    assert np.abs(top - [253, 231, 37]).max() < 40  # viridis' last colour
    move(page, "strength", Keys.HOME)
    grey = canvas(page, "a-i2t")
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()


@contextmanager
def narrow(browser: Any) -> Iterator[None]:
    """A telephone's width."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_maps_are_not_tiny_on_a_telephone(page: Any) -> None:
    """Three in a row were 105 pixels wide each."""
    with narrow(page):
        click(page, "ring")
        boxes = {name: page.find_element("id", name).rect for name in ("picture", "a-i2t", "a-t2i")}
        assert boxes["picture"]["width"] > 300 and min(boxes[name]["width"] for name in ("a-i2t", "a-t2i")) > 150
        assert boxes["a-i2t"]["y"] == boxes["a-t2i"]["y"] > boxes["picture"]["y"]


def test_a_word_without_end_is_folded(browser: Any, tmp_path: Path) -> None:
    """It made the page as wide as itself."""
    browser.get(explorer(exploration(1, 1, (4, 6), ["w" * 300, "a"], 24)[0]).save(tmp_path / "page.html").as_uri())
    drawn(browser, 1)
    with narrow(browser):
        click(browser, "w" * 300)
    quiet(browser)


def test_every_control_has_a_name_and_can_be_reached(page: Any) -> None:
    for element in page.find_elements("css selector", "button, input, canvas, img, table, [role]"):
        if element.get_attribute("id") != "status":
            assert element.accessible_name, element.get_attribute("outerHTML")
    reached = page.execute_script(
        "return [...document.querySelectorAll('button, input')].every((one) => one.tabIndex >= 0)"
    )
    assert reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(page: Any, scheme: str) -> None:
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    script = """return ["h1", ".soft", ".name", "button.first", ".b .name", "output"].map((at) => {
      const one = document.querySelector(at), style = getComputedStyle(one);
      const plain = style.backgroundColor === "rgba(0, 0, 0, 0)";
      return [style.color, plain ? getComputedStyle(document.body).backgroundColor : style.backgroundColor];
    });"""
    for colour, back in page.execute_script(script):
        assert contrast(colour, back) >= 4.5, (colour, back)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(*colours: str) -> float:
    """WCAG 2 contrast of two CSS colours."""
    lights = []
    for colour in colours:
        parts = np.array([float(v) for v in colour.strip("rgba()").split(",")[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_a_report_opens_without_a_request(browser: Any, tmp_path: Path) -> None:
    figure = png(Image.new("RGB", (200, 100), "red"))
    sections = [
        Section("First", ["one"], ["<table><tr><td>1</td></tr></table>"], {"a figure": figure}),
        Section("Last"),
    ]
    browser.get(report("A report", ["n = 4"], sections).save(tmp_path / "index.html").as_uri())
    assert browser.find_element("css selector", "img").get_property("naturalWidth") > 100
    browser.find_element("link text", "Last").click()
    assert browser.current_url.endswith("#1-last")
    with narrow(browser):
        assert browser.find_element("css selector", "img").rect["width"] >= 680  # in a figure that scrolls
    quiet(browser)
