"""Options that mean the same in every command.

def command(seed: Seed = 0, device: Device = "auto", as_json: Json = False) -> None: ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
