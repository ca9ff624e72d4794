"""Matrices that mix tokens: Gaussian blurs with a stated border, as pure functions.

    >>> import torch
    >>> matrix = blur_matrix(6, taps(9.0, 5), "reflect")          # the paper's recipe on six tokens
    >>> bool(torch.allclose(matrix.sum(1), torch.ones(6).double()))   # a blur of a constant is that constant
    True
    >>> [round(x, 2) for x in blur_matrix(12, taps(9.0, 5), "reflect").sum(0).tolist()[:4]]   # but mass moves inwards
    [0.6, 1.2, 1.2, 1.0]

Rows are outputs: the blurred sequence is `matrix @ a`. "reflect" mirrors without repeating the edge token, "symmetric"
repeats it, which makes the columns sum to 1 as well: every token's mass is conserved.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmdit_probe.errors import UserError, unknown

Border = Literal["reflect", "symmetric", "replicate"]
BORDERS: tuple[Border, ...] = ("reflect", "symmetric", "replicate")


def taps(sigma: float, kernel: int) -> Tensor:
    """Normalised Gaussian weights [kernel] float64; sigma in tokens, 0 gives the identity.

    Raises:
        UserError: a negative sigma, or a kernel that is not odd and positive.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise UserError(f"blur kernel {kernel}: expected an odd number of tokens from 1")
    if not sigma >= 0:
        raise UserError(f"blur sigma {sigma}: expected a width in tokens from 0")
    offsets = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    if sigma == 0:
        return (offsets == 0).double()
    weights = (-0.5 * (offsets / sigma) ** 2).exp()
    return weights / weights.sum()


def blur_matrix(length: int, weights: Tensor, border: Border = "reflect") -> Tensor:
    """The matrix [length, length] float64 of a 1-D blur with `weights` [kernel] and the border rule; rows sum to 1."""
    if border not in BORDERS:
        raise unknown("border", border, BORDERS)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    rows = torch.arange(length)[:, None]
    sources = _inside(rows + torch.arange(len(weights)) - len(weights) // 2, length, border)
    return matrix.index_put_((rows, sources), weights.double().expand(length, -1), accumulate=True)


def spread(matrix: Tensor, positions: Tensor, length: int) -> Tensor:
    """A matrix [n, n] on n of `length` positions, the identity elsewhere: [length, length]."""
    full = torch.eye(length, dtype=matrix.dtype)
    full[positions[:, None], positions[None, :]] = matrix
    return full


def _inside(index: Tensor, length: int, border: Border) -> Tensor:
    """The positions that stand for those beyond the ends."""
    if border == "replicate" or length == 1:
        return index.clamp(0, length - 1)
    # Mirrors repeat with this period; positions beyond one mirror image come back (short sequences, wide kernels).
    period = 2 * (length - 1) if border == "reflect" else 2 * length
    index = index % period
    return torch.minimum(index, (period if border == "reflect" else period - 1) - index)
