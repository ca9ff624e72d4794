"""SelectLayers: evidence per layer joined into one `LayerSelection`, with intervals, ranks, controls and stability.

    result = SelectLayers(evidence="word_mass,segmentation", limit=24).run("scenes-sd3")
    result.selection; result.summary

Models that do not know the scenes world: run attention-budget, value-norms and perturb on them and pass the run folders
(`runs`). Not here: the measurements (`experiments.evidence` and the other experiments).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mmdit_probe.errors import UserError, check_known
from mmdit_probe.experiments import evidence
from mmdit_probe.experiments.evidence import EVIDENCE, RANK_RULES, Amount, evidence_names
from mmdit_probe.experiments.experiment import Experiment, Study, request_of, text_of
from mmdit_probe.experiments.options import Control, Input, Sampling, sources_of
from mmdit_probe.experiments.target import knows_scenes
from mmdit_probe.experiments.text import Text, TextTable, signed
from mmdit_probe.options import Option
from mmdit_probe.results.selection import LayerSelection
from mmdit_probe.scenes import split_of_world

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import Store, TaskRecord
    from mmdit_probe.models.mmdit import MMDiT

Split = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class SelectLayers(Sampling, Experiment):
    """Join evidence per layer, each with interval and rank, and select layers; writes selection.json.

    Models that do not know the scenes world: run attention-budget, value-norms and perturb on them and pass the run
    folders with --from.
    """

    name = "select-layers"
    examples = ("--evidence word_mass,segmentation --limit 24", "--from runs/budget --from runs/perturb --top 2")
    tables = ("evidence",)
    claimed = "the layer shows more of the evidence than in the control"

    evidence: Annotated[
        str | None,
        Input("Evidence to measure on scenes: all, or some of word_mass, value_gap, pca_class, perturbation,"
              " segmentation.", shown_default="all, or none with --from")
    ] = None  # fmt: skip
    runs: Annotated[
        Sequence[Path | str],
        Input("Run folder of attention-budget, value-norms, pca or perturb; repeatable.", flag="--from"),
    ] = ()
    rule: Annotated[str, Option("ranks (least mean rank), median-ranks, or one evidence.")] = "ranks"
    top: Annotated[int, Option("Layers to select.", min=1)] = 1
    weights: Annotated[Literal["equal", "ranks"], Option("Weights of several layers.")] = "equal"
    top_heads: Annotated[int, Option("Heads to select per layer, by their maps on scenes; 0: all.", min=0)] = 0
    split: Annotated[Split, Input("Scenes to select on.")] = "val"
    report: Annotated[Split, Input("Other scenes to report on.")] = "test"
    limit: Annotated[int, Input("Scenes per evidence.", min=4)] = 24
    perturb_limit: Annotated[int, Input("Prompts of the perturbation.", min=1)] = 8
    sigma: Annotated[float, Option("Noise level, 0 clean to 1 noise.", min=0, max=1)] = 0.515
    control: Control = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = self.wanted()
        check_known("rule", self.rule, (*RANK_RULES, *EVIDENCE))
        if self.split == self.report and wanted:
            raise UserError(f"--split and --report are both {self.split!r}: select on one split, report on another")

    def wanted(self) -> list[str]:
        """The evidence to measure."""
        return evidence_names(self.evidence, bool(self.runs))

    @property
    def selected_on(self) -> str:
        """What the layers are selected on, in words."""
        return " and ".join([self.split] * bool(self.wanted()) + ["given runs"] * bool(self.runs))

    @property
    def amount(self) -> Amount:
        """How much of each is measured."""
        return Amount(self.limit, self.sigma, self.perturb_limit, self.num_steps, self.guidance, self.seed)

    def gather(self, scenes: bool) -> None:
        if self.wanted() and not scenes:
            raise UserError(
                "evidence is measured on scenes, which this model does not know; run attention-budget, value-norms and"
                " perturb on it and pass their folders with --from"
            )
        if self.top_heads and not scenes:
            raise UserError("--top-heads are selected by their maps on scenes, which this model does not know")
        for run in self.runs:
            evidence.record_of(run)

    def check_counts(self, layers: int, heads: int) -> None:
        """A model of so many layers and heads has as many as are to be selected.

        Raises:
            UserError: it has not.
        """
        if self.top > layers:
            raise UserError(f"--top {self.top}: expected 1 to {layers} layers")
        if self.top_heads > heads:
            raise UserError(f"--top-heads {self.top_heads}: expected at most {heads} heads, or 0 for all")

    def prepare(self, model: MMDiT, inputs: None) -> Study:
        self.check_counts(len(model.layers), model.heads)
        chosen = self.chosen_controls()
        names = self.wanted()
        kept = f"scenes:{self.report}" if names else ""
        read = [evidence.from_run(run, model, text_of(model), kept) for run in self.runs]
        held = [*names, *(str(frame["evidence"].iloc[0]) for frame in read)]
        twice = next((name for name in held if held.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"evidence {twice!r} is given twice; give one run of its command, or measure it here")
        check_known("rule", self.rule, (*RANK_RULES, *held))
        # Controls belong to the split that is selected on.
        tasks: list[Any] = [frame.assign(split=self.split) for frame in read]
        tasks += [
            (name, split, chosen if split == self.split else ())
            for split in (self.split, self.report)
            for name in names
        ]
        request = request_of(
            model, evidence=names, top=self.top, heads=self.top_heads, num_steps=self.num_steps, guidance=self.guidance,
            controls=list(chosen), **self._how(),
        )  # fmt: skip
        records = {str(run): evidence.record_of(run) for run in self.runs}
        sources = [f"scenes:{self.split}"] * bool(names)
        for record in records.values():
            sources += sources_of(record.get("options", {}), knows_scenes(model))
        contents = {run: record["created"] for run, record in records.items()}
        return Study(model, request, tasks, "evidence", facts={"contents": contents, "selected_on": sources})

    def _how(self) -> dict[str, Any]:
        return {
            "rule": self.rule, "weights": self.weights, "split": split_of_world(self.split),
            "report": split_of_world(self.report), "n": self.limit, "prompts": self.perturb_limit, "sigma": self.sigma,
            "seed": self.seed, "from": [str(run) for run in self.runs],
        }  # fmt: skip

    def measure(self, study: Study, task: Any, record: TaskRecord) -> None:
        if isinstance(task, tuple):
            name, split, chosen = task
            task = evidence.measure(name, study.model, split, self.amount, chosen)
        record.write("evidence", task)

    def finish(self, study: Study, store: Store) -> None:
        if self.top_heads and "best_heads" not in store.data:
            table = evidence.by_layer(store.table("evidence"))
            chosen = evidence.choose(table[table["split"] == self.split], self.top, self.rule)
            best = evidence.best_heads(study.model, chosen, self.top_heads, self.split, self.amount)
            store.record(best_heads={str(layer): list(of) for layer, of in best.items()})

    def summarise(self, result: Result) -> pd.DataFrame:
        return evidence.by_layer(result.table)

    def selected(self, result: Result) -> LayerSelection:
        """The selection that the evidence makes."""
        here = result.summary[result.summary["split"] == self.split]
        chosen = evidence.choose(here, self.top, self.rule)
        heads = {int(layer): tuple(of) for layer, of in result.data.get("best_heads", {}).items()}
        shares = {str(row["layer"]): row["share"] for row in _rows(result.frames["stability"])}
        return LayerSelection(
            result.data["model"]["id"], result.data["model"]["weight_hash"], chosen,
            weights=evidence.weights_of(here, chosen, self.weights, self.rule), heads=heads,
            how=self._how()
            | {"what": EVIDENCE, "stability": shares, "selected_on": result.data.get("selected_on", [])},
            evidence=[{str(n): value for n, value in row.items()} for row in result.summary.to_dict("records")],
        )  # fmt: skip

    def scores(self, result: Result) -> pd.DataFrame:
        table = result.table
        return table.loc[table["split"] == self.split, ["evidence", "layer", "item", "control", "value"]]

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        return {
            "evidence_by_layer": result.summary,
            "agreement": evidence.agreement(result.table),
            "stability": evidence.stability(result.table[result.table["split"] == self.split], self.top, self.rule),
        }

    def files(self, result: Result, folder: Path) -> None:
        self.selected(result).save(folder / "selection.json")

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.layers import evidence as figure

        layers = self.selected(result).layers
        chosen = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        title = f"{result.model_name}: {chosen} selected on {self.selected_on}"
        here = result.summary[result.summary["split"] == self.split]
        return {"select_layers": figure(here, self._within(result.frames["agreement"]), layers, title=title)}

    def _within(self, correlations: pd.DataFrame) -> pd.DataFrame:
        if correlations.empty:
            return correlations
        return correlations[(correlations["first_split"] == self.split) & (correlations["second_split"] == self.split)]

    def tell(self, result: Result) -> list[Text]:
        lines: list[Text] = [evidence_table(result.summary, self.split, self.selected_on)]
        if self.report in set(result.summary["split"]):
            lines.append(evidence_table(result.summary, self.report, self.report))
        correlations = result.frames["agreement"]
        if len(correlations):
            again = correlations[
                (correlations["first"] == correlations["second"])
                & (correlations["first_split"] != correlations["second_split"])
            ]
            rows = [*_rows(again), *_rows(self._within(correlations))]
            lines += [agreement_table(rows)] if rows else []
        own = _rows(result.frames["stability"].sort_values("share", ascending=False))
        shares = ", ".join(f"layer {row['layer']} {row['share']:.0%}" for row in own if row["share"] > 0)
        lines.append(f"stability over resampled items: {shares}.")
        where = "" if result.path is None else f"; pass --selection {result.path / 'selection.json'}"
        here = result.summary[result.summary["split"] == self.split]
        known = evidence.ranks_of(here, self.rule).index
        if len(known) < here["layer"].nunique():
            lines.append(f"selected among layers {', '.join(map(str, known))}: the others lack some of the evidence.")
        chosen = self.selected(result).layers
        word = "layer" if len(chosen) == 1 else "layers"
        level = "".join(f" (layer {layer} is level)" for layer in evidence.level(here, chosen, self.rule))
        return [*lines, f"selected by {self.rule}: {word} {', '.join(map(str, chosen))}{level}{where}"]

    def document(self, result: Result) -> dict[str, Any]:
        selection = self.selected(result)
        return {
            "selection": None if result.path is None else result.path / "selection.json",
            "layers": list(selection.layers),
            "heads": {str(layer): list(heads) for layer, heads in selection.heads.items()},
            "weights": list(selection.weights),
            "evidence": result.summary,
            "agreement": result.frames["agreement"],
            "stability": result.frames["stability"],
            "controls": result.claims,
        }


def _rows(frame: pd.DataFrame) -> list[dict[Any, Any]]:
    return frame.to_dict("records")


def agreement_table(rows: list[dict[Any, Any]]) -> TextTable:
    """Rank correlations over layers of two evidences, or of one on two splits; "-" where one is alike in all layers."""
    title = f"rank correlation over {rows[0]['layers']} layers, 95 % interval over items"
    table = TextTable(["evidence", "with", "correlation", "p (Holm)"], left=("evidence", "with"), title=title)
    for row in rows:
        same = row["first"] == row["second"]
        rho = signed(row["rho"], row["low"], row["high"], 2)
        p = "<0.01" if row["p_holm"] < 0.005 else f"{row['p_holm']:.2f}"
        table.add(
            row["first"], f"itself on {row['second_split']}" if same else row["second"],
            *((rho, p) if row["rho"] == row["rho"] else ("-", "-")),
        )  # fmt: skip
    return table


def evidence_table(table: pd.DataFrame, split: str, where: str) -> TextTable:
    """One split's evidence in text: value and rank per layer; with intervals five evidences are wider than a screen."""
    part = table[table["split"] == split]
    names = list(dict.fromkeys(part["evidence"]))
    result = TextTable(
        ["layer", *names], spare=names[:1:-1], title=f"{where}: value (rank); intervals stand in the figure and the CSV"
    )
    indexed = part.set_index(["evidence", "layer"])
    for layer in sorted(set(part["layer"])):
        cells = [str(layer)]
        for name in names:
            if (name, layer) not in indexed.index:
                cells.append("")
                continue
            row = indexed.loc[(name, layer)]
            cells.append(f"{row['value']:.3f} ({int(row['rank'])})")
        result.add(*cells)
    return result
