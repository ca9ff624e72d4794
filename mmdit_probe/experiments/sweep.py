"""Sampling with perturbed guidance at several scales and layers, paired with stock sampling (Fig. 6 of
arXiv:2509.18096).

    table = sweep(load("scenes-sd3"), ["a red ring on grass"], Blur("image", "text"), [(4,)], [1.0, 3.0])

Whether the guidance helps is a question for the alignment of its images, with an interval over paired seeds; the random
control says how much of it any perturbation would do. Not here: the guidance itself (`edit.guidance`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdit_probe.edit.control import EqualBudget
from mmdit_probe.edit.edit import Edit
from mmdit_probe.edit.guidance import perturbed_guidance
from mmdit_probe.experiments.controls import Variant
from mmdit_probe.experiments.outcomes import Change, Outcome, measure
from mmdit_probe.experiments.perturb import AGAINST_STOCK, BUDGET, Sampling, chunks, own
from mmdit_probe.observe.observer import MemorySink, Sink
from mmdit_probe.observe.probe import probe
from mmdit_probe.results.statistics import NONE, interval

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from mmdit_probe.models.mmdit import MMDiT

PLACE = ["layers", "scale", "control"]
"""Columns of a setting; `control` is that of `experiments.controls`, or "budget": the random perturbation of equal
size."""
ROW = ["item", "prompt", "seed", *PLACE]


@dataclass(frozen=True)
class Setting:
    """Layers perturbed together, scale s, and whether the perturbation is the random control. Scale 0 is stock."""

    layers: tuple[int, ...] = ()
    scale: float = 0.0
    control: bool = False

    @property
    def name(self) -> str:
        """A file name's worth of it."""
        if self.scale == 0:
            return "stock"
        kind = "control" if self.control else "guided"
        return f"{kind}-layers{'+'.join(map(str, self.layers))}-scale{self.scale:g}"


def settings(layers: Sequence[tuple[int, ...]], scales: Sequence[float], control: bool = False) -> list[Setting]:
    """Stock first, then every set of layers at every scale other than 0, each with its control if asked for."""
    kinds = (False, True) if control else (False,)
    return [Setting(), *(Setting(of, s, kind) for of in layers for s in scales if s != 0 for kind in kinds)]


def run_chunk(
    model: MMDiT, prompts: Sequence[str], indices: Sequence[int], plan: Sequence[Setting], edit: Edit,
    sampling: Sampling, outcomes: Sequence[Outcome], sink: Sink,
    keep: Callable[[int, Setting, Image], None] = lambda *_: None, advance: Callable[[], None] = lambda: None,
    variant: Variant | None = None, shuffled: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Sample some prompts under every setting and measure; `options` go to `Guided.generate` (start, stop, ...).

    Args:
        variant: the control that is sampled instead of the model, if any.
        shuffled: write the rows of the same images against the next prompt's text too.
    """
    texts = [prompts[index] for index in indices]
    others = [prompts[(index + 1) % len(prompts)] for index in indices]
    seeds = [sampling.seed + index for index in indices]
    how: dict[str, Any] = {"steps": sampling.steps, "guidance": sampling.guidance, "seed": seeds}
    always, sampled = (variant.edits, variant.model) if variant is not None else ((), model)
    name = NONE if variant is None else variant.name
    stock: list[Image] = []
    for setting in plan:
        with ExitStack() as stack:
            if always:
                stack.enter_context(probe(sampled, edits=always))
            if setting.scale == 0:
                images = sampled.generate(texts, **how)
            else:
                here = edit.at(layers=list(setting.layers))
                guided = stack.enter_context(
                    perturbed_guidance(sampled, EqualBudget(here) if setting.control else here)
                )
                images = guided.generate(texts, scale=setting.scale, **how, **options)
        stock = stock or images
        count = len(texts)
        against = [(BUDGET if setting.control and name == NONE else name, texts)]
        against += [("shuffled", others)] if shuffled and not setting.control else []
        for control, read in against:
            sink.write(
                {
                    "item": np.array(indices, np.int64),
                    "prompt": np.array(read, dtype=object),
                    "seed": np.array(seeds, np.int64),
                    "layers": np.full(count, ",".join(map(str, setting.layers)), dtype=object),
                    "scale": np.full(count, setting.scale, np.float64),
                    "control": np.full(count, control, dtype=object),
                    **measure(outcomes, read, images, stock),
                }
            )
        for index, image in zip(indices, images, strict=True):
            keep(index, setting, image)
        advance()


def sweep(
    model: MMDiT, prompts: str | Sequence[str], edit: Edit, layers: Sequence[tuple[int, ...]], scales: Sequence[float],
    *, control: bool = False, sampling: Sampling | None = None, outcomes: Sequence[Outcome] = (),
) -> pd.DataFrame:  # fmt: skip
    """Sample prompts under every setting and measure.

    Args:
        model: whose pipeline makes the extra forward of skip-layer guidance.
        prompts: one or more. edit: what the perturbed forward does.
        layers: sets of layers to perturb together. scales: values of s; stock is always sampled too.
        control: add the equal-budget random perturbation at every setting.

    Returns: one row per image: item, prompt, seed, layers, scale, control (none | budget), and one column per outcome.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    how = sampling or Sampling()
    plan = settings(layers, scales, control)
    memory = MemorySink()
    for indices in chunks(texts, how):
        run_chunk(model, texts, indices, plan, edit, how, [Change(), *outcomes], memory)
    return memory.table()


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per setting and outcome: layers, scale, control (whether the perturbation is the random one), n, mean,
    low, high (95 % bootstrap over prompts), and, for settings other than stock, difference, difference_low,
    difference_high (minus stock, paired). `change` is a difference as it is."""
    import pandas as pd

    table = own(table)
    stock = table[table["scale"] == 0].set_index("item")
    rows = []
    for place, part in table.groupby(PLACE, observed=True):
        for name in (column for column in table.columns if column not in ROW):
            row: dict[str, Any] = dict(zip(PLACE, place, strict=True)) | {"outcome": name, "n": len(part)}
            row["control"] = row["control"] == BUDGET
            row["mean"], row["low"], row["high"] = interval(part[name])
            if row["scale"] != 0:
                paired = part[name] - part["item"].map(stock[name])
                row["difference"], row["difference_low"], row["difference_high"] = interval(paired)
            rows.append(row)
    return pd.DataFrame(rows).sort_values(["outcome", *PLACE]).reset_index(drop=True)


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """What guidance adds to stock sampling, for `results.statistics.compare`: columns item, control, layers, scale,
    outcome, value (guided minus stock of the same model, prompt and seed)."""
    import pandas as pd

    parts = []
    for control in dict.fromkeys(table["control"]):
        base = table[table["control"] == (NONE if control == BUDGET else control)]
        stock = base[base["scale"] == 0].set_index("item")
        part = table[(table["control"] == control) & (table["scale"] != 0)]
        names = [column for column in table.columns if column not in (*ROW, *AGAINST_STOCK)]
        wide = part[["item", "control", "layers", "scale"]].copy()
        for name in names:
            wide[name] = part[name] - part["item"].map(stock[name])
        parts.append(wide.melt(["item", "control", "layers", "scale"], names, "outcome"))
    return pd.concat(parts, ignore_index=True)
