"""`mmdit-probe datasets`: which data sets can be read, what a folder holds, and the missing preparation steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmdit_probe.cli.narrow import App
from mmdit_probe.cli.options import Debug, Json, Quiet, completing, epilog
from mmdit_probe.cli.output import Output
from mmdit_probe.data import dataset
from mmdit_probe.data.sources import NAMES
from mmdit_probe.errors import counted
from mmdit_probe.experiments.options import INPUT
from mmdit_probe.experiments.text import TextTable

app = App(
    help="Segmentation data sets: list, check, prepare.",
    epilog=epilog("datasets list", "datasets check voc20:VOCdevkit/VOC2012"), rich_markup_mode="rich",
)  # fmt: skip


@app.command("list", epilog=epilog("datasets list"))
def list_(quiet: Quiet = False, as_json: Json = False, debug: Debug = False) -> None:
    """Name the readers, their classes and the folders they look for."""
    from mmdit_probe.data.coco import KINDS
    from mmdit_probe.data.public import SETS

    title = "data sets; give them as NAME:ROOT"
    table = TextTable(["name", "classes", "images", "background"], left=("name", "background"), title=title)
    found = "folders: images + labels, first layout found"
    places = TextTable(["name", found], left=("name", found))
    rows: list[dict[str, Any]] = [
        {
            "name": source.name, "classes": len(source.names), "images": source.expected,
            "background": source.background, "ignored": [0] if source.named else [],
            "folders": [layout.files for layout in source.layouts],
        }
        for source in SETS
    ]  # fmt: skip
    for row in rows:
        background = "a word, not scored" if row["ignored"] else "yes" if row["background"] else "no"
        table.add(row["name"], str(row["classes"]), str(row["images"]), background)
        for number, folder in enumerate(row["folders"]):
            places.add("" if number else row["name"], folder)
    for kind in KINDS:
        table.add(f"coco-{kind}", "the JSON's", "any", "no")
        places.add(f"coco-{kind}", f"val2017, train2017 + annotations/{kind}_*.json")
    table.add("sa1b", "masks", "any", "no")
    places.add("sa1b", "sa_*.jpg + sa_*.json; or images + annotations")
    table.add("folder", "classes.txt", "any", "if named")
    places.add("folder", "images + labels/*.png, a class per line in classes.txt")
    table.add("scenes:SPLIT", "15", "any", "no")
    Output(quiet=quiet, as_json=as_json, debug=debug).result({"datasets": rows}, [table, places])


@app.command("check", epilog=epilog("datasets check voc20:VOCdevkit/VOC2012", "datasets check scenes:val --limit 20"))
def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="NAME:ROOT",
            help="Data set and its folder, such as voc20:VOCdevkit/VOC2012.",
            autocompletion=completing(NAMES),
        ),
    ],
    limit: Annotated[
        int | None,
        typer.Option(
            help="Look at the first LIMIT images.", min=1, show_default="200 scenes, or all", rich_help_panel=INPUT
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Open every picture and label and say what is found, missing or wrong. Exit code 1 if something is wrong."""
    from mmdit_probe.data.check import check as run

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    data = dataset(source, limit)
    with output.progress.bar("images", len(data.samples)) as advance:
        found = run(data, advance)
    held = "masks without names" if data.agnostic else counted(len(data.classes), "class", "classes")
    title = f"{data.name}: {counted(found.images, 'image')}, {held}"
    table = TextTable(["class", "share of scored pixels"], left=("class",), title=title)
    total = max(1, int(found.pixels.sum()))
    for one, pixels in zip(data.classes, found.pixels, strict=True):
        table.add(one.name, f"{pixels / total:.2%}")
    what = "masks" if data.agnostic else "classes"
    lines = [title] if data.agnostic else []
    if found.ignored == found.ignored:  # NaN where no picture could be read
        lines += [f"not scored: {found.ignored:.1%} of pixels; {found.per_image:.1f} {what} per image"]
    lines += [f"never seen: {', '.join(found.never)}"] if found.never and not data.agnostic else []
    lines += [data.note] if data.note else []
    lines += [f"note: {image}: {what}" for image, what in found.notes[:10]]
    lines += [f"wrong: {image}: {what}" for image, what in found.problems[:50]] or ["nothing is wrong"]
    document = {
        "dataset": data.name, "images": found.images, "classes": [one.name for one in data.classes],
        "pixels": found.pixels.tolist(), "ignored": found.ignored, "never": found.never, "note": data.note,
        "per_image": found.per_image, "problems": [list(problem) for problem in found.problems],
        "notes": [list(note) for note in found.notes],
    }  # fmt: skip
    output.result(document, lines if data.agnostic else [table, *lines])
    if found.problems:
        raise typer.Exit(1)


@app.command("prepare", epilog=epilog("datasets prepare coco-object coco coco-object-labels"))
def prepare(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="coco-object, coco-stuff-27 or pc60-last.",
            autocompletion=completing(("coco-object", "coco-stuff-27", "pc60-last")),
        ),
    ],
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of the data set.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write label PNGs to.")],
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write label PNGs in the ids other projects expect: COCO-Object, COCO-Stuff-27, Context with background last."""
    from mmdit_probe.data.public import prepare as run

    count = run(kind, root, out)
    Output(quiet=quiet, as_json=as_json, debug=debug).result(
        {"files": count, "out": out}, [f"{counted(count, 'file')}: {out}"], out
    )
