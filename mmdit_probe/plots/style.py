"""One look for all figures: colour-blind-safe, readable in grey and at column width, the same bytes on every run.

    >>> from mmdit_probe.plots import style
    >>> with style.context():
    ...     figure = style.figure(width=3.3, height=2.0)

Colours are Okabe and Ito's palette (Color Universal Design, 2008), ordered here so that neighbours in a stack differ in
lightness as well. Figures are built without pyplot: no global state, no display needed.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE, TEXT, OTHER = "#0072B2", "#E69F00", "#999999"
"""Colours of the three modalities, the same in every figure."""

SPANS = {
    "word": "#E69F00",
    "bos": "#000000",
    "eos": "#CC79A7",
    "template": "#0072B2",
    "pad": "#56B4E9",
    "null": "#D9D9D9",
    "unknown": "#999999",
}
"""Colours of the span kinds, in stacking order; content words keep the colour of text."""

LABELS = {"word": "words", "bos": "BOS", "eos": "EOS", "template": "template", "pad": "padding", "null": "null slots"}
"""Names of the span kinds in legends and printed tables."""

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.4,
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


def save(figure: Figure, path: Path | str) -> list[Path]:
    """Write `<path>.png` and `<path>.pdf`, without dates, so that equal figures are equal files.

    Returns: the two paths. Files are replaced atomically.
    """
    stem = Path(path).with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with context():
        for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None, "Producer": None})):
            final = stem.with_suffix(suffix)
            temporary = final.with_suffix(f"{suffix}.tmp")
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
            os.replace(temporary, final)
            written.append(final)
    return written
