"""The paper's numbers beside ours: attention budget, value norms, mIoU by layer, Tables 1 to 5 of arXiv:2509.18096.

    python figures/paper_vs_measured.py --model ...

Reads the CSVs that the other scripts wrote to `figures/out/<model>/` and writes `paper_vs_measured.csv` and `.md`.
For the paper's own model, on the same data set, a row has both values and their difference. For any other model the
paper's rows are those of another world (Stable Diffusion 3, photographs): they are listed, marked, and never
subtracted.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from runs import is_paper_model, options_of, target

from mmdit_probe.data import paper_table

KEYS = ["source", "place", "quantity"]
DATASETS = {
    "voc20": "VOC20", "voc21": "VOC21", "coco-object": "COCO-Object", "coco-stuff-27": "COCO-Stuff-27", "pc59": "PC59",
    "ade20k": "ADE20K-150", "cityscapes": "Cityscapes",
}  # fmt: skip
"""Our names of the paper's data sets."""
METHODS = {("present", "seg4diff"): "Seg4Diff (SD3, none)", ("unsupervised", "seg4diff-unsup"): "Seg4Diff (SD3, none)"}
"""What was measured in both worlds, if the model is the paper's; methods on other backbones stay apart."""
SOURCES = {
    "Fig. 2b, 2c": "share of attention: of image queries to text (I2T), of text queries to image (T2I)",
    "Fig. 4": "mean L2 norm of the values",
    "Fig. 8": "mIoU of each layer alone, percent",
    "Table 1": "open-vocabulary mIoU, percent",
    "Table 2": "unsupervised mIoU, percent",
    "Table 3": "CLIPScore, 0 to 100",
    "Table 4": "alignment by category (the paper: T2I-CompBench++; scenes: share of facts shown)",
    "Table 5": "mIoU by normalisation of the maps, percent",
}


def main() -> None:
    options = options_of(__doc__, "nothing").parse_args()
    path = target(options, options.model, "paper_vs_measured")
    same = is_paper_model(options.model)
    table = joined(ours(path.parent, same), paper(), same)
    table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.5g")
    path.with_suffix(".md").write_text(markdown(table, options.model), encoding="utf-8")
    print(path.with_suffix(".csv"), path.with_suffix(".md"), sep="\n")


def joined(measured: pd.DataFrame, published: pd.DataFrame, same_model: bool) -> pd.DataFrame:
    """One row per quantity: measured with interval, paper, difference; rows of another world stay apart."""
    world = "both" if same_model else "measured"
    measured = measured.assign(world=world)
    published = published.assign(world=world if same_model else "paper: another model and data")
    table = measured.merge(published, on=[*KEYS, "world"], how="outer", sort=False)
    table["difference"] = table["measured"] - table["paper"]
    rows = pd.concat([published, measured])[[*KEYS, "world"]].drop_duplicates()  # the paper's order, then ours
    table = rows.merge(table, on=[*KEYS, "world"], how="left")
    order = {name: place for place, name in enumerate(SOURCES)}
    table = table.sort_values("source", key=lambda column: column.map(order), kind="stable")
    return table[["source", "world", "place", "quantity", "measured", "low", "high", "paper", "difference"]]


def ours(folder: Path, same_model: bool) -> pd.DataFrame:
    """What the scripts have written, long: source, place, quantity, measured, low, high.

    Args:
        same_model: rows that were measured as the paper's own ones take the paper's names.
    """
    rows: list[pd.DataFrame] = []
    budget, norms = read(folder / "fig02_attention_budget.csv"), read(folder / "fig04_value_norms.csv")
    layer = "layer " + budget["layer"].astype(str) if len(budget) else None
    rows += [long("Fig. 2b, 2c", layer, name, budget, name) for name in ("I2T", "T2I") if name in budget]
    layer = "layer " + norms["layer"].astype(str) if len(norms) else None
    rows += [long("Fig. 4", layer, name, norms, name) for name in ("image", "text", "prompt") if name in norms]
    layers, table = read(folder / "fig08_miou_by_layer.csv"), read(folder / "table12_league.csv")
    if len(layers):
        alone = layers[layers["layers"].notna() & (layers["refine"].fillna("none") == "none")]
        alone = alone.sort_values("layers", key=lambda column: column.astype(int))
        quantity = "mIoU, " + alone["dataset"].map(dataset_name)
        place = "layer " + alone["layers"].astype(int).astype(str)
        rows.append(long("Fig. 8", place, quantity, alone, "miou", 100))
    if len(table):
        table = table[table["world"] == "measured"]
        refine, names = table["refine"].fillna("none"), METHODS if same_model else {}
        for source, blind in (("Table 1", False), ("Table 2", True)):
            part = table[(table["protocol"] == "unsupervised") == blind]
            place = [
                names.get((protocol, method), f"{method} [{protocol}]") if how == "none"
                else f"{method} + {how} [{protocol}]"
                for protocol, method, how in zip(part["protocol"], part["method"], refine[part.index], strict=True)
            ]  # fmt: skip
            rows.append(
                long(source, pd.Series(place, part.index), part["dataset"].map(dataset_name), part, "miou", 100)
            )
    clip, facts, read_at = (
        read(folder / f"{name}.csv") for name in ("table3_clipscore", "table4_alignment", "table5_normalisation")
    )
    if len(clip):
        clip = clip[clip["world"] == "measured"]
        rows.append(long("Table 3", clip["variant"], clip["prompt_set"], clip, "mean", 1, "low", "high"))
    if len(facts):
        facts = facts[(facts["world"] == "measured") & (facts["metric"] == "facts")]
        rows.append(long("Table 4", facts["variant"], facts["category"], facts, "mean", 1, "low", "high"))
    if len(read_at):
        read_at = read_at[read_at["world"] == "measured"]
        place = normalisation(read_at) + ", " + read_at["variant"] + ", " + read_at["at"]
        rows.append(long("Table 5", place, read_at["dataset"], read_at, "miou", 100, "low", "high"))
    empty = pd.DataFrame(columns=[*KEYS, "measured", "low", "high"])
    return pd.concat(rows, ignore_index=True) if rows else empty


def paper() -> pd.DataFrame:
    """The published numbers, long: source, place, quantity, paper."""
    rows = []
    budget, norms, layers = (paper_table(f"{name}_by_layer") for name in ("budget", "value_norm", "miou"))
    for name in ("i2t", "t2i"):
        rows.append(published("Fig. 2b, 2c", by_layer(budget), name.replace("i", "I").replace("t", "T"),
                              budget[f"{name}_share"]))  # fmt: skip
    rows += [published("Fig. 4", by_layer(norms), name, norms[name]) for name in ("image", "text", "prompt")]
    rows.append(published("Fig. 8", by_layer(layers), "mIoU, VOC20", layers["miou"]))
    for source, name in (("Table 1", "ovss_table"), ("Table 2", "unsupervised_table")):
        table = paper_table(name)
        method = table["method"] + " (" + table["backbone"] + ", " + table["training"] + ")"
        rows.append(published(source, method, table["dataset"], table["miou"]))
    clip, bench = paper_table("clipscore_table"), paper_table("t2i_compbench_table")
    rows.append(published("Table 3", clip["method"] + ", " + clip["training"], clip["prompt_set"], clip["clipscore"]))
    rows.append(published("Table 4", bench["method"] + ", " + bench["training"], bench["category"], bench["score"]))
    maps = paper_table("normalisation_ablation")
    rows.append(published("Table 5", normalisation(maps), maps["dataset"], maps["miou"]))
    return pd.concat(rows, ignore_index=True)


def read(path: Path) -> pd.DataFrame:
    """A CSV, or an empty table where it is not there: a figure that was not drawn has nothing to compare."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""]) if path.is_file() else pd.DataFrame()


def long(
    source: str, place: object, quantity: object, table: pd.DataFrame, column: str, factor: float = 1, low: str = "",
    high: str = "",
) -> pd.DataFrame:  # fmt: skip
    """One column of a table with its interval in the long form."""
    found = {"measured": column, "low": low or f"{column}_low", "high": high or f"{column}_high"}
    values = {name: table[of] * factor if of in table else float("nan") for name, of in found.items()}
    return pd.DataFrame({"source": source, "place": place, "quantity": quantity, **values}, index=table.index)


def published(source: str, place: pd.Series, quantity: object, values: pd.Series) -> pd.DataFrame:
    return pd.DataFrame({"source": source, "place": place, "quantity": quantity, "paper": values})


def by_layer(table: pd.DataFrame) -> pd.Series:
    return "layer " + table["layer"].astype(str)


def normalisation(table: pd.DataFrame) -> pd.Series:
    """Names of the rows of Table 5."""
    names = {True: "yes", False: "no", "True": "yes", "False": "no"}
    softmax, min_max = (table[name].map(lambda value: names.get(value, value)) for name in ("softmax", "min_max"))
    return "softmax " + softmax.astype(str) + ", min-max " + min_max.astype(str)


def dataset_name(name: str) -> str:
    return DATASETS.get(str(name).split(":")[0], str(name))


def markdown(table: pd.DataFrame, model: str) -> str:
    """A section per figure or table of the paper; a column per quantity."""
    same = is_paper_model(model)
    lines = [f"# Paper against measured: {Path(model).name}", ""]
    lines += [
        "Measured value [95 % interval] | paper | difference, where both exist for the same data."
        if same
        else "**The paper's numbers are of another world**: Stable Diffusion 3 on photographs. They are to be read"
        f" beside those of {Path(model).name}, not to be compared with them.",
        "",
    ]
    for source, what in SOURCES.items():
        part = table[table["source"] == source]
        lines += [f"## {source}: {what}", ""]
        if same:
            lines += rows_of(part.assign(cell=part.apply(both, axis=1)))
            continue
        for world, title in (("measured", Path(model).name), ("paper: another model and data", "the paper's world")):
            mine = part[part["world"] == world]
            lines += [f"{title}{'' if len(mine) else ': not measured'}", ""]
            lines += rows_of(mine.assign(cell=mine.apply(both, axis=1))) if len(mine) else []
    return "\n".join(lines) + "\n"


def both(row: pd.Series) -> str:
    """A cell: what there is of measured, interval, paper and difference."""
    measured = "" if pd.isna(row["measured"]) else f"{row['measured']:.3g}"
    if measured and not pd.isna(row["low"]):
        measured += f" [{row['low']:.3g}, {row['high']:.3g}]"
    parts = [measured, "" if pd.isna(row["paper"]) else f"{row['paper']:.3g}"]
    parts += [] if pd.isna(row["difference"]) else [f"{row['difference']:+.3g}"]
    return " / ".join(part for part in parts if part)


def rows_of(part: pd.DataFrame) -> list[str]:
    quantities, places = list(dict.fromkeys(part["quantity"])), list(dict.fromkeys(part["place"]))
    cells = {(row["place"], row["quantity"]): row["cell"] for row in part.to_dict("records")}
    lines = ["| | " + " | ".join(map(str, quantities)) + " |", "|-|" + "-:|" * len(quantities)]
    for place in places:
        lines.append(f"| {place} | " + " | ".join(str(cells.get((place, name), "")) for name in quantities) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
