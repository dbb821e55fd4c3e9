"""Factorising and inverting large symmetric matrices within their own memory.

``M = L Lᵀ``, ``L⁻¹`` and ``M⁻¹ = L⁻ᵀ L⁻¹`` take each other's place: of a factor with 14,336 rows each is 1.5 GiB. What
is needed beside it is one panel, or a quarter of the matrix while halves are multiplied. Everything is done by products
of large parts, which run several times as fast as LAPACK's inverse does (`python -m benchmarks.solves`).

Reference: Golub & Van Loan 2013, *Matrix Computations*, sections 3.1 and 4.2 (recursion by blocks).
"""

import torch
from torch import Tensor

from surgeon.curvature.gram import mirror_lower

_LEAF = 192
"""Side of a triangle that is inverted or solved with as a whole."""
_PANEL = 512
"""Rows of an inverse that are formed at a time."""


def cholesky_in_place(matrix: Tensor) -> tuple[Tensor, bool]:
    """Puts the Cholesky factor in the place of a symmetric matrix.

    Args:
        matrix: `[n, n]`, contiguous by rows; used up.

    Returns:
        The lower triangular factor, a view of the same memory, stored by columns; and whether the matrix was positive
        definite. If not, the factor is of no use.
    """
    transposed = matrix.mT  # the same matrix, as LAPACK wants it stored: so nothing is copied
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(transposed, out=(transposed, info))
    return transposed, int(info) == 0


def invert_lower(lower: Tensor) -> Tensor:
    """Puts the inverse of a lower triangular matrix in its place, by halves: ``n³ / 3`` multiply-adds of products.

    Args:
        lower: `[n, n]`, non-zero diagonal; used up.

    Returns:
        The same tensor.
    """
    n = lower.shape[0]
    if n <= _LEAF:
        unit = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
    half = n // 2
    first, last = invert_lower(lower[:half, :half]), invert_lower(lower[half:, half:])
    between = lower[half:, :half]
    between.addmm_(last, between @ first, beta=0, alpha=-1)
    return lower


def gram_of_lower(lower: Tensor) -> Tensor:
    """Puts ``XᵀX`` in the place of a lower triangular matrix ``X``: about a third of a product of full matrices.

    Args:
        lower: `[n, n]`; used up.

    Returns:
        The same tensor, exactly symmetric.
    """
    n = lower.shape[0]
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        # Only rows from here on are needed by this panel and those that follow, and only these are overwritten.
        lower[start:stop, :stop] = lower[start:, start:stop].T @ lower[start:, :stop]
    return mirror_lower(lower)


def solve_transposed(lower: Tensor, x: Tensor) -> Tensor:
    """Puts ``L⁻ᵀ X`` in the place of ``X``, by halves.

    Args:
        lower: ``L`` `[n, n]`, any strides.
        x: `[n, k]`; used up.

    Returns:
        The same tensor as x.
    """
    n = lower.shape[0]
    if n <= _LEAF:
        return x.copy_(torch.linalg.solve_triangular(lower.T, x, upper=True))
    half = n // 2
    last = solve_transposed(lower[half:, half:], x[half:])
    x[:half].addmm_(lower[half:, :half].T, last, alpha=-1)
    solve_transposed(lower[:half, :half], x[:half])
    return x
