"""The best approximations of matrices by factors: truncated singular value decompositions and Kronecker products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of a matrix that are in float64 at a time: 16 MiB of a matrix with 2048 rows.
_COLUMNS = 1024


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition of a matrix [out, in], whose vectors are only made up to the rank asked for.

    values [k]: descending, float64. factors(r): up [out, r] and down [r, in], float64, whose product is the best
    approximation of rank r, or of rank k where that is less (Eckart and Young, 1936). up has orthogonal columns, down
    orthogonal rows; column i and row i are both √values[i] long.
    """

    values: Tensor
    factors: Callable[[int], tuple[Tensor, Tensor]]

    def relative_error(self, rank: int) -> float:
        """Of the approximation of that rank: ‖M - M_r‖ / ‖M‖ in the Frobenius norm; 0 for a zero matrix."""
        total = self.values.norm()
        return float(self.values[rank:].norm() / total) if total > 0 else 0.0

    def choose_rank(self, rank: int | None, energy: float | None) -> int:
        """The least rank that keeps this share of the squared singular values, and `rank` at most."""
        chosen = len(self.values)
        if energy is not None:
            kept = self.values.square().cumsum(0)
            chosen = int((kept < energy * kept[-1]).sum()) + 1
        return chosen if rank is None else min(chosen, rank)


def decompose(matrix: Tensor) -> Decomposition:
    """Of a dense matrix [out, in]; k is its shorter side.

    It goes over the eigenvectors U of M Mᵀ (or of Mᵀ M), as M = U (Uᵀ M): several times faster than an SVD, and in
    float64 no less exact than one in float32. Beside the matrix, memory holds U and eigh's workspace, 32 k² bytes in
    all, and a piece of the matrix in float64.
    """
    if matrix.shape[0] > matrix.shape[1]:
        found = decompose(matrix.t())
        return Decomposition(found.values, lambda rank: tuple(factor.t() for factor in found.factors(rank)[::-1]))
    vectors = torch.linalg.eigh(_gram(matrix)).eigenvectors.flip(1)
    values = sum((vectors.t() @ piece).square_().sum(1) for piece in _pieces(matrix)).sqrt()

    def factors(rank: int) -> tuple[Tensor, Tensor]:
        kept, roots = vectors[:, :rank], values[:rank].sqrt()
        rows = values.new_empty(len(roots), matrix.shape[1])
        for part, piece in zip(rows.split(_COLUMNS, dim=1), _pieces(matrix), strict=True):
            part.copy_(kept.t() @ piece)
        return kept * roots, rows.div_(roots.clamp(min=torch.finfo(roots.dtype).tiny)[:, None])

    return Decomposition(values, factors)


def _gram(matrix: Tensor) -> Tensor:
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for piece in _pieces(matrix):
        gram.addmm_(piece, piece.t())
    return gram


def _pieces(matrix: Tensor) -> Iterator[Tensor]:
    """The matrix's columns, some at a time, in float64."""
    return (piece.double() for piece in matrix.split(_COLUMNS, dim=1))


def decompose_product(left: Tensor, right: Tensor) -> Decomposition:
    """Of left [out, r] · right [r, in], which is not built: with left = Q R and rightᵀ = P S, it is Q (R Sᵀ) Pᵀ."""
    left_basis, left_core = torch.linalg.qr(left.double())
    right_basis, right_core = torch.linalg.qr(right.double().t())
    core = decompose(left_core @ right_core.t())

    def factors(rank: int) -> tuple[Tensor, Tensor]:
        up, down = core.factors(rank)
        return left_basis @ up, down @ right_basis.t()

    return Decomposition(core.values, factors)


def decompose_kronecker(first: Decomposition, second: Decomposition) -> Decomposition:
    """Of first ⊗ second: its singular values are all products of one of each, and so are its vectors."""
    values, order = torch.kron(first.values, second.values).sort(descending=True)

    def factors(rank: int) -> tuple[Tensor, Tensor]:
        i, j = order[:rank] // len(second.values), order[:rank] % len(second.values)
        (up1, down1), (up2, down2) = first.factors(int(i.max()) + 1), second.factors(int(j.max()) + 1)
        up = up1[:, None, i] * up2[None, :, j]
        down = down1[i, :, None] * down2[j, None, :]
        return up.flatten(0, 1), down.flatten(1)

    return Decomposition(values, factors)


def nearest_kronecker(matrix: Tensor, w1_shape: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
    """The w1 ⊗ w2 nearest to a matrix [o1·o2, i1·i2], for w1 of shape [o1, i1]; and its relative error.

    Rearranged so that each block of o2 × i2 is a row, a Kronecker product is a matrix of rank 1 (Van Loan and
    Pitsianis, 1993, "Approximation with Kronecker Products"). w1 and w2 are float64 and equally long.
    """
    (o1, i1), (out_features, in_features) = w1_shape, matrix.shape
    o2, i2 = out_features // o1, in_features // i1
    blocks = matrix.reshape(o1, o2, i1, i2).transpose(1, 2).reshape(o1 * i1, o2 * i2)
    found = decompose(blocks)
    w1, w2 = found.factors(1)
    return w1.reshape(o1, i1), w2.reshape(o2, i2), found.relative_error(1)
