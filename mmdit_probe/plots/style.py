"""One look for all figures, and the pieces they are made of: error bars, heat maps, legends, titles, files.

    with style.panels(style.COLUMN, 2.2, title="scenes-sd3, n = 40 prompts") as (figure, axes):
        style.errorbars(axes, table, "mean", 0, label="images")
        style.legend(figure, axes)
    style.save(figure, "layers")

Colours are Okabe and Ito's (Color Universal Design, 2008); series differ in marker and line as well. No text is below 6
pt at the figure's own size. Figures are built without pyplot's global state. seaborn draws the heat maps; it computes
its error bars from raw data, so that intervals that are known already are drawn here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D

from mmdit_probe.results.atomic import write_bytes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

COLUMN, PAGE = 3.15, 6.7
"""Widths in inches: of a column (8 cm) and of a page (17 cm)."""

IMAGE, TEXT, OTHER, REFERENCE = "#0072B2", "#E69F00", "#999999", "#D55E00"
"""Colours of the modalities, the same in every figure."""

FRAMES = {"same frame": "#6A5ACD", "other frames": "#1B1464"}
"""Colours of the image keys of a video's image queries."""

COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#777777")
MARKERS = "os^Dv<>p"
LINES = ("-", "--", "-.", ":")
"""Looks of series by number."""

SPANS = {
    "word": "#E69F00",
    "bos": "#000000",
    "eos": "#CC79A7",
    "template": "#0072B2",
    "pad": "#56B4E9",
    "vision": "#F0E442",
    "null": "#D9D9D9",
    "unknown": "#999999",
}
"""Colours of the span kinds, in stacking order; content words keep the colour of text."""

DARK = {"null": "#555555", "vision": "#A89B00"}
"""Span kinds whose areas are too light for a line."""

HATCHES = {SPANS["eos"]: "....", SPANS["pad"]: "/////"}
"""Colour -> hatch of stacked areas: words, EOS and padding are one grey in print."""

LABELS = {"word": "words", "bos": "BOS", "eos": "EOS", "template": "template", "pad": "padding", "null": "null slots",
          "vision": "pictures"}  # fmt: skip
"""Names of the span kinds in legends and printed tables."""

INTERVAL = "95 % interval"
"""Name of the error bars in legends."""

Place = Literal["outside lower left", "outside lower center", "outside lower right"]
"""Of a legend, outside the panels."""

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.4,
    "lines.linewidth": 1.0,
    "text.parse_math": False,  # names hold $, _ and ^
    "pdf.fonttype": 42,  # text stays text in the PDF
    "savefig.dpi": 200,
}


def context() -> AbstractContextManager[None]:
    """The style as a context; nothing is changed outside it."""
    return mpl.rc_context(_RC)


def figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, laid out by matplotlib's constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def panels(
    width: float, height: float, count: int | None = None, *, title: str = "", **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure in the style, sizes in inches, with a row of `count` axes (None: one by itself), and a title above.

    Args:
        options: of `Figure.subplots`.
    """
    with context():
        drawn = figure(width, height)
        axes = drawn.subplots(1, count or 1, squeeze=False, **options)[0]
        yield drawn, axes[0] if count is None else axes
        headline(drawn, title)


def name(text: str) -> str:
    """A name as a label: what cannot be printed is marked, and a leading "_" does not hide it from legends."""
    shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return f"\u200b{shown}" if shown.startswith("_") else shown


def headline(figure: Figure, text: str) -> None:
    """A line above everything, folded where the figure is narrower."""
    if text:
        characters = int(figure.get_figwidth() * 16)
        lines = (fill(line, characters) for line in name(text).split("\n"))
        figure.suptitle("\n".join(lines), fontsize=8, x=0.01, ha="left")


def legend(figure: Figure, *axes: Axes, handles: Sequence[Any] = (), place: Place = "outside lower center") -> None:
    """One legend for all panels, each label once, in as many columns as fit; where there are error bars, it says what
    they are."""
    seen: dict[str, Any] = {one.get_label(): one for one in handles}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    for shown in _intervals(axes):
        caps, bars = Line2D([], [], color="black", ms=3), LineCollection([], colors="black", linewidths=0.8)
        drawn = (Line2D([], [], ls=""), (caps,), (bars,))
        seen.setdefault(INTERVAL, ErrorbarContainer(drawn, shown.has_xerr, shown.has_yerr))
    if seen:
        room = figure.get_figwidth() * (0.5 if place.endswith(("left", "right")) else 1.0)
        columns = int(room / (0.4 + 0.055 * max(len(label) for label in seen)))
        figure.legend(list(seen.values()), list(seen), loc=place, ncols=min(len(seen), max(1, columns)))


def _intervals(panels: Sequence[Axes]) -> Iterator[ErrorbarContainer]:
    """The series that show intervals."""
    for one in (series for axes in panels for series in axes.containers if isinstance(series, ErrorbarContainer)):
        if any(len(line) and np.ptp(line, axis=0).max() > 0 for bars in one.lines[2] for line in bars.get_segments()):
            yield one


def look(series: int | str) -> tuple[str, str, str]:
    """Colour, marker and line of a series by number, or of a span kind by name."""
    number = series if isinstance(series, int) else list(SPANS).index(series) if series in SPANS else len(SPANS)
    colour = COLOURS[number % len(COLOURS)] if isinstance(series, int) else DARK.get(series) or SPANS.get(series, OTHER)
    return colour, MARKERS[number % len(MARKERS)], LINES[number % len(LINES)]


def errorbars(
    axes: Axes, rows: pd.DataFrame, value: str, number: int | str, *, at: str | ArrayLike = "layer", of: int = 1,
    label: str = "", joined: bool = True, hollow: bool = False, horizontal: bool = False,
) -> None:  # fmt: skip
    """A series with its intervals, which lie inside the axes; without an interval (NaN) a point stands alone.

    Args:
        rows: one per point. value: its column; the bounds are `<value>_low` and `<value>_high`, else low and high.
        number: of the series; decides colour, marker and line. A span kind has its own: give its name.
        at: where the points are along the axes, or the column that says it. of: series that lie side by side there.
        joined: by a line. hollow: markers, as controls have them. horizontal: values run along x.
    """
    colour, marker, line = look(number)
    prefix = f"{value}_" if f"{value}_low" in rows else ""
    middle, low, high = (np.asarray(rows[column], float) for column in (value, f"{prefix}low", f"{prefix}high"))
    error = np.maximum([middle - low, high - middle], 0)
    place = np.asarray(rows[at] if isinstance(at, str) else at, float)
    if of > 1 and isinstance(number, int):
        place = place + dodge(number, of, 0.3 if joined else 0.5)
    x, y = (middle, place) if horizontal else (place, middle)
    axes.errorbar(
        x, y, xerr=error if horizontal else None, yerr=None if horizontal else error, color=colour,
        marker=marker, ms=3.5, mfc="white" if hollow else colour, mec=colour, mew=0.7,
        ls=line if joined else "", elinewidth=0.8, capsize=1.5, label=name(label),
        clip_on=False,  # a marker on the axes' border is seen whole
    )  # fmt: skip


def dodge(place: int, count: int, width: float = 0.5) -> float:
    """Shift of series `place` of `count`, so that bars at one position lie side by side within `width`."""
    return width * ((place + 0.5) / count - 0.5)


def within(axes: Axes, axis: str, low: float | None = None, high: float | None = None) -> None:
    """Limits that hold `low` and `high` and all that is drawn, also in panels that share the axis."""
    panels = getattr(axes, f"get_shared_{axis}_axes")().get_siblings(axes)
    ends = np.array([getattr(one.dataLim, f"interval{axis}") for one in panels if one.has_data()])
    first, last = ends[:, 0].min(), ends[:, 1].max()
    pad = 0.04 * (last - first)
    below = first - pad if low is None else min(low, first - pad * (first < low))
    above = last + pad if high is None else max(high, last + pad * (last > high))
    if above > below:
        getattr(axes, f"set_{axis}lim")(below, above)


def whole(axes: Axes, label: str = "layer") -> None:
    """An x axis of whole numbers from 0, with room around a single one."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(_counted))
    axes.set_xlabel(label)
    first, last = axes.dataLim.intervalx
    if last - first < 2:
        axes.set_xlim(first - 0.8, last + 0.8)


def _counted(value: float, position: int | None = None) -> str:
    """A tick's label, none below 0. No lambda: a figure that holds one cannot be pickled."""
    return f"{value:g}" if value >= 0 else ""


def heat(
    axes: Axes, grid: pd.DataFrame, *, low: float, high: float, label: str = "", colours: str = "cividis",
    texts: Any = None, decimals: int | None = None,
) -> Any:  # fmt: skip
    """A heat map of a table, first row on top.

    Args:
        grid: index and columns are the tick labels and the names of the axes. low, high: ends of the colours.
        label: of the colour bar; none without it. texts: [rows, columns] written into the cells; decimals: or the
            values.

    Returns: what `figure.colorbar` takes.
    """
    import seaborn as sns

    written = texts if texts is not None else True if decimals is not None else None
    bar = {"label": fill(name(label), 34)} if label else None
    every = [-(-count // most) for count, most in zip(grid.shape, (24, 12), strict=True)]
    sns.heatmap(
        grid, ax=axes, vmin=low, vmax=high, cmap=colours, cbar=bool(label), cbar_kws=bar, annot=written,
        fmt="" if texts is not None else f".{decimals or 0}f", annot_kws={"fontsize": 6}, yticklabels=every[0],
        xticklabels=every[1],
    )  # fmt: skip
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelrotation=0)
    return axes.collections[0]


def save(figure: Figure, path: Path | str) -> list[Path]:
    """Write `<path>.png` and `<path>.pdf`, without dates, so that equal figures are equal files.

    Returns: the two paths. Errors as in `results.atomic.replacing`.
    """
    stem = Path(path)
    written = []
    with context():
        for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
            final = stem.with_name(f"{stem.name}.{kind}")
            drawn = BytesIO()  # a full disk in the middle of a PDF would be an error of the writer's own
            figure.savefig(drawn, format=kind, metadata=metadata)
            written.append(write_bytes(final, drawn.getvalue()))
    return written
