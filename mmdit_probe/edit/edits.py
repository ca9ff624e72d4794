"""The edits: blur (the paper's perturbation, arXiv:2509.18096, section 3.3 and A.3), scale and zero, mean, swap.

    with probe(model, edits=Blur("image", "text", layers=[9], sigma=9, kernel=5)):
        image = model.generate("a red ring on grass")

Exact and without the N x N matrix: a linear map M on the keys' probabilities is a map on what is read there,
`A[:, keys] M^T v = A[:, keys] (M^T v)`, and one on logits is a map on the keys themselves; a map on query positions
acts on outputs. So a blur along text tokens costs one more attention call in the edited layer.

Not here: which layer to edit (`select`), and guidance with the perturbed model (`edit.guidance`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.edit.edit import Edit, Place, Proceed
from mmdit_probe.edit.mixing import BORDERS, Border, blur_matrix, spread, taps
from mmdit_probe.errors import UserError, unknown

Where = Literal["probabilities", "logits"]
WHERE: tuple[Where, ...] = ("probabilities", "logits")


@dataclass(frozen=True)
class KeyMix(Edit):
    """Base of edits that mix keys: `matrix` [n, n] acts on the n selected keys of one sample, in their order."""

    by_rows = True

    def matrix(self, place: Place, row: int) -> Tensor:
        """The map on the selected keys of sample `row`: new probabilities = matrix @ old ones. [n, n] float64."""
        raise NotImplementedError

    def attend(self, call: SDPACall, place: Place, proceed: Proceed) -> Tensor:
        maps = self._maps(place, call)
        return proceed(replace(call, value=_mixed(call.value, maps.transpose(-1, -2), self.key, place)))

    def _maps(self, place: Place, call: SDPACall) -> Tensor:
        """[B, K, K] float32: the map on all keys of the modality, the identity on those not selected."""
        length = place.layout.counts[self.key]
        maps = []
        for row, chosen in enumerate(place.keys.cpu()):
            positions = chosen.nonzero()[:, 0]
            maps.append(
                spread(self.matrix(place, row), positions, length) if len(positions) else torch.eye(length).double()
            )
        return torch.stack(maps).to(call.value.device, torch.float32)


@dataclass(frozen=True)
class Blur(KeyMix):
    """Gaussian blur along the keys: the paper's perturbation with its defaults.

    Args:
        sigma, kernel: width in tokens and number of taps. With 9 and 5 the taps are in effect a box of five.
        border: "reflect" (the paper's; the first and last tokens lose mass, their neighbours gain), "symmetric" (every
            token's mass is conserved) or "replicate".
        where: "probabilities" (after the softmax, the paper's) or "logits" (before it; the rows stay normalised).

    Text keys are blurred in their joint order, over all selected positions as one sequence: with every stream selected
    (the default) CLIP's last tokens mix with T5's first. Image keys are blurred in two dimensions on the grid.
    `sigma=0` or `kernel=1` is the no-op. The remaining arguments are those of `Edit`.
    """

    sigma: float = 9.0
    kernel: int = 5
    border: Border = "reflect"
    where: Where = "probabilities"

    def __post_init__(self) -> None:
        super().__post_init__()
        taps(self.sigma, self.kernel)
        if self.border not in BORDERS:
            raise unknown("border", self.border, BORDERS)
        if self.where not in WHERE:
            raise unknown("place of the blur", self.where, WHERE)

    @property
    def neutral(self) -> bool:
        return self.sigma == 0 or self.kernel == 1

    def no_op(self) -> Edit:
        return self.at(sigma=0.0)

    def matrix(self, place: Place, row: int) -> Tensor:
        weights = taps(self.sigma, self.kernel)
        if self.key == "image":
            frames, h, w = _grid(place)
            blur = torch.kron(blur_matrix(h, weights, self.border), blur_matrix(w, weights, self.border))
            return torch.kron(torch.eye(frames, dtype=blur.dtype), blur)
        return blur_matrix(int(place.keys[row].sum()), weights, self.border)

    def attend(self, call: SDPACall, place: Place, proceed: Proceed) -> Tensor:
        if self.where == "probabilities":
            return super().attend(call, place, proceed)
        # Logits are linear in the keys: blurred logits are the logits of blurred keys. A mask's bias is not blurred.
        return proceed(replace(call, key=_mixed(call.key, self._maps(place, call), self.key, place)))


@dataclass(frozen=True)
class Scale(KeyMix):
    """Multiply the block's probabilities by `factor`; 0 removes what its queries read there, 1 is the no-op."""

    factor: float = 0.0

    @property
    def neutral(self) -> bool:
        return self.factor == 1.0

    def matrix(self, place: Place, row: int) -> Tensor:
        return self.factor * torch.eye(int(place.keys[row].sum()), dtype=torch.float64)


@dataclass(frozen=True)
class Mean(KeyMix):
    """Give every selected key the mean of their probabilities: the block's mass stays, its distribution is flat."""

    def matrix(self, place: Place, row: int) -> Tensor:
        count = int(place.keys[row].sum())
        return torch.full((count, count), 1.0 / count, dtype=torch.float64)


@dataclass(frozen=True)
class Swap(KeyMix):
    """Exchange two words: queries that look at the first read the second, and the other way round.

    Args:
        words: the two words; rows whose prompt lacks one are left alone. In each encoder stream as many positions are
            exchanged as the shorter word has.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words is None or len(self.words) != 2:
            raise UserError(f"swap of words {self.words}: expected two words of the prompt")

    def matrix(self, place: Place, row: int) -> Tensor:
        assert self.words is not None
        chosen = place.keys[row].cpu()
        matrix = torch.eye(int(chosen.sum()), dtype=torch.float64)
        place_of = {int(p): k for k, p in enumerate(chosen.nonzero()[:, 0])}
        table = place.tables[row]
        known = [word.lower() for word in table.words]
        if not all(part.lower() in known for word in self.words for part in word.split()):
            return matrix
        first, second = (table.word_spans(word) for word in self.words)
        for stream in first.keys() & second.keys():
            for a, b in zip(first[stream], second[stream], strict=False):
                if a in place_of and b in place_of:
                    one, two = place_of[a], place_of[b]
                    matrix[[one, two]] = matrix[[two, one]]
        return matrix


@dataclass(frozen=True)
class GridBlur(Edit):
    """Blur of the block over the image grid of its queries, as SEG (arXiv:2408.00760) blurs queries; I2T by default.

    Args:
        sigma, kernel, border: of the separable blur, in tokens.
        where: "probabilities": each key's map over the image is blurred (rows of the attention then no longer sum to
            one: see `renormalise`); "logits": the same before the softmax, the rows stay normalised.

    `sigma=0` or `kernel=1` is the no-op. The remaining arguments are those of `Edit`; the queries must be image tokens.
    """

    sigma: float = 9.0
    kernel: int = 5
    border: Border = "reflect"
    where: Where = "probabilities"

    def __post_init__(self) -> None:
        super().__post_init__()
        taps(self.sigma, self.kernel)
        if self.query != "image":
            raise UserError("a blur over the image grid needs image queries")
        if self.border not in BORDERS:
            raise unknown("border", self.border, BORDERS)
        if self.where not in WHERE:
            raise unknown("place of the blur", self.where, WHERE)

    @property
    def neutral(self) -> bool:
        return self.sigma == 0 or self.kernel == 1

    def no_op(self) -> Edit:
        return self.at(sigma=0.0)

    def attend(self, call: SDPACall, place: Place, proceed: Proceed) -> Tensor:
        keys = torch.zeros(call.key.shape[0], call.key.shape[-2], dtype=torch.bool, device=call.key.device)
        keys[:, place.layout.positions(self.key)] = place.keys
        inside = keys[:, None, :, None]
        if self.where == "probabilities":
            part = proceed(replace(call, value=call.value * inside))
            return proceed(call) + (self._blurred(part, place) - part)
        # One call of double width: [q, Gq] against [k, 0] outside the block and [0, k] inside it.
        query = torch.cat([call.query, self._blurred(call.query, place)], -1)
        key = torch.cat([call.key * ~inside, call.key * inside], -1)
        width = call.value.shape[-1]
        value = torch.nn.functional.pad(call.value, (0, query.shape[-1] - width))  # fused kernels want equal widths
        return proceed(replace(call, query=query, key=key, value=value, scale=call.scale_factor))[..., :width]

    def _blurred(self, tokens: Tensor, place: Place) -> Tensor:
        """Tokens [B, H, N, D] with the image ones blurred over the grid."""
        frames, h, w = _grid(place)
        weights = taps(self.sigma, self.kernel)
        rows, columns = (blur_matrix(side, weights, self.border).to(tokens.device, torch.float32) for side in (h, w))
        positions = place.layout.positions("image")
        grid = tokens[:, :, positions].float().unflatten(2, (frames, h, w))
        blurred = torch.einsum("yi,xj,bhfijd->bhfyxd", rows, columns, grid).flatten(2, 4)
        result = tokens.clone()
        result[:, :, positions] = blurred.to(tokens.dtype)
        return result


def _mixed(tokens: Tensor, maps: Tensor, kind: str, place: Place) -> Tensor:
    """Tokens [B, H, N, D] of which those of one kind are mapped by [B, K, K], computed in float32."""
    positions = place.layout.positions(kind)
    result = tokens.clone()
    result[:, :, positions] = (maps[:, None] @ tokens[:, :, positions].float()).to(tokens.dtype)
    return result


def _grid(place: Place) -> tuple[int, int, int]:
    """Frames, rows and columns of the image tokens."""
    layout = place.layout
    h, w = layout.grid or (0, 0)
    if layout.frames * h * w != layout.counts["image"]:
        raise UserError(f"the image tokens have no known grid: {layout.counts['image']} tokens")
    return layout.frames, h, w
