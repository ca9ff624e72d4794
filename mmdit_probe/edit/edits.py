"""The edits: blur (the paper's perturbation, arXiv:2509.18096, section 3.3 and A.3), scale and zero, mean, swap,
another text.

    with probe(model, edits=Blur("image", "text", layers=[9], sigma=9, kernel=5)):
        image = model.generate("a red ring on grass")

Exact and without the N x N matrix: a linear map M on the keys' probabilities is a map on what is read there, `A[:,
keys] M^T v = A[:, keys] (M^T v)`, and one on logits is a map on the keys themselves. So a blur along text tokens costs
one more attention call in the edited layer. Not here: guidance with the perturbed model (`edit.guidance`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.edit.edit import Edit, Factored, Place, Proceed, has_words, words_of
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.specs import number, whole

Where = Literal["probabilities", "logits"]
Border = Literal["reflect", "symmetric", "replicate"]
WHERE: tuple[Where, ...] = get_args(Where)
BORDERS: tuple[Border, ...] = get_args(Border)
_OF_SCIPY = {"reflect": "mirror", "symmetric": "reflect", "replicate": "nearest"}


@dataclass(frozen=True)
class Gaussian(Edit):
    """Base of blurs.

    Args:
        sigma, kernel: width in tokens and number of taps. With 9 and 5 the taps are in effect a box of five.
        border: "reflect" (the paper's; the first and last tokens lose mass, their neighbours gain), "symmetric" (every
            token's mass is conserved) or "replicate".
        where: "probabilities" (after the softmax, the paper's) or "logits" (before it; the rows stay normalised).

    `sigma=0` or `kernel=1` is the no-op. The remaining arguments are those of `Edit`.
    """

    sigma: float = 9.0
    kernel: int = 5
    border: Border = "reflect"
    where: Where = "probabilities"

    def __post_init__(self) -> None:
        super().__post_init__()
        taps(self.sigma, self.kernel)
        check_known("border", self.border, BORDERS)
        check_known("place of the blur", self.where, WHERE)

    @property
    def neutral(self) -> bool:
        return self.sigma == 0 or self.kernel == 1

    def no_op(self) -> Self:
        return self.at(sigma=0.0)

    def over_grid(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The blurs along rows and along columns of a picture's grid, [h, h] and [w, w] float64."""
        weights = taps(self.sigma, self.kernel)
        return blur_matrix(grid[0], weights, self.border), blur_matrix(grid[1], weights, self.border)


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
class Blur(Gaussian, KeyMix):
    """Gaussian blur along the keys: the paper's perturbation with its defaults. Arguments: see `Gaussian`.

    Text keys are blurred in their joint order, over all selected positions as one sequence: with every stream selected
    (the default) CLIP's last tokens mix with T5's first. Image keys are blurred in two dimensions on the grid, of a
    video within each frame: no mass moves from one frame to another; those of a reference picture on its own grid.
    """

    def matrix(self, place: Place, row: int) -> Tensor:
        if self.key != "text":
            pictures = _pictures(place, self.key, row, self.references)
            return torch.block_diag(*(torch.kron(*self.over_grid(grid)) for _, grid, n in pictures for _ in range(n)))
        return blur_matrix(int(place.keys[row].sum()), taps(self.sigma, self.kernel), self.border)

    def attend(self, call: SDPACall, place: Place, proceed: Proceed) -> Tensor:
        if self.where == "probabilities":
            return super().attend(call, place, proceed)
        # Logits are linear in the keys: blurred logits are the logits of blurred keys. A mask's bias is not blurred.
        return proceed(replace(call, key=_mixed(call.key, self._maps(place, call), self.key, place)))


@dataclass(frozen=True)
class Scale(Factored, KeyMix):
    """Multiply the block's probabilities by `factor`; 0 removes what its queries read there, 1 is the no-op."""

    factor: float = 0.0

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
    """Exchange two words: queries that look at the first read the second, and the other way round. Or, with reference
    keys, two pictures of equal size, patch by patch.

    One edit for values and keys: the softmax does not know the order of its keys, so that exchanging the keys of two
    words and exchanging their values is the same thing (and exchanging both changes nothing).

    Args:
        words: the two words, or prompt -> two words; rows whose prompt lacks one are left alone. In each encoder stream
            as many positions are exchanged as the shorter word has.
        references: the two pictures, by number.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key == "reference":
            if len(set(self.references or ())) != 2:
                raise UserError(f"swap of references {self.references}: expected the numbers of two of them")
            return
        pairs = self.words.values() if isinstance(self.words, Mapping) else [self.words or ()]
        for words in pairs:
            if len(words) != 2:
                raise UserError(f"swap of words {list(words)}: expected two words of the prompt")

    def matrix(self, place: Place, row: int) -> Tensor:
        chosen = place.keys[row].cpu()
        matrix = torch.eye(int(chosen.sum()), dtype=torch.float64)
        if self.key == "reference":
            (_, *first), (_, *second) = _pictures(place, self.key, row, self.references)
            if first != second:
                raise UserError(f"references {self.references} differ in size, {first} and {second}: no exchange")
            return matrix.roll(len(matrix) // 2, 0)
        place_of = {int(p): k for k, p in enumerate(chosen.nonzero()[:, 0])}
        table = place.tables[row]
        words = words_of(self, table)
        if not words or not all(has_words(table, word) for word in words):
            return matrix
        spans = [table.word_spans(word) for word in words]
        for stream in spans[0].keys() & spans[1].keys():
            for a, b in zip(spans[0][stream], spans[1][stream], strict=False):
                if a in place_of and b in place_of:
                    one, two = place_of[a], place_of[b]
                    matrix[[one, two]] = matrix[[two, one]]
        return matrix


@dataclass(frozen=True)
class OtherText(Edit):
    """Read another text: queries see the text keys and values of the batch's next sample (the last one: the first).

    With two samples that differ in their prompt alone it puts one layer's text of the one into the other: activation
    patching of what the layer reads. `spans`, `streams` and `words` choose whose place is taken.
    """

    by_rows = True

    def attend(self, call: SDPACall, place: Place, proceed: Proceed) -> Tensor:
        if call.mask is not None and len(call.mask) > 1:
            raise UserError("the samples of this batch hide different keys: their texts cannot stand in for each other")
        positions = place.layout.positions(self.key)
        chosen = place.keys[:, None, :, None]

        def exchanged(tokens: Tensor) -> Tensor:
            own, result = tokens[:, :, positions], tokens.clone()
            result[:, :, positions] = torch.where(chosen, own.roll(-1, 0), own)
            return result

        return proceed(replace(call, key=exchanged(call.key), value=exchanged(call.value)))


@dataclass(frozen=True)
class GridBlur(Gaussian):
    """Blur of the block over the grid of its queries, as SEG (arXiv:2408.00760) blurs queries; I2T by default. Of a
    video it is in two dimensions too, within each frame.

    With `where="probabilities"` each key's map over the image is blurred, and rows of the attention no longer sum to
    one (see `renormalise`). Arguments: see `Gaussian`; the queries must be image or reference tokens.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query == "text":
            raise UserError("a blur over a picture's grid needs image queries, or reference queries")

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
        """Tokens [B, H, N, D] with those of the queries' kind blurred over their grids."""
        result = tokens.clone()
        for row, of_row in enumerate(tokens):
            for positions, size, frames in _pictures(place, self.query, row):
                rows, columns = (matrix.to(tokens.device, torch.float32) for matrix in self.over_grid(size))
                grid = of_row[:, positions].float().unflatten(1, (frames, *size))
                blurred = torch.einsum("yi,xj,hfijd->hfyxd", rows, columns, grid).flatten(1, 3)
                result[row, :, positions] = blurred.to(tokens.dtype)
        return result


def _mixed(tokens: Tensor, maps: Tensor, kind: str, place: Place) -> Tensor:
    """Tokens [B, H, N, D] of which those of one kind are mapped by [B, K, K], computed in float32."""
    positions = place.layout.positions(kind)
    result = tokens.clone()
    result[:, :, positions] = (maps[:, None] @ tokens[:, :, positions].float()).to(tokens.dtype)
    return result


def _pictures(
    place: Place, kind: str, row: int, numbers: Sequence[int] | None = None
) -> list[tuple[Tensor, tuple[int, int], int]]:
    """Positions, grid and frames of the image, or of the references (None: all) of sample `row`."""
    layout = place.layout
    found = [(layout.indices("image"), layout.grid, layout.frames)]
    if kind == "reference":
        known = enumerate(layout.references_of(row))
        found = [(at, of.grid, of.frames) for n, (of, at) in known if numbers is None or n in numbers]
    for at, grid, frames in found:
        if grid is None or frames * grid[0] * grid[1] != len(at):
            raise UserError(f"the {kind} tokens have no known grid: {len(at)} tokens")
    return found  # type: ignore[return-value]


def taps(sigma: float, kernel: int) -> Tensor:
    """Normalised Gaussian weights [kernel] float64; sigma in tokens, 0 gives the identity.

    Raises:
        UserError: a negative sigma, or a kernel that is not odd and positive.
    """
    if whole("blur kernel", kernel, 1) % 2 == 0:
        raise UserError(f"blur kernel {kernel}: expected an odd number of tokens from 1")
    number("blur sigma", sigma, 0)
    offsets = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    if sigma == 0:
        return (offsets == 0).double()
    weights = (-0.5 * (offsets / sigma) ** 2).exp()
    return weights / weights.sum()


def blur_matrix(length: int, weights: Tensor, border: Border = "reflect") -> Tensor:
    """The matrix [length, length] float64 of a 1-D blur with `weights` [kernel] and the border rule; rows sum to 1.

    Rows are outputs: the blurred sequence is `matrix @ a`. "reflect" mirrors without repeating the edge token,
    "symmetric" repeats it, which makes the columns sum to 1 as well: every token's mass is conserved.

        >>> [round(x, 2) for x in blur_matrix(12, taps(9.0, 5), "reflect").sum(0).tolist()[:4]]     # mass moves inwards
        [0.6, 1.2, 1.2, 1.0]
    """
    from scipy.ndimage import correlate1d

    check_known("border", border, BORDERS)
    taken = weights.double().numpy()
    return torch.from_numpy(correlate1d(np.eye(length), taken, axis=0, mode=_OF_SCIPY[border]))


def spread(matrix: Tensor, positions: Tensor, length: int) -> Tensor:
    """A matrix [n, n] on n of `length` positions, the identity elsewhere: [length, length]."""
    full = torch.eye(length, dtype=matrix.dtype)
    full[positions[:, None], positions[None, :]] = matrix
    return full
