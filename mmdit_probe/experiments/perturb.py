"""Perturb: edit one place at a time, sample again with the same seed, and see what the image loses; Fig. 5 and 18 of
arXiv:2509.18096.

    result = Perturb(layers="all", prompts="scenes:val", limit=16).run("scenes-sd3")
    result.summary

Every place (a layer, a head of a layer, or a span kind in a layer) is edited on its own. Beside the edit stand a no-op
row, which must be exactly 0, and controls of equal size: the edit's own change, turned (coherent), or white noise. An
effect that a control shows as well says that the layer is sensitive, not what it carries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import UserError, counted
from mmdit_probe.experiments.options import EditControl, Edited, LayersAndHeads, Output, check_streams
from mmdit_probe.experiments.sweep import (
    BUDGET,
    DISTANCES,
    EQUAL,
    HARM_IS_RISE,
    MEANING,
    STOCK,
    Condition,
    JudgedSweep,
    aligned_outcome,
    effects,
    gains,
    outcome_names,
    sheet_cells,
)
from mmdit_probe.experiments.text import Text, TextTable, signed
from mmdit_probe.options import Option
from mmdit_probe.results.statistics import (
    BEYOND,
    FEWEST,
    LEVEL,
    NONE,
    NOT_BEYOND,
    TOO_FEW,
    Kind,
    corrected,
    interval,
    kind_of,
    n_for_effect,
    p_value,
)
from mmdit_probe.scenes.captions import STATED
from mmdit_probe.specs import Spec, heads_at, step_indices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.models.mmdit import MMDiT

SPANS = ("word", "bos", "eos", "pad")
ALL_HEADS, ALL_SPANS = -1, "all"
NO_OP, EDIT, CONTROL = "no-op", "edit", "control"
NO_EFFECT = "no effect shown"
PLACE = ["layer", "head", "span"]
ROW = ["item", "prompt", "seed", "control", "condition", *PLACE]
DRAWN = [name for name in MEANING if name not in ("grounds_right", *STATED, "relabelled")]
"""Outcomes of the figure."""


@dataclass(frozen=True, kw_only=True)
class Perturb(LayersAndHeads, Edited, JudgedSweep):
    """Edit the I2T block of one layer at a time, sample with the same seeds, and measure what changes.

    Outcomes: change of the image; for models of the scenes world, which facts of the prompt the image still shows; with
    --clip and --dino, the paper's CLIP-T, CLIP-I and DINO similarity. The no-op row must be exactly 0.
    """

    name = "perturb"
    examples = ("--layers all --prompts scenes:val --limit 16", "--layers 4 --sweep head --limit 8")
    tables = ("perturb",)

    control: EditControl = BUDGET
    sweep: Annotated[Literal["layer", "head", "span"], Option("Edit each layer, head or span kind alone.")] = "layer"
    renormalise: Annotated[bool, Option("Rescale edited rows to a total of 1.")] = False
    steps: Annotated[Spec, Option("Sampling steps to edit: all, 0,20, 0-4, last-8.")] = "all"
    branch: Annotated[Literal["all", "cond", "uncond"], Option("Guidance branch to edit.")] = "all"
    shown: Annotated[int, Output("Keep the images of this many prompts for the contact sheet.", min=0)] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        step_indices(self.steps, self.num_steps)
        if self.sweep == "span" and self.key != "text":
            raise UserError("--sweep span tells kinds of text tokens apart; --key reference has none")
        if self.branch == "uncond" and self.guidance <= 1:
            raise UserError(f"--branch uncond: --guidance {self.guidance:g} runs without that branch")

    def conditions(self, model: MMDiT, prompts: Sequence[str]) -> list[Condition]:
        check_streams(model, self.streams)
        layers, heads = self.places(model)
        branches = None if self.branch == "all" else (self.branch,)
        edit = self.change(renormalise=self.renormalise, steps=self.steps, branches=branches)
        plan = [_condition(STOCK, -1), _condition(NO_OP, -1, edit=edit.no_op().at(layers=list(layers)))]
        for layer in layers:
            these = heads_at(heads, layer, model.heads)
            whole = len(these) == model.heads
            for head, span in self._places_of(these):
                address: dict[str, Any] = {"layers": [layer]} | ({} if whole else {"heads": these})
                address |= {"heads": head} if head != ALL_HEADS else {}
                address |= {"spans": (span,)} if span != ALL_SPANS else {}
                here = edit.at(**address)
                plan.append(_condition(EDIT, layer, head, span, here))
                plan += [
                    _condition(CONTROL, layer, head, span, equal_budget(here, self.seed, name), name)
                    for name in self.chosen_controls()
                    if name in EQUAL
                ]
        return plan

    def _places_of(self, heads: Sequence[int]) -> list[tuple[int, str]]:
        if self.sweep == "head":
            return [(head, ALL_SPANS) for head in heads]
        return [(ALL_HEADS, span) for span in SPANS] if self.sweep == "span" else [(ALL_HEADS, ALL_SPANS)]

    def keeps(self, index: int) -> bool:
        return index < self.shown

    def summarise(self, result: Result) -> pd.DataFrame:
        return summarise(self.rows(result))

    def scores(self, result: Result) -> pd.DataFrame:
        """What every edit costs: the effect with the sign that makes harm positive, a drop of alignment or similarity,
        a rise of change."""
        found = gains(self.rows(result), ROW, ["condition", *PLACE])
        found = found[found["condition"] != NO_OP].drop(columns="condition")
        harm = np.where(found["outcome"].isin(HARM_IS_RISE), 1.0, -1.0)
        return found.assign(value=found["value"] * harm)

    def sign(self, outcome: str) -> float:
        return -1.0  # the scores are what an edit costs

    def claim(self, result: Result) -> str:
        main = self._main(result)
        return (
            f"editing the place costs more ({main}: {'rise' if main in HARM_IS_RISE else 'drop'}) than in the control"
        )

    def _main(self, result: Result) -> str:
        return aligned_outcome(result.table) or "change"

    def headline(self, claims: pd.DataFrame) -> pd.DataFrame:
        main = aligned_outcome(claims) or "change"
        return claims[(claims["outcome"] == main) & ~claims["control"].isin(EQUAL)].drop(columns="outcome")

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        return {"perturb_by_place": result.summary}

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.perturb import effects_by_layer, effects_grid
        from mmdit_probe.plots.sheet import sheet

        summary, name = result.summary, result.model_name
        count = int(summary["n"].max())
        what = f"{name}: {self.edit} of {'I2T' if self.key == 'text' else 'I2R'}"
        title = f"{what}, n = {counted(count, 'prompt')}"
        if self.sweep != "layer":
            return {"perturb": effects_grid(summary, self._main(result), title=title)}
        figures = {"perturb": effects_by_layer(summary, DRAWN, title=title)}
        rows = sorted({int(kept.split("-")[0]) for kept in result.store.picture_names()})
        prompts = [result.request["items"][row][0] for row in rows]
        for kind, label, shown in (
            (EDIT, "sheet", what), (CONTROL, "sheet_control", f"{name}: a change of equal size in place of the edit"),
        ):  # fmt: skip
            columns = [c for c in result.request["conditions"] if c[1]["condition"] in (STOCK, kind)]
            if rows and len(columns) > 1:
                cells = sheet_cells(result, [c[0] for c in columns], rows)
                heads = ["none" if c[1]["layer"] < 0 else f"layer {c[1]['layer']}" for c in columns]
                shown = f"{shown}, {len(rows)} of {counted(count, 'prompt')}"
                figures[f"perturb_{label}"] = sheet(cells, heads, prompts, title=shown)
        return figures

    def tell(self, result: Result) -> list[Text]:
        request, count = result.request, int(result.summary["n"].max())
        moved = no_op_change(result.table)
        return [
            effect_table(result.summary),
            *power(self.rows(result)),
            "Difference from the unedited image of the same prompt and seed, mean [95 % interval over prompts];"
            " control: a change of equal size; verdicts are corrected for the places (Holm). Meaning comes first: a"
            " picture that moves may say the same.",
            f"n = {counted(count, 'prompt')}, {counted(request['num_steps'], 'step')}, guidance {request['guidance']};"
            f" no-op row: largest change {moved:g}{'' if moved == 0 else ' (must be 0: results are not paired)'}",
        ]

    def document(self, result: Result) -> dict[str, Any]:
        return {"no_op_change": no_op_change(result.table), "places": result.summary, "controls": result.claims}


def equal_budget(edit: Any, seed: int, control: str) -> Any:
    """The control of equal size of an edit."""
    from mmdit_probe.edit import EqualBudget

    return EqualBudget(edit, seed, kind=EQUAL[control])


def _condition(
    kind: str, layer: int, head: int = ALL_HEADS, span: str = ALL_SPANS, edit: Any = None, control: str = NONE
) -> Condition:
    place = "" if layer < 0 else f"-layer{layer}"
    place += "" if head == ALL_HEADS else f"-head{head}"
    place += "" if span == ALL_SPANS else f"-{span}"
    name = f"{control}{place}" if kind == CONTROL else f"{kind}{place}"
    return Condition(name, {"condition": kind, "layer": layer, "head": head, "span": span}, edit, control=control)


def no_op_change(table: pd.DataFrame) -> float:
    """The largest change of the rows that must not change anything."""
    return float(table.loc[table["condition"] == NO_OP, "change"].abs().max())


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per place and outcome.

    Returns: columns layer, head, span, outcome, n, effect, low, high (mean and 95 % interval over prompts of the paired
    effect); of the strongest control of equal size there: equal (its name), control, control_low,
    control_high, beyond, beyond_low, beyond_high (edit minus control, paired) and p_holm (of that difference, corrected
    for the places of an outcome); and verdict: "beyond control" if the effect's interval excludes 0, beyond's does on
    the same side, and p_holm is at most .05; "no effect shown" if the effect's own includes 0; else "not beyond
    control"; "too few items" where p_holm is NaN, "" without a control. The no-op has layer -1.
    """
    long = effects(table, ROW)
    rows: list[dict[str, Any]] = []
    for place, part in long.groupby(PLACE, observed=True):
        edited = part[part["condition"] != CONTROL].set_index("item")
        equal = [of.set_index("item") for _, of in part[part["condition"] == CONTROL].groupby("control", observed=True)]
        for name in outcome_names(long, ROW):
            row = dict(zip(PLACE, place, strict=True)) | {"outcome": name, "n": int(edited[name].notna().sum())}
            distance = name in DISTANCES
            # The no-op is no sample of anything: it must be 0, not about 0.
            kind: Kind = kind_of(edited[name], distance=distance) if edited["layer"].iloc[0] >= 0 else "mean"
            row |= interval(edited[name], kind).named("effect", "") | {"p_holm": float("nan")}
            if equal:
                row |= _strongest(edited[name], {str(of["control"].iloc[0]): of[name] for of in equal}, distance)
            rows.append(row)
    found = corrected(pd.DataFrame(rows), ["p_holm"], "outcome")
    found["verdict"] = [_verdict(row) for row in found.to_dict("records")]
    order = found["outcome"].map({name: place for place, name in enumerate(MEANING)})
    return found.assign(order=order).sort_values(["order", *PLACE]).drop(columns="order").reset_index(drop=True)


def _strongest(edited: pd.Series, equal: Mapping[str, pd.Series], distance: bool) -> dict[str, Any]:
    """The columns of `summarise` about the strongest control: the one whose interval of edit minus control reaches
    least far in the direction of the edit's effect. What is beyond it is beyond each, so p is the largest of all."""
    rows = []
    for name, control in equal.items():
        control = control.reindex(edited.index)
        difference, kind = edited - control, kind_of(edited, control, distance=distance)
        beyond, p = interval(difference, kind), p_value(difference, kind)
        row: dict[str, Any] = {"equal": name, "p_holm": p}
        own = interval(control, kind_of(control, distance=distance))
        rows.append(row | own.named("control") | beyond.named("beyond"))
    rises = edited.mean() > 0
    least = min(rows, key=lambda row: np.nan_to_num(row["beyond_low"] if rises else -row["beyond_high"], nan=np.inf))
    return least | {"p_holm": float(np.max([row["p_holm"] for row in rows]))}  # NaN if one is


SMALL = 0.05
"""Drop of the alignment that the power is told for."""


def power(table: pd.DataFrame) -> list[str]:
    """How many prompts would show a small drop of the alignment at every place, also beyond the controls of equal size,
    as the verdict asks; nothing without a measure of it, or from fewer prompts than a verdict needs.

    By the place and control whose differences spread most, at 5 % over all places (Holm's first step), with power .8;
    where the differences of a place do not vary, nothing can be told of it.
    """
    main = aligned_outcome(table)
    long = effects(table, ROW)
    if main is None or long["item"].nunique() < FEWEST:
        return []
    differences = []
    for _, part in long[long["condition"] != NO_OP].groupby(PLACE, observed=True):
        edited = part[part["condition"] == EDIT].set_index("item")[main]
        equal = part[part["condition"] == CONTROL].groupby("control", observed=True)
        differences.append([edited, *(edited - of.set_index("item")[main] for _, of in equal)])
    needed = [[n_for_effect(one, SMALL, comparisons=len(differences)) for one in place] for place in differences]
    known = [max(n for n in place if n is not None) for place in needed if None not in place]
    if not known:
        return []
    beyond = " beyond the control" if (table["condition"] == CONTROL).any() else ""
    where = "every place" if len(known) == len(needed) else f"{len(known)} of {len(needed)} places, others untold"
    return [f"Power: n = {max(known)} would show a drop of {SMALL:g}{beyond} at {where} (80 %, {main})."]


def _verdict(row: Mapping[Any, Any]) -> str:
    if row.get("beyond", np.nan) != row.get("beyond", np.nan):
        return ""
    if np.isnan(row["p_holm"]):
        return TOO_FEW
    if row["low"] <= 0 <= row["high"]:
        return NO_EFFECT
    same_side = row["beyond_low"] > 0 if row["low"] > 0 else row["beyond_high"] < 0
    return BEYOND if same_side and row["p_holm"] <= 1 - LEVEL else NOT_BEYOND


def effect_table(summary: pd.DataFrame) -> TextTable:
    """The table per place in text: alignment with the prompt first, the change of the image last."""
    from mmdit_probe.plots.perturb import LABELS

    there = set(summary.loc[summary["n"] > 0, "outcome"])
    shown = [name for name in (aligned_outcome(summary) or "", "things_right", "change") if name in there]
    columns = [column for name in shown for column in (LABELS[name], "control", "verdict")]
    table = TextTable(["place", *columns], left=("place",), spare=("control",))
    for place, part in summary.groupby(PLACE, sort=True):
        layer, head, span = int(str(place[0])), int(str(place[1])), str(place[2])
        rows = part.set_index("outcome")
        label = "no-op" if layer < 0 else f"layer {layer}"
        label += "" if head < 0 else f" head {head}"
        cells = [label + ("" if span == ALL_SPANS else f" {span}")]
        for name in shown:
            row = rows.loc[name]
            equal = row.get("control")
            cells.append(signed(row["effect"], row["low"], row["high"]))
            cells.append("" if equal is None or equal != equal else f"{equal:+.3f}")
            cells.append(str(row["verdict"]))
        table.add(*cells)
    return table
