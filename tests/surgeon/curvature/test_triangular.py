"""Factorising, inverting and solving in place, against dense answers, and what they hold beside the matrix."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from surgeon.curvature import triangular
from surgeon.curvature.triangular import cholesky_in_place, gram_of_lower, invert_lower, solve_transposed

SIZES = pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 8, 13])


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangular, "_LEAF", 2)
    monkeypatch.setattr(triangular, "_PANEL", 3)


def definite(n: int) -> Tensor:
    x = torch.randn(n, 2 * n + 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return x @ x.T + torch.eye(n, dtype=torch.float64)


def lower_of(n: int, *, by_columns: bool) -> Tensor:
    lower = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).tril(-1)
    lower += 2 * torch.eye(n, dtype=torch.float64)
    return lower.T.contiguous().T if by_columns else lower


@SIZES
def test_a_cholesky_factor_takes_the_place_of_the_matrix(n: int) -> None:
    matrix = definite(n)
    expected = torch.linalg.cholesky(matrix)
    place = matrix.data_ptr()
    lower, is_definite = cholesky_in_place(matrix)
    assert is_definite
    assert lower.data_ptr() == place
    assert_close(lower, expected)
    assert not lower.triu(1).any()


def test_a_matrix_that_is_not_definite_is_told() -> None:
    assert not cholesky_in_place(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64))[1]


@SIZES
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_triangular_inverse_by_halves(n: int, by_columns: bool) -> None:
    lower = lower_of(n, by_columns=by_columns)
    expected, place = torch.linalg.inv(lower), lower.data_ptr()
    inverse = invert_lower(lower)
    assert inverse.data_ptr() == place
    assert_close(inverse, expected, rtol=1e-10, atol=1e-10)
    assert not inverse.triu(1).any()


@SIZES
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_gram_matrix_by_panels(n: int, by_columns: bool) -> None:
    lower = lower_of(n, by_columns=by_columns)
    expected, place = lower.T @ lower, lower.data_ptr()
    gram = gram_of_lower(lower)
    assert gram.data_ptr() == place
    assert_close(gram, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(gram, gram.T)


@SIZES
@pytest.mark.parametrize("k", [0, 1, 4])
def test_solving_with_the_transposed(n: int, k: int) -> None:
    lower = lower_of(n, by_columns=True)
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    expected = torch.linalg.solve(lower.T, x)
    solved = solve_transposed(lower, x)
    assert solved.data_ptr() == x.data_ptr()
    assert_close(solved, expected, rtol=1e-10, atol=1e-10)
