"""Generate: images, with perturbed guidance at several scales and layers if asked for; Eq. 7 and Fig. 6 of
arXiv:2509.18096.

    result = Generate(prompts="a red ring on grass", perturb_layers="4", perturb_scale="1,3").run("scenes-sd3")
    result.summary

Whether the guidance helps is a question for the alignment of its images, with an interval over paired seeds; the
controls of equal size say how much of it any perturbation would do. Not here: the guidance itself (`edit.guidance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError, counted
from mmdit_probe.experiments.options import Edited, check_streams, checked_heads, selected_places
from mmdit_probe.experiments.perturb import equal_budget
from mmdit_probe.experiments.sweep import (
    AGAINST_STOCK,
    DISTANCES,
    EQUAL,
    STOCK,
    Condition,
    JudgedSweep,
    aligned_outcome,
    gains,
    outcome_names,
    own_rows,
    sheet_cells,
)
from mmdit_probe.experiments.text import Text, TextTable, bounded, signed
from mmdit_probe.options import Option, changed
from mmdit_probe.results.statistics import NONE, corrected, interval, kind_of, p_value, two_sided
from mmdit_probe.scenes.captions import STATED
from mmdit_probe.specs import Spec, layer_indices, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.models.mmdit import MMDiT

PLACE = ["layers", "scale", "control"]
ROW = ["item", "prompt", "seed", *PLACE]
DIFFERENCE = ("difference", "difference_low", "difference_high")
SHARES = ("facts", "things_right", "grounds_right", *STATED, "relabelled")
"""Outcomes in [0, 1]."""
SHOWN_PROMPTS = 8
"""Prompts in the contact sheet."""


@dataclass(frozen=True, kw_only=True)
class Generate(Edited, JudgedSweep):
    """Sample images; with --perturb-layers, guided away from what the model says when those layers read blurred text.

    eps = eps_uncond + g (eps_cond - eps_uncond) + s (eps_cond - eps_perturbed), with g = --guidance, s =
    --perturb-scale. Stock images of the same seeds are sampled too; alignment is compared pairwise.
    """

    name = "generate"
    examples = (
        '--prompts "a red ring and a blue house on grass"',
        "--perturb-layers 4 --perturb-scale 1,2,4 --limit 8",
    )
    tables = ("images",)

    perturb_layers: Annotated[
        Spec | None, Option("Layers whose I2T is perturbed in the extra forward: 4, 3-5.", shown_default="none")
    ] = None
    perturb_scale: Annotated[
        str | float | Sequence[float], Option("Scale s of the guidance; several for a sweep: 1,2,4.")
    ] = "2"
    sweep: Annotated[Literal["none", "layer"], Option("Perturb each layer alone.")] = "none"
    selection: Annotated[
        Path | str | None, Option("Layers and heads from select-layers, in place of --perturb-layers.")
    ] = None
    enhance: Annotated[
        Spec | None,
        Option("Also sample with the text of these layers' blocks doubled (arXiv:2601.02211).", shown_default="none"),
    ] = None
    start: Annotated[float, Option("Guide from this part of the sampling, 0 to 1.", min=0, max=1)] = 0.0
    stop: Annotated[float, Option("Guide up to this part of the sampling.", min=0, max=1)] = 1.0

    default_prompts = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perturb_layers is not None and self.selection is not None:
            raise UserError("--perturb-layers and --selection both name layers; give one")
        if self.start > self.stop:
            raise UserError(f"--start {self.start:g} is after --stop {self.stop:g}: nothing would be guided")
        self.scales()
        equal = bool({*EQUAL} & {*self.chosen_controls()})
        unread = changed(self, "perturb_scale", "sweep", "start", "stop", *(["control"] if equal else []))
        if self.perturb_layers is None and self.selection is None and unread:
            raise UserError(f"{unread} is of perturbed guidance: name its layers with --perturb-layers or --selection")

    def scales(self) -> list[float]:
        """The scales of the guidance.

        Raises:
            UserError: they are no finite numbers.
        """
        refusal = f"--perturb-scale {self.perturb_scale!r}: expected a number of -1000 to 1000, or numbers by comma"
        return numbers(self.perturb_scale, -1000, 1000, refusal)

    def conditions(self, model: MMDiT, prompts: Sequence[str]) -> list[Condition]:
        check_streams(model, self.streams)
        from mmdit_probe.edit import ScaleText

        plan = [_condition((), 0.0)]
        if self.enhance is not None:
            doubled = layer_indices(self.enhance, len(model.layers))
            plan.append(_condition(doubled, 0.0, ScaleText(layers=list(doubled))))
        if self.selection is not None:
            layers, heads = selected_places(self.selection, model)
        elif self.perturb_layers is not None:
            layers = layer_indices(self.perturb_layers, len(model.layers))
            heads = checked_heads("all", layers, model.heads)
        else:
            return plan
        edit = self.change().at(heads=heads)
        for these in [(layer,) for layer in layers] if self.sweep == "layer" else [layers]:
            here = edit.at(layers=list(these))
            for scale in (scale for scale in self.scales() if scale != 0):
                plan.append(_condition(these, scale, here))
                plan += [
                    _condition(these, scale, equal_budget(here, self.seed, name), name)
                    for name in self.chosen_controls()
                    if name in EQUAL
                ]
        return plan

    def guided_options(self) -> dict[str, Any]:
        return {"start": self.start, "stop": self.stop}

    def extra_request(self) -> dict[str, Any]:
        return {"range": [self.start, self.stop]}

    def keeps(self, index: int) -> bool:
        return True

    def summarise(self, result: Result) -> pd.DataFrame:
        return summarise(self.rows(result))

    def scores(self, result: Result) -> pd.DataFrame:
        """What guidance adds to stock sampling."""
        rows = self.rows(result)
        table = rows.assign(condition=rows["layers"].map(lambda layers: "guided" if layers else STOCK))
        found = gains(table, [*ROW, "condition"], ["layers", "scale"])
        return found[~found["outcome"].isin(AGAINST_STOCK)]

    def claim(self, result: Result) -> str:
        aligned = aligned_outcome(result.table) or "no measure of it"
        return f"guidance adds more to the alignment ({aligned}) than in the control"

    def headline(self, claims: pd.DataFrame) -> pd.DataFrame:
        return claims[claims["outcome"] == aligned_outcome(claims)].drop(columns="outcome")

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        return {"by_setting": result.summary}

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.perturb import guidance_sweep
        from mmdit_probe.plots.sheet import sheet

        request = result.request
        plan = request["conditions"]
        prompts = [prompt for prompt, _ in request["items"]][:SHOWN_PROMPTS]
        cells = sheet_cells(result, [c[0] for c in plan], range(len(prompts)))
        guided = "perturbed guidance, " if len(plan) > 1 else ""
        title = f"{result.model_name}: {guided}guidance {request['guidance']:g}"
        figures = {"generate": sheet(cells, [_heading(c) for c in plan], prompts, title=title)}
        if len(plan) > 1:
            count = result.summary["n"].max()
            figures["sweep"] = guidance_sweep(result.summary, title=f"{title}, n = {count}")
        return figures

    def tell(self, result: Result) -> list[Text]:
        request = result.request
        texts: list[Text] = [setting_table(result.summary)]
        if len(request["conditions"]) > 1:
            texts.append(
                "in brackets: 95 % interval over prompts; differences are paired with stock by seed, their verdicts are"
                " corrected for the settings of the table (Holm)."
            )
        kept = "" if result.path is None else f"; images: {result.path / 'images'}"
        count = counted(result.summary["n"].max(), "prompt")
        return [*texts, f"n = {count}, {counted(request['num_steps'], 'step')}{kept}"]

    def document(self, result: Result) -> dict[str, Any]:
        images = None if result.path is None else result.path / "images"
        return {"images": images, "settings": result.summary, "controls": result.claims}


def _condition(layers: Sequence[int], scale: float, edit: Any = None, control: str = NONE) -> Condition:
    place = f"-layers{'+'.join(map(str, layers))}-scale{scale:g}"
    kind = "guided" if control == NONE else control
    name = f"{kind}{place}" if scale else f"enhanced{place}" if layers else STOCK
    labels = {"layers": ",".join(map(str, layers)), "scale": float(scale), "control": control}
    return Condition(name, labels, edit, scale, control)


def _heading(condition: Sequence[Any]) -> str:
    _, labels, scale, _ = condition
    if scale == 0:
        return f"text x 2\nlayer {labels['layers'].replace(',', '+')}" if labels["layers"] else STOCK
    equal = "" if labels["control"] == NONE else f"{labels['control']}, "
    return f"{equal}layer {labels['layers'].replace(',', '+')}\nscale {scale:g}"


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per setting and outcome: layers (none for stock), scale (0 without guidance), control (none, or which
    control of equal size the perturbation is), n, mean, low, high (95 % interval over prompts), and, for settings other
    than stock, difference, difference_low, difference_high (minus stock, paired), p_holm (corrected for the settings of
    an outcome) and verdict (`results.statistics.two_sided`). `change` is a difference as it is."""
    table = own_rows(table)
    stock = table[table["layers"] == ""].set_index("item")
    rows = []
    for place, part in table.groupby(PLACE, observed=True):
        for name in outcome_names(table, ROW):
            row: dict[str, Any] = dict(zip(PLACE, place, strict=True))
            row |= {"outcome": name, "n": int(part[name].notna().sum())}
            itself = not row["layers"] and name in AGAINST_STOCK  # exact: stock beside stock is no sample of anything
            share = name in SHARES and not itself
            row |= interval(part[name], kind="share" if share else "mean").named("mean", "")
            row |= dict.fromkeys((*DIFFERENCE, "p_holm"), np.nan)
            if row["layers"]:
                before = part["item"].map(stock[name])
                gain, kind = part[name] - before, kind_of(part[name], before, distance=name in DISTANCES)
                row |= interval(gain, kind).named("difference") | {"p_holm": p_value(gain, kind)}
            rows.append(row)
    found = corrected(pd.DataFrame(rows), ["p_holm"], "outcome").sort_values(["outcome", *PLACE], ignore_index=True)
    ends = dict(zip(DIFFERENCE[1:], ("low", "high"), strict=True))
    told = two_sided(found.drop(columns=[*ends.values()]).rename(columns=ends))
    return found.assign(verdict=told.where(found["layers"] != "", ""))


_HEADINGS = {"facts": "facts shown", "clip_t": "CLIP-T", "change": "change (RMS)"}


def setting_table(summary: pd.DataFrame) -> TextTable:
    """One row per setting in text."""
    known = set(summary.loc[summary["n"] > 0, "outcome"])
    names = [name for name in _HEADINGS if name in known]
    places, columns = ["layers", "scale", "perturbation"], []
    for name in names:
        heading = _HEADINGS[name]
        columns += [heading, *([f"{heading} - stock"] if name != "change" else [])]
    main = aligned_outcome(summary)
    columns += ["verdict"] if main else []
    spare = ("CLIP-T - stock", "CLIP-T", "perturbation")
    table = TextTable([*places, *columns], left=[*places, "verdict"], spare=spare)
    for place, part in summary.groupby(PLACE, observed=True, sort=True):
        layers, scale, control = str(place[0]), float(str(place[1])), str(place[2])
        rows = part.set_index("outcome")
        what = "edit" if scale else "text x 2" if layers else "none"
        cells = [layers or "-", f"{scale:g}", what if control == NONE else control]
        for name in names:
            row = rows.loc[name]
            cells.append(bounded(row["mean"], row["low"], row["high"]))
            if name != "change":
                cells.append(
                    "" if not layers else signed(row["difference"], row["difference_low"], row["difference_high"])
                )
        table.add(*cells, *([str(rows.loc[main, "verdict"])] if main else []))
    return table
