"""The edit of the I2T block that perturb and guided sampling share, as options."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mmdit_probe.edit.edit import Edit


class Kind(StrEnum):
    """Edits of the block."""

    BLUR = "blur"
    GRID_BLUR = "grid-blur"
    ZERO = "zero"
    MEAN = "mean"


class BorderRule(StrEnum):
    """What stands for tokens beyond the ends."""

    REFLECT = "reflect"
    SYMMETRIC = "symmetric"
    REPLICATE = "replicate"


class Stage(StrEnum):
    """Before or after the softmax."""

    PROBABILITIES = "probabilities"
    LOGITS = "logits"


class Branch(StrEnum):
    """Guidance branches to edit."""

    ALL = "all"
    COND = "cond"
    UNCOND = "uncond"


@dataclass(frozen=True)
class Edited:
    """How the I2T block is edited."""

    edit: Annotated[Kind, typer.Option(help="blur along text tokens (the paper), grid-blur, zero, mean.")] = Kind.BLUR
    blur_sigma: Annotated[float, typer.Option(help="Blur width in tokens; 0 is the no-op.", min=0)] = 9.0
    kernel: Annotated[int, typer.Option(help="Taps of the blur, odd.", min=1)] = 5
    border: Annotated[BorderRule, typer.Option(help="reflect (the paper) or symmetric (keeps mass).")] = (
        BorderRule.REFLECT
    )
    where: Annotated[Stage, typer.Option(help="Blur probabilities (the paper) or logits.")] = Stage.PROBABILITIES
    streams: Annotated[
        str | None, typer.Option(help="Text tokens of these encoders only, e.g. clip.", show_default="all")
    ] = None

    def build(self, renormalise: bool = False, steps: str = "all", branch: Branch = Branch.ALL) -> Edit:
        """The edit that the options describe; its layers are set later."""
        from mmdit_probe.edit import Blur, GridBlur, Mean, Scale

        address: dict[str, Any] = {
            "streams": tuple(self.streams.split(",")) if self.streams else None,
            "renormalise": renormalise,
            "steps": steps,
            "branches": None if branch is Branch.ALL else (branch.value,),
        }
        if self.edit is Kind.ZERO:
            return Scale("image", "text", factor=0.0, **address)
        if self.edit is Kind.MEAN:
            return Mean("image", "text", **address)
        blur = Blur if self.edit is Kind.BLUR else GridBlur
        return blur(
            "image", "text", sigma=self.blur_sigma, kernel=self.kernel, border=self.border.value,
            where=self.where.value, **address,
        )  # fmt: skip


EDITED = Edited()
