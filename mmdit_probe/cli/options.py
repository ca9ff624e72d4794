"""Options that mean the same in every command.

    @with_session
    def command(layers: Layers = "all", session: Session = SESSION) -> None: ...

`with_session` puts the options of `Session` (model, device, seed, run folder, output) in the place of that one
argument, so that a command spells out its own options only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

DEFAULT_MODEL = "scenes-sd3"

Model = Annotated[str, typer.Option("--model", "-m", help="Embedded model, diffusers directory or hub id.")]
Lora = Annotated[
    str | None,
    typer.Option(help="LoRA on the model: a folder as train-magnet or diffusers writes it, or a hub id."),
]
Device = Annotated[str, typer.Option(help="auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on CPU, bfloat16 on CUDA), float32, bfloat16, float16.")]
Seed = Annotated[int, typer.Option(help="Seed of the first item; item k uses seed + k.", min=0)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder [default: runs/<command>/<time>-<hash>].")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run of the same request; a finished one is shown again.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the run folder only.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")]
NoT5 = Annotated[bool, typer.Option("--no-t5", help="Leave the T5 encoder out: its slots are zeros, as in the paper.")]

Layers = Annotated[str, typer.Option(help="Joint-attention layers, 0-based: all, 9, 7-11 or 0,9.")]
Heads = Annotated[str, typer.Option(help="Attention heads to keep in the table: all, 3, 0-3 or 0,5.")]
Selection = Annotated[
    Path | None, typer.Option(help="Layers and heads from select-layers, in place of --layers and --heads.")
]
Prompts = Annotated[
    str | None,
    typer.Option(help="File with one prompt per line, a text, or a set: everyday, scenes:train|val|test. "
                      "[default: scenes:val for embedded models, else everyday]"),
]  # fmt: skip
Images = Annotated[
    str | None, typer.Option(help="Probe real pictures instead of sampling: a folder, or scenes:train|val|test.")
]
Pictures = Annotated[
    str | None,
    typer.Option("--images", help="Pictures: a folder, a file, or scenes:train|val|test. "
                                  "[default: scenes:val if embedded]"),
]  # fmt: skip
Caption = Annotated[
    str | None, typer.Option("--prompts", help="One prompt for all pictures [default: their captions].")
]
Steps = Annotated[str, typer.Option(help="Sampling steps: all, 0,20, 0-4; last-8 is the 8th from the clean end.")]
NumSteps = Annotated[int, typer.Option(help="Number of sampling steps.", min=1)]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 or less runs without it.")]
Length = Annotated[int | None, typer.Option("--max-sequence-length", help="T5 tokens (the paper: 77).", min=1)]
Sigma = Annotated[float, typer.Option(help="Noise level of --images, 0 clean to 1 noise (the paper's t=8: 0.515).")]
Limit = Annotated[
    int | None, typer.Option(help="Use the first LIMIT prompts or pictures [default: 50 of a scenes set].")
]
Controls = Annotated[
    str,
    typer.Option("--control", help="Also measure controls, by comma: random (the same network, random weights), "
                                   "shuffled (another item's caption), uniform (uniform attention); or none."),
]  # fmt: skip

EditControls = Annotated[
    str,
    typer.Option("--control", help="Controls by comma: budget (a random change of equal size), random (the same edits "
                                   "on random weights), shuffled (images against another caption), uniform (under "
                                   "uniform attention); or none."),
]  # fmt: skip
Clip = Annotated[
    str | None,
    typer.Option(help="CLIP checkpoint for CLIP-T and CLIP-I: a folder, a hub id, or none. "
                      "[default: scenes-clip for embedded models]"),
]  # fmt: skip
Batch = Annotated[int, typer.Option(help="Prompts sampled at once.", min=1)]


@dataclass(frozen=True)
class Session:
    """The options of every command that runs a model."""

    model: Model = DEFAULT_MODEL
    lora: Lora = None
    no_t5: NoT5 = False
    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: Seed = 0
    out: Out = None
    resume: Resume = False
    quiet: Quiet = False
    as_json: Json = False
    debug: Debug = False

    @property
    def embedded(self) -> bool:
        """Whether the model ships with the package and knows the scenes world."""
        from mmdit_probe import assets

        return self.model in assets.names()


SESSION = Session()


def with_session(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of `Session` in place of its argument `session`."""
    names = [field.name for field in fields(Session)]

    @functools.wraps(command)
    def expanded(**options: Any) -> None:
        command(session=Session(**{name: options.pop(name) for name in names}), **options)

    own = [
        parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "session"
    ]
    hints = get_type_hints(Session, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Session)
    ]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    marks: Any = expanded
    marks.__signature__ = inspect.Signature([*own, *shared], return_annotation=None)
    marks.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shared]}
    del marks.__wrapped__
    return expanded
