"""`mmdit-probe evaluate`: methods compared on the same forwards of the same images, under a named protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdit_probe.cli.options import READING, SESSION, Reading, Session, with_session
from mmdit_probe.cli.segment import BackgroundRule

NAME = "evaluate"

DatasetName = Annotated[str, typer.Option(help="scenes:val, or NAME:ROOT; `mmdit-probe datasets list` names them.")]
Methods = Annotated[
    str, typer.Option("--method", help="Methods by comma, open-vocabulary and unsupervised ones mixed.")
]
Protocols = Annotated[str, typer.Option("--protocol", help="present, predicted, full; several by comma.")]
Refinements = Annotated[
    str, typer.Option("--refine", help="Refinements by comma, each measured: none,pamr,affinity+pamr.")
]
Setting = Annotated[list[str] | None, typer.Option("--set", help="Option of a method: iseg.ent=0.02; repeatable.")]
Sweep = Annotated[str, typer.Option(help="none, or each layer, head or sigma alone: layer, head, sigma.")]
Match = Annotated[str, typer.Option(help="Matching of segments: image, upstream, majority, dataset, row.")]
ManyToOne = Annotated[
    bool, typer.Option("--many-to-one", help="Segments left over join the background class (DiffCut).")
]
Tags = Annotated[Path | None, typer.Option(help="JSON for the protocol 'predicted': image name -> class names.")]
TaggerName = Annotated[
    str | None,
    typer.Option("--tagger", help="Tagger for the protocol 'predicted': a CLIP (embedded name, folder or hub id), or "
                                  "scenes-parser."),
]  # fmt: skip
TagSplit = Annotated[
    str | None,
    typer.Option(
        help="Labelled images that the tagger's threshold is chosen on.", show_default="scenes:train for scenes"
    ),
]
TagThreshold = Annotated[
    float | None,
    typer.Option(help="Threshold of the tagger, 0 or less, in place of one chosen on --tag-split.", max=0.0),
]
Limit = Annotated[
    int | None, typer.Option(help="Use the first LIMIT images.", show_default="200 scenes, or all", min=1)
]
Cache = Annotated[
    Path | None, typer.Option(help="Keep captured forwards here, so that methods re-run without the model.")
]


@with_session
def command(
    dataset: DatasetName = "scenes:val",
    method: Methods = "seg4diff",
    protocol: Protocols = "present",
    refine: Refinements = "none",
    set_: Setting = None,
    background: BackgroundRule = "none",
    sweep: Sweep = "none",
    match: Match = "image",
    many_to_one: ManyToOne = False,
    tags: Tags = None,
    tagger: TaggerName = None,
    tag_split: TagSplit = None,
    tag_threshold: TagThreshold = None,
    limit: Limit = None,
    reading: Reading = READING,
    cache: Cache = None,
    session: Session = SESSION,
) -> None:
    """Score segmentation methods on a data set: mIoU under both averaging rules, accuracy, intervals over images.

    Writes counts.parquet (sparse confusion counts per image and configuration), league.csv, per_class.csv, the figure
    and run.json. Rows of different protocols must not be ranked against each other. `accelerate launch --multi_gpu
    --num_processes 2 -m mmdit_probe evaluate ...` or torchrun divides the images over processes.
    """
    from mmdit_probe.cli.league import TAGS, report
    from mmdit_probe.cli.session import check_stream, load_model, output_of, text_of
    from mmdit_probe.data.sources import dataset as read_dataset
    from mmdit_probe.errors import UserError, unknown
    from mmdit_probe.evaluate.scores import MATCHES
    from mmdit_probe.segment.settings import parse_sigmas, parse_size, selected

    output = output_of(session)
    if match not in MATCHES:
        raise unknown("matching", match, MATCHES)
    data = read_dataset(dataset, limit)
    if many_to_one and data.background is None:
        raise UserError(f"{data.name} has no background class, so --many-to-one has nothing to join segments to")
    if data.note:
        output.note(data.note)
    layers, heads, weights = selected(reading.selection, reading.layers, reading.heads)
    request: dict[str, Any] = {
        "dataset": dataset, "images": len(data.samples), "methods": _split(method), "protocols": _split(protocol),
        "refine": _split(refine), "options": _options(set_), "background": background, "sweep": sweep,
        "layers": layers, "heads": heads, "weights": weights, "sigmas": parse_sigmas(reading.sigma),
        "seeds": list(range(session.seed, session.seed + reading.noise_seeds)), "fit": reading.fit,
        "size": reading.size, **text_of(session),
        "tags": _read_tags(tags), "tagger": _tagger(tagger, tags, tag_split, tag_threshold, dataset),
        "by_rows": match == "row",
    }  # fmt: skip
    for options in request["options"].values():
        check_stream(session, options)
    if "predicted" in request["protocols"] and tagger is None and tags is None:
        raise UserError("protocol 'predicted' needs --tagger CLIP, or --tags FILE of another program's tags")

    from mmdit_probe.evaluate.captures import Captures
    from mmdit_probe.evaluate.plan import Plan, evaluate
    from mmdit_probe.evaluate.tagger import Tagging
    from mmdit_probe.results import RunFolder, processes
    from mmdit_probe.results.selection import load_selection
    from mmdit_probe.segment.record import Reading as Read

    if processes.alone_under_launcher():
        output.note(
            "accelerate started one process only (--cpu leaves the others to MPI): use accelerate launch --multi_gpu "
            "--num_processes N, or torchrun --nproc_per_node N; both take CPUs where there is no GPU"
        )
    model = session.model
    here = replace(session, device=processes.local_device(session.device))
    captures = Captures(lambda: load_model(here), session.named, cache, text_of(session))
    if session.named != model:
        _ = captures.model  # an adapter's or GGUF file may hold other weights than when the cache was made: compare now
    facts = captures.facts
    selection = reading.selection
    if selection is not None and load_selection(selection).weight_hash != facts["weight_hash"]:
        raise UserError(f"the selection {str(selection)!r} was made with other weights; run select-layers on {model}")
    plan = Plan.of(
        data, request["methods"], layer_count=facts["layers"], head_count=facts["heads"],
        reading=Read(layers, weights, None, request["sigmas"], request["seeds"], reading.fit, parse_size(reading.size)),
        protocols=request["protocols"], refine=request["refine"], options=request["options"], background=background,
        heads=heads, sweep=sweep, tags=request["tags"] or {}, by_rows=match == "row",
    )  # fmt: skip
    named_by = None if request["tagger"] is None else Tagging.of(data, **request["tagger"])
    asked = {"model": model, "weight_hash": facts["weight_hash"], **request}
    with (
        processes.joined(),
        processes.from_first(lambda: RunFolder.open(NAME, asked, out=session.out, resume=session.resume)) as folder,
    ):
        if not folder.complete:
            folder.record(
                model=facts, classes=[list(c.synonyms) for c in data.classes], agnostic=data.agnostic,
                images=[sample.name for sample in data.samples], background=data.background,
                processes=processes.world(),
            )  # fmt: skip
            if named_by is not None:
                with output.progress.bar("tags", named_by.steps) as advance:
                    plan = replace(plan, tags=named_by.tags(folder.path / TAGS, advance))
            with output.progress.bar("images", len(processes.share(data.samples))) as advance:
                evaluate(plan, captures, folder, advance)
        if processes.rank() == 0:
            report(folder, output, model, data.background if many_to_one else None, match)


def _tagger(
    name: str | None, tags: Path | None, split: str | None, threshold: float | None, dataset: str
) -> dict[str, Any] | None:
    """The tagger as a request: its name, and a threshold or the images it is chosen on."""
    from mmdit_probe.errors import UserError

    if name is None:
        if split is not None or threshold is not None:
            raise UserError("--tag-split and --tag-threshold are of a tagger; name it with --tagger")
        return None
    if tags is not None:
        raise UserError("--tags and --tagger both say which classes there are; give one of them")
    if threshold is None and split is None:
        if not dataset.startswith("scenes"):
            raise UserError(
                "a tagger needs a threshold: --tag-threshold, or --tag-split NAME:ROOT, other images to choose it on"
            )
        split = "scenes:train"
    if split == dataset:
        raise UserError(f"--tag-split {split!r} are the images that are evaluated; choose the threshold on others")
    return {"name": name, "split": split if threshold is None else None, "threshold": threshold}


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _options(texts: list[str] | None) -> dict[str, dict[str, Any]]:
    from mmdit_probe.errors import UserError
    from mmdit_probe.segment.methods.base import parse_option

    found: dict[str, dict[str, Any]] = {}
    for text in texts or []:
        name, value = parse_option(text)
        method, dot, option = name.partition(".")
        if not dot:
            raise UserError(f"--set {text!r}: expected METHOD.OPTION=VALUE, e.g. iseg.ent=0.02")
        found.setdefault(method, {})[option] = value
    return found


def _read_tags(path: Path | None) -> dict[str, list[str]] | None:
    from mmdit_probe.data import read_json
    from mmdit_probe.errors import UserError

    if path is None:
        return None
    data = read_json(path, "tags, image name -> list of class names")
    if not isinstance(data, dict) or not all(isinstance(value, list) for value in data.values()):
        raise UserError(f"--tags {str(path)!r}: expected an object, image name -> list of class names")
    return data
