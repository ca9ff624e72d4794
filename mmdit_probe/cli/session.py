"""What commands on a model share: what to measure on, the loaded model, the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_probe.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from mmdit_probe.cli.options import Measured, Session
    from mmdit_probe.cli.output import Output
    from mmdit_probe.data.images import Picture
    from mmdit_probe.experiments.budget_items import Budget
    from mmdit_probe.experiments.outcomes import Outcome
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.results import RunFolder

DEFAULT_CLIP = "scenes-clip"
"""CLIP of the scenes world, which ships with the package."""

PAPER_MODEL = "stable-diffusion-3-medium"
"""Part of the names of the one model whose published numbers are shipped."""


def output_of(session: Session) -> Output:
    """Where the answer goes."""
    from mmdit_probe.cli.output import Output

    return Output(quiet=session.quiet, as_json=session.as_json, debug=session.debug)


def load_model(session: Session) -> MMDiT:
    """The model of the session."""
    from mmdit_probe import load
    from mmdit_probe.attention import tiles

    tiles.BFLOAT16_UNITS = True  # a command owns its process
    model = load(session.model, lora=session.lora, device=session.device, dtype=session.dtype, t5=not session.no_t5)
    if session.max_sequence_length is not None:
        model.max_sequence_length = session.max_sequence_length
    return model


def text_of(session: Session) -> dict[str, Any]:
    """What a request says of how the text is encoded: neither weights nor prompts tell. Nothing for the model's own
    way."""
    asked = {"no_t5": session.no_t5, "max_sequence_length": session.max_sequence_length}
    return {name: value for name, value in asked.items() if value}


def check_stream(session: Session, options: Mapping[str, Any]) -> None:
    """A method reads class names in an encoder stream that has them.

    Raises:
        UserError: it is to read them in T5, which is left out.
    """
    if session.no_t5 and options.get("stream") == "t5":
        raise UserError("stream=t5 reads class names in T5, which --no-t5 leaves out; take stream=clip, or drop one")


def prompts_of(session: Session, prompts: str | None, limit: int | None, default: int | None = None) -> list[str]:
    """The prompts to sample: what was asked for, else held-out captions or the everyday set (`default` of them)."""
    from mmdit_probe.data.prompts import resolve

    source = ("scenes:val" if session.embedded else "everyday") if prompts is None else prompts
    return resolve(source, default if limit is None and prompts is None else limit)


def pictures_of(session: Session, images: str | None, limit: int | None, default: int) -> list[Picture]:
    """The pictures to probe: what was asked for, else `default` held-out scenes.

    Raises:
        UserError: none are named, and the model does not know the scenes world.
    """
    from mmdit_probe.data.images import resolve

    if images is None and not session.embedded:
        raise UserError("no pictures are given; name a folder with --images")
    return resolve(images or "scenes:val", default if limit is None and images is None else limit)


def check_layers(selection: Path | None, layers: str, heads: str = "all") -> None:
    """Layers are named once.

    Raises:
        UserError: --selection beside --layers or --heads.
    """
    if selection is not None and (layers != "all" or heads != "all"):
        raise UserError("--selection names layers and heads already; leave --layers and --heads out")


def check_sigma(sigma: float) -> None:
    """A noise level is 0 to 1.

    Raises:
        UserError: it is not.
    """
    if not 0.0 <= sigma <= 1.0:
        raise UserError(f"--sigma {sigma} is no noise level; expected 0 (clean) to 1 (noise)")


def check_streams(model: MMDiT, streams: str | None) -> None:
    """Encoder streams exist.

    Raises:
        UserError: one does not.
    """
    from mmdit_probe.errors import unknown

    known = dict.fromkeys(model.token_tables([""])[0].streams)
    for name in streams.split(",") if streams else ():
        if name not in known:
            raise unknown("encoder stream", name, known)


def layers_of(selection: Path | None, layers: str, heads: str, model: MMDiT) -> tuple[Any, Any]:
    """Layers and heads to measure: those of the selection if there is one. Heads are a specification for all layers,
    or layer -> heads.

    Raises:
        UserError: not a selection, or one of other weights.
    """
    if selection is None:
        return layers, heads
    from mmdit_probe.results.selection import load_selection

    found = load_selection(selection, model)
    chosen = sorted(found.layers)
    return chosen, {layer: list(found.heads[layer]) for layer in chosen if layer in found.heads} or "all"


def outcomes_of(
    session: Session, device: Any, clip: str | None, dino: str | None = None
) -> tuple[list[Outcome], dict[str, str | None]]:
    """What is measured of images, and the checkpoints it takes: the change always, the scenes parser and scenes-clip
    for models of the scenes world, CLIP and DINO where named ("none" leaves CLIP out)."""
    from mmdit_probe import assets
    from mmdit_probe.experiments.outcomes import Change, Clip, Dino, Parser

    outcomes: list[Outcome] = [Change()]
    if session.embedded:
        outcomes.append(Parser())
        clip = DEFAULT_CLIP if clip is None else clip
    clip = None if clip == "none" else clip
    if clip is not None:
        outcomes.append(Clip(assets.path(clip) if clip in assets.names() else clip, device))
    if dino is not None:
        outcomes.append(Dino(dino, device))
    return outcomes, {"clip": clip, "dino": dino}


def request_of(model: MMDiT, **options: Any) -> dict[str, Any]:
    """A request: the weights that are measured, and every option that decides the numbers."""
    return {
        "model": model.name,
        "weight_hash": model.weight_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text_length": model.text_length,
        **options,
    }


def open_folder(command: str, model: MMDiT, session: Session, options: dict[str, Any], **facts: Any) -> RunFolder:
    """The run folder of a request, with what its record says of the model."""
    from mmdit_probe.results import RunFolder

    request = request_of(model, **options, **text_of(session))
    folder = RunFolder.open(command, request, out=session.out, resume=session.resume)
    if not folder.complete:
        known = {"id": model.name, "family": model.family.name, "weight_hash": model.weight_hash}
        folder.record(model=known, device=str(model.device), seed=session.seed, **facts)
    return folder


def measure(
    kind: type[Budget], command: str, table: str, measured: Measured, session: Session
) -> tuple[RunFolder, MMDiT, Output]:
    """Prompts or pictures -> measurement -> table in a run folder: the body of attention-budget and value-norms.

    Args:
        kind: the measurement. command, table: names of the command and of its table.
        measured, session: the options.
    """
    from mmdit_probe.data import images as pictures

    output = output_of(session)
    check_layers(measured.selection, measured.layers, measured.heads)
    chosen = pictures.resolve(measured.images, measured.limit) if measured.images is not None else None
    asked = prompts_of(session, measured.prompts, measured.limit) if chosen is None or measured.prompts else []

    from mmdit_probe.experiments.controls import parse
    from mmdit_probe.results import RunFolder, TableWriter

    controls = parse(measured.control)
    loaded = load_model(session)
    which, heads = layers_of(measured.selection, measured.layers, measured.heads, loaded)
    shared = {"layers": which, "heads": heads, "seed": session.seed, "controls": controls}
    if chosen is None:
        measurement = kind.of_prompts(
            loaded, asked, steps=measured.steps, num_steps=measured.num_steps, guidance=measured.guidance, **shared
        )
    else:
        measurement = kind.of_pictures(loaded, chosen, asked, sigma=measured.sigma, **shared)
    for remark in measurement.remarks:
        output.note(remark)
    request = measurement.request | text_of(session)
    folder = RunFolder.open(command, request, out=session.out, resume=session.resume)
    if not folder.complete:
        folder.record(**measurement.facts)
        with TableWriter(folder.path, table) as writer:
            label = "prompts" if chosen is None else "pictures"
            with output.progress(label, len(measurement), len(writer.done)) as advance:
                measurement.run(writer, advance)
            folder.record()
    return folder, loaded, output


def setting(folder: RunFolder, summary: pd.DataFrame) -> str:
    """What was averaged over and how it was run, for the figure's title and the line below the table."""
    request, count = folder.data["request"], int(summary.prompts.min())
    if request["mode"] == "pictures":
        return f"n = {count} pictures, sigma {request['sigma']}"
    steps, total = len(request["steps"]), request["num_steps"]
    return f"n = {count} prompts, {steps} of {total} steps, guidance {request['guidance']}"
