"""The paper's numbers beside ours: attention budget, value norms, mIoU by layer, Tables 1 to 5 of arXiv:2509.18096.

    python figures/paper_vs_measured.py --model ...

Reads the CSVs that the other scripts wrote to `figures/out/<model>/`, of all data sets, and writes
`paper_vs_measured.csv` and `.md`. For the paper's own model, on the same data set and measured as the paper measured
(every setting of `measured_as`, and the averaging rule), a row has both values and their difference; measured
otherwise, it says in its place which settings differ. For any other model the paper's rows are those of another world
(Stable Diffusion 3, photographs): they are listed, marked, and never subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from fig08_segmentation import ADAPTED
from runs import as_measured, is_paper_model, options_of, target

from mmdit_probe.data import paper_table
from mmdit_probe.data.public import SETS
from mmdit_probe.errors import run_script
from mmdit_probe.evaluate.league import METHOD
from mmdit_probe.experiments.presets import PRESETS

KEYS = ["source", "place", "quantity"]
NAMED = {
    "voc20": "VOC20", "coco-object-words": "COCO-Object", "pc59": "PC59", "ade20k": "ADE20K-150",
    "cityscapes": "Cityscapes",
}  # fmt: skip
BLIND = {
    "voc21": "VOC21", "pc60": "PC59", "coco-object": "COCO-Object", "coco-stuff-27": "COCO-Stuff-27",
    "ade20k": "ADE20K-150", "cityscapes": "Cityscapes",
}  # fmt: skip
"""Our names of the data sets of the paper's Tables 1 and 5, and of Table 2, which has the background as a class."""
OWN = {("present", "seg4diff"), ("unsupervised", "seg4diff-unsup")}
"""Protocol and method of Tables 1 and 2 that are measured on the paper's model; other methods had other backbones."""
SEGMENTED = {
    "text": "T5 off, length 77", "sigma": "0.515", "layers": "9", "heads": "mean", "draws": "1", "fit": "squash",
    "size": "own", "reference": "none", "options": "none", "refine": "none", "background": "none", "matching": "none",
    "compared": "own size", "adapter": "none",
}  # fmt: skip
BY_PADS = SEGMENTED | {
    "options": ", ".join(sorted(text.partition(".")[2] for text in PRESETS["seg4diff-unsup"].options)),
    "matching": "image", "compared": str(PRESETS["seg4diff-unsup"].score_size),
}  # fmt: skip
SAMPLED = {
    "text": "T5 off, length 77", "mode": "sample", "guidance": "7.5", "step": "20 of 28", "heads": "all",
    "prompts": "50 of drawbench",
}  # fmt: skip
"""How the paper measured, in the words of the column `measured_as`."""
ADAPTERS = {"COCO": "chyun/seg4diff-coco-lora on COCO", "SA-1B": "chyun/seg4diff-sa1b-lora on SA-1B"}
"""The paper's adapters by the data that they were trained on."""
SOURCES = {
    "Fig. 2b, 2c": "share of attention: of image queries to text (I2T), of text queries to image (T2I)",
    "Fig. 4": "mean L2 norm of the values",
    "Fig. 8": "mIoU of each layer alone, percent (the paper does not name its data set)",
    "Table 1": "open-vocabulary mIoU, percent",
    "Table 2": "unsupervised mIoU, percent; segments matched per image, as the paper's text has it",
    "Table 3": "CLIPScore, 0 to 100",
    "Table 4": "alignment by category (the paper: T2I-CompBench++; scenes: share of facts shown)",
    "Table 5": "mIoU by normalisation of the maps, percent",
}


def main() -> None:
    options = options_of(__doc__, run=False, more=False).parse_args()
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
    both = table["measured"].notna() & table["paper"].notna()
    table["why_not"] = [
        unlike(*row) if there else None
        for there, *row in zip(both, table["measured_as"], table["published_as"], strict=True)
    ]
    table["difference"] = (table["measured"] - table["paper"]).where(table["why_not"].isna())
    rows = pd.concat([published, measured])[[*KEYS, "world"]].drop_duplicates()  # the paper's order, then ours
    table = rows.merge(table, on=[*KEYS, "world"], how="left")
    order = {name: place for place, name in enumerate(SOURCES)}
    table = table.sort_values("source", key=lambda column: column.map(order), kind="stable")
    return table[[*KEYS[:1], "world", *KEYS[1:], "measured", "low", "high", "paper", "difference", "why_not"]]


def unlike(measured: object, published: object) -> str | None:
    """Which settings are not those of the paper; None where all are."""
    if not isinstance(measured, str) or not isinstance(published, str):
        return "measured with unknown settings"
    found, wanted = settings(measured), settings(published)
    others = [
        f"{name} {found.get(name, 'unknown')} (the paper: {wanted.get(name, 'unknown')})"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    return f"measured with {'; '.join(others)}" if others else None


def settings(text: str) -> dict[str, str]:
    """What `runs.as_measured` wrote, setting by setting."""
    return dict(part.split(": ", 1) for part in text.split("; "))


def ours(folder: Path, same_model: bool) -> pd.DataFrame:
    """What the scripts have written, long: source, place, quantity, measured, low, high, measured_as.

    Args:
        same_model: rows that were measured as the paper's own ones take the paper's names, and its averaging rule.
    """
    rows: list[pd.DataFrame] = []
    budget, norms = read(folder, "fig02_attention_budget"), read(folder, "fig04_value_norms")
    layer = "layer " + budget["layer"].astype(str) if len(budget) else None
    rows += [long("Fig. 2b, 2c", layer, name, budget, name) for name in ("I2T", "T2I") if name in budget]
    layer = "layer " + norms["layer"].astype(str) if len(norms) else None
    rows += [long("Fig. 4", layer, name, norms, name) for name in ("image", "text", "prompt") if name in norms]
    layers, table = read(folder, "fig08_miou_by_layer"), read(folder, "table12_league")
    miou = "miou_gt" if same_model else "miou"
    if len(layers):
        alone = layers[(layers["role"] == METHOD) & (layers["refine"].fillna("none") == "none")]
        alone = alone.sort_values("layers", key=lambda column: column.astype(int))
        quantity = "mIoU, " + dataset_names(alone, NAMED)
        place = "layer " + alone["layers"].astype(int).astype(str)
        rows.append(long("Fig. 8", place, quantity, alone, miou, 100))
    if len(table):
        shifted = table["method"].str.endswith(", words shifted")
        table = table[(table["world"] == "measured") & ~shifted].fillna({"refine": "none"})
        for source, blind in (("Table 1", False), ("Table 2", True)):
            part = table[(table["protocol"] == "unsupervised") == blind]
            place = [league_place(row, same_model) for row in part.to_dict("records")]
            quantity, column = dataset_names(part, BLIND if blind else NAMED), "miou" if blind else miou
            rows.append(long(source, pd.Series(place, part.index), quantity, part, column, 100))
    clip, facts = read(folder, "table3_clipscore"), read(folder, "table4_alignment")
    if len(clip):
        clip = clip[clip["world"] == "measured"]
        rows.append(long("Table 3", clip["variant"], clip["prompt_set"], clip, "mean", 1, "low", "high"))
    if len(facts):
        facts = facts[(facts["world"] == "measured") & (facts["metric"] == "facts")]
        rows.append(long("Table 4", facts["variant"], facts["category"], facts, "mean", 1, "low", "high"))
    for name in ("table5_normalisation", "table5_magnet"):
        read_at = read(folder, name)
        if len(read_at):
            read_at = read_at[read_at["world"] == "measured"]
            place = normalisation(read_at)
            own = same_model & (read_at["variant"] == "base") & (name == "table5_normalisation")
            place = place.where(own, place + ", " + read_at["variant"] + ", " + read_at["at"])
            column = miou if miou in read_at else "miou"
            rows.append(long("Table 5", place, dataset_names(read_at, NAMED), read_at, column, 100, "low", "high"))
    empty = pd.DataFrame(columns=[*KEYS, "measured", "low", "high", "measured_as"])
    found = pd.concat(rows, ignore_index=True) if rows else empty
    if (twice := found[found.duplicated(KEYS)]).size:
        raise ValueError(f"several rows are called {twice[KEYS].iloc[0].tolist()}: one would hide the others")
    return found


def league_place(row: Mapping[str, Any], same_model: bool) -> str:
    """The name of a row of the league; as in Tables 1 and 2 where it is of the paper's methods and model."""
    method, adapted, _ = row["method"].partition(ADAPTED)
    trained = settings(row["measured_as"])["adapter"].rpartition(" on ")[2] if adapted else ""
    own = (row["protocol"], method) in OWN and (not adapted or trained in ADAPTERS)
    if same_model and own and row["refine"] == "none":
        return f"Seg4Diff+MAGNET (SD3, {trained})" if adapted else "Seg4Diff (SD3, none)"
    refined = "" if row["refine"] == "none" else f" + {row['refine']}"
    return f"{row['method']}{refined} [{row['protocol']}]"


def paper() -> pd.DataFrame:
    """The published numbers, long: source, place, quantity, paper, and how they were measured, if that is known."""
    rows = []
    budget, norms, layers = (paper_table(f"{name}_by_layer") for name in ("budget", "value_norm", "miou"))
    sampled = as_measured(**SAMPLED)
    for name in ("i2t", "t2i"):
        rows.append(published("Fig. 2b, 2c", by_layer(budget), name.replace("i", "I").replace("t", "T"),
                              budget[f"{name}_share"], sampled))  # fmt: skip
    rows += [published("Fig. 4", by_layer(norms), name, norms[name], sampled) for name in ("image", "text", "prompt")]
    rows.append(published("Fig. 8", by_layer(layers), "mIoU, data set not stated", layers["miou"], None))
    for source, name, how in (("Table 1", "ovss_table", SEGMENTED), ("Table 2", "unsupervised_table", BY_PADS)):
        table = paper_table(name)
        method = table["method"] + " (" + table["backbone"] + ", " + table["training"] + ")"
        said = [
            segmented(how, dataset, adapter=ADAPTERS.get(training, "none"))
            for dataset, training in zip(table["dataset"], table["training"], strict=True)
        ]
        rows.append(published(source, method, table["dataset"], table["miou"], said))
    clip, bench = paper_table("clipscore_table"), paper_table("t2i_compbench_table")
    trained = (table["method"] + ", " + table["training"] for table in (clip, bench))
    rows.append(published("Table 3", next(trained), clip["prompt_set"], clip["clipscore"], None))
    rows.append(published("Table 4", next(trained), bench["category"], bench["score"], None))
    maps = paper_table("normalisation_ablation")
    said = [
        segmented(SEGMENTED, dataset, options=f"softmax={'joint' if softmax == 'yes' else 'logit'}",
                  refine="minmax" if stretched == "yes" else "none")
        for dataset, softmax, stretched in zip(maps["dataset"], maps["softmax"], maps["min_max"], strict=True)
    ]  # fmt: skip
    rows.append(published("Table 5", normalisation(maps), maps["dataset"], maps["miou"], said))
    return pd.concat(rows, ignore_index=True)


def segmented(how: Mapping[str, str], dataset: str, **more: str) -> str:
    """How a value of Tables 1, 2 and 5 was measured on one of the paper's data sets: on all of its pictures."""
    names = BLIND if how is BY_PADS else NAMED
    pictures = [one.expected for one in SETS if names.get(one.name) == dataset]
    return as_measured(**how | more | {"pictures": str(*pictures)})


def read(folder: Path, name: str) -> pd.DataFrame:
    """The CSVs of a figure, of every data set, or an empty table: a figure that was not drawn has nothing to compare.

    Raises:
        OSError: as `read_csv`.
    """
    files = sorted(folder.glob(f"{name}*.csv"))
    found = [pd.read_csv(path, keep_default_na=False, na_values=[""]) for path in files]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def long(
    source: str, place: object, quantity: object, table: pd.DataFrame, column: str, factor: float = 1, low: str = "",
    high: str = "",
) -> pd.DataFrame:  # fmt: skip
    """One column of a table with its interval in the long form."""
    found = {"measured": column, "low": low or f"{column}_low", "high": high or f"{column}_high"}
    values = {name: table[of] * factor if of in table else float("nan") for name, of in found.items()}
    how = table.get("measured_as")
    named = {"source": source, "place": place, "quantity": quantity}
    return pd.DataFrame({**named, **values, "measured_as": how}, index=table.index)


def published(source: str, place: pd.Series, quantity: object, values: pd.Series, how: object) -> pd.DataFrame:
    named = {"source": source, "place": place, "quantity": quantity}
    return pd.DataFrame({**named, "paper": values, "published_as": how})


def by_layer(table: pd.DataFrame) -> pd.Series:
    return "layer " + table["layer"].astype(str)


def normalisation(table: pd.DataFrame) -> pd.Series:
    """Names of the rows of Table 5."""
    names = {True: "yes", False: "no", "True": "yes", "False": "no"}
    softmax, min_max = (table[name].map(lambda value: names.get(value, value)) for name in ("softmax", "min_max"))
    return "softmax " + softmax.astype(str) + ", min-max " + min_max.astype(str)


def dataset_names(table: pd.DataFrame, known: dict[str, str]) -> pd.Series:
    """The paper's names of the data sets where it has them."""
    return table["dataset"].map(lambda name: known.get(str(name).split(":")[0], str(name)))


def markdown(table: pd.DataFrame, model: str) -> str:
    """A section per figure or table of the paper; a column per quantity."""
    same = is_paper_model(model)
    lines = [f"# Paper against measured: {Path(model).name}", ""]
    lines += [
        "Measured value [95 % interval] / paper / difference, where both exist for the same data and protocol."
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
    parts += [] if pd.isna(row["why_not"]) else [f"no difference: {row['why_not']}"]
    return " / ".join(part for part in parts if part)


def rows_of(part: pd.DataFrame) -> list[str]:
    quantities, places = list(dict.fromkeys(part["quantity"])), list(dict.fromkeys(part["place"]))
    cells = {(row["place"], row["quantity"]): row["cell"] for row in part.to_dict("records")}
    lines = ["| | " + " | ".join(map(str, quantities)) + " |", "|-|" + "-:|" * len(quantities)]
    for place in places:
        lines.append(f"| {place} | " + " | ".join(str(cells.get((place, name), "")) for name in quantities) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    run_script(main)
