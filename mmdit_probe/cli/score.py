"""`mmdit-probe score`: what generated pictures show, per category, with and without adapters on the same seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.options import SESSION, Guidance, NumSteps, Session, session_without

if TYPE_CHECKING:
    import pandas as pd

NAME, TABLE = "score", "scores"
BASE = "base"

Loras = Annotated[
    list[str] | None, typer.Option("--lora", help="Adapter to compare with the base model: [NAME=]PATH; repeatable.")
]
Baseline = Annotated[str | None, typer.Option(help="Variant that differences are taken to.", show_default="base")]
Categories = Annotated[str, typer.Option(help="all, or categories of scenes: colour,numeracy,...")]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="Score these prompts instead of scenes categories: a file, a text, a set, or a folder with one text file "
        "per category (T2I-CompBench: colour_val.txt, ...)."
    ),
]
Clip = Annotated[
    str, typer.Option(help="CLIP model of CLIPScore and CLIP similarity: scenes-clip, a folder, a hub id, or none.")
]
Vqa = Annotated[
    str | None, typer.Option(help="BLIP question-answering model (folder or hub id): P(yes) of each noun phrase.")
]
Export = Annotated[Path | None, typer.Option(help="Also write the pictures in T2I-CompBench's folder layout.")]


@session_without("lora")
def command(
    lora: Loras = None,
    baseline: Baseline = None,
    categories: Categories = "all",
    n: Annotated[int, typer.Option("--n", "-n", help="Prompts per category.", min=1)] = 20,
    prompts: Prompts = None,
    images_per_prompt: Annotated[int, typer.Option(help="Pictures per prompt.", min=1)] = 1,
    num_steps: NumSteps = 28,
    guidance: Guidance = 7.5,
    clip: Clip = "scenes-clip",
    vqa: Vqa = None,
    export: Export = None,
    session: Session = SESSION,
) -> None:
    """Text-image alignment per category, CLIPScore and BLIP answers, paired over prompts and seeds between variants.

    Writes scores.parquet (one row per picture), comparison.csv (means, paired differences, 95 % intervals over prompts,
    n) and run.json.
    """
    from mmdit_probe.cli.session import load_model, open_folder, output_of

    output = output_of(session)
    variants = _variants(lora or [])
    asked = _asked(prompts, n) if prompts is not None else None

    from mmdit_probe.errors import unknown
    from mmdit_probe.evaluate.blip import BlipAsker
    from mmdit_probe.evaluate.clipscore import ClipScorer
    from mmdit_probe.experiments import generation
    from mmdit_probe.models.adapters import load_adapter
    from mmdit_probe.results import TableWriter, read_table
    from mmdit_probe.scenes import load_parser

    baseline = BASE if baseline is None else baseline
    if baseline not in variants:
        raise unknown("variant", baseline, variants)
    if asked is None:
        chosen = () if categories == "all" else tuple(part.strip() for part in categories.split(","))
        asked = generation.scene_prompts(n, chosen)
    parser = load_parser() if prompts is None else None
    scorer = None if clip == "none" else ClipScorer.load(clip)
    asker = None if vqa is None else BlipAsker.load(vqa)
    generation.require(parser, scorer, asker, export)
    loaded = load_model(session)
    options = {
        "variants": variants, "prompts": asked, "images_per_prompt": images_per_prompt, "num_steps": num_steps,
        "guidance": guidance, "seed": session.seed, "clip": clip, "vqa": vqa,
        "export": None if export is None else str(export),
    }  # fmt: skip
    folder = open_folder(NAME, loaded, session, options)
    if not folder.complete:
        batch = 16
        total = -(-len(asked) * images_per_prompt // batch)
        bar = output.progress("pictures", total * len(variants))
        with TableWriter(folder.path, TABLE) as writer, bar as advance:
            for index, (name, path) in enumerate(variants.items()):
                if index in writer.done:
                    for _ in range(total):
                        advance()
                    continue
                if path is not None:
                    load_adapter(loaded.pipeline, path, "scored")
                found = generation.score(
                    loaded, asked, variant=name, images=images_per_prompt, steps=num_steps, guidance=guidance,
                    seed=session.seed, parser=parser, clip=scorer, asker=asker, batch=batch, advance=advance,
                    export=None if export is None else export / name,
                )  # fmt: skip
                if path is not None:
                    loaded.pipeline.unload_lora_weights()
                with writer.item(index) as item:
                    item.write(found)
    frame = read_table(folder.path / f"{TABLE}.parquet")
    comparison = generation.compare(frame, baseline)
    comparison.to_csv(folder.path / "comparison.csv", index=False, float_format="%.6g")
    if not folder.complete:
        folder.finish()
    document = {
        "run": folder.path,
        "comparison": comparison.astype(object).where(comparison.notna(), None).to_dict("records"),
    }
    tables = [_table(comparison, metric, baseline) for metric in dict.fromkeys(comparison.metric) if metric in _SHOWN
              or metric.startswith(("clipscore", "blip_yes"))]  # fmt: skip
    output.result(document, [*tables, f"table: {folder.path}"], folder.path)


_SHOWN = ("facts", "all_right")


def _asked(source: str, n: int) -> list[tuple[str, str]]:
    """(category, prompt) pairs of a prompt source; of a folder, at most `n` of each text file."""
    from mmdit_probe.data import prompts
    from mmdit_probe.errors import UserError

    if not Path(source).is_dir():
        return [("prompts", text) for text in prompts(source, n)]
    files = sorted(Path(source).glob("*.txt"))
    if not files:
        raise UserError(f"{source!r} has no text files; expected one per category, with one prompt per line")
    return [(file.stem.removesuffix("_val"), text) for file in files for text in prompts(str(file), n)]


def _variants(given: list[str]) -> dict[str, str | None]:
    """Name -> adapter; the base model first."""
    from mmdit_probe.errors import UserError

    found: dict[str, str | None] = {BASE: None}
    for text in given:
        name, _, path = text.rpartition("=")
        name = name or (Path(path).parent.name if Path(path).name == "lora" else Path(path).name)
        if name in found:
            raise UserError(f"two variants are called {name!r}; name them: --lora NAME=PATH")
        if not Path(path).exists() and path.count("/") != 1:
            raise UserError(f"no LoRA {path!r}: expected a folder as train-magnet writes it, or a hub id")
        found[name] = path
    return found


def _table(comparison: pd.DataFrame, metric: str, baseline: str) -> Any:
    """One metric: variants by row, categories by column, mean and paired difference with its interval."""
    from rich import box
    from rich.table import Table

    part = comparison[comparison.metric == metric]
    first = part.iloc[0]
    table = Table(
        title=f"{metric}: mean, and difference to {baseline} [95 % interval over prompts], paired; n = {first.prompts}"
        f" prompts, {first.images} pictures",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("variant")
    order = list(dict.fromkeys(part.category))
    for category in order:
        table.add_column(category, justify="right")
    for name in dict.fromkeys(part.variant):
        rows = part[part.variant == name].set_index("category")
        cells = []
        for category in order:
            row = rows.loc[category]
            cell = f"{row['mean']:.3f}"
            if name != baseline:
                cell += f"\n{row.difference:+.3f} [{row.difference_low:+.3f}, {row.difference_high:+.3f}]"
            cells.append(cell)
        table.add_row(name, *cells)
    return table
