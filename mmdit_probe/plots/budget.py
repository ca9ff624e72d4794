"""The attention budget, after Fig. 2b and 2c of arXiv:2509.18096: where each layer's attention goes.

    from mmdit_probe.plots import attention_budget, save
    save(attention_budget(summary), "attention_budget")

One horizontal stacked bar per layer, layer 0 on top: of image queries (left), of text queries and, in editing models,
of those of reference pictures (middle), and of the part of the image queries' attention that goes to text, by kind of
token (right). Of a video, I2I is split into the query's own frame and the other ones. Dotted lines: uniform attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KEYS = {
    "I": (style.IMAGE, "image keys"), "T": (style.TEXT, "text keys"), "R": (style.REFERENCE, "reference keys"),
    "O": (style.OTHER, "other keys"),
}  # fmt: skip


def attention_budget(summary: pd.DataFrame, *, title: str = "", paper: pd.DataFrame | None = None) -> Figure:
    """The figure.

    Args:
        summary: one row per layer, from `experiments.attention_budget.summarise`: columns `layer`, `I2I`, `I2T`, `I2O`,
            `T2I`, `T2T`, `T2O`, those of references where there are any, `<name>_uniform`, `<name>_low`, `<name>_high`
            and `I2T_<span>`, of a video `I2I_same_frame` and `I2I_other_frames`; shares in 0..1.
        title: a line above the panels, such as the model's name.
        paper: the published shares by layer (`paper_table("budget_by_layer")`), marked by diamonds.

    Returns: a matplotlib figure with three panels, or four.
    """
    spans = [kind for kind in style.SPANS if f"I2T_{kind}" in summary and summary[f"I2T_{kind}_uniform"].max() > 0]
    height = max(2.6, 1.2 + 0.16 * len(summary))
    bars = {"I2I": "image queries: I2I | I2T", "T2I": "text queries: T2I | T2T"}
    bars |= {"R2I": "reference queries: R2I | R2T"} if "R2I" in summary else {}
    with style.panels(style.PAGE, height, len(bars) + 1, sharey=True, title=title) as (figure, (*stacks, split)):
        image = stacks[0]
        _stack(split, summary, [(f"I2T_{kind}", style.SPANS[kind], style.LABELS.get(kind, kind)) for kind in spans])
        split.set_title("I2T by kind of text token")
        for axes, (name, words) in zip(stacks, bars.items(), strict=True):
            keys = {key: look for key, look in _KEYS.items() if f"{name[0]}2{key}" in summary}
            parts = [(f"{name[0]}2{key}", *look) for key, look in keys.items()]
            if name == "I2I" and "I2I_same_frame" in summary:
                looks = style.FRAMES.items()
                parts[:1] = [(f"I2I_{of.replace(' ', '_')}", colour, f"image keys, {of}") for of, colour in looks]
            _stack(axes, summary, parts)
            axes.set_title(words)
            _uniform(axes, summary[f"{name}_uniform"].mean())
            _interval(axes, summary, name)
            if paper is not None and name != "R2I":
                share = {"I2I": 1 - paper.i2t_share, "T2I": paper.t2i_share}[name]
                share = share[paper.layer.isin(summary.layer)]
                axes.plot(share, _rows(summary)[: len(share)], "D", ms=3, mfc="white", mec="black", mew=0.7, ls="",
                          label="paper")  # fmt: skip
            axes.set_xlim(0, 1)
        _uniform(split, summary["I2T_uniform"].mean())
        split.set_xlim(0, max(0.05, 1.05 * float(summary[["I2T", "I2T_uniform"]].max().max())))
        for axes in (*stacks, split):
            axes.set_xlabel("share of attention")
        style.legend(figure, *stacks, place="outside lower left")
        style.legend(figure, split, place="outside lower right")
        image.set_ylabel("layer")
        image.set_yticks(_rows(summary), [str(layer) for layer in summary.layer])
        image.set_ylim(len(summary) - 0.4, -0.6)
    return figure


def _stack(axes: Axes, summary: pd.DataFrame, parts: list[tuple[str, str, str]]) -> None:
    left = summary[parts[0][0]].to_numpy() * 0
    for name, colour, label in parts:
        width = summary[name].to_numpy()
        if name.endswith("O") and width.max() == 0:
            continue
        axes.barh(_rows(summary), width, left=left, height=0.8, color=colour, edgecolor="white", lw=0.4, label=label,
                  hatch=style.HATCHES.get(colour))  # fmt: skip
        left = left + width


def _interval(axes: Axes, summary: pd.DataFrame, name: str) -> None:
    low, middle, high = (summary[f"{name}{suffix}"] for suffix in ("_low", "", "_high"))
    if low.notna().any():
        axes.errorbar(middle, _rows(summary), xerr=[middle - low, high - middle], fmt="none", ecolor="black",
                      elinewidth=0.8, capsize=1.5, label=style.INTERVAL)  # fmt: skip


def _uniform(axes: Axes, value: float) -> None:
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=2.2, foreground="white")]  # a dark line on a dark bar is lost in print
    axes.axvline(value, color="black", linestyle=":", linewidth=1.0, label="uniform", path_effects=outline)


def _rows(summary: pd.DataFrame) -> range:
    """Bar positions: layers are drawn without gaps when only some were probed."""
    return range(len(summary))
