"""What `mmdit-probe evaluate` reports of a finished run folder: league table, classes, figure, the tagger's quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from mmdit_probe.cli.output import Output
    from mmdit_probe.experiments.text import TextTable
    from mmdit_probe.results import RunFolder

TAGS = "tags.json"
"""What a tagger said, in the run folder."""


def report(folder: RunFolder, output: Output, model: str, background: int | None, match: str) -> None:
    """League table, per-class IoU, figure and paths, from the counts on disk."""
    from mmdit_probe.data import paper_table
    from mmdit_probe.evaluate.league import league, per_class
    from mmdit_probe.experiments.attention_budget import PAPER_MODEL
    from mmdit_probe.plots import save
    from mmdit_probe.plots.league import head_figure, layer_figure, league_figure, sigma_figure
    from mmdit_probe.results import read_table

    counts = read_table(folder.path / "counts.parquet")
    names = [synonyms[0] for synonyms in folder.data["classes"]]
    agnostic = folder.data["agnostic"]
    table = league(counts, len(names), match=match, background=background, agnostic=agnostic)
    table.to_csv(folder.path / "league.csv", index=False, float_format="%.6g")
    if not agnostic:
        per_class(counts, names, match=match, background=background).to_csv(
            folder.path / "per_class.csv", index=False, float_format="%.6g"
        )
    request = folder.data["request"]
    tagger, remark = _tagger_report(folder, counts, names)
    title = f"{Path(model).name} on {request['dataset']}"
    sweep = request["sweep"]
    if sweep == "layer":
        paper = paper_table("miou_by_layer") if PAPER_MODEL in model else None
        figure = layer_figure(table, title, paper)
    else:
        figure = {"none": league_figure, "head": head_figure, "sigma": sigma_figure}[sweep](table, title)
    figures = save(figure, folder.path / ("league" if sweep == "none" else f"by_{sweep}"))
    if not folder.complete:
        folder.finish()
    document = {
        "run": folder.path, "league": table, "match": match, "figures": figures, "model": folder.data["model"],
        "request": request, "tagger": tagger,
    }  # fmt: skip
    lines = [
        "mIoU: mean over the masks of all images, its 95 % interval over images."
        if agnostic
        else "mIoU: union rule, its 95 % interval over images; mIoU gt: classes of the truth only (Seg4Diff's rule).",
        *remark,
        f"Protocols are not comparable with each other. Segments matched: {match}. Written: {folder.path}",
    ]
    output.result(document, [rows_of(table), *lines], folder.path)


def _tagger_report(
    folder: RunFolder, counts: pd.DataFrame, names: list[str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """What the tagger of the protocol "predicted" got right: for the document, and as a line."""
    import json

    from mmdit_probe.evaluate.tagger import quality

    request = folder.data["request"]
    if "predicted" not in request["protocols"]:
        return None, []
    about: dict[str, Any] = {"name": "tags of a file"}
    said = request["tags"]
    if request["tagger"] is not None:
        about = {"name": request["tagger"]["name"]}
        about |= json.loads((folder.path / TAGS).read_text(encoding="utf-8"))
        said = about.pop("tags")
    found = quality(said, counts, folder.data["images"], names, folder.data["background"])
    about |= {"precision": found.precision, "recall": found.recall, "f1": found.f1, "per_image": found.per_image}
    how = f", threshold {about['threshold']:.3g}" if "threshold" in about else ""
    how += f" chosen on {about['chosen_on']}" if "chosen_on" in about else ""
    return about, [
        f"predicted: {about['name']}{how}; precision {found.precision:.2f}, recall {found.recall:.2f}, "
        f"{found.per_image:.1f} classes per image."
    ]


def rows_of(table: pd.DataFrame, limit: int = 60) -> TextTable:
    """The league table for the terminal."""
    from mmdit_probe.experiments.text import TextTable

    places = ("protocol", "method", "refine", "layers", "heads", "sigma")
    out = TextTable([*places, "n", "mIoU", "95 %", "mIoU gt", "pixel acc", "mean acc", "gain", "segments"], left=places)
    for row in table.head(limit).to_dict("records"):
        interval = "" if _nan(row["miou_low"]) else f"{_share(row['miou_low'])}-{_share(row['miou_high'])}"
        gain = "" if _nan(row["gain"]) else f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
        cells = [str(row[name]) for name in places]
        cells += [str(row["n"]), _share(row["miou"]), interval, _share(row["miou_gt"]), _share(row["accuracy"])]
        cells += [_share(row["macc"]), gain, "" if _nan(row["segments"]) else f"{row['segments']:.1f}"]
        out.add(*cells)
    if len(table) > limit:
        out.add("...", f"{len(table) - limit} more rows in league.csv", *[""] * (len(out.columns) - 2))
    return out


def _share(value: float) -> str:
    return "" if _nan(value) else f"{value:.3f}".removeprefix("0")


def _nan(value: Any) -> bool:
    return isinstance(value, float) and value != value
