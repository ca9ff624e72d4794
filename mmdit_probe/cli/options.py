"""The options of every command on a model, and of those that only print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mmdit_probe.experiments.options import DETAIL, MODEL, OUTPUT
from mmdit_probe.models.names import DEVICES, DTYPES, OFFLOADS, QUANTIZERS, embedded_models


def completing(values: Sequence[str] | Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """Completion of one value, or of the last of several by comma or plus."""

    def complete(incomplete: str) -> list[str]:
        cut = max(incomplete.rfind(","), incomplete.rfind("+")) + 1
        known = values() if callable(values) else values
        return [incomplete[:cut] + value for value in known if value.startswith(incomplete[cut:])]

    return complete


def epilog(*examples: str) -> str:
    """The examples below a command's help text."""
    lines = [f"mmdit-probe {line}".replace("[", r"\[") for line in examples]
    return "\n\n".join([f"Example{'s' if len(lines) > 1 else ''}:", *lines])


Device = Annotated[
    str,
    typer.Option(help="auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps.", rich_help_panel=MODEL,
                 autocompletion=completing(DEVICES)),
]  # fmt: skip
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Run folder.", show_default="runs/<command>/<time>-<hash>",
                 rich_help_panel=OUTPUT),
]  # fmt: skip
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print the run folder only, if any.", rich_help_panel=OUTPUT)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of tables.", rich_help_panel=OUTPUT)
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.", rich_help_panel=OUTPUT)
]


@dataclass(frozen=True)
class Session:
    """Which model, and where the answer goes."""

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Embedded model, diffusers directory, hub id or .safetensors file.",
            rich_help_panel=MODEL,
            autocompletion=embedded_models,
        ),
    ] = "scenes-sd3"
    device: Device = "auto"
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (float32 on CPU, bfloat16 on CUDA), float32, bfloat16, float16.",
            rich_help_panel=MODEL,
            autocompletion=completing(DTYPES),
        ),
    ] = "auto"
    lora: Annotated[
        str | None,
        typer.Option(help="LoRA on the model: a folder as train-magnet or diffusers writes it, or a hub id.",
                     rich_help_panel=MODEL),
    ] = None  # fmt: skip
    offload: Annotated[
        str | None,
        typer.Option(
            help="Keep weights in the processor's memory until called for: model, sequential or group.",
            rich_help_panel=DETAIL, autocompletion=completing(OFFLOADS),
        ),
    ] = None  # fmt: skip
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Store the transformer's weights in fewer bits: int8, fp8, nf4, or gguf:FILE in their place.",
            rich_help_panel=DETAIL, autocompletion=completing([*list(QUANTIZERS)[:3], "gguf:"]),
        ),
    ] = None  # fmt: skip
    no_t5: Annotated[
        bool,
        typer.Option("--no-t5", help="Leave the T5 encoder out: its slots are zeros, as in the paper.",
                     rich_help_panel=DETAIL),
    ] = False  # fmt: skip
    max_sequence_length: Annotated[
        int | None,
        typer.Option(
            "--max-sequence-length",
            help="T5 tokens (the paper: 77).",
            min=1,
            max=65536,
            show_default="the model's own",
            rich_help_panel=DETAIL,
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option("--size", help="HEIGHTxWIDTH in pixels of what is made.", show_default="the model's own",
                     rich_help_panel=DETAIL),
    ] = None  # fmt: skip
    num_frames: Annotated[
        int | None,
        typer.Option("--num-frames", help="Frames of a video.", min=1, show_default="the model's own",
                     rich_help_panel=DETAIL),
    ] = None  # fmt: skip
    out: Out = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run of the same request; a finished one is shown again.",
                     rich_help_panel=OUTPUT),
    ] = False  # fmt: skip
    quiet: Quiet = False
    as_json: Json = False
    debug: Debug = False
