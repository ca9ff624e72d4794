"""What holds of every figure: names as they are, bars inside the axes, text that can be read, one order of rows."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from mmdit_probe.errors import UserError
from mmdit_probe.plots import layers, magnet, save, style
from mmdit_probe.plots.league import layer_figure, league_figure
from mmdit_probe.plots.sheet import sheet, wrapped
from tests.scripts import script

guidance_by_layer = script("figures/fig06_guidance.py").guidance_by_layer

STRANGE = ["cat_$x^2$", "[red]ring[/red]", "_hidden", "50 % {a}", "bell\a"]


def league(protocols: tuple[str, ...], orders: list[list[str]]) -> pd.DataFrame:
    rows = []
    for protocol, methods in zip(protocols, orders, strict=True):
        for place, method in enumerate(methods):
            middle = 0.97 - 0.2 * place
            rows.append(
                {"protocol": protocol, "method": method, "refine": "none", "layers": "3", "heads": "mean", "n": 9,
                 "sigma": "0.5", "miou": middle, "miou_low": middle - 0.3, "miou_high": middle + 0.1,
                 "role": "method", "over": 0.1}
            )  # fmt: skip
    return pd.DataFrame(rows)


def gains() -> pd.DataFrame:
    rows = [{"layers": "", "scale": 0.0, "control": "none", "outcome": "facts", "n": 9, "mean": 0.5, "low": 0.1,
             "high": 0.9, "difference": np.nan, "difference_low": np.nan, "difference_high": np.nan}]  # fmt: skip
    for layer in range(3):
        rows.append(
            {"layers": str(layer), "scale": 2.0, "control": "none", "outcome": "facts", "n": 9, "mean": 0.6, "low": 0.2,
             "high": 1.0, "difference": 0.1, "difference_low": 0.08, "difference_high": 0.12}
        )  # fmt: skip
    return pd.DataFrame(rows)


def differences(names: list[str]) -> pd.DataFrame:
    rows = [
        {"variant": variant, "category": category, "metric": "clipscore[scenes-clip]", "prompts": 9, "difference": 0.1,
         "difference_low": -2.0, "difference_high": 0.3}
        for variant in ("base", *names) for category in ("all", "colour")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def figures() -> list[Figure]:
    agreement = pd.DataFrame({"layer": [0, 1], "rho": [0.1, 0.5], "low": [-0.9, 0.4], "high": [0.2, 1.0],
                              "control": [0.0, 0.1], "control_low": np.nan, "control_high": np.nan})  # fmt: skip
    return [
        league_figure(league(("present", "full"), [["a", "b"], ["b", "a"]])),
        layer_figure(league(("present",), [["a"]]), "one point"),
        layers.agreement(agreement),
        guidance_by_layer(gains()),
        magnet.differences(differences(["tuned"]), "clipscore[scenes-clip]", "base"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_error_bars_lie_inside_the_axes_and_text_can_be_read(number: int, tmp_path: Path) -> None:
    figure = figures()[number]
    save(figure, tmp_path / "figure")  # lays it out
    assert pickle.loads(pickle.dumps(figure)).axes  # a result that was shown holds it
    bars = 0
    for axes in figure.axes:
        (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        for container in axes.containers:
            for collection in container.lines[2]:
                for segment in collection.get_segments():
                    if segment.ndim == 2 and np.isfinite(segment).all():
                        bars += 1
                        assert (segment[:, 0] >= left).all() and (segment[:, 0] <= right).all()
                        assert (segment[:, 1] >= bottom).all() and (segment[:, 1] <= top).all()
    assert bars
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 6
    width = figure.get_figwidth()
    renderer = FigureCanvasAgg(figure).get_renderer()
    ticks = {id(label) for axes in figure.axes for label in axes.get_xticklabels()}  # also those beyond the limits
    for text in (text for text in texts if id(text) not in ticks):
        if text.get_window_extent(renderer).width:
            box = text.get_window_extent(renderer).transformed(figure.dpi_scale_trans.inverted())
            assert box.x0 > -0.05 and box.x1 < width + 0.05, text.get_text()


def test_names_are_drawn_as_they_are() -> None:
    figure = magnet.differences(differences(STRANGE), "clipscore[scenes-clip]", "base")
    (legend,) = figure.legends
    shown = [text.get_text().removeprefix("\u200b") for text in legend.get_texts()]
    assert shown == [*STRANGE[:-1], "bell\ufffd", style.INTERVAL]
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text())
    picture = np.zeros((4, 4, 3), np.uint8)
    drawn = sheet([[picture] * 5], STRANGE, legend=dict.fromkeys(STRANGE, "red"), title=STRANGE[0])
    titles = [axes.get_title().removeprefix("\u200b") for axes in drawn.axes]
    assert "cat_$x^2$" in titles[0] and titles[2] == "_hidden" and len(drawn.legends[0].get_texts()) == 5
    assert not any(text.get_parse_math() for text in drawn.findobj(Text) if "$" in text.get_text())


def test_rows_of_the_league_have_one_order() -> None:
    figure = league_figure(league(("present", "full"), [["a", "b", "c"], ["c", "d", "a"]]))
    first, second = figure.axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["a", "b", "c", "d"]
    (container,) = second.containers
    np.testing.assert_allclose(container.lines[0].get_ydata(), [2, 3, 0])
    assert "n = 9" in first.get_title(loc="left")


def test_a_league_of_one_panel_has_room_for_its_rows(tmp_path: Path) -> None:
    figure = league_figure(league(("present",), [["a"]]))
    save(figure, tmp_path / "league")  # lays it out
    (axes,) = figure.axes
    assert axes.get_position().height * figure.get_figheight() / len(axes.get_yticks()) > 0.2  # inches


def test_gains_are_paired_differences() -> None:
    axes = guidance_by_layer(gains()).axes[0]
    (segments,) = (collection.get_segments() for collection in axes.containers[0].lines[2])
    np.testing.assert_allclose([segment[:, 1] for segment in segments], [[0.08, 0.12]] * 3)
    assert "stock: 0.500" in axes.get_title(loc="left")


def test_controls_of_equal_size_are_hollow_and_named() -> None:
    both = pd.concat([gains(), gains().query("scale > 0").assign(control="budget")])
    figure = guidance_by_layer(both)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == [style.INTERVAL, "scale 2", "scale 2, coherent change of equal size", "stock"]
    faces = [container.lines[0].get_markerfacecolor() for container in figure.axes[0].containers]
    assert faces[0] == "white" and faces[1] != "white"  # by control: budget comes before none


@pytest.mark.parametrize(("low", "named"), [(0.1, True), (np.nan, False)])
def test_a_legend_names_error_bars_where_there_are_some(low: float, named: bool) -> None:
    table = pd.DataFrame({"layer": [0, 1], "rho": [0.2, 0.5], "low": low, "high": low + 0.6, "control": [0.0, 0.1],
                          "control_low": np.nan, "control_high": np.nan})  # fmt: skip
    (legend,) = layers.agreement(table).legends
    assert ("95 % interval" in [text.get_text() for text in legend.get_texts()]) == named


def test_each_kind_of_word_tells_its_own_n() -> None:
    kinds = (("noun", 32, "higher"), ("count", 2, "too few items"))
    rows = [{"kind": kind, "layer": layer, "sigma": 0.5, "n": n, "difference": 0.1, "verdict": verdict}
            for kind, n, verdict in kinds for layer in range(2)]  # fmt: skip
    panels = layers.sigma_map(pd.DataFrame(rows)).axes[:2]
    assert [axes.get_title(loc="left") for axes in panels] == ["noun (n = 32)", "count (n = 2, too few)"]


def test_titles_tell_metric_and_number() -> None:
    figure = magnet.differences(differences(["tuned"]), "clipscore[scenes-clip]", "base")
    assert figure.get_suptitle() == "CLIPScore (scenes-clip), n = 9 prompts"


def test_one_layer_is_one_tick() -> None:
    axes = layer_figure(league(("present",), [["a"]])).axes[0]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [3]


def test_series_differ_without_colour() -> None:
    looks = {(style.MARKERS[k % 8], style.LINES[k % 4]) for k in range(8)}
    assert len(looks) == len(set(style.COLOURS)) == 8
    grey = [np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) for colour in style.COLOURS[:3]]
    assert min(abs(a - b) for k, a in enumerate(grey) for b in grey[k + 1 :]) > 0.2


def test_sheets_take_maps_pictures_and_gaps() -> None:
    picture, small = np.zeros((8, 16, 3), np.uint8), np.eye(4) * 0.0004
    figure = sheet([[picture, small, None], [picture, np.eye(4)]], ["picture", "ring"], ["first", ""], note="a note")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == ["picture", "ring\nmax 4e-04"] and titles[4] == "max 1.000" and len(titles) == 6
    row = sheet([[small, np.eye(4)]], scale="row")
    assert {image.norm.vmax for axes in row.axes for image in axes.images} == {1.0}
    assert wrapped([1, 2, 3], ["a", "b", "c"], 2) == ([[1, 2], [3, None]], [["a", "b"], ["c", ""]])


def test_files_are_whole_and_names_keep_their_dots(tmp_path: Path) -> None:
    figure = sheet([[np.eye(4)]])
    assert [path.name for path in save(figure, tmp_path / "new" / "layer_0.5")] == ["layer_0.5.png", "layer_0.5.pdf"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save(figure, tmp_path / "file" / "figure")
