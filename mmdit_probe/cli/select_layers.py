"""`mmdit-probe select-layers`: join the evidence per layer and write the selection that later commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.options import SESSION, Controls, Guidance, NumSteps, Session, Sigma, with_session

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

NAME, TABLE = "select-layers", "evidence"


@with_session
def command(
    evidence: Annotated[
        str | None,
        typer.Option(
            help="Evidence to measure on scenes: all, or some of word_mass, value_gap, pca_class, "
            "perturbation, segmentation.",
            show_default="all, or none with --from",
        ),
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Run folder of attention-budget, value-norms, pca or perturb; repeatable."),
    ] = None,
    rule: Annotated[str, typer.Option(help="ranks (least mean rank), median-ranks, or one evidence.")] = "ranks",
    top: Annotated[int, typer.Option(help="Layers to select.", min=1)] = 1,
    weights: Annotated[str, typer.Option(help="Weights of several layers: equal, or ranks.")] = "equal",
    heads: Annotated[int, typer.Option(help="Heads to select per layer, by their maps on scenes; 0: all.", min=0)] = 0,
    split: Annotated[str, typer.Option(help="Scenes to select on.")] = "val",
    report: Annotated[str, typer.Option(help="Other scenes to report on.")] = "test",
    limit: Annotated[int, typer.Option(help="Scenes per evidence.", min=4)] = 24,
    prompts: Annotated[int, typer.Option(help="Prompts of the perturbation.", min=1)] = 8,
    sigma: Sigma = 0.515,
    num_steps: NumSteps = 28,
    guidance: Guidance = 7.5,
    control: Controls = "none",
    session: Session = SESSION,
) -> None:
    """Join evidence per layer, each with interval and rank, and select layers; writes selection.json.

    Models that do not know the scenes world: run attention-budget, value-norms and perturb on them and pass the run
    folders with --from.
    """
    from mmdit_probe.cli.session import check_sigma, load_model, open_folder, output_of, text_of
    from mmdit_probe.errors import UserError, unknown
    from mmdit_probe.experiments.evidence_names import CONTROLLED, EVIDENCE, RANK_RULES, WEIGHT_RULES, evidence_names
    from mmdit_probe.scenes import SPLITS

    output = output_of(session)
    wanted = evidence_names(evidence, bool(runs))
    for kind, given, known in (
        ("rule", rule, (*RANK_RULES, *EVIDENCE)), ("rule of the weights", weights, WEIGHT_RULES),
        ("split", split, SPLITS), ("split", report, SPLITS),
    ):  # fmt: skip
        if given not in known:
            raise unknown(kind, given, known)
    check_sigma(sigma)
    if split == report and wanted:
        raise UserError(f"--split and --report are both {split!r}: select on one split, report on another")

    import pandas as pd

    from mmdit_probe.experiments import evidence as room
    from mmdit_probe.experiments.controls import parse
    from mmdit_probe.results import TableWriter, read_table
    from mmdit_probe.results.selection import LayerSelection
    from mmdit_probe.results.statistics import NONE

    controls = parse(control)
    loaded = load_model(session)
    if top > len(loaded.layers):
        raise UserError(f"--top {top}: expected 1 to {len(loaded.layers)} layers")
    plan = room.Plan(limit, sigma, prompts, num_steps, guidance, session.seed)
    read = [room.from_run(run, loaded, text_of(session)) for run in runs or []]
    how: dict[str, Any] = {
        "rule": rule, "weights": weights, "split": split, "report": report, "n": limit, "prompts": prompts,
        "sigma": sigma, "seed": session.seed, "from": [str(run) for run in runs or []],
    }  # fmt: skip
    options = {
        "evidence": wanted, "top": top, "heads": heads, "num_steps": num_steps, "guidance": guidance,
        "controls": list(controls), **how,
    }  # fmt: skip
    folder = open_folder(NAME, loaded, session, options)
    if not folder.complete:
        tasks = [(name, split, NONE) for name in wanted]
        tasks += [(name, report, NONE) for name in wanted]
        tasks += [(name, split, of) for name in wanted for of in controls if of in CONTROLLED[name]]
        with TableWriter(folder.path, TABLE) as writer:
            for number, frame in enumerate(read):
                if number not in writer.done:
                    with writer.item(number) as item:
                        item.write(frame.assign(split=split))
            with output.progress("evidence", len(tasks), max(0, len(writer.done) - len(read))) as advance:
                for number, (name, scenes, of) in enumerate(tasks, len(read)):
                    if number not in writer.done:
                        with writer.item(number) as item:
                            item.write(room.measure(loaded, scenes, [name], plan, control=of))
                        advance()
            folder.record()

    long = pd.DataFrame(read_table(folder.path / f"{TABLE}.parquet"))
    table, correlations = room.by_layer(long), room.agreement(long)
    here = table[table["split"] == split]
    chosen = room.choose(here, top, rule)
    if heads and "best_heads" not in folder.data:
        best = room.best_heads(loaded, chosen, heads, split, plan)
        folder.record(best_heads={str(layer): list(of) for layer, of in best.items()})
    known_heads = folder.data.get("best_heads", {}) if heads else {}
    selection = LayerSelection(
        loaded.name, loaded.weight_hash, chosen, weights=room.weights_of(here, chosen, weights),
        heads={int(layer): tuple(of) for layer, of in known_heads.items()}, how=how | {"what": EVIDENCE},
        evidence=[{str(name): value for name, value in row.items()} for row in table.to_dict("records")],
    )  # fmt: skip
    path = selection.save(folder.path / "selection.json")
    _report(folder, selection, long, table, correlations, path, output)


def _report(
    folder: Any, selection: Any, long: pd.DataFrame, table: pd.DataFrame, correlations: pd.DataFrame, path: Path,
    output: Any,
) -> None:  # fmt: skip
    from mmdit_probe.cli.tables import plain, report_controls
    from mmdit_probe.plots import save
    from mmdit_probe.plots.select import evidence
    from mmdit_probe.results.statistics import compare

    request = folder.data["request"]
    split, report = request["split"], request["report"]
    table.to_csv(folder.path / "evidence_by_layer.csv", index=False, float_format="%.6g")
    correlations.to_csv(folder.path / "agreement.csv", index=False, float_format="%.6g")
    here = correlations[(correlations["first_split"] == split) & (correlations["second_split"] == split)]
    across = correlations[
        (correlations["first"] == correlations["second"])
        & (correlations["first_split"] != correlations["second_split"])
    ]
    title = f"{Path(request['model']).name}: selected layers {', '.join(map(str, selection.layers))} on {split}"
    figure = evidence(table[table["split"] == split], here, selection.layers, title=title)
    figures = save(figure, folder.path / "select_layers")
    comparison = compare(long[long["split"] == split], ["evidence", "layer"])
    against = report_controls(
        folder, TABLE, comparison, "the selected layers show more of the evidence than in the control",
        lambda rows: rows[rows["layer"].isin(selection.layers)],
    )  # fmt: skip
    if not folder.complete:
        folder.finish(layers=list(selection.layers))
    lines: list[Any] = [evidence_rows(table, split)]
    if report in set(table["split"]):
        lines.append(evidence_rows(table, report))
    for row in across.itertuples():
        lines.append(
            f"{row.first}: rank correlation {split} with {report} {row.rho:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
        )
    for row in here.itertuples():
        lines.append(f"{row.first} with {row.second}: {row.rho:+.2f} [{row.low:+.2f}, {row.high:+.2f}]")
    lines += against
    lines.append(f"selected ({request['rule']}): layers {list(selection.layers)}; pass --selection {path}")
    document = {
        "run": folder.path,
        "selection": path,
        "layers": list(selection.layers),
        "heads": {str(layer): list(heads) for layer, heads in selection.heads.items()},
        "figures": figures,
        "weights": list(selection.weights),
        "evidence": plain(table),
        "agreement": plain(correlations),
        "controls": plain(comparison),
    }
    output.result(document, lines, path)


def evidence_rows(table: pd.DataFrame, split: str) -> Table:
    """One split's evidence for the terminal: value, interval and rank per layer."""
    from mmdit_probe.cli.tables import bare_table

    part = table[table["split"] == split]
    names = list(dict.fromkeys(part["evidence"]))
    result = bare_table(["layer", *names])
    result.title = f"{split}: value [95 %] (rank)"
    indexed = part.set_index(["evidence", "layer"])
    for layer in sorted(set(part["layer"])):
        cells = [str(layer)]
        for name in names:
            if (name, layer) not in indexed.index:
                cells.append("")
                continue
            row = indexed.loc[(name, layer)]
            cells.append(f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] ({int(row['rank'])})")
        result.add_row(*cells)
    return result
