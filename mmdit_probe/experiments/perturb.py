"""The perturbation experiment (arXiv:2509.18096, Fig. 5 and 18): edit one place at a time, sample again with the same
seed, and see what the image loses.

    from mmdit_probe import Blur, load
    from mmdit_probe.experiments.perturb import perturb, summarise
    table = perturb(load("scenes-sd3"), ["a red ring on grass"], Blur("image", "text"), layers="all")
    print(summarise(table))

Every place (a layer, a head of a layer, or a span kind in a layer) is edited on its own. Beside the edit stand a no-op
row, which must be exactly 0, and the equal-budget random control: the same amount of change in the layer's output, in a
random direction. An effect that the control shows as well says that the layer is sensitive, not what it carries. The
controls of `experiments.controls` come beside it: the same edits on random weights, under uniform attention, and the
same images against another item's caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmdit_probe.edit.control import EqualBudget
from mmdit_probe.edit.edit import Edit
from mmdit_probe.errors import UserError, unknown
from mmdit_probe.experiments.controls import Variant
from mmdit_probe.experiments.outcomes import Change, Outcome, measure
from mmdit_probe.observe.observer import MemorySink, Sink
from mmdit_probe.observe.probe import probe
from mmdit_probe.results.statistics import FEWEST, NONE, interval, measured
from mmdit_probe.specs import HeadSpec, Spec, heads_at, layer_indices

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from mmdit_probe.models.mmdit import MMDiT

By = Literal["layers", "heads", "spans"]
BY: tuple[By, ...] = ("layers", "heads", "spans")
SPANS = ("word", "bos", "eos", "pad")
ALL_HEADS, ALL_SPANS = -1, "all"
STOCK, NO_OP, EDIT, CONTROL = "stock", "no-op", "edit", "control"
BUDGET = "budget"
"""Value of the column `control` in rows of the equal-budget random control."""
AGAINST_STOCK = ("change", "relabelled", "clip_i", "dino")
"""Outcomes that already compare with the unedited image; the others are reported as differences from its value."""


@dataclass(frozen=True)
class Condition:
    """One way to sample: what is edited, and where. `layer` is -1 for stock and no-op."""

    kind: str
    layer: int = -1
    head: int = ALL_HEADS
    span: str = ALL_SPANS
    edit: Any = None

    @property
    def name(self) -> str:
        """A file name's worth of it."""
        head = "" if self.head == ALL_HEADS else f"-head{self.head}"
        span = "" if self.span == ALL_SPANS else f"-{self.span}"
        return self.kind if self.layer < 0 else f"{self.kind}-layer{self.layer}{head}{span}"


def conditions(
    model: MMDiT, edit: Edit, layers: Spec = "all", by: By = "layers", heads: HeadSpec = "all", control: bool = True,
    seed: int = 0,
) -> list[Condition]:  # fmt: skip
    """Everything to sample: stock first, then the no-op, then each place with its control.

    Args:
        model: whose layers and heads exist.
        edit: what is done; its layers (and heads or spans) are set per place.
        layers: which layers. by: one place per layer, per head of each, or per span kind in each.
        heads: those that are edited, together or (with `by="heads"`) one at a time.
        control: add the equal-budget random control of every place; its directions are drawn from `seed`.
    """
    if by not in BY:
        raise unknown("kind of place", by, BY)
    chosen = layer_indices(layers, len(model.layers))
    result = [Condition(STOCK), Condition(NO_OP, edit=edit.no_op().at(layers=list(chosen)))]
    for layer in chosen:
        places: list[dict[str, Any]] = [{}]
        these = heads_at(heads, layer, model.heads)
        if by == "heads":
            places = [{"heads": head} for head in these]
        elif by == "spans":
            places = [{"spans": (span,)} for span in SPANS]
        for place in places:
            here = edit.at(layers=[layer], **({} if heads == "all" else {"heads": these}) | place)
            address = (layer, place.get("heads", ALL_HEADS), place.get("spans", (ALL_SPANS,))[0])
            result.append(Condition(EDIT, *address, edit=here))
            if control:
                result.append(Condition(CONTROL, *address, edit=EqualBudget(here, seed)))
    return result


@dataclass(frozen=True)
class Sampling:
    """How images are sampled: steps, guidance scale, seed of the first prompt (prompt k: seed + k), prompts at once."""

    steps: int = 28
    guidance: float = 7.5
    seed: int = 0
    batch: int = 8


def chunks(prompts: Sequence[str], sampling: Sampling) -> list[list[int]]:
    """Indices of the prompts that are sampled together; an image depends on its own seed alone."""
    size = max(1, sampling.batch)
    return [list(range(first, min(first + size, len(prompts)))) for first in range(0, len(prompts), size)]


def run_chunk(
    model: MMDiT, prompts: Sequence[str], indices: Sequence[int], plan: Sequence[Condition], sampling: Sampling,
    outcomes: Sequence[Outcome], sink: Sink, keep: Callable[[int, Condition, Image], None] = lambda *_: None,
    advance: Callable[[], None] = lambda: None, variant: Variant | None = None, shuffled: bool = False,
) -> None:  # fmt: skip
    """Sample some prompts under every condition and measure; `keep` gets each image, `sink` one row per image.

    Args:
        variant: the control that is sampled instead of the model, if any.
        shuffled: write the rows of the same images against the next prompt's text too.
    """
    if plan[0].kind != STOCK:
        raise UserError("the first condition must be stock: every outcome is a comparison with it")
    texts = [prompts[index] for index in indices]
    others = [prompts[(index + 1) % len(prompts)] for index in indices]
    seeds = [sampling.seed + index for index in indices]
    always, sampled = (variant.edits, variant.model) if variant is not None else ((), model)
    unedited: list[Image] = []
    for condition in plan:
        options: dict[str, Any] = {"steps": sampling.steps, "guidance": sampling.guidance, "seed": seeds}
        edits = [*always, *([] if condition.edit is None else [condition.edit])]
        if edits:
            with probe(sampled, edits=edits):
                images = sampled.generate(texts, **options)
        else:
            images = sampled.generate(texts, **options)
        unedited = unedited or images
        count = len(texts)
        name = NONE if variant is None else variant.name
        against = [(BUDGET if condition.kind == CONTROL and name == NONE else name, texts)]
        against += [("shuffled", others)] if shuffled and condition.kind in (STOCK, EDIT) else []
        for control, read in against:
            sink.write(
                {
                    "item": np.array(indices, np.int64),
                    "prompt": np.array(read, dtype=object),
                    "seed": np.array(seeds, np.int64),
                    "control": np.full(count, control, dtype=object),
                    "condition": np.full(count, condition.kind, dtype=object),
                    "layer": np.full(count, condition.layer, np.int64),
                    "head": np.full(count, condition.head, np.int64),
                    "span": np.full(count, condition.span, dtype=object),
                    **measure(outcomes, read, images, unedited),
                }
            )
        for index, image in zip(indices, images, strict=True):
            keep(index, condition, image)
        advance()


def perturb(
    model: MMDiT, prompts: str | Sequence[str], edit: Edit, *, layers: Spec = "all", by: By = "layers",
    heads: HeadSpec = "all", control: bool = True, sampling: Sampling | None = None,
    outcomes: Sequence[Outcome] = (), variant: Variant | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Sample prompts under every condition and measure.

    Args:
        model: from `load`. prompts: one or more. edit: see `mmdit_probe.edit`.
        layers, by, heads, control: as in `conditions`.
        outcomes: beside the change of the pixels, see `experiments.outcomes`.
        variant: sample this control of `experiments.controls` instead.

    Returns: one row per image: item, prompt, seed, control (none; budget where the condition is control), condition
    (stock | no-op | edit | control), layer, head, span, and one column per outcome.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    how = sampling or Sampling()
    plan = conditions(model, edit, layers, by, heads, control, how.seed)
    memory = MemorySink()
    for indices in chunks(texts, how):
        run_chunk(model, texts, indices, plan, how, [Change(), *outcomes], memory, variant=variant)
    return memory.table()


PLACE = ["layer", "head", "span"]
ROW = ["item", "prompt", "seed", "control", "condition", *PLACE]


def own(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the measurement itself, its equal-budget control among them."""
    import pandas as pd

    return pd.concat([measured(table), measured(table, BUDGET)]) if "control" in table else table


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `own` with every outcome as a paired effect: what compares with the unedited image as it is, the
    others minus the value of the unedited image of the same prompt and seed."""
    table = own(table)
    stock = table[table["condition"] == STOCK].set_index("item")
    result = table[table["condition"] != STOCK].copy()
    for name in (column for column in table.columns if column not in ROW):
        if name in ("clip_i", "dino"):
            result[name] = result[name] - 1.0  # the unedited image has cosine 1 with itself
        elif name not in AGAINST_STOCK:
            result[name] = result[name] - result["item"].map(stock[name])
    return result


def losses(table: pd.DataFrame) -> pd.DataFrame:
    """What every edit costs, for `results.statistics.compare`.

    Returns: columns item, control, layer, head, span, outcome, value. The value is the effect with the sign that
    makes harm positive: a drop of alignment or similarity, a rise of change.
    """
    import pandas as pd

    parts = []
    for control in dict.fromkeys(table["control"]):
        if control == BUDGET:  # compared with the measurement's own stock rows
            part = effects(table)
            part = part[part["condition"] == CONTROL]
        else:
            part = effects(table[table["control"] == control].assign(control=NONE))
            part = part[part["condition"] == EDIT]
        names = [column for column in part.columns if column not in ROW]
        if control == "shuffled":
            names = [name for name in names if name not in AGAINST_STOCK]  # those read no text
        harm = part[names] * [1.0 if name in ("change", "relabelled") else -1.0 for name in names]
        wide = pd.concat([part[["item", *PLACE]], harm], axis=1).assign(control=control)
        parts.append(wide.melt(["item", "control", *PLACE], names, "outcome"))
    return pd.concat(parts, ignore_index=True)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per place and outcome.

    Returns: columns layer, head, span, outcome, n, effect, low, high (mean and 95 % bootstrap interval over prompts of
    the paired effect), control, control_low, control_high, beyond, beyond_low, beyond_high (edit minus control, paired)
    and verdict: "beyond control" if that interval excludes 0, "as control" if not, "no effect" if the effect's own
    interval includes 0, "too few" below 5 prompts, "" without a control. The no-op has layer -1.
    """
    import pandas as pd

    long = effects(table)
    names = [column for column in long.columns if column not in ROW]
    rows: list[dict[str, Any]] = []
    for place, part in long.groupby(PLACE, observed=True):
        edited = part[part["condition"] != CONTROL].set_index("item")
        random = part[part["condition"] == CONTROL].set_index("item")
        for name in names:
            row = dict(zip(PLACE, place, strict=True)) | {"outcome": name, "n": len(edited)}
            row["effect"], row["low"], row["high"] = interval(edited[name])
            row["verdict"] = ""
            if len(random):
                row["control"], row["control_low"], row["control_high"] = interval(random[name])
                difference = edited[name] - random[name].reindex(edited.index)
                row["beyond"], row["beyond_low"], row["beyond_high"] = interval(difference)
                row["verdict"] = _verdict(row)
            rows.append(row)
    summary = pd.DataFrame(rows)
    return summary.sort_values(["outcome", *PLACE]).reset_index(drop=True)


def _verdict(row: dict[str, Any]) -> str:
    if row["n"] < FEWEST:
        return "too few"
    if row["low"] <= 0 <= row["high"]:
        return "no effect"
    return "as control" if row["beyond_low"] <= 0 <= row["beyond_high"] else "beyond control"
