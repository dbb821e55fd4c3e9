"""Eigenvalues of a factor and what they say: condition numbers, with and without damping, and effective rank.

The eigenvalues are computed in float64. Factors often have condition numbers beyond the 1e7 that float32 can resolve:
their smallest eigenvalues would be the rounding of the largest. (And it takes no longer: measured.)

Reference: Roy & Vetterli 2007, *The effective rank* (exponential of the entropy of the spectrum).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Spectral = NDArray[np.float64]
LARGEST_CONDITION = 1.0 / float(np.finfo(np.float32).eps)
"""What float32 can tell from a singular matrix: condition numbers beyond it are given as this."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of a symmetric positive semi-definite matrix ``M``.

    Attributes:
        values: ascending, `[n]` float64; rounding of ``M`` can make the smallest negative.
    """

    values: Spectral

    @property
    def mean_diagonal(self) -> float:
        """``mean(diag M)``, which is the mean of the eigenvalues: what relative damping is relative to."""
        return float(self.values.mean()) if self.values.size else 0.0

    def added(self, damping: float) -> float:
        """What relative damping adds to each eigenvalue."""
        return damping * self.mean_diagonal

    def condition(self, damping: float = 0.0) -> float | None:
        """Largest over smallest eigenvalue of ``M + λ mean(diag M) I``; None if it has none, or is zero.

        The smallest counts as at least float32 rounding of the largest, for that is how well ``M`` is known.
        """
        if not self.values.size or self.values[-1] <= 0:
            return None
        smallest, largest = (float(v) + self.added(damping) for v in (self.values[0], self.values[-1]))
        return largest / max(smallest, largest / LARGEST_CONDITION)

    def effective_rank(self) -> float:
        """Exponential of the entropy of the eigenvalues as shares of their sum, from 1 to n; 0 for a zero matrix."""
        shares = self.values.clip(min=0.0)
        if not shares.sum():
            return 0.0
        shares = shares[shares > 0] / shares.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))


def spectrum_of(matrix: NDArray[np.floating]) -> Spectrum:
    """Eigenvalues of a symmetric matrix `[n, n]`, of which the lower triangle is read."""
    return Spectrum(np.linalg.eigvalsh(matrix.astype(np.float64)))
