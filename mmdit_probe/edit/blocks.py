"""Operations on whole transformer blocks, after arXiv:2601.02211: remove a block, silence its text, double its text.

    with probe(model, edits=RemoveBlock(layers=[3], steps="0-9")): ...
    with probe(model, edits=ScaleText(layers=[3, 4], factor=2.0)): ...      # their "enhance"; factor 0 is "disable"

Unlike the edits of `edit.edits` these change the tokens that go into or come out of a block, not its attention, so they
have no block query -> key, no heads and no control of equal size. As published, scaled text goes on into the later
blocks; where a block normalises its text without learned weights (SD3, Flux) the block itself reads it the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from mmdit_probe.edit.edit import Addressed, Factored
from mmdit_probe.errors import UserError
from mmdit_probe.models.layout import KINDS, Layer
from mmdit_probe.models.pipeline_call import bind
from mmdit_probe.specs import Spec

if TYPE_CHECKING:
    from mmdit_probe.observe.probe import Run

IMAGE, TEXT = ("hidden_states", "x"), "encoder_hidden_states"
"""Names that blocks give to their image tokens (or to the one sequence of all tokens) and to their text tokens."""


@dataclass(frozen=True)
class BlockEdit(Addressed):
    """Base of operations on blocks.

    Args:
        layers: joint-attention layers; the block is the module that holds the layer's attention.
        steps, branches: sampling steps and guidance branches concerned, as in `Edit`; None is all branches.
    """

    layers: Spec = "all"
    steps: Spec = "all"
    branches: Sequence[str] | None = None

    stage: ClassVar[Literal["block"]] = "block"

    def run(self, block: BlockCall, rows: Tensor) -> Any:
        """The block's output under the operation. rows: [B, 1, 1] boolean, the samples concerned."""
        raise NotImplementedError

    def handler(self, layer: Layer, run: Run) -> Callable[..., Any]:
        """Goes around the forward of the layer's block, for `probe(edits=...)`."""

        def forward(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self.acts(layer, run):
                return proceed(*args, **kwargs)
            assert run.current is not None
            rows = self.rows(run.current.branches)
            if not rows.any():
                return proceed(*args, **kwargs)
            block = BlockCall(layer, run, proceed, args, kwargs)
            return self.run(block, rows[:, None, None].to(block.image.device))

        return forward


@dataclass(frozen=True)
class RemoveBlock(BlockEdit):
    """The block adds nothing: its tokens leave it as they came.

    It still runs, and what it computes is dropped: samples of other branches need it, and observers see its attention.
    """

    def run(self, block: BlockCall, rows: Tensor) -> Any:
        output = block.proceed(*block.args, **block.kwargs)
        pairs = block.pairs(output)
        kept = [out if given is None else torch.where(rows, given.to(out.dtype), out) for out, given in pairs]
        return tuple(kept) if isinstance(output, tuple) else kept[0]


@dataclass(frozen=True)
class ScaleText(Factored, BlockEdit):
    """Text tokens that enter the block, times `factor`: 0 silences the block's text, 2 doubles it, 1 is the no-op."""

    factor: float = 2.0

    def run(self, block: BlockCall, rows: Tensor) -> Any:
        name, tokens = (block.name, block.image) if block.text is None else (TEXT, block.text)
        concerned = rows & block.is_text().to(tokens.device)[..., None]
        return block.proceed(**block.inputs | {name: torch.where(concerned, self.factor * tokens, tokens)})


class BlockCall:
    """One call of a transformer block: its tokens, by stream or in one sequence, whatever their order in its output."""

    def __init__(
        self, layer: Layer, run: Run, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.layer, self.proceed, self.args, self.kwargs = layer, proceed, args, kwargs
        self.layout, self.places = run.arranged(layer)
        self.inputs = bind(run.block(layer), args, kwargs)
        self.name = next((name for name in IMAGE if name in self.inputs), "")
        image, text = self.inputs.get(self.name), self.inputs.get(TEXT)
        count = len(run.current.branches) if run.current is not None else 0
        if not isinstance(image, Tensor) or image.ndim != 3 or len(image) != count:
            raise self._unreadable(f"no tokens of {count} samples are among its arguments")
        self.image: Tensor = image
        self.text: Tensor | None = text if isinstance(text, Tensor) else None

    def is_text(self) -> Tensor:
        """[B or 1, N] boolean: which tokens of the text stream, or of the one sequence, are text."""
        labels, tokens = self.layout.labels, self.image if self.text is None else self.text
        if self.text is None and self.places is not None:  # samples differ in their order of tokens
            found = torch.zeros(len(tokens), tokens.shape[1] + 1, dtype=torch.bool)
            return found.scatter(1, self.places.keys[:, self.layout.positions("text")] % found.shape[1], True)[:, :-1]
        if self.text is not None:
            inside = torch.tensor([KINDS.index(kind) for kind in ("image", "reference")])
            labels = labels[~torch.isin(labels, inside)]
        if len(labels) != tokens.shape[1]:
            raise self._unreadable("it is not known which of its tokens are text")
        return (labels == KINDS.index("text"))[None]

    def pairs(self, output: Any) -> list[tuple[Any, Tensor | None]]:
        """What comes out, each with the tokens that went in; None for a stream that the block drops."""
        outputs = output if isinstance(output, tuple) else (output,)
        streams = [self.image] if self.text is None else [self.image, self.text]
        lengths = {stream.shape[1]: stream for stream in streams}
        if len(outputs) > len(streams) or len(lengths) != len(streams):
            raise self._unreadable(f"which of its {len(outputs)} outputs is the image? Sample another picture size")
        found = [(out, None if out is None else lengths.pop(out.shape[1], None)) for out in outputs]
        if any(out is not None and (given is None or given.shape != out.shape) for out, given in found):
            raise self._unreadable("its outputs have other shapes than its inputs")
        return found

    def _unreadable(self, why: str) -> UserError:
        return UserError(f"the block of layer {self.layer.index} ({self.layer.path}) cannot be edited: {why}")
