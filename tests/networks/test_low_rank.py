"""Decompositions and best approximations, against torch.linalg.svd and torch.kron."""

import math

import pytest
import torch

from networks.low_rank import decompose, decompose_kronecker, decompose_product, nearest_kronecker


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (6, 6), (1, 5)])
def test_a_matrix_is_decomposed_as_by_svd(shape):
    matrix = random(*shape)
    found, values = decompose(matrix), torch.linalg.svdvals(matrix)
    torch.testing.assert_close(found.values, values)
    up, down = found.factors(len(values))
    torch.testing.assert_close(up @ down, matrix)
    torch.testing.assert_close(up.t() @ up, values.diag())
    torch.testing.assert_close(down @ down.t(), values.diag())


def test_a_wide_matrix_is_taken_in_pieces(monkeypatch):
    """11 columns, 4 at a time."""
    monkeypatch.setattr("networks.low_rank._COLUMNS", 4)
    matrix = random(3, 11)
    found = decompose(matrix)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(matrix))
    up, down = found.factors(2)
    torch.testing.assert_close(up @ down, truncated(matrix, 2))


def test_float32_is_decomposed_to_its_own_precision():
    """The matrix is not exact to more than 6e-8 itself; a rank that is there is found to 1e-6 of its size."""
    left, right = random(64, 3).float(), random(3, 200).float()
    found = decompose(left @ right)
    up, down = found.factors(3)
    exact = left.double() @ right.double()
    assert float((up @ down - exact).norm() / exact.norm()) < 1e-6 and found.relative_error(3) < 1e-6


@pytest.mark.parametrize(("left", "right"), [((9, 3), (3, 8)), ((4, 6), (6, 5)), ((9, 6), (6, 4))])
def test_a_product_is_decomposed_as_its_matrix(left, right):
    left, right = random(*left), random(*right) * 100
    found, values = decompose_product(left, right), torch.linalg.svdvals(left @ right)
    torch.testing.assert_close(found.values, values[: len(found.values)])
    up, down = found.factors(len(found.values))
    torch.testing.assert_close(up @ down, left @ right)
    assert len(found.values) == min(left.shape[0], *right.shape)


def test_a_kronecker_product_is_decomposed_as_its_matrix():
    first, second = random(2, 3), random(4, 5)
    found, product = decompose_kronecker(decompose(first), decompose(second)), torch.kron(first, second)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(product)[:8])
    up, down = found.factors(3)
    torch.testing.assert_close(up @ down, truncated(product, 3))


def truncated(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_relative_error_is_that_of_the_best_approximation(rank):
    matrix = random(12, 7)
    found = decompose(matrix)
    up, down = found.factors(rank)
    error = (matrix - up @ down).norm() / matrix.norm()
    assert found.relative_error(rank) == pytest.approx(float(error), abs=1e-12)
    assert float(error) == pytest.approx(float((matrix - truncated(matrix, rank)).norm() / matrix.norm()), abs=1e-12)


@pytest.mark.parametrize(
    ("rank", "energy", "chosen"),
    [(2, None, 2), (9, None, 4), (None, 0.5, 1), (None, 0.9, 2), (None, 0.97, 3), (1, 0.97, 1), (None, 1.0, 4)],
)
def test_the_least_rank_of_an_energy_is_chosen(rank, energy, chosen):
    """Squares 64, 16, 4, 1: shares of 0.753, 0.941, 0.988 and 1."""
    assert decompose(torch.tensor([8.0, 4.0, 2.0, 1.0]).diag()).choose_rank(rank, energy) == chosen


def test_a_zero_matrix_has_no_error_and_rank_one():
    found = decompose(torch.zeros(3, 5))
    assert found.choose_rank(None, 0.9) == 1 and found.relative_error(1) == 0.0
    assert all(factor.isfinite().all() for factor in found.factors(3))


def test_a_kronecker_product_gives_its_factors_back():
    w1, w2 = random(4, 2), random(3, 5)
    found_w1, found_w2, error = nearest_kronecker(torch.kron(w1, w2), (4, 2))
    torch.testing.assert_close(torch.kron(found_w1, found_w2), torch.kron(w1, w2))
    assert error < 1e-7 and found_w1.norm() == pytest.approx(float(found_w2.norm()))


def test_no_other_kronecker_product_is_nearer():
    """Alternating least squares from ten starts, each optimal in one factor, finds nothing better."""
    matrix = random(6, 8)
    blocks = matrix.reshape(2, 3, 2, 4)
    w1, w2, error = nearest_kronecker(matrix, (2, 2))
    assert error == pytest.approx(float((matrix - torch.kron(w1, w2)).norm() / matrix.norm()))
    for start in range(10):
        other = torch.randn(3, 4, generator=torch.Generator().manual_seed(start), dtype=torch.float64)
        for _ in range(200):
            first = torch.einsum("aibj,ij->ab", blocks, other) / other.square().sum()
            other = torch.einsum("aibj,ab->ij", blocks, first) / first.square().sum()
        assert (matrix - torch.kron(first, other)).norm() / matrix.norm() >= error - 1e-9
