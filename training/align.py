"""What a transformer's image tokens may be taught beside flow matching, and through which blocks. By default nothing.

    Alignment.parse("layer:4")        # the recipe of the first checkpoint: the parser's classes and colours at layer 4
    Alignment.parse("all:features")   # features that no label taught, on every block, with equal weights

After REPA (arXiv 2410.06940): a small head reads the output of a block, and what it says of a token is compared with
what a frozen network sees at its place in the clean image. Heads never ship. A block that was taught what the classes
are answers questions about classes: `analyses/alignment_ablation.py` measures by how much. Attention is never taught.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit_probe.errors import UserError
from mmdit_probe.scenes.parser import SceneParser
from mmdit_probe.scenes.world import CLASSES, COLOUR_NAMES, THINGS

LAYERS, WIDTH = 8, 128
"""Blocks of the embedded transformer and the width of its tokens."""
WEIGHT = 0.3
"""Weight of the mean alignment loss over blocks beside the flow loss."""
READ = len(CLASSES) + len(COLOUR_NAMES) + 1
"""Numbers of the parser's reading of a token: classes, colours, "no colour"."""

Target = Callable[[Tensor], Tensor]
"""Clean images [B, 3, S, S] -> what the heads are compared with [B, I, K]."""


@dataclass(frozen=True)
class Alignment:
    """Layers whose outputs are aligned (0-based) and to what."""

    layers: tuple[int, ...] = ()
    target: Literal["labels", "features"] = "labels"

    @classmethod
    def parse(cls, text: str) -> Alignment:
        """Read `none`, `all:TARGET`, `layer:N` (labels) or `layer:N:TARGET`.

        Raises:
            UserError: something else, or a layer that the transformer does not have.
        """
        match text.split(":"):
            case ["none"]:
                return cls()
            case ["all", "labels" | "features" as target]:
                return cls(tuple(range(LAYERS)), target)
            case ["layer", number, *rest] if number.isdecimal() and int(number) < LAYERS:
                match rest:
                    case [] | ["labels"]:
                        return cls((int(number),))
                    case ["features"]:
                        return cls((int(number),), "features")
        raise UserError(
            f"--align {text!r}: expected none, all:labels, all:features, layer:N or layer:N:features with N of"
            f" 0..{LAYERS - 1}"
        )

    def heads(self, width: int) -> nn.ModuleDict:
        """A head per aligned layer, tokens [B, I, 128] -> [B, I, `width`]."""
        return nn.ModuleDict(
            {
                str(layer): nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, width))
                for layer in self.layers
            }
        )

    def loss(self, said: Sequence[Tensor], target: Tensor) -> Tensor:
        """Mean over layers of what their heads say [B, I, K] against the target [B, I, K]."""
        compare = reading_loss if self.target == "labels" else feature_loss
        return torch.stack([compare(each.float(), target) for each in said]).mean()


def reading(parser: SceneParser, down: int) -> Target:
    """What the parser reads at each token, [B, I, 22].

    The mean over a token's pixels of the class probabilities [15], and of the colour probabilities where it sees an
    object [6], the rest being "no colour" [1].

    Args:
        down: pixels per token along each axis.
    """

    @torch.no_grad()
    def target(images: Tensor) -> Tensor:
        classes, colours = (logits.float().softmax(1) for logits in parser(images))
        thing = classes[:, : len(THINGS)].sum(1, keepdim=True)
        read = torch.cat([classes, colours * thing, 1 - thing], dim=1)
        return F.avg_pool2d(read, down).flatten(2).transpose(1, 2)

    return target


def reading_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of class and colour logits [B, I, 22] against the parser's reading [B, I, 22], summed."""
    sizes = [len(CLASSES), len(COLOUR_NAMES) + 1]
    parts = zip(logits.split(sizes, -1), target.split(sizes, -1), strict=True)
    return torch.stack([-(t * part.log_softmax(-1)).sum(-1).mean() for part, t in parts]).sum()


def feature_loss(said: Tensor, target: Tensor) -> Tensor:
    """One minus the mean cosine of [B, I, K] and the features [B, I, K] (arXiv 2410.06940, eq. 8)."""
    return 1 - F.cosine_similarity(said, target, dim=-1).mean()
