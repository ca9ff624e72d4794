"""What commands that are no experiments share: the loaded model, the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmdit_probe.errors import UserError

if TYPE_CHECKING:
    from mmdit_probe.cli.options import Session
    from mmdit_probe.cli.output import Output
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.results import RunFolder


def output_of(session: Session) -> Output:
    """Where the answer goes."""
    from mmdit_probe.cli.output import Output

    return Output(quiet=session.quiet, as_json=session.as_json, debug=session.debug)


def load_model(session: Session) -> MMDiT:
    """The model of the session."""
    from mmdit_probe import load
    from mmdit_probe.attention import tiles

    tiles.BFLOAT16_UNITS = True  # a command owns its process
    model = load(session.model, **session.loading)
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


def open_folder(command: str, model: MMDiT, session: Session, options: dict[str, Any], **facts: Any) -> RunFolder:
    """The run folder of a request, with what its record says of the model."""
    from mmdit_probe.experiments.experiment import described, request_of
    from mmdit_probe.results import RunFolder

    request = request_of(model, **options)
    folder = RunFolder.open(command, request, out=session.out, resume=session.resume)
    if not folder.complete:
        folder.record(**described(model), seed=session.seed, **facts)
    return folder
