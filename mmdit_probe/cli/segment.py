"""`mmdit-probe segment`: the classes you name, in your own picture (arXiv:2509.18096, section 3.4)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_probe.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Json, Lora, Model, Out, Quiet, Seed

if TYPE_CHECKING:
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
Layers = Annotated[str | None, typer.Option(help="Layers, 0-based: 9, 7-11, all [default: the middle third].")]
Heads = Annotated[str | None, typer.Option(help="Attention heads: 3, 0-3, 0,5 [default: all, averaged].")]
Selection = Annotated[Path | None, typer.Option(help="LayerSelection file (JSON) in place of --layers and --heads.")]
Sigma = Annotated[str, typer.Option(help="Noise levels by comma, 0 clean to 1 noise; several are averaged.")]
NoiseSeeds = Annotated[int, typer.Option(help="Number of noise seeds to average over.", min=1)]
FitHow = Annotated[str, typer.Option("--fit", help="squash, letterbox, crop or aspect.")]
Size = Annotated[str | None, typer.Option(help="Network input, HxW in pixels [default: the model's own].")]


def command(
    image: Picture,
    classes: Classes,
    method: MethodName = "seg4diff",
    set_: MethodOption = None,
    background: BackgroundRule = "none",
    refine: Refine = "none",
    layers: Layers = None,
    heads: Heads = None,
    selection: Selection = None,
    sigma: Sigma = "0.515",
    noise_seeds: NoiseSeeds = 1,
    fit: FitHow = "squash",
    size: Size = None,
    model: Model = DEFAULT_MODEL,
    lora: Lora = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Label every pixel of a picture with one of the classes you name.

    Writes labels.png (indexed, with a palette), overlay.png and the sheet of maps, probability maps as 8-bit PNG and
    as safetensors, segmentation.json with the area of each class, and run.json into a run folder.
    """
    from mmdit_probe.cli.output import Output
    from mmdit_probe.segment.methods import find
    from mmdit_probe.segment.refine import Refinement
    from mmdit_probe.segment.tail import Background
    from mmdit_probe.segment.vocabulary import parse_classes

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    parsed = parse_classes(classes)
    find(method)
    Refinement.parse(refine)
    Background.parse(background)
    request, picture, shared = prepare(
        image, method, set_, refine, layers, heads, selection, sigma, noise_seeds, seed, fit, size
    )
    request |= {"classes": [list(one.synonyms) for one in parsed], "background": background}

    from mmdit_probe.cli.session import open_model
    from mmdit_probe.segment.run import segment
    from mmdit_probe.select import load_selection

    loaded = open_model(model, lora=lora, debug=debug, device=device, dtype=dtype)
    if selection is not None:
        load_selection(selection, loaded)  # refuses the selection of another model
    result = segment(loaded, picture, parsed, background=background, **shared)
    for extra in result.capture.passes[1:2]:
        output.note(
            f"{len(result.capture.passes)} prompts: the names overflow the text encoders ({extra.prompt.text!r}, ...)"
        )
    report("segment", result, loaded, request, image, out, output)


def prepare(
    image: str, method: str, options: list[str] | None, refine: str, layers: str | None, heads: str | None,
    selection: Path | None, sigma: str, noise_seeds: int, seed: int, fit: str, size: str | None,
) -> tuple[dict[str, Any], Any, dict[str, Any]]:  # fmt: skip
    """What `segment` and `discover` read of their options: the request, the picture, keyword arguments."""
    from mmdit_probe.segment.methods.base import parse_option
    from mmdit_probe.segment.settings import parse_sigmas, parse_size, picture_of, selected

    chosen_layers, chosen_heads, weights = selected(selection, layers, heads)
    values: dict[str, Any] = dict(parse_option(text) for text in options or [])
    if chosen_heads is not None:
        values["heads"] = chosen_heads
    sigmas, seeds = parse_sigmas(sigma), list(range(seed, seed + noise_seeds))
    request = {
        "image": image, "method": method, "options": values, "refine": refine, "layers": chosen_layers,
        "weights": weights, "sigmas": sigmas, "seeds": seeds, "fit": fit, "size": size,
    }  # fmt: skip
    shared = {
        "method": method, "options": values, "refine": refine, "layers": chosen_layers, "weights": weights,
        "sigmas": sigmas, "seeds": seeds, "fit": fit, "size": parse_size(size),
    }  # fmt: skip
    return request, picture_of(image), shared


def report(
    command_name: str, result: Segmentation, model: Any, request: dict[str, Any], image: str, out: Path | None,
    output: Any,
) -> None:  # fmt: skip
    """The files of one labelled picture, and the table of areas."""
    import json

    import numpy as np
    from PIL import Image
    from rich import box
    from rich.table import Table
    from safetensors.numpy import save_file

    from mmdit_probe.plots import save
    from mmdit_probe.plots.segmentation import blend, overlay_sheet, write_labels
    from mmdit_probe.results import RunFolder

    folder = RunFolder.open(command_name, {"model": model.name, "weight_hash": model.weight_hash, **request}, out=out)
    shares = result.probabilities.numpy()
    labels = write_labels(result.labels, folder.path / "labels.png")
    Image.fromarray(blend(result.capture.image, result.labels)).save(folder.path / "overlay.png")
    (folder.path / "maps").mkdir(exist_ok=True)
    for index, share in enumerate(shares):
        stem = "".join(c if c.isalnum() else "_" for c in result.names[index])
        Image.fromarray(np.rint(255 * share).astype(np.uint8)).save(folder.path / "maps" / f"{index:03d}_{stem}.png")
    save_file({"probabilities": np.ascontiguousarray(shares, np.float32)}, folder.path / "probabilities.safetensors")
    title = f"{image}: {request['method']}, layers {_spans(result.capture.layers)}, sigma {_list(request['sigmas'])}"
    sheet = overlay_sheet(result.capture.image, result.labels, result.names, shares, title=title)
    figures = save(sheet, folder.path / "sheet")
    areas = result.areas()
    document = {
        "run": str(folder.path), "labels": str(labels), "overlay": str(folder.path / "overlay.png"),
        "figures": [str(path) for path in figures], "names": result.names, "areas": areas, "request": request,
        "prompts": [one.prompt.text for one in result.capture.passes], "grid": list(result.capture.grid),
        "layers": list(result.capture.layers),
    }  # fmt: skip
    (folder.path / "segmentation.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    folder.finish(model={"id": model.name, "weight_hash": model.weight_hash}, dtype=str(model.dtype))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("index", justify="right")
    table.add_column("class")
    table.add_column("pixels", justify="right")
    table.add_column("share", justify="right")
    for index, (name, area) in enumerate(areas.items()):
        table.add_row(str(index), name, str(area["pixels"]), f"{area['share']:.1%}")
    output.result(document, [table, f"labels, overlay, maps: {folder.path}"], folder.path)


def _spans(layers: Any) -> str:
    return ",".join(str(layer) for layer in layers)


def _list(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
