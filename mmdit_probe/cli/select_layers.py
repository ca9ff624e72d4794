"""`mmdit-probe select-layers`: join the evidence per layer and write the selection that later commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.attention_budget import Guidance, NoT5, NumSteps, Sigma
from mmdit_probe.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Json, Lora, Model, Out, Quiet, Resume, Seed

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

NAME, TABLE = "select-layers", "evidence"


def command(
    evidence: Annotated[
        str | None,
        typer.Option(
            help="Evidence to measure on scenes: all, or some of word_mass, value_gap, pca_class, "
            "perturbation, segmentation. [default: all, or none with --from]"
        ),
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Run folder of attention-budget, value-norms, pca or perturb; repeatable."),
    ] = None,
    rule: Annotated[str, typer.Option(help="ranks (least mean rank), median-ranks, or one evidence.")] = "ranks",
    top: Annotated[int, typer.Option(help="Layers to select.", min=1)] = 1,
    heads: Annotated[int, typer.Option(help="Heads to select per layer, by their maps on scenes; 0: all.", min=0)] = 0,
    split: Annotated[str, typer.Option(help="Scenes to select on.")] = "val",
    report: Annotated[str, typer.Option(help="Other scenes to report on (the perturbation is not repeated).")] = "test",
    limit: Annotated[int, typer.Option(help="Scenes per evidence.", min=4)] = 24,
    prompts: Annotated[int, typer.Option(help="Prompts of the perturbation.", min=1)] = 8,
    sigma: Sigma = 0.515,
    num_steps: NumSteps = 28,
    guidance: Guidance = 7.5,
    no_t5: NoT5 = False,
    model: Model = DEFAULT_MODEL,
    lora: Lora = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Join evidence per layer, each with interval and rank, and select layers; writes selection.json.

    Models that do not know the scenes world: run attention-budget, value-norms and perturb on them and pass the run
    folders with --from.
    """  # fmt: skip
    from mmdit_probe.cli.output import Output
    from mmdit_probe.errors import UserError
    from mmdit_probe.select.names import EVIDENCE, evidence_names

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    wanted = evidence_names(evidence, bool(runs))
    if rule not in ("ranks", *EVIDENCE):
        from mmdit_probe.errors import unknown

        raise unknown("rule", rule, ("ranks", *EVIDENCE))
    if split == report and wanted:
        raise UserError(f"--split and --report are both {split!r}: select on one split, report on another")

    import pandas as pd

    from mmdit_probe.cli.session import open_model
    from mmdit_probe.results import RunFolder, TableWriter
    from mmdit_probe.select import LayerSelection
    from mmdit_probe.select import evidence as room

    loaded = open_model(model, lora=lora, debug=debug, device=device, dtype=dtype, t5=not no_t5)
    plan = room.Plan(limit, sigma, prompts, num_steps, guidance, seed)
    read = [room.from_run(run, loaded) for run in runs or []]
    request = {
        "model": loaded.name,
        "weight_hash": loaded.weight_hash,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "evidence": wanted,
        "from": [str(run) for run in runs or []],
        "rule": rule,
        "top": top,
        "heads": heads,
        "split": split,
        "report": report,
        "n": limit,
        "prompts": prompts,
        "sigma": sigma,
        "num_steps": num_steps,
        "guidance": guidance,
        "seed": seed,
    }
    folder = RunFolder.open(NAME, request, out=out, resume=resume)
    if not folder.complete:
        facts = {"id": loaded.name, "family": loaded.family.name, "weight_hash": loaded.weight_hash}
        folder.record(model=facts, device=str(loaded.device))
        tasks = [(name, split) for name in wanted]
        tasks += [(name, report) for name in wanted if name != "perturbation"]
        with TableWriter(folder.path, TABLE) as writer:
            for number, frame in enumerate(read):
                if number not in writer.done:
                    with writer.item(number) as item:
                        item.write(frame.assign(split=split))
            with output.progress("evidence", len(tasks), max(0, len(writer.done) - len(read))) as advance:
                for number, (name, of) in enumerate(tasks, len(read)):
                    if number not in writer.done:
                        with writer.item(number) as item:
                            item.write(room.measure(loaded, of, [name], plan))
                        advance()
            folder.record()
    from mmdit_probe.results import read_table

    long = pd.DataFrame(read_table(folder.path / f"{TABLE}.parquet"))
    table, correlations = room.by_layer(long), room.agreement(long)
    chosen = room.choose(table[table["split"] == split], top, rule)
    which = room.best_heads(loaded, chosen, heads, split, plan) if heads else {}
    how = {name: request[name] for name in ("rule", "split", "report", "n", "prompts", "sigma", "seed", "from")}
    selection = LayerSelection(
        loaded.name, loaded.weight_hash, chosen, heads=which, how=how | {"what": EVIDENCE},
        evidence=[{str(name): value for name, value in row.items()} for row in table.to_dict("records")],
    )  # fmt: skip
    path = selection.save(folder.path / "selection.json")
    _report(folder, selection, table, correlations, path, output)


def _report(
    folder: Any, selection: Any, table: pd.DataFrame, correlations: pd.DataFrame, path: Path, output: Any
) -> None:
    from mmdit_probe.plots import save
    from mmdit_probe.plots.select import evidence

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
    lines.append(f"selected ({request['rule']}): layers {list(selection.layers)}; pass --selection {path}")
    document = {
        "run": folder.path,
        "selection": path,
        "layers": list(selection.layers),
        "heads": {str(layer): list(heads) for layer, heads in selection.heads.items()},
        "figures": figures,
        "evidence": table.to_dict("records"),
        "agreement": [{k: (None if v != v else v) for k, v in row.items()} for row in correlations.to_dict("records")],
    }
    output.result(document, lines, path)


def evidence_rows(table: pd.DataFrame, split: str) -> Table:
    """One split's evidence for the terminal: value, interval and rank per layer."""
    from rich import box
    from rich.table import Table

    part = table[table["split"] == split]
    names = list(dict.fromkeys(part["evidence"]))
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=f"{split}: value [95 %] (rank)")
    result.add_column("layer", justify="right")
    for name in names:
        result.add_column(name, justify="right")
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
