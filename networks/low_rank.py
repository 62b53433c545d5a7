"""The best approximations of matrices by factors: truncated singular value decompositions and Kronecker products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition up · down of a matrix, each singular value shared equally by both factors.

    up [out, k] has orthogonal columns, down [k, in] orthogonal rows; column i and row i are both √values[i] long.
    values [k] descend. All are float64. The first r columns and rows are the best approximation of rank r (Eckart and
    Young, 1936).
    """

    up: Tensor
    down: Tensor
    values: Tensor

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
    float64 no less exact than one in float32.
    """
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        transposed = decompose(matrix.t())
        return Decomposition(transposed.down.t(), transposed.up.t(), transposed.values)
    vectors = torch.linalg.eigh(matrix @ matrix.t()).eigenvectors.flip(1)
    rows = vectors.t() @ matrix
    values = rows.norm(dim=1)
    roots = values.sqrt()
    return Decomposition(vectors * roots, rows / roots.clamp(min=torch.finfo(roots.dtype).tiny)[:, None], values)


def decompose_product(left: Tensor, right: Tensor) -> Decomposition:
    """Of left [out, r] · right [r, in], which is not built: with left = Q R and rightᵀ = P S, it is Q (R Sᵀ) Pᵀ."""
    left_basis, left_core = torch.linalg.qr(left.double())
    right_basis, right_core = torch.linalg.qr(right.double().t())
    core = decompose(left_core @ right_core.t())
    return Decomposition(left_basis @ core.up, core.down @ right_basis.t(), core.values)


def decompose_kronecker(first: Decomposition, second: Decomposition) -> Decomposition:
    """Of first ⊗ second: its singular values are all products of one of each, and so are its vectors."""
    values, order = torch.kron(first.values, second.values).sort(descending=True)
    # torch.kron cannot take views of every layout (2.13).
    up = torch.kron(first.up.contiguous(), second.up.contiguous())
    down = torch.kron(first.down.contiguous(), second.down.contiguous())
    return Decomposition(up[:, order], down[order], values)


def nearest_kronecker(matrix: Tensor, w1_shape: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
    """The w1 ⊗ w2 nearest to a matrix [o1·o2, i1·i2], for w1 of shape [o1, i1]; and its relative error.

    Rearranged so that each block of o2 × i2 is a row, a Kronecker product is a matrix of rank 1 (Van Loan and
    Pitsianis, 1993, "Approximation with Kronecker Products"). w1 and w2 are float64 and equally long.
    """
    (o1, i1), (out_features, in_features) = w1_shape, matrix.shape
    o2, i2 = out_features // o1, in_features // i1
    blocks = matrix.reshape(o1, o2, i1, i2).transpose(1, 2).reshape(o1 * i1, o2 * i2)
    found = decompose(blocks)
    return found.up[:, 0].reshape(o1, i1), found.down[0].reshape(o2, i2), found.relative_error(1)
