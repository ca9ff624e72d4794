"""Does the expert follow the aligned layer? Transformers trained alike but for what their tokens were taught.

    python -m training all && python -m training ssl
    python analyses/alignment_ablation.py --device cuda
    python analyses/alignment_ablation.py --minutes 60      # an hour of it; the same again goes on, exactly

Six recipes: plain flow matching; self-supervised features on all blocks; the parser's labels on all blocks; the same
labels on layer 2, 4 and 6. Equal samples, the same curriculum, batches and noise; the other stages are those of the
working folder. Each transformer is trained into `<workdir>/ablation/`, then measured on held-out scenes beside a
transformer of random weights: I2T mIoU by layer, all evidence of `select-layers` by layer, and what samples show of
their captions, the opposite beside it. What was measured of a run is not measured again, and the rows of other runs
that lie in `--out` stay, whatever machine measured them, where `settings.json` says that they were made alike: so
recipes and seeds can be added one by one.

Writes `analyses/results/alignment_ablation/{maps,evidence,samples,gain}.csv`, `settings.json` and `summary.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mmdit_probe import load
from mmdit_probe.errors import at_least, run_script
from mmdit_probe.experiments import evidence
from mmdit_probe.experiments.evidence import EVIDENCE, Amount
from mmdit_probe.experiments.experiment import plain
from mmdit_probe.experiments.scenes_quality import held_out, word_map_scores
from mmdit_probe.experiments.text import bounded
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results.atomic import replacing, write_json, write_text
from mmdit_probe.results.statistics import defined, interval
from mmdit_probe.scenes import captions
from mmdit_probe.scenes.parser import SCORES
from training.align import Alignment
from training.assemble import assemble
from training.flow import CURRICULUM, fitted, train_transformer
from training.loop import read_progress
from training.measure import alignment_of
from training.parser import load_trained_parser
from training.recipe import SHIPPED
from training.session import Session
from training.transformer import load_trained_transformer

OUT = Path(__file__).parent / "results" / "alignment_ablation"
RECIPES = ("none", "all:features", "all:labels", "layer:2", "layer:4", "layer:6")
RANDOM = "random weights"
CATEGORIES = ("colour", "2d-spatial", "numeracy")
TABLES = ("maps", "evidence", "samples", "gain")
KEPT = ("maps", "evidence", "pictures")
"""What is measured of a transformer and kept beside it; of pictures, every one of them."""
RUN = ["recipe", "seed"]


@dataclass(frozen=True)
class Size:
    """How much is measured of each transformer."""

    n: int = 200
    n_evidence: int = 48
    prompts: int = 8
    num_steps: int = 28
    guidance: float = 4.5
    sigma: float = 0.5
    evidence: tuple[str, ...] = tuple(EVIDENCE)


def runs(common: Session, seeds: Sequence[int], recipes: Sequence[str]) -> Iterator[tuple[Session, Path]]:
    """What is trained and where, one seed of every recipe after the other, in the time that is left of `common`."""
    for seed in seeds:
        for recipe in recipes:
            left = None if common.minutes is None else max(0.0, common.seconds_left() / 60)
            session = replace(common, stage="transformer", seed=seed, align=recipe, minutes=left)
            yield session, common.workdir / "ablation" / f"{recipe.replace(':', '-')}-seed{seed}"


def measure(model: MMDiT, session: Session, size: Size, name: str) -> pd.DataFrame:
    """One of `KEPT`: maps by layer, evidence by layer, or the scores of every sample with its caption's category."""
    if name == "maps":
        maps = word_map_scores(model, held_out(size.n), sigma=size.sigma)
        return maps[maps["head"] == "mean"][["layer", "min_max", "sigma", "n", "miou", "low", "high"]]
    if name == "evidence":
        amount = Amount(size.n_evidence, size.sigma, size.prompts, size.num_steps, size.guidance)
        return evidence.by_layer(pd.concat([evidence.measure(of, model, "val", amount) for of in size.evidence]))
    parser, found = load_trained_parser(session.workdir), []
    for category in CATEGORIES:
        prompts = captions("val", size.n, category, distinct=False)
        scores = alignment_of(model, parser, prompts, steps=size.num_steps, guidance=size.guidance)
        found.append(scores.assign(category=category))
    return pd.concat(found)


def samples(pictures: pd.DataFrame) -> pd.DataFrame:
    """Mean of every score by category with its interval over captions: one that comes up again is the same."""
    rows = []
    for category, part in pictures.groupby("category", sort=False):
        by_caption = part[list(SCORES)].groupby(part["caption"]).mean()
        for name in SCORES:
            mean, low, high = interval(by_caption[name], "share")
            rows.append({"score": name, "images": int(part[name].notna().sum()), "n": len(defined(by_caption[name])),
                         "mean": mean, "low": low, "high": high, "category": category})  # fmt: skip
    return pd.DataFrame(rows)


def gain(folder: Path) -> pd.DataFrame:
    """The last entries of the curves of held-out losses and text gains: name, value."""
    curves = pd.read_csv(folder / "curves.csv")
    last = curves.groupby("name", sort=False)["value"].last()
    return last[[name for name in last.index if "@" in name and not name.startswith("miou")]].reset_index()


def kept(folder: Path, session: Session, size: Size, transformer: Path | None) -> dict[str, pd.DataFrame]:
    """The tables of one transformer (of random weights if None), measured once per checkpoint into `folder`."""
    step = 0 if transformer is None else read_progress(transformer).step
    paths = {name: folder / f"{name}-{step:07d}-n{size.n}.csv" for name in KEPT}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        if transformer is None:
            network = load("scenes-sd3-random", device="cpu", dtype="float32").transformer
        else:
            network = load_trained_transformer(transformer)
        # Under the name of the model of the scenes world: what experiments ask of it depends on that.
        model = MMDiT(assemble(session, network).to(session.where), name="scenes-sd3")
        for name in missing:
            table = measure(model, session, size, name)
            with replacing(paths[name]) as path:
                table.to_csv(path, index=False)
    tables = {name: pd.read_csv(path) for name, path in paths.items()}
    tables["samples"] = samples(tables.pop("pictures"))
    return tables if transformer is None else {**tables, "gain": gain(transformer)}


BY = {
    "by_maps": "the best raw maps",
    "by_min_max": "the best maps stretched to 0..1",
    "by_evidence": "the least mean rank over all evidence",
}
"""How a run's best layer is told."""


def best_layers(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per run: the best layer by each of `BY`, the aligned layer (NaN unless it is one), and whether each best
    layer is that one or the next, which reads it."""
    rows = []
    for (recipe, seed), part in tables["maps"].groupby(RUN, sort=False):
        of = tables["evidence"]
        of = of[(of["recipe"] == recipe) & (of["seed"] == seed)]
        layers = Alignment.parse(recipe).layers if recipe != RANDOM else ()
        raw, stretched = (part[part["min_max"] == kind] for kind in (False, True))
        rows.append(
            {"recipe": recipe, "seed": seed, "aligned": layers[0] if len(layers) == 1 else float("nan"),
             "by_maps": int(raw.loc[raw["miou"].idxmax(), "layer"]),
             "by_min_max": int(stretched.loc[stretched["miou"].idxmax(), "layer"]),
             "by_evidence": evidence.choose(of, 1)[0]}
        )  # fmt: skip
    table = pd.DataFrame(rows)
    for name in BY:
        table[f"{name}_follows"] = table[name].sub(table["aligned"]).isin((0, 1)).where(table["aligned"].notna())
    return table


def as_markdown(tables: dict[str, pd.DataFrame], samples: int, size: Size) -> str:
    """The tables for people, and the answer."""
    best = best_layers(tables)
    one = best[best["aligned"].notna()]
    layers = tables["maps"]["layer"].nunique()
    counts = [f"the layer of {told} in {int(one[f'{name}_follows'].sum())}" for name, told in BY.items()]
    answer = (
        f"Of {len(one)} transformers with one aligned layer, that layer or the next is {', '.join(counts)}; two of"
        f" {layers} layers drawn at random would be right in {len(one) * 2 / layers:.2f}."
    )
    lines = [
        "# Does the expert follow the aligned layer?", "",
        "Written by `python analyses/alignment_ablation.py`. Recipes differ in what image tokens are taught",
        f"beside flow matching, through heads that do not ship; {samples} samples each. Held-out scenes, n = {size.n}",
        f"(fewer where it says so), sigma {size.sigma:g}, beside a transformer of random weights.", "",
        answer, "", "## Best layers", "", *_rows(best, 3), "",
        "## mIoU of the I2T maps by layer, raw / min-max", "",
    ]  # fmt: skip
    maps = tables["maps"].assign(kind=lambda t: t["min_max"].map({False: "raw", True: "min-max"}))
    maps["cell"] = [bounded(*row) for row in maps[["miou", "low", "high"]].to_numpy()]
    keys = [*RUN, "kind"]
    lines += _rows(
        maps.pivot_table(index=keys, columns="layer", values="cell", aggfunc="first", sort=False).reset_index(), 3
    )
    for name in size.evidence:
        part = tables["evidence"][tables["evidence"]["evidence"] == name]
        cells = part.assign(cell=[bounded(*row) for row in part[["value", "low", "high"]].to_numpy()])
        wide = cells.pivot_table(index=RUN, columns="layer", values="cell", aggfunc="first", sort=False).reset_index()
        lines += ["", f"## {name}: {EVIDENCE[name]}, by layer, n = {part['n'].max()}", "", *_rows(wide, 3)]
    found = tables["samples"].dropna(subset=["mean"])
    found = found.assign(cell=[bounded(*row) for row in found[["mean", "low", "high"]].to_numpy()])
    whole = found.groupby("category")["n"].transform("max")
    found["cell"] += [f" (n = {n})" if n < most else "" for n, most in zip(found["n"], whole, strict=True)]
    found["captions"] = whole
    keys = [*RUN, "category", "captions"]
    wide = found.pivot_table(index=keys, columns="score", values="cell", aggfunc="first", sort=False).reset_index()
    told = f"Means and intervals over captions, of {size.n} samples; (n = ...): fewer captions state such a thing."
    lines += ["", "## What samples show, the opposite beside it", "", told, "", *_rows(wide.fillna(""), 3)]
    text = tables["gain"].pivot_table(index=RUN, columns="name", values="value", sort=False).reset_index()
    lines += ["", "## Held-out losses, and what a wrong caption adds in percent, by noise level", "", *_rows(text, 3)]
    return "\n".join(lines) + "\n"


def _rows(table: pd.DataFrame, digits: int) -> list[str]:
    """A table as Markdown."""
    cells = [[f"{value:.{digits}f}" if isinstance(value, float) else str(value) for value in row]
             for row in table.itertuples(index=False)]  # fmt: skip
    head = [str(name) for name in table.columns]
    return ["| " + " | ".join(row) + " |" for row in (head, ["-"] * len(head), *cells)]


def ablation(common: Session, seeds: Sequence[int], size: Size, out: Path, recipes: Sequence[str] = RECIPES) -> bool:
    """Train, measure, and write tables and summary of what is there; what the time does not allow is left.

    Args:
        common: the session of all runs; its `steps` are those of each transformer.

    Returns: whether all was done.

    Raises:
        UserError: a stage that this needs is not trained in the working folder.
    """
    for name in (*SHIPPED[:-1], *(["ssl"] if "all:features" in recipes else [])):
        read_progress(common.workdir / name)
    settings: dict[str, Any] = plain({"samples": samples_of(common.steps), **asdict(size)})
    found = earlier(out, settings)
    if not any((table["recipe"] == RANDOM).any() for table in found.get("maps", [])):
        random = kept(common.workdir / "ablation" / "random", common, size, None)
        for name, table in random.items():
            found.setdefault(name, []).append(table.assign(recipe=RANDOM, seed=0))
    complete = True
    for session, folder in runs(common, seeds, recipes):
        complete = train_transformer(session, folder)
        if not complete:
            break
        for name, table in kept(folder, session, size, folder).items():
            found.setdefault(name, []).append(table.assign(recipe=session.align, seed=session.seed))
    if "gain" in found:
        tables = {name: in_order(parts) for name, parts in found.items()}
        for name, table in tables.items():
            columns = [*RUN, *(column for column in table.columns if column not in RUN)]
            with replacing(out / f"{name}.csv") as path:
                table[columns].to_csv(path, index=False, float_format="%.4f")
        write_json(out / "settings.json", settings)
        write_text(out / "summary.md", as_markdown(tables, settings["samples"], size))
    return complete


def earlier(out: Path, settings: dict[str, Any]) -> dict[str, list[pd.DataFrame]]:
    """The tables that lie in a folder, if they were made with the same settings."""
    file = out / "settings.json"
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")) != settings:
        return {}
    return {name: [pd.read_csv(out / f"{name}.csv")] for name in TABLES}


def in_order(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table of all runs, by recipe and seed; of a run in several parts, the last part's rows."""
    runs = {run: rows for part in parts for run, rows in part.groupby(RUN, sort=False)}
    order = {recipe: place for place, recipe in enumerate((RANDOM, *RECIPES))}
    return pd.concat([runs[run] for run in sorted(runs, key=lambda run: (order[run[0]], run[1]))], ignore_index=True)


def samples_of(steps: int | None) -> int:
    """Samples that a transformer has seen after all its steps."""
    return sum(phase.steps * phase.batch for phase in fitted(CURRICULUM, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path(".training"), help="of `python -m training`")
    parser.add_argument("--samples", type=at_least(1), default=100_000, help="of each transformer")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1])
    parser.add_argument("--limit", "-n", type=at_least(1), default=Size.n, help="scenes, and captions per category")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--minutes", type=float, help="stop after this time; the same call goes on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    steps = round(options.samples * sum(phase.steps for phase in CURRICULUM) / samples_of(None))
    common = Session(workdir=options.workdir, steps=steps, minutes=options.minutes, device=options.device)
    done = ablation(common, options.seeds, Size(n=options.limit), options.out, options.recipes)
    print(options.out / "summary.md" if done else "the time is over; the same call goes on")


if __name__ == "__main__":
    run_script(main)
