"""`mmdit-probe segment`: the classes you name, in your own picture (arXiv:2509.18096, section 3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.options import READING, SESSION, Reading, Session, session_without

if TYPE_CHECKING:
    from mmdit_probe.cli.output import Output
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.segment.run import Segmentation

Picture = Annotated[str, typer.Argument(metavar="IMAGE", help="Picture file, or scenes:val:0.")]
Classes = Annotated[
    str,
    typer.Option(help="Names by comma, synonyms by semicolon: 'cat; kitten, wet grass'; or a .txt file, one per line."),
]
MethodName = Annotated[str, typer.Option(help="Method; `mmdit-probe segment --help` names the options they share.")]
MethodOption = Annotated[list[str] | None, typer.Option("--set", help="Option of the method: name=value; repeatable.")]
BackgroundRule = Annotated[str, typer.Option(help="none, threshold:0.5, power:2 or class:NAME.")]
Refine = Annotated[str, typer.Option(help="none, or steps: affinity[:n], nosink[:n], pamr[:n], joined by +.")]


@session_without("resume")
def command(
    image: Picture,
    classes: Classes,
    method: MethodName = "seg4diff",
    set_: MethodOption = None,
    background: BackgroundRule = "none",
    refine: Refine = "none",
    reading: Reading = READING,
    session: Session = SESSION,
) -> None:
    """Label every pixel of a picture with one of the classes you name.

    Writes labels.png (indexed, with a palette), overlay.png and the sheet of maps, probability maps as 8-bit PNG and
    as safetensors, segmentation.json with the area of each class, and run.json into a run folder.
    """
    from mmdit_probe.cli.session import output_of
    from mmdit_probe.data import parse_classes
    from mmdit_probe.segment.methods import find
    from mmdit_probe.segment.refine import Refinement
    from mmdit_probe.segment.tail import Background

    output = output_of(session)
    parsed = parse_classes(classes)
    find(method)
    Refinement.parse(refine)
    Background.parse(background)
    request, picture, shared = prepare(image, method, set_, refine, reading, session)
    request |= {"classes": [list(one.synonyms) for one in parsed], "background": background}

    from mmdit_probe.segment.run import segment

    loaded = load_read(reading, session)
    result = segment(loaded, picture, parsed, background=background, **shared)
    for extra in result.capture.passes[1:2]:
        output.note(
            f"{len(result.capture.passes)} prompts: the names overflow the text encoders ({extra.prompt.text!r}, ...)"
        )
    report("segment", result, loaded, session, request, output)


def prepare(
    image: str, method: str, options: list[str] | None, refine: str, reading: Reading, session: Session
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """What `segment` and `discover` read of their options: the request, the picture, keyword arguments."""
    from mmdit_probe.cli.session import check_stream, output_of
    from mmdit_probe.data import single
    from mmdit_probe.segment.methods.base import parse_option
    from mmdit_probe.segment.record import Reading as Read
    from mmdit_probe.segment.settings import parse_sigmas, parse_size, selected

    layers, heads, weights = selected(reading.selection, reading.layers, reading.heads)
    values: dict[str, Any] = dict(parse_option(text) for text in options or [])
    check_stream(session, values)
    if heads is not None:
        values["heads"] = heads
    read = Read(
        layers, weights, None, parse_sigmas(reading.sigma), range(session.seed, session.seed + reading.noise_seeds),
        reading.fit, parse_size(reading.size),
    )  # fmt: skip
    shared = {"method": method, "options": values, "refine": refine}
    sample = single(image)
    pixels = sample.image
    for note in sample.notes:
        output_of(session).note(f"{image}: {note}")
    request = {
        "image": image, "content": sample.fingerprint(), **shared, "layers": layers, "weights": weights,
        "sigmas": read.sigmas, "seeds": list(read.seeds), "fit": reading.fit, "size": reading.size,
    }  # fmt: skip
    return request, pixels, {**shared, "reading": read}


def load_read(reading: Reading, session: Session) -> MMDiT:
    """The model of the session.

    Raises:
        UserError: the selection to read is of other weights.
    """
    from mmdit_probe.cli.session import load_model
    from mmdit_probe.results.selection import load_selection

    loaded = load_model(session)
    if reading.selection is not None:
        load_selection(reading.selection, loaded)
    return loaded


def report(
    command_name: str, result: Segmentation, model: MMDiT, session: Session, request: dict[str, Any], output: Output
) -> None:
    """The files of one labelled picture, and the table of areas."""
    import json

    import numpy as np
    from PIL import Image
    from safetensors.numpy import save_file

    from mmdit_probe.cli.session import open_folder
    from mmdit_probe.experiments.text import TextTable
    from mmdit_probe.plots import save
    from mmdit_probe.plots.segmentation import blend, overlay_sheet, write_labels

    folder = open_folder(command_name, model, session, request)
    shares = result.probabilities.numpy()
    labels = write_labels(result.labels, folder.path / "labels.png")
    Image.fromarray(blend(result.capture.image, result.labels)).save(folder.path / "overlay.png")
    (folder.path / "maps").mkdir(exist_ok=True)
    for index, share in enumerate(shares):
        stem = "".join(c if c.isalnum() else "_" for c in result.names[index])
        Image.fromarray(np.rint(255 * share).astype(np.uint8)).save(folder.path / "maps" / f"{index:03d}_{stem}.png")
    save_file({"probabilities": np.ascontiguousarray(shares, np.float32)}, folder.path / "probabilities.safetensors")
    title = (
        f"{request['image']}: {request['method']}, layers {_spans(result.capture.layers)}, "
        f"sigma {_list(request['sigmas'])}"
    )
    sheet = overlay_sheet(result.capture.image, result.labels, result.names, shares, title=title)
    figures = save(sheet, folder.path / "sheet")
    areas = result.areas()
    document = {
        "run": str(folder.path), "labels": str(labels), "overlay": str(folder.path / "overlay.png"),
        "figures": [str(path) for path in figures], "names": result.names, "areas": areas,
        "request": folder.data["request"],
        "prompts": [one.prompt.text for one in result.capture.passes], "grid": list(result.capture.grid),
        "layers": list(result.capture.layers),
    }  # fmt: skip
    (folder.path / "segmentation.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    folder.finish()
    table = TextTable(["index", "class", "pixels", "share"], left=("class",))
    for index, (name, area) in enumerate(areas.items()):
        table.add(str(index), name, str(area["pixels"]), f"{area['share']:.1%}")
    output.result(document, [table, f"labels, overlay, maps: {folder.path}"], folder.path)


def _spans(layers: Any) -> str:
    return ",".join(str(layer) for layer in layers)


def _list(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
