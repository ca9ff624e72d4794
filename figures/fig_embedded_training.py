"""How the embedded model learned, from the training curves that ship with it. Not a figure of the paper.

    python figures/fig_embedded_training.py

Writes `figures/out/scenes-sd3/embedded_training.{png,pdf}`. Takes and ignores the options of its sister scripts, since
only the embedded model has these curves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import pandas as pd
from matplotlib.lines import Line2D
from runs import options_of

from mmdit_probe import assets
from mmdit_probe.errors import run_script
from mmdit_probe.plots import save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Curves = dict[str, pd.DataFrame]

GAINS = {
    "shuffled": "another's caption",
    "empty": "no caption",
    "relation_wrong": "the opposite relation",
    "count_wrong": "a wrong count",
}
"""What held-out losses are measured with in place of the right caption."""
SEEN = {
    "things_right": ("objects", 0),
    "grounds_right": ("ground", 1),
    "relation": ("relation", 2),
    "opposite_relation": ("its opposite", 2),
    "count": ("count", 3),
    "wrong_count": ("a wrong count", 3),
}
"""Scores of samples: label, and number of the colour, which a score shares with its opposite."""


TITLE = (
    "scenes-sd3: how the transformer was trained. One training; losses of up to 96 held-out scenes, maps of 48,"
    " samples of up to 48 captions; no intervals"
)
_BEST: Any = {"marker": "o", "ls": "none", "ms": 2.5, "color": "white", "mec": "black", "mew": 0.5}


def main() -> None:
    options = options_of(__doc__, run=False, more=False).parse_args()
    curves = pd.read_csv(assets.path("scenes-sd3") / "training" / "transformer.csv")
    for path in save(
        training_curves(curves, title=TITLE),
        options.out / "scenes-sd3" / "embedded_training",
    ):
        print(path)


def training_curves(curves: pd.DataFrame, *, title: str = "") -> Figure:
    """The transformer's training curves, a panel per kind; what was not measured is left out.

    Maps by layer are heat maps, layer by step, so that eight layers can be told apart; a dot marks the best of a step.

    Args:
        curves: columns step, name, value, as the training loop writes them: ``flow`` and ``align`` (training losses),
            ``shuffled@s``, ``empty@s``, ``relation_wrong@s``, ``count_wrong@s`` (increase of the held-out loss in
            percent with another's caption, none, or the opposite one, at noise level s), ``miou@s/layerK`` (I2T map
            quality), and the scores of `scenes.parser.judge`.
    """
    by_name = {str(name): part.sort_values("step") for name, part in curves.groupby("name")}
    gains = [kind for kind in GAINS if any(name.startswith(f"{kind}@") for name in by_name)]
    levels = sorted({name.split("/")[0].split("@")[1] for name in by_name if name.startswith("miou@")}, key=float)
    panels = 2 + len(gains) + len(levels)
    rows = -(-panels // 3)
    with style.context():
        figure = style.figure(style.PAGE, 0.3 + 1.9 * rows)
        axes = list(figure.subplots(rows, 3).ravel())
        _losses(axes[0], by_name)
        for axis, kind in zip(axes[1:], gains, strict=False):
            _gain(axis, by_name, kind)
        for axis, level in zip(axes[1 + len(gains) :], levels, strict=False):
            _maps(axis, by_name, level)
        _seen(axes[panels - 1], by_name)
        best = Line2D([], [], label="best layer of the step", **_BEST)
        style.legend(figure, *axes[1 : 1 + len(gains)], handles=[best] if levels else [])
        style.headline(figure, title)
        for axis in axes[panels:]:
            axis.set_axis_off()
    return figure


def _losses(axis: Axes, by_name: Curves) -> None:
    for number, (name, label) in enumerate({"flow": "flow matching", "align": "auxiliary head"}.items()):
        if name in by_name:
            axis.plot(by_name[name]["step"], by_name[name]["value"], style.LINES[number], color=style.COLOURS[number],
                      label=label)  # fmt: skip
    axis.set(title="training losses", xlabel="step", ylim=(0, None))
    axis.legend()


def _gain(axis: Axes, by_name: Curves, kind: str) -> None:
    """Increase of the loss over steps, a line per noise level."""
    levels = sorted({name.split("@")[1] for name in by_name if name.startswith(f"{kind}@")}, key=float)
    for number, level in enumerate(levels):
        part = by_name[f"{kind}@{level}"]
        colour = mpl.colormaps["viridis"](0.9 * number / max(1, len(levels) - 1))
        axis.plot(
            part["step"], part["value"], color=colour, marker=style.MARKERS[number % 8], ms=2.5, label=f"sigma {level}"
        )
    axis.axhline(0, color="#999999", linewidth=0.5)
    axis.set(title=f"text gain: {GAINS[kind]}", xlabel="step", ylabel="held-out loss, + %")


def _maps(axis: Axes, by_name: Curves, level: str) -> None:
    """I2T map quality, layer by step; the best layer of each step has a dot."""
    prefix = f"miou@{level}/layer"
    layers = sorted((name for name in by_name if name.startswith(prefix)), key=lambda name: int(name[len(prefix) :]))
    grid = pd.DataFrame({int(name[len(prefix) :]): by_name[name].set_index("step")["value"] for name in layers}).T
    grid = grid.rename_axis(index="layer", columns="step")
    values = grid.to_numpy()
    style.heat(axis, grid, low=0, high=float(values.max()), label="mIoU")
    steps = [step + 0.5 for step in range(values.shape[1])]
    axis.plot(steps, values.argmax(0) + 0.5, **_BEST)
    axis.set_title(f"I2T maps at sigma {level}")


def _seen(axis: Axes, by_name: Curves) -> None:
    """What samples show of their captions; an opposite is dotted, in the colour of what it is the opposite of."""
    for name, (label, number) in SEEN.items():
        if name in by_name:
            opposite = name.startswith(("opposite", "wrong"))
            axis.plot(by_name[name]["step"], by_name[name]["value"], ":" if opposite else "-", ms=2.5, label=label,
                      color=style.COLOURS[number], marker=style.MARKERS[number])  # fmt: skip
    axis.set(title="what samples show", xlabel="step", ylabel="share of captions", ylim=(-0.02, 1.02))
    if axis.lines:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=2)  # the curves fill the panel


if __name__ == "__main__":
    run_script(main)
