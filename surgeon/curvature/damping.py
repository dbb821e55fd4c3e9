"""Damped factors of a curvature, factorised in float64.

``M̂ = M + λ mean(diag M) I``. Where that is not positive definite, λ is multiplied by ten, a bounded number of times.

Reference: van der Ouderaa et al. 2024 (LLM Surgeon), section 3; George et al. 2018 for the damping of both factors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.curvature.triangular import cholesky_in_place, gram_of_lower, invert_lower
from surgeon.errors import NumericalError

MAX_ESCALATIONS = 3
ESCALATION = 10.0
_ROWS = 512
"""Rows that are put into another order at a time."""


@dataclass(frozen=True)
class Factorised:
    """A damped factor with its Cholesky factor.

    Attributes:
        matrix: the undamped factor over live structures, `[n, n]`, any float dtype.
        cholesky: lower triangular, `[n, n]` float64, of the damped factor with its rows and columns in `order`.
        damping: the relative damping in force.
        escalations: how often it had to be multiplied by ten before the factorisation succeeded.
        order: `[n]` int64, which structure comes where; None where they are as they were.
    """

    matrix: Tensor
    cholesky: Tensor
    damping: float
    escalations: int
    order: Tensor | None = None

    @property
    def damped(self) -> Tensor:
        """With damping, `[n, n]` float64, in the order of `matrix`; made anew whenever it is asked for."""
        return damped(self.matrix, self.damping)

    def solve(self, x: Tensor) -> Tensor:
        """``M̂⁻¹ x`` for x `[n, k]` in the order of `matrix`."""
        if self.order is None:
            result: Tensor = torch.cholesky_solve(x, self.cholesky)
            return result
        result = torch.empty_like(x)
        result[self.order] = torch.cholesky_solve(x[self.order], self.cholesky)
        return result

    def inverted(self) -> Tensor:
        """``M̂⁻¹`` `[n, n]` float64 in the memory of the Cholesky factor, which is used up."""
        assert self.order is None, "only a factor in its own order is inverted"
        return gram_of_lower(invert_lower(self.cholesky))

    def inverted_diagonal(self) -> Tensor:
        """``diag(M̂⁻¹)`` `[n]`: with ``M̂ = L Lᵀ``, the squared norms of the columns of ``L⁻¹``; ``L`` is used up."""
        assert self.order is None, "only a factor in its own order is inverted"
        return invert_lower(self.cholesky).square_().sum(dim=0)


def damped(matrix: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """``M + λ mean(diag M) I``, a new matrix `[n, n]` float64.

    Args:
        matrix: `[n, n]`, any float dtype.
        damping: ``λ``.
        order: `[n]` int64, which rows and columns come where; None leaves them as they are.
    """
    if order is None:
        result = matrix.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    else:
        result = torch.empty(matrix.shape, dtype=torch.float64, device=matrix.device)
        for start in range(0, order.numel(), _ROWS):  # so that no second copy is made on the way
            result[start : start + _ROWS] = matrix[order[start : start + _ROWS]].index_select(1, order)
    if matrix.shape[0]:
        result.diagonal().add_(damping * result.diagonal().mean())
    return result


def factorise(matrix: Tensor, damping: float, where: str, order: Tensor | None = None) -> Factorised:
    """Damps a symmetric positive semi-definite factor and factorises it.

    Args:
        matrix: `[n, n]`, any float dtype.
        damping: relative to the mean of the diagonal.
        where: block, linear and side, for the error message.
        order: `[n]` int64, in which rows and columns are factorised; None leaves them as they are.

    Raises:
        NumericalError: if it is not positive definite although damping was escalated `MAX_ESCALATIONS` times.
    """
    used = damping
    for escalations in range(MAX_ESCALATIONS + 1):
        if escalations:
            used = max(used, 1e-6) * ESCALATION
        cholesky, is_definite = cholesky_in_place(damped(matrix, used, order))
        if is_definite:
            return Factorised(matrix, cholesky, used, escalations, order)
    raise NumericalError(
        f"{where}: the {matrix.shape[0]}x{matrix.shape[0]} factor is not positive definite even with damping {used:g} "
        f"(asked: {damping:g}, raised {MAX_ESCALATIONS} times; {_spectrum(matrix.double())}). Use more calibration "
        "sequences or a larger prune.damping."
    )


def _spectrum(matrix: Tensor) -> str:
    """What is wrong with a matrix, for a message."""
    if not torch.isfinite(matrix).all():
        return "it has entries that are not finite"
    values = torch.linalg.eigvalsh(matrix)
    condition = float(values[-1] / values.abs().min()) if float(values.abs().min()) > 0 else float("inf")
    return f"eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}, condition number {condition:.3g}"
