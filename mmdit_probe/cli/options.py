"""Options that mean the same in every command.

    @with_session
    def command(layers: Layers = "all", session: Session = SESSION) -> None: ...

`with_session` puts the options of `Session` (model, device, seed, run folder, output) in the place of that one
argument, so that a command spells out its own options only; `session_without("resume")` does so for a command that has
no use for some of them. Other groups of options are dataclasses too and go the same way: `Measured`, `Reading`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

DEFAULT_MODEL = "scenes-sd3"

Model = Annotated[
    str, typer.Option("--model", "-m", help="Embedded model, diffusers directory, hub id or .safetensors file.")
]
Lora = Annotated[
    str | None,
    typer.Option(help="LoRA on the model: a folder as train-magnet or diffusers writes it, or a hub id."),
]
Device = Annotated[str, typer.Option(help="auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on CPU, bfloat16 on CUDA), float32, bfloat16, float16.")]
Offload = Annotated[
    str | None,
    typer.Option(help="Keep weights in the processor's memory until called for: model, sequential or group."),
]
Quantize = Annotated[
    str | None,
    typer.Option(help="Store the transformer's weights in fewer bits: int8, fp8, nf4, or gguf:FILE in their place."),
]
Seed = Annotated[int, typer.Option(help="Seed of the first item; item k uses seed + k.", min=0)]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Run folder.", show_default="runs/<command>/<time>-<hash>")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run of the same request; a finished one is shown again.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the run folder only.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")]
NoT5 = Annotated[bool, typer.Option("--no-t5", help="Leave the T5 encoder out: its slots are zeros, as in the paper.")]
Length = Annotated[int | None, typer.Option("--max-sequence-length", help="T5 tokens (the paper: 77).", min=1)]

Layers = Annotated[str, typer.Option(help="Joint-attention layers, 0-based: all, 9, 7-11 or 0,9.")]
Heads = Annotated[str, typer.Option(help="Attention heads to keep in the table: all, 3, 0-3 or 0,5.")]
Selection = Annotated[
    Path | None, typer.Option(help="Layers and heads from select-layers, in place of --layers and --heads.")
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="File with one prompt per line, a text, or a set: everyday, scenes:train|val|test.",
        show_default="scenes:val for embedded models, else everyday",
    ),
]
Images = Annotated[
    str | None, typer.Option(help="Probe real pictures instead of sampling: a folder, or scenes:train|val|test.")
]
Pictures = Annotated[
    str | None,
    typer.Option(
        "--images", help="Pictures: a folder, a file, or scenes:train|val|test.", show_default="scenes:val if embedded"
    ),
]
Caption = Annotated[
    str | None, typer.Option("--prompts", help="One prompt for all pictures.", show_default="their captions")
]
Steps = Annotated[str, typer.Option(help="Sampling steps: all, 0,20, 0-4; last-8 is the 8th from the clean end.")]
NumSteps = Annotated[int, typer.Option(help="Number of sampling steps.", min=1)]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 or less runs without it.")]
Sigma = Annotated[float, typer.Option(help="Noise level of --images, 0 clean to 1 noise (the paper's t=8: 0.515).")]
Limit = Annotated[
    int | None, typer.Option(help="Use the first LIMIT prompts or pictures.", show_default="50 of a scenes set")
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
    typer.Option(
        help="CLIP checkpoint for CLIP-T and CLIP-I: a folder, a hub id, or none.",
        show_default="scenes-clip for embedded models",
    ),
]
Batch = Annotated[int, typer.Option(help="Prompts sampled at once.", min=1)]


@dataclass(frozen=True)
class Session:
    """The options of every command that runs a model."""

    model: Model = DEFAULT_MODEL
    lora: Lora = None
    no_t5: NoT5 = False
    max_sequence_length: Length = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    offload: Offload = None
    quantize: Quantize = None
    seed: Seed = 0
    out: Out = None
    resume: Resume = False
    quiet: Quiet = False
    as_json: Json = False
    debug: Debug = False

    @property
    def loading(self) -> dict[str, Any]:
        """What `load` is told beside the model's name."""
        told = {name: getattr(self, name) for name in ("device", "dtype", "lora", "offload", "quantize")}
        return told | {"t5": not self.no_t5}

    @property
    def named(self) -> str:
        """The name that `load` gives the model."""
        return "+".join([self.model, *(more for more in (self.lora, self.quantize) if more is not None)])

    @property
    def embedded(self) -> bool:
        """Whether the model ships with the package and knows the scenes world."""
        from mmdit_probe import assets

        return self.model in assets.names()


SESSION = Session()


@dataclass(frozen=True)
class Reading:
    """Where a segmentation reads the network, and how the picture is shown to it."""

    layers: Annotated[
        str | None, typer.Option(help="Layers, 0-based: 9, 7-11, all.", show_default="the middle third")
    ] = None
    heads: Annotated[str | None, typer.Option(help="Attention heads: 3, 0-3, 0,5.", show_default="all, averaged")] = (
        None
    )
    selection: Annotated[
        Path | None, typer.Option(help="LayerSelection file (JSON) in place of --layers and --heads.")
    ] = None
    sigma: Annotated[str, typer.Option(help="Noise levels by comma, 0 clean to 1 noise; several are averaged.")] = (
        "0.515"
    )
    noise_seeds: Annotated[int, typer.Option(help="Number of noise seeds to average over.", min=1)] = 1
    fit: Annotated[str, typer.Option(help="squash, letterbox, crop or aspect.")] = "squash"
    size: Annotated[str | None, typer.Option(help="Network input, HxW in pixels.", show_default="the model's own")] = (
        None
    )


READING = Reading()


def with_session(command: Callable[..., None], left_out: Collection[str] = ()) -> Callable[..., None]:
    """`command` with the options of its groups in the place of the arguments that take them.

    Args:
        command: its arguments are options, or groups of them (dataclasses; one is `session`).
        left_out: options of groups that the command does not offer; they keep their defaults.
    """
    options: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        group = parameter.annotation
        if not is_dataclass(group):
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(group, include_extras=True)
        offered = [field for field in fields(group) if field.name not in left_out]
        groups[name] = group, [field.name for field in offered]
        options += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in offered
        ]

    @functools.wraps(command)
    def expanded(**given: Any) -> None:
        for name, (group, names) in groups.items():
            given[name] = group(**{option: given.pop(option) for option in names})
        command(**given)

    marks: Any = expanded
    marks.__signature__ = inspect.Signature(options, return_annotation=None)
    marks.__annotations__ = {option.name: option.annotation for option in options}
    del marks.__wrapped__
    return expanded


def session_without(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`with_session` for a command that has no use for some of the shared options."""
    return functools.partial(with_session, left_out=names)
