"""The perturbation experiment (arXiv:2509.18096, Fig. 5 and 18): edit one place at a time, sample again with the same
seed, and see what the image loses.

    from mmdit_probe import Blur, load
    from mmdit_probe.edit.perturb import perturb, summarise
    table = perturb(load("scenes-sd3"), ["a red ring on grass"], Blur("image", "text"), layers="all")
    print(summarise(table))

Every place (a layer, a head of a layer, or a span kind in a layer) is edited on its own. Beside the edit stand a no-op
row, which must be exactly 0, and the equal-budget random control: the same amount of change in the layer's output, in a
random direction. An effect that the control shows as well says that the layer is sensitive, not what it carries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmdit_probe.edit.base import Edit
from mmdit_probe.edit.control import EqualBudget
from mmdit_probe.edit.outcomes import Change, Outcome, measure
from mmdit_probe.errors import UserError, unknown
from mmdit_probe.observe.base import MemorySink, Sink
from mmdit_probe.observe.probe import probe
from mmdit_probe.specs import Spec, head_indices, layer_indices

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from mmdit_probe.models.mmdit import MMDiT

By = Literal["layers", "heads", "spans"]
BY: tuple[By, ...] = ("layers", "heads", "spans")
SPANS = ("word", "bos", "eos", "pad")
ALL_HEADS, ALL_SPANS = -1, "all"
STOCK, NO_OP, EDIT, CONTROL = "stock", "no-op", "edit", "control"
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
    model: MMDiT, edit: Edit, layers: Spec = "all", by: By = "layers", heads: Spec = "all", control: bool = True,
    seed: int = 0,
) -> list[Condition]:  # fmt: skip
    """Everything to sample: stock first, then the no-op, then each place with its control.

    Args:
        model: whose layers and heads exist.
        edit: what is done; its layers (and heads or spans) are set per place.
        layers: which layers. by: one place per layer, per head of each, or per span kind in each.
        heads: with `by="heads"`, which.
        control: add the equal-budget random control of every place; its directions are drawn from `seed`.
    """
    if by not in BY:
        raise unknown("kind of place", by, BY)
    chosen = layer_indices(layers, len(model.layers))
    result = [Condition(STOCK), Condition(NO_OP, edit=edit.no_op().at(layers=list(chosen)))]
    for layer in chosen:
        places: list[dict[str, Any]] = [{}]
        if by == "heads":
            places = [{"heads": head} for head in head_indices(heads, model.heads)]
        elif by == "spans":
            places = [{"spans": (span,)} for span in SPANS]
        for place in places:
            here = edit.at(layers=[layer], **place)
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
    advance: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Sample some prompts under every condition and measure; `keep` gets each image, `sink` one row per image."""
    if plan[0].kind != STOCK:
        raise UserError("the first condition must be stock: every outcome is a comparison with it")
    texts = [prompts[index] for index in indices]
    seeds = [sampling.seed + index for index in indices]
    unedited: list[Image] = []
    for condition in plan:
        options: dict[str, Any] = {"steps": sampling.steps, "guidance": sampling.guidance, "seed": seeds}
        if condition.edit is None:
            images = model.generate(texts, **options)
        else:
            with probe(model, edits=condition.edit, layers=[0]):
                images = model.generate(texts, **options)
        unedited = unedited or images
        count = len(texts)
        sink.write(
            {
                "item": np.array(indices, np.int64),
                "prompt": np.array(texts, dtype=object),
                "seed": np.array(seeds, np.int64),
                "condition": np.full(count, condition.kind, dtype=object),
                "layer": np.full(count, condition.layer, np.int64),
                "head": np.full(count, condition.head, np.int64),
                "span": np.full(count, condition.span, dtype=object),
                **measure(outcomes, texts, images, unedited),
            }
        )
        for index, image in zip(indices, images, strict=True):
            keep(index, condition, image)
        advance()


def perturb(
    model: MMDiT, prompts: str | Sequence[str], edit: Edit, *, layers: Spec = "all", by: By = "layers",
    heads: Spec = "all", control: bool = True, sampling: Sampling | None = None, outcomes: Sequence[Outcome] = (),
) -> pd.DataFrame:  # fmt: skip
    """Sample prompts under every condition and measure.

    Args:
        model: from `load`. prompts: one or more. edit: see `mmdit_probe.edit`.
        layers, by, heads, control: as in `conditions`.
        outcomes: beside the change of the pixels, see `edit.outcomes`.

    Returns: one row per image: item, prompt, seed, condition (stock | no-op | edit | control), layer, head, span, and
    one column per outcome.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    how = sampling or Sampling()
    plan = conditions(model, edit, layers, by, heads, control, how.seed)
    memory = MemorySink()
    for indices in chunks(texts, how):
        run_chunk(model, texts, indices, plan, how, [Change(), *outcomes], memory)
    return memory.table()


PLACE = ["layer", "head", "span"]
ROW = ["item", "prompt", "seed", "condition", *PLACE]


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """The long table with every outcome as a paired effect: what compares with the unedited image as it is, the others
    minus the value of the unedited image of the same prompt and seed."""
    stock = table[table["condition"] == STOCK].set_index("item")
    result = table[table["condition"] != STOCK].copy()
    for name in (column for column in table.columns if column not in ROW):
        if name in ("clip_i", "dino"):
            result[name] = result[name] - 1.0  # the unedited image has cosine 1 with itself
        elif name not in AGAINST_STOCK:
            result[name] = result[name] - result["item"].map(stock[name])
    return result


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per place and outcome.

    Returns: columns layer, head, span, outcome, n, effect, low, high (mean and 95 % bootstrap interval over prompts of
    the paired effect), control, control_low, control_high, beyond, beyond_low, beyond_high (edit minus control, paired)
    and verdict: "beyond control" if that interval excludes 0, "as control" if not, "no effect" if the effect's own
    interval includes 0, "too few" below 5 prompts, "" without a control. The no-op has layer -1.
    """
    import pandas as pd

    from mmdit_probe.embedded.report import interval

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


FEWEST = 5
"""Prompts below which a bootstrap interval decides nothing."""


def _verdict(row: dict[str, Any]) -> str:
    if row["n"] < FEWEST:
        return "too few"
    if row["low"] <= 0 <= row["high"]:
        return "no effect"
    return "as control" if row["beyond_low"] <= 0 <= row["beyond_high"] else "beyond control"
