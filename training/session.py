"""What one call of `python -m training` asks for: every option, stated once, and what follows from them.

    session = Session(stage="vae", workdir=Path(".training"), minutes=30)
    session.pool("train"), session.where, session.seconds_left()

Not here: the stages themselves (`training.recipe`) and the command line (`training.__main__`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from mmdit_probe.assets import folder as assets_folder
from mmdit_probe.errors import UserError
from mmdit_probe.models.load import pick_device
from training.align import Alignment
from training.pool import Pool, pool

StageName = Literal["parser", "vae", "clip", "t5", "ssl", "transformer", "export", "import", "all"]
HELD_OUT_POOL = 1000


@dataclass(frozen=True, kw_only=True)
class Session:
    """Train what the package embeds: parser, vae, clip, t5, transformer, or all of them in this order.

    A stage that was stopped or killed goes on from its last checkpoint, exactly. `export` writes what ships from the
    working folder, `import` makes what ships the last checkpoints of a new working folder. `ssl` trains the encoder
    whose features `--align` may name; no other stage needs it.
    """

    stage: Annotated[StageName, typer.Argument(help="What to do.")] = "all"
    workdir: Annotated[Path, typer.Option(help="Working folder: pools, checkpoints, curves.")] = Path(".training")
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the stage in place of its recipe's. Of the transformer: fewer shrink every phase of the"
            " curriculum alike, more lengthen the last; so a finished run goes on.",
            min=1,
        ),
    ] = None
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop after this time with a checkpoint; the same command then goes on.", min=0),
    ] = None
    finish: Annotated[
        bool, typer.Option("--finish", help="With --minutes: bring the learning rate down before the time is over.")
    ] = False
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew, whatever the working folder holds.")] = False
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto"
    seed: Annotated[int, typer.Option(help="Of weights, batches and noise.", min=0)] = 0
    align: Annotated[
        str,
        typer.Option(
            help="What the transformer's image tokens are taught beside flow matching: none; all:labels or layer:N (the"
            " parser's classes and colours, on every block or on the output of block N); all:features or"
            " layer:N:features (those of the stage ssl)."
        ),
    ] = "none"
    scenes: Annotated[int, typer.Option(help="Training scenes of each pool, rendered once.", min=16)] = 40000
    held_out: Annotated[int, typer.Option(help="Held-out scenes that curves are measured on.", min=4)] = 96
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the transformer.")] = True
    assets: Annotated[
        Path | None,
        typer.Option(help="Where export writes and import reads.", show_default="the package's own assets"),
    ] = None
    began: float = field(init=False, default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        if self.finish and self.minutes is None:
            raise UserError("--finish brings the learning rate down within --minutes: give a time, e.g. --minutes 60")
        Alignment.parse(self.align)

    @cached_property
    def where(self) -> torch.device:
        """The device."""
        return torch.device(pick_device(self.device))

    @property
    def alignment(self) -> Alignment:
        """What `align` says."""
        return Alignment.parse(self.align)

    @property
    def shipped(self) -> Path:
        """The folder of the assets."""
        return self.assets or assets_folder()

    def seconds_left(self) -> float:
        """Until the session's time is over; infinite without `minutes`."""
        return float("inf") if self.minutes is None else 60 * self.minutes - (time.monotonic() - self.began)

    def lands(self, stage: str) -> bool:
        """Whether the learning rate of a stage comes down before the time is over: that of the last one asked for."""
        return self.finish and stage == ("transformer" if self.stage == "all" else self.stage)

    def pool(self, split: str, **how: Any) -> Pool:
        """The training scenes, or the first held-out ones of another split; `how` as in `training.pool.pool`."""
        count = self.scenes if split == "train" else min(HELD_OUT_POOL, self.scenes)
        return pool(self.workdir / "pools", split, count, **how)
