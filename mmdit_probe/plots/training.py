"""How the embedded model learned: losses, what the text is worth, where its words look, what its images show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import pandas as pd

from mmdit_probe.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def training_curves(curves: pd.DataFrame) -> Figure:
    """Six panels from the transformer's training curves.

    Args:
        curves: columns step, name, value, as the training loop writes them: ``flow`` and ``align`` (training losses),
            ``shuffled@s`` and ``empty@s`` (increase of the held-out loss in percent with another's caption or none, at
            noise level s), ``miou@s/layerK`` (I2T map quality), ``facts``, ``things_right``, ``grounds_right``.
    """
    by_name = {str(name): part for name, part in curves.groupby("name")}
    with style.context():
        figure = style.figure(style.PAGE, 4.6)
        axes = figure.subplots(2, 3)
        losses, shuffled, empty, low, high, seen = axes.ravel()
        _lines(losses, by_name, {"flow": "flow matching", "align": "parser alignment"})
        losses.set(title="training losses", ylim=(0, None))
        for axis, kind, title in ((shuffled, "shuffled", "another's caption"), (empty, "empty", "no caption")):
            names = sorted(name for name in by_name if name.startswith(f"{kind}@"))
            _lines(axis, by_name, {name: f"sigma {name.split('@')[1]}" for name in names}, ordered=True)
            axis.set(title=f"text gain: {title}", ylabel="held-out loss, + %", ylim=(0, None))
        for axis, sigma in ((low, "0.5"), (high, "0.75")):
            _layers(axis, {name: part for name, part in by_name.items() if name.startswith(f"miou@{sigma}/layer")})
            axis.set(title=f"I2T maps at sigma {sigma}", ylabel="mIoU of classes present", ylim=(0, 1))
        labels = {"things_right": "objects right", "grounds_right": "ground right", "facts": "facts"}
        _lines(seen, by_name, labels)
        seen.set(title="samples, read by the parser", ylim=(0, 1.02))
        for axis in axes.ravel():
            axis.set_xlabel("step")
            axis.legend(fontsize=6, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.26), columnspacing=0.8,
                        handlelength=1.8)  # fmt: skip
    return figure


def _layers(axis: Axes, curves: dict[str, pd.DataFrame], named: int = 3) -> None:
    """The layers that end highest by name, the others as thin grey lines."""
    ends = sorted(curves, key=lambda name: -float(curves[name]["value"].iloc[-1]))
    for name in ends[named:]:
        label = "other layers" if name == ends[-1] else "_other"
        axis.plot(curves[name]["step"], curves[name]["value"], color="#BBBBBB", lw=0.7, label=label)
    _lines(axis, curves, {name: f"layer {name.split('layer')[1]}" for name in ends[:named]})


def _lines(axis: Axes, by_name: dict[str, pd.DataFrame], labels: dict[str, str], *, ordered: bool = False) -> None:
    """One line per curve that exists; ``ordered`` curves run through one colour map. Markers and dashes differ."""
    found = {name: label for name, label in labels.items() if name in by_name}
    for place, (name, label) in enumerate(found.items()):
        colour = mpl.colormaps["viridis"](0.9 * place / max(1, len(found) - 1)) if ordered else style.COLOURS[place]
        steps = by_name[name]["step"]
        axis.plot(steps, by_name[name]["value"], label=label, color=colour, marker=style.MARKERS[place % 8], ms=3,
                  markevery=(place * len(steps) // (8 * len(found)), max(1, len(steps) // 8)),
                  linestyle=style.LINES[place % 4])  # fmt: skip
