"""SwapTest: exchange two words of the prompt at one layer, sample again, and see whether their objects change places.

    result = SwapTest(swap="colours", layers="all", limit=200).run("scenes-sd3")
    result.summary                     # per layer: share of images in which the attributes are exchanged

Image tokens that look at "red" read "blue" there, and the other way round (`edit.Swap`: exchanging values and
exchanging keys is the same thing, the softmax does not know their order). If a layer is where the word decides, "a red
ring and a blue house" becomes a blue ring and a red house. Paired with stock sampling and with the exchange of two
function words, "and" and "on". Only for models of the scenes world, whose parser reads the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError, counted
from mmdit_probe.experiments.options import Input, LayersAndHeads, prompts_of
from mmdit_probe.experiments.sweep import STOCK, Condition, Sweep
from mmdit_probe.experiments.text import Text, TextTable, bounded, signed
from mmdit_probe.options import Option
from mmdit_probe.results.statistics import NONE, compare, interval
from mmdit_probe.scenes.captions import opposites, parse
from mmdit_probe.specs import Spec, heads_at, step_indices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.outcomes import Images, Numbers, Outcome
    from mmdit_probe.experiments.result import Result
    from mmdit_probe.models.mmdit import MMDiT

Kind = Literal["colours", "nouns"]
SWAP, FUNCTION = "swap", "function"
FUNCTION_WORDS = ("and", "on")
TOGETHER = -1
"""Value of the column `layer` in rows of all layers at once."""
OUTCOMES = ("exchanged", "kept")
SOURCE = "scenes:val"
POOL = 30
"""Captions that are looked through for each prompt that is wanted."""


@dataclass(frozen=True, kw_only=True)
class SwapTest(LayersAndHeads, Sweep):
    """Exchange the two colours, or the two nouns, of a prompt at one layer: do the objects exchange them too?

    Prompts with two single objects of different nouns and colours. Outcomes, read by the parser: both objects have
    each other's attribute, or both their own. Compared with stock images and with the exchange of two function words.
    """

    name = "swap-test"
    examples = ("--limit 50", "--swap nouns --layers 2-5 --together --limit 50")
    tables = ("swaps",)

    swap: Annotated[Kind, Option("Words to exchange: the two colours or the two nouns.")] = "colours"
    limit: Annotated[int | None, Input("Prompts (n).", min=1, shown_default="{0.default_prompts}")] = None
    steps: Annotated[Spec, Option("Sampling steps to edit: all, 0,20, 0-4, last-8.")] = "all"
    together: Annotated[bool, Option("Also exchange the words in all these layers at once.")] = False

    default_prompts = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        step_indices(self.steps, self.num_steps)
        if set(self.chosen_controls()) - {"random"}:
            raise UserError(f"--control {self.control}: a swap test has its own; expected random or none")

    def gather(self, scenes: bool) -> list[str]:
        if not scenes:
            raise UserError("a swap test reads images by the scenes parser, which does not know this model's world")
        wanted = self.limit or self.default_prompts
        own = self.prompts is None
        asked = prompts_of(SOURCE if own else self.prompts, POOL * wanted if own else None, scenes, wanted)
        fit = [text for text in asked if swapped_words(text, self.swap)][:wanted]
        if not fit:
            raise UserError(
                f"none of {counted(len(asked), 'prompt')} has two single coloured objects joined by 'and' on a ground,"
                " such as 'a red ring and a blue house on grass'"
            )
        return fit

    def conditions(self, model: MMDiT, prompts: Sequence[str]) -> list[Condition]:
        from mmdit_probe.edit import Swap

        layers, heads = self.places(model)
        words = {text: swapped_words(text, self.swap) for text in prompts}
        plan = [Condition(STOCK, {"condition": STOCK, "layer": TOGETHER})]
        places = [((layer,), layer) for layer in layers] + ([(layers, TOGETHER)] if self.together else [])
        for these, label in places:
            some = {layer: heads_at(heads, layer, model.heads) for layer in these}
            for name, pairs in ((SWAP, words), (FUNCTION, dict.fromkeys(prompts, FUNCTION_WORDS))):
                edit = Swap(words=pairs, layers=list(these), heads=some, steps=self.steps)
                place = "-together" if label == TOGETHER else f"-layer{label}"
                plan.append(Condition(f"{name}{place}", {"condition": name, "layer": label}, edit))
        return plan

    def outcomes(self, model: MMDiT) -> tuple[list[Outcome], dict[str, str | None]]:
        from mmdit_probe.experiments.outcomes import Change

        return [Change(), Exchange()], {}

    def extra_request(self) -> dict[str, Any]:
        return {"swap": self.swap}

    def keeps(self, index: int) -> bool:
        return index < 4

    def scores(self, result: Result) -> pd.DataFrame:
        return against(self.rows(result))

    def compare(self, result: Result) -> pd.DataFrame:
        return compare(self.scores(result).query("outcome == 'exchanged'"), ["layer", "outcome"])

    def claim(self, result: Result) -> str:
        return f"exchanging the two {self.swap} at this layer exchanges them in the image more often than the control"

    def headline(self, claims: pd.DataFrame) -> pd.DataFrame:
        return claims.drop(columns="outcome")

    def summarise(self, result: Result) -> pd.DataFrame:
        return summarise(self.rows(result))

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.layers import swaps

        count = int(result.summary["n"].max())
        title = f"{result.model_name}: {self.swap} exchanged, n = {counted(count, 'prompt')}"
        return {"swap": swaps(result.summary, title=title)}

    def tell(self, result: Result) -> list[Text]:
        count = counted(result.summary["n"].max(), "prompt")
        return [
            swap_table(result.summary),
            "share of images in which both objects have each other's attribute (exchanged) or their own (kept), 95 %"
            " interval; function: 'and' and 'on' are exchanged instead; difference from stock paired by prompt and"
            " seed.",
            f"n = {count}, {counted(self.num_steps, 'step')}, guidance {self.guidance:g}.",
        ]


def swapped_words(prompt: str, kind: Kind) -> tuple[str, str] | tuple[()]:
    """The two colours, or nouns, of a prompt; nothing unless it names two single objects of different nouns and colours
    and has both function words."""
    try:
        groups = parse(prompt).groups
    except UserError:
        return ()
    if len(groups) != 2 or any(group.count > 1 or group.colour is None for group in groups):
        return ()
    one, two = groups
    if one.noun == two.noun or one.colour == two.colour or not set(FUNCTION_WORDS) <= set(prompt.split()):
        return ()
    return (one.noun, two.noun) if kind == "nouns" else (str(one.colour), str(two.colour))


class Exchange:
    """`exchanged` and `kept`: 1 where the image shows both objects with each other's colour, or both with their own."""

    names = OUTCOMES

    def __init__(self) -> None:
        from mmdit_probe.scenes.parser import load_parser

        self.parser = load_parser()

    def __call__(self, prompts: Sequence[str], images: Images, unedited: Images) -> Numbers:
        from mmdit_probe.scenes.parser import things_right

        readings = list(zip(prompts, self.parser.read(images), strict=True))
        return {
            "exchanged": np.array([float(things_right(opposites(t)["swapped_colours"], seen)) for t, seen in readings]),
            "kept": np.array([float(things_right(text, seen)) for text, seen in readings]),
        }


def against(table: pd.DataFrame) -> pd.DataFrame:
    """The swap beside its controls: columns item, control (none, stock, function, random), layer, outcome, value."""
    own = table[table["control"] == NONE]
    swaps, stock = own[own["condition"] == SWAP], own[own["condition"] == STOCK]
    parts = [swaps, own[own["condition"] == FUNCTION].assign(control=FUNCTION)]
    parts += [stock.assign(control=STOCK, layer=layer) for layer in dict.fromkeys(swaps["layer"])]
    parts.append(table[(table["control"] != NONE) & (table["condition"] == SWAP)])
    every = pd.concat(parts, ignore_index=True)
    return every.melt(["item", "control", "layer"], list(OUTCOMES), "outcome")


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per condition, layer and outcome: n, share, low, high (95 % interval over prompts), and its difference
    from stock with difference_low and difference_high (paired). Stock has layer -1 and no difference."""

    own = table[table["control"] == NONE]
    stock = own[own["condition"] == STOCK].set_index("item")
    rows = []
    for (condition, layer), part in own.groupby(["condition", "layer"], observed=True):
        for outcome in OUTCOMES:
            row = {"condition": condition, "layer": layer, "outcome": outcome, "n": len(part)}
            row |= interval(part[outcome], kind="share").named("share", "")
            if condition != STOCK:
                away = part[outcome] - part["item"].map(stock[outcome])
                row |= interval(away, kind="change").named("difference")
            rows.append(row)
    return pd.DataFrame(rows)


def swap_table(summary: pd.DataFrame) -> TextTable:
    """One row per layer in text, stock first."""
    table = TextTable(["layer", "exchanged", "difference from stock", "function words", "kept"])
    rows = {(str(r["condition"]), r["layer"], r["outcome"]): r for r in summary.to_dict("records")}
    for layer in [None, *dict.fromkeys(summary.loc[summary["condition"] == SWAP, "layer"])]:
        condition, at = (STOCK, TOGETHER) if layer is None else (SWAP, layer)
        main, kept = (rows[condition, at, outcome] for outcome in OUTCOMES)
        cells = ["stock" if layer is None else "all" if layer == TOGETHER else str(layer)]
        cells.append(bounded(main["share"], main["low"], main["high"]))
        if layer is None:
            cells += ["", ""]
        else:
            other = rows[FUNCTION, layer, "exchanged"]
            cells.append(signed(main["difference"], main["difference_low"], main["difference_high"]))
            cells.append(bounded(other["share"], other["low"], other["high"]))
        table.add(*cells, bounded(kept["share"], kept["low"], kept["high"]))
    return table
