"""Kendall's rank correlation: how far two orders agree."""

import numpy as np
from numpy.typing import NDArray


def kendall_tau(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Kendall's tau-b of two vectors `[n]`, from -1 to 1; 0 where all values of one are equal.

    Reference: Kendall 1945, *The treatment of ties in ranking problems*.
    """
    one = np.sign(first[:, None] - first[None, :])
    other = np.sign(second[:, None] - second[None, :])
    norm = np.sqrt(np.abs(one).sum() * np.abs(other).sum())
    return float((one * other).sum() / norm) if norm else 0.0
